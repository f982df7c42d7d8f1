"""The dense model computes what OLMo-core and transformers do; counts are exact; bad sizes are refused."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from convert import export, load
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo3Config, Olmo3ForCausalLM

from olmo_fn import spec, tree
from olmo_fn.core.chain import IGNORE, PLAIN, Backend
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.core.primitive import primitive
from olmo_fn.kernels.attention import attend, document_starts
from olmo_fn.kernels.attention_backend import need_of
from olmo_fn.kernels.attention_cpu import WHOLE
from olmo_fn.kernels.attention_sight import TILE
from olmo_fn.kernels.attention_table import attend_vjp, choose_auto
from olmo_fn.kernels.huge_pages import LARGE, new_large, to_large
from olmo_fn.kernels.tiles import TILES
from olmo_fn.mesh.axis import Axis
from olmo_fn.models import count, transformer
from olmo_fn.models.config import dense, modified
from olmo_fn.models.families import OLMO2, OLMO3
from olmo_fn.nn import cross_entropy as head
from olmo_fn.nn.attention import causal_pairs
from olmo_fn.nn.context import Context
from olmo_fn.nn.embedding import add_rows, embedding
from olmo_fn.nn.feed_forward import gated
from olmo_fn.nn.linear import Adapted, linear
from olmo_fn.nn.norm import rms_norm

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
NAMES = ("olmo2_mha", "olmo2_gqa", "olmo2_headdim", "olmo3_swa", "swa_default_flags")
ENGINES = ("tape", "func")
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def config(theirs):
    """Our config of OLMo-core's."""
    block = theirs["block"]
    mixer, swa = block["sequence_mixer"], block["sequence_mixer"].get("sliding_window", {})
    return dense(
        d_model=theirs["d_model"],
        n_layers=theirs["n_layers"],
        n_heads=mixer["n_heads"],
        hidden_size=block["feed_forward"]["hidden_size"],
        vocab_size=theirs["vocab_size"],
        n_kv_heads=mixer.get("n_kv_heads"),
        head_dim=mixer.get("head_dim"),
        rope_theta=mixer["rope"]["theta"],
        norm_eps=block["layer_norm"]["eps"],
        window_pattern=tuple(swa.get("pattern", ())),
        first_layer_full=swa.get("force_full_attention_on_first_layer", False),
        last_layer_full=swa.get("force_full_attention_on_last_layer", True),
        tie_embeddings=theirs["tie_word_embeddings"],
    )


@pytest.fixture(params=NAMES)
def case(request):
    """Config, tensors, facts, parameters and batch of one of OLMo-core's models."""
    return read(request.param)


def read(name):
    facts = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    cfg = config(facts["olmo_core_config"])
    params = load(under("param.", tensors), transformer.specs(cfg), "olmo_core")
    return cfg, tensors, facts, params, {name: tensors[name] for name in ("input_ids", "labels")}


def under(prefix, tensors):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def assert_grads(ours, theirs, params, rtol=1e-4, atol=1e-5):
    """Equal within ``rtol`` and ``atol`` times the largest entry of the tensor; ``theirs`` has our paths."""
    assert tree.flatten(ours).keys() == tree.flatten(params).keys()
    for path, g in tree.items(ours):
        expected = tree.at(theirs, path)
        assert_close(g, expected, rtol=rtol, atol=atol * expected.abs().max().item(), msg=lambda m, p=path: f"{p}: {m}")


# --- OLMo-core ----------------------------------------------------------------------------------------------


def test_logits_and_hidden_states(case):
    """Each block's output, and the logits."""
    cfg, tensors, _, params, batch = case
    chain, x = transformer.loss(cfg), None
    context = chain.context(batch, PLAIN)
    for stage in chain.stages[:-1]:
        x, _ = stage.fn({key: tree.at(params, path) for key, path in stage.params}, x, context)
        if stage.name == "feed_forward":
            assert_close(x, tensors[f"hidden.{stage.block}"], **CLOSE)
    assert_close(transformer.logits(cfg, params, batch), tensors["logits"], **CLOSE)


def test_loss_per_token(case):
    """Cross entropy and z-loss of each token: the head on one position at a time, which vmap makes of it."""
    cfg, tensors, facts, params, batch = case
    x = tensors[f"hidden.{cfg.n_layers - 1}"]
    w_out = transformer.output_matrix(params)

    def one(x, label):
        return head.plain_cross_entropy(w_out, x, label, label, None, facts["z_loss_multiplier"], Axis())[1]

    h = rms_norm(params["head"]["norm"], x, cfg.norm_eps)
    parts = torch.vmap(torch.vmap(one))(h, batch["labels"])
    assert_close(parts["ce"], tensors["ce_per_token"], **CLOSE)
    unmasked = tensors["z_per_token"]  # OLMo-core's z of a token without label is not 0 here, but does not enter its loss
    assert_close(parts["z"], unmasked.where(batch["labels"] != IGNORE, 0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_and_gradients(case, engine):
    """The mean losses and the gradient of every parameter."""
    cfg, tensors, facts, params, batch = case
    step = pipe(transformer.loss(cfg, z_loss=facts["z_loss_multiplier"]), grad(engine))
    grads, metrics = step(params, batch)
    for ours, theirs in (("loss", "loss"), ("ce", "ce_loss"), ("z", "z_loss")):
        assert metrics[ours].item() == pytest.approx(facts["mean"][theirs], rel=1e-5)
    assert_grads(grads, load(under("grad.", tensors), params, "olmo_core"), params)


@pytest.mark.parametrize("engine", ENGINES)
def test_document_masking(engine):
    """Attention inside a document, positions from 0 in each; the label of its last token still counts."""
    cfg, tensors, facts, params, batch = read("olmo2_gqa")
    lengths = tensors["doc.doc_lens"]
    batch["documents"] = torch.stack([torch.arange(row.numel()).repeat_interleave(row) for row in lengths])
    assert_close(transformer.logits(cfg, params, batch), tensors["doc.logits"], **CLOSE)
    grads, metrics = pipe(transformer.loss(cfg, z_loss=facts["z_loss_multiplier"]), grad(engine))(params, batch)
    assert metrics["loss"].item() == pytest.approx(facts["doc"]["loss"], rel=1e-5)
    assert_grads(grads, load(under("doc.grad.", tensors), params, "olmo_core"), params)
    assert (tensors["doc.logits"] - tensors["logits"]).abs().max() > 0.1  # masking matters here


def test_windows_of_the_fixtures():
    """Forcing the first layer to full attention shifts the pattern by one, as in OLMo-core."""
    expected = {"olmo3_swa": [5, 5, 5, None], "swa_default_flags": [None, 3, 6, None]}
    for name, windows in expected.items():
        assert [read(name)[0].block.mixer.window(layer, 4) for layer in range(4)] == windows


# --- documents and windows over many blocks of rows ---------------------------------------------------------


@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attend_is_softmax_attention(heads, kv_heads, window):
    """By blocks of rows, each with its own keys, it is still one softmax over what a row may see."""
    g = torch.Generator().manual_seed(0)
    T = 2 * TILE + 44
    q = torch.randn(2, heads, T, 6, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, T, 6, generator=g, dtype=torch.float64)
    documents = torch.randint(0, 40, (2, T), generator=g).sort(-1).values
    k_all, v_all = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    sees = (distance >= 0) & (distance < (window or T))
    for docs in (None, document_starts(documents)):
        allowed = sees if docs is None else sees & (docs[:, None, :, None] == docs[:, None, None, :])
        scores = (q @ k_all.mT / 6**0.5).masked_fill(~allowed, -torch.inf)
        expected = scores.softmax(-1) @ v_all
        assert_close(attend(q, k, v, window=window, documents=docs), expected)
        law_pullback(
            partial(attend, window=window, documents=docs), partial(attend_vjp, window=window, documents=docs), q, k, v
        )


def test_torchs_own_attention_is_the_same_function():
    """The law in fp64; in fp32 `attend_vjp` takes it where only causality and documents hide keys, and tiles elsewhere."""
    q, k, v = torch.randn(3, 2, 4, 300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law_pullback(attend, WHOLE, q, k, v)
    q, k, v = (x.float() for x in (q, k, v))
    documents = torch.zeros(2, 300, dtype=torch.int64)
    for window, docs, whole in ((None, None, True), (300, None, True), (299, None, False), (None, documents, True)):
        assert (choose_auto(need_of(q, k, window=window)) is WHOLE) == whole
        found, _ = attend_vjp(q, k, v, window=window, documents=docs)
        assert_close(found, attend(q, k, v, window=window, documents=docs), rtol=1e-5, atol=1e-6)
    assert choose_auto(need_of(q, k[:, :2])) is TILES
    assert choose_auto(need_of(q.bfloat16(), k.bfloat16())) is TILES


def law_pullback(fn, vjp, *inputs):
    """A faster form gives the value of the plain one, and its pullback the plain one's derivative."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = fn(*leaves)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, pullback = vjp(*inputs)
        found = pullback(out, cotangent)
    assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_pullback_law_catches():
    """Mutants: a pullback that sees no mask, and one that forgets the scale."""
    q, k, v = torch.randn(3, 1, 2, 150, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide_window = partial(attend_vjp, window=151)
    with pytest.raises(AssertionError):
        law_pullback(partial(attend, window=7), lambda *x: (attend(*x, window=7), wide_window(*x)[1]), q, k, v)
    with pytest.raises(AssertionError):
        law_pullback(attend, lambda *x: (attend(*x), lambda o, c: tuple(2 * g for g in attend_vjp(*x)[1](o, c))), q, k, v)


IDS = torch.zeros(1, 1, dtype=torch.int64)
PLAIN_CONTEXT, FAST_CONTEXT = (Context(Backend(made_by), IDS, IDS, IDS) for made_by in (None, primitive))


def law_primitive(fn, *inputs):
    """``fn(ctx, *inputs)`` gives the same by the fast primitives as by plain operations, its gradients included."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected, found = fn(PLAIN_CONTEXT, *leaves), fn(FAST_CONTEXT, *leaves)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    grads = (torch.autograd.grad(out, leaves, cotangent) for out in (found, expected))
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_swiglu_and_linear_are_their_definitions():
    g = torch.Generator().manual_seed(0)
    x, gate, up, down = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, 5, 6), (6, 9), (6, 9), (9, 6)))
    law_primitive(gated, x, gate, up, down)
    law_primitive(lambda ctx, x, a, b: torch.cat(ctx.linear(x, a, b), -1).sin(), x, gate, up)
    law_primitive(lambda ctx, x, w, a, b: ctx.linear(x, Adapted(w, a, b, 0.5))[0], x, gate, up[:2], gate[:, :2])


def test_a_weight_that_is_no_leaf_has_its_gradient_through_autograd():
    """Gradients of leaves may be taken past autograd; those of what was computed from leaves must not be."""
    taken, x, w = [], torch.ones(1, 2, 3), torch.ones(3, 3, requires_grad=True)
    backend = Backend(primitive, weight_grads=lambda weight, gradient: weight is w and not taken.append(gradient()))
    (through_autograd,) = torch.autograd.grad(linear(backend, x, [2 * w])[0].sum(), w)
    assert (through_autograd == 4).all()
    assert not taken
    torch.autograd.grad(linear(backend, x, [w])[0].sum(), w, allow_unused=True)
    assert (taken[0] == 2).all()


@pytest.mark.parametrize("pattern", [(), (5, -1)])
def test_documents_do_not_see_each_other(pattern):
    """A packed row gives each document the logits that it has alone, with and without a window."""
    cfg = dense(16, 2, 2, 32, vocab_size=50, window_pattern=pattern, last_layer_full=False, init_std=0.3)
    params = spec.init(transformer.specs(cfg), seed=0)
    lengths = [1, 9, 130, 20]
    ids = torch.randint(0, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    packed = transformer.logits(cfg, params, {"input_ids": ids, "documents": documents})
    alone = [transformer.logits(cfg, params, {"input_ids": part}) for part in ids.split(lengths, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1), **CLOSE)


def test_large_memory_is_ordinary_memory():
    """Large enough for the hint: the tensor's own shape, dtype and storage, writable to its end, its neighbours untouched."""
    x = new_large(torch.ones(1, dtype=torch.bfloat16), LARGE // 2 + 3)
    assert (x.shape, x.dtype, x.nbytes) == ((LARGE // 2 + 3,), torch.bfloat16, LARGE + 6)
    x.fill_(2)
    assert x[0] == x[-1] == 2
    assert bool((to_large(x, torch.float32) == 2.0).all())


@pytest.mark.parametrize("known", [False, True])
def test_head_by_chunks(monkeypatch, known):
    """The head's own pullback, over chunks of logits, is the derivative of its loss, with the cotangent known before or not."""
    g = torch.Generator().manual_seed(0)
    w_out, h = (torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((11, 8), (3, 7, 8)))
    labels = torch.randint(0, 11, (3, 7), generator=g).masked_fill(torch.rand(3, 7, generator=g) < 0.3, IGNORE)
    monkeypatch.setattr(head, "LOGITS_BYTES", 0)
    monkeypatch.setattr(head, "LOGITS_ROWS", (5, 5))  # five rows at once, and the last chunk has one
    total, parts = head.cross_entropy(PLAIN_CONTEXT, w_out, h, labels, 11, z_loss=0.01)
    expected = torch.autograd.grad(total * 0.7, (w_out, h))
    weight = torch.tensor(0.7, dtype=torch.float64)
    ctx = replace(FAST_CONTEXT, backend=Backend(primitive, loss_weight=weight))
    by_chunks, more = head.cross_entropy(ctx, w_out, h, labels, 11, z_loss=0.01)
    assert_close((by_chunks.detach(), more), (total.detach(), parts))
    cotangent = weight if known else torch.tensor(0.7, dtype=torch.float64)
    assert_close(torch.autograd.grad(by_chunks, (w_out, h), cotangent), expected)
    other = head.cross_entropy(ctx, w_out, h, labels, 11, z_loss=0.01)[0]
    assert_close(torch.autograd.grad(other, (w_out, h), 2 * weight), tuple(2 * g for g in expected))
    alone = replace(FAST_CONTEXT, backend=Backend(primitive))
    assert_close(head.cross_entropy(alone, w_out, h, labels, 11, z_loss=0.01)[0], total.detach())


def test_rows_of_an_embedding_are_summed_wide_and_rounded_once():
    """Each of 300 cotangents of 1 is lost in a bf16 sum above 256; rows that no id reads have none."""
    weight, ids = torch.randn(5, 2), torch.tensor([[3] * 300 + [1]])
    ctx = replace(FAST_CONTEXT, input_ids=ids)
    assert_close(embedding(ctx, weight, 5, weight.shape[1]), weight[ids])
    found = add_rows(torch.ones(1, 301, 2, dtype=torch.bfloat16), ids, None, 5)
    assert found.dtype == torch.bfloat16
    assert found[:, 0].tolist() == [0, 1, 0, 300, 0]


# --- transformers -------------------------------------------------------------------------------------------

SMALL = dense(32, 3, 4, 48, vocab_size=80, init_std=0.15)
PEERS = {
    "mha": (SMALL, 24, "eager"),
    "gqa": (modified(SMALL, n_kv_heads=2, rope_theta=10_000.0), 24, "sdpa"),
    "mqa_tied": (modified(SMALL, n_kv_heads=1, tie_embeddings=True, norm_eps=1e-5), 24, "eager"),
    "wide_heads": (modified(SMALL, head_dim=14, n_kv_heads=2), 24, "eager"),
    "windows": (modified(SMALL, n_layers=5, window_pattern=(6, 6, 6, -1)), 24, "eager"),
    "windows_over_blocks": (modified(SMALL, n_kv_heads=2, window_pattern=(40, -1)), 300, "sdpa"),
    "all_windows": (modified(SMALL, window_pattern=(3,), last_layer_full=False), 24, "sdpa"),
}


def peer(cfg, params, attention):
    """transformers' model of the config with the same weights, in fp32."""
    mixer = cfg.block.mixer
    shared = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.block.feed_forward.hidden_size,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.width(cfg.d_model),
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "max_position_embeddings": 512,
        "attn_implementation": attention,
        "pad_token_id": None,
    }
    rope = {"rope_type": "default", "rope_theta": mixer.rope_theta}
    windows = [mixer.window(layer, cfg.n_layers) for layer in range(cfg.n_layers)]
    if any(windows):
        kinds = ["sliding_attention" if w else "full_attention" for w in windows]
        theirs = Olmo3ForCausalLM(
            Olmo3Config(
                **shared,
                layer_types=kinds,
                sliding_window=next(w for w in windows if w),
                rope_parameters={
                    "full_attention": rope,
                    "sliding_attention": rope,
                },  # rope_theta sets one alone
            )
        )
    else:
        theirs = Olmo2ForCausalLM(Olmo2Config(**shared, rope_parameters=rope))
    weights = export(params, "transformers")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if cfg.tie_embeddings else [])
    return theirs.float().eval()


@pytest.mark.parametrize("case", PEERS)
def test_transformers(case):
    """Logits, loss and every gradient are those of Olmo2ForCausalLM and Olmo3ForCausalLM."""
    cfg, length, attention = PEERS[case]
    g = torch.Generator().manual_seed(3)
    params = tree.map(
        lambda p: p if p.ndim > 1 else p + 0.3 * torch.randn(p.shape, generator=g),  # gains that matter
        spec.init(transformer.specs(cfg), seed=5),
    )
    ids = torch.randint(0, cfg.vocab_size, (2, length), generator=g)
    targets = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.2, IGNORE)  # transformers shifts them itself
    labels = torch.cat((targets[:, 1:], torch.full((2, 1), IGNORE)), dim=1)
    theirs = peer(cfg, params, attention)
    out = theirs(input_ids=ids, labels=targets)
    out.loss.backward()
    expected = load({n: p.grad for n, p in theirs.named_parameters()}, params, "transformers")

    assert_close(transformer.logits(cfg, params, {"input_ids": ids}), out.logits.detach(), **CLOSE)
    for engine in ENGINES:
        batch = {"input_ids": ids, "labels": labels}
        grads, metrics = pipe(transformer.loss(cfg), grad(engine))(params, batch)
        assert metrics["loss"].item() == pytest.approx(out.loss.item(), rel=1e-5)
        assert_grads(grads, expected, params)


# --- counts -------------------------------------------------------------------------------------------------

COUNTS = {  # OLMo-core's at vocabulary 100,352: all, without the embedding
    "olmo2-1m": (2_448_620, 1_244_396),
    "olmo2-14m": (26_740_864, 13_895_808),
    "olmo2-30m": (54_792_448, 29_102_336),
    "olmo2-60m": (95_957_376, 57_422_208),
    "olmo2-100m": (153_117_184, 101_736_960),
    "olmo2-190m": (267_424_512, 190_354_176),
    "olmo2-370m": (474_022_912, 371_262_464),
    "olmo2-600m": (732_255_552, 597_382_464),
    "olmo2-760m": (912_360_960, 758_220_288),
    "olmo2-1b": (1_484_916_736, 1_279_395_840),
    "olmo2-1b-18l": (1_619_150_848, 1_413_629_952),
    "olmo2-3b": (3_503_508_736, 3_169_537_280),
    "olmo2-7b": (7_298_617_344, 6_887_575_552),
    "olmo2-13b": (13_716_198_400, 13_202_396_160),
    "olmo2-32b": (32_234_279_936, 31_720_477_696),
}
COUNTS_3 = {n.replace("olmo2", "olmo3"): c for n, c in COUNTS.items() if n != "olmo2-1b-18l"}
COUNTS_3["olmo3-600m"] = (676_414_720, 676_414_720 - 100_352 * 1280)


def matrix_entries(cfg):
    """Entries of the matrices that multiply every token: of the blocks and the head, also a tied one."""
    matrices = sum(s.size for path, s in tree.items(transformer.specs(cfg)) if len(s.shape) == 2 and path != "embed")
    return matrices + cfg.vocab_size * cfg.d_model * cfg.tie_embeddings


def heads_width(cfg):
    return cfg.block.mixer.n_heads * cfg.block.mixer.width(cfg.d_model)


@pytest.mark.parametrize(("presets", "counts"), [(OLMO2, COUNTS), (OLMO3, COUNTS_3)])
def test_parameters_of_the_presets(presets, counts):
    """Every size of both families has OLMo-core's number of parameters."""
    assert {n: (count.num_params(m), count.num_non_embedding_params(m)) for n, m in presets.items()} == counts


def test_parameters_of_the_fixtures(case):
    """OLMo-core's counts; a tied embedding is subtracted once."""
    cfg, _, facts, params, _ = case
    assert count.num_params(cfg) == facts["counts"]["num_params"]
    assert count.num_params(cfg) == sum(p.numel() for _, p in tree.items(params))
    assert count.num_non_embedding_params(cfg) == facts["counts"]["num_non_embedding_params"]


def test_flops_of_the_fixtures(case):
    """OLMo-core 3.0's FLOPs per token, exactly, after what it counts differently is put in."""
    cfg, _, facts, params, _ = case
    gains = sum(p.numel() for path, p in tree.items(params) if path.endswith(("q_norm", "k_norm", "head.norm")))
    for length, theirs in facts["counts"]["flops_per_token"].items():
        S = int(length)
        mixer, width = cfg.block.mixer, heads_width(cfg)
        attention = [12 * width * causal_pairs(S, mixer.window(i, cfg.n_layers)) for i in range(cfg.n_layers)]
        rounded_away = sum(a % S for a in attention)
        assert count.flops_per_sequence(cfg, S) == S * (theirs - 6 * gains) + rounded_away
        assert count.flops_per_token(cfg, S) == pytest.approx(theirs - 6 * gains, abs=cfg.n_layers)


def test_matrix_flops_are_those_of_the_multiplications(case):
    """Every matrix is used once: torch counts 2 FLOPs per entry and token in forward."""
    cfg, _, _, params, batch = case
    with FlopCounterMode(display=False) as counter:
        transformer.logits(cfg, params, batch)
    B, T = batch["input_ids"].shape
    scores_and_values = 4 * B * heads_width(cfg) * T * T * cfg.n_layers  # T is below a block of rows: no key left out
    assert counter.get_total_flops() == 2 * B * T * matrix_entries(cfg) + scores_and_values


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
def test_causal_pairs(window):
    """The closed form is the number of pairs."""
    pairs = sum(1 for i in range(9) for j in range(i + 1) if window is None or i - j < window)
    assert causal_pairs(9, window) == pairs


def test_counting_is_quick():
    """The largest preset is counted in milliseconds: it makes no tensors."""
    start = time.perf_counter()
    count.flops_per_token(OLMO2["olmo2-32b"], 4096)
    assert time.perf_counter() - start < 0.5


# --- configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OLMO2, *OLMO3])
def test_presets_fit_together(name):
    """No preset is refused."""
    ({**OLMO2, **OLMO3})[name].check()


def test_windows_of_olmo3():
    """Layers 3, 7, 11, … are full."""
    model = OLMO3["olmo3-7b"]
    windows = [model.block.mixer.window(layer, model.n_layers) for layer in range(model.n_layers)]
    assert [layer for layer, window in enumerate(windows) if window is None] == list(range(3, 32, 4))
    assert {*windows} == {4096, None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"d_model": 30},
            "n-heads 4 does not divide --model.d-model 30; choose one of 1, 2, 3, 5, 6, 10, 15, 30",
        ),
        ({"n_heads": 32}, "head width is 1, of which 1 are rotated; rotary positions need an even number"),
        ({"head_dim": 7}, "head width is 7, of which 7 are rotated; rotary positions need an even number"),
        ({"n_kv_heads": 3}, "n-kv-heads 3 does not divide --model.n-heads 4; choose one of 1, 2, 4"),
        ({"n_layers": 0}, "--model.n-layers is 0; it must be at least 1"),
        ({"window_pattern": (8, 0)}, "--model.window-pattern has 0"),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    """In one line with the fix, before any weight exists: it names flags, and fields where the loss is built."""
    with pytest.raises(ValueError, match=message) as error:
        modified(SMALL, **change).check()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"\w") as built:
        transformer.loss(modified(SMALL, **change))
    assert "--" not in str(built.value)
    assert str(built.value) == str(error.value).replace("--model.", "").replace("-", "_").replace("_1 for", "-1 for")
