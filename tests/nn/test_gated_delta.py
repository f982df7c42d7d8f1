"""Gated DeltaNet: chunks compute the recurrence; hybrids compute what OLMo-core does, with documents and while decoding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_families import load
from test_models import ENGINES, assert_grads, under
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.chain import PLAIN
from olmo_fn.core.compile import compile
from olmo_fn.core.pipe import clip, grad, pipe
from olmo_fn.formats.olmo_core_model import model
from olmo_fn.generate.decode import empty_cache, extend
from olmo_fn.kernels.gated_delta import chunked, chunked_over, recurrent
from olmo_fn.mesh.axis import Axis
from olmo_fn.models import count, transformer
from olmo_fn.models.config import Attention, Block, GatedDelta, Model, PreNorm, SwiGLU
from olmo_fn.optim import adamw
from olmo_fn.research.sharpness import hessian_product, mean_loss
from olmo_fn.spec import init

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
CLOSE = {"rtol": 1e-5, "atol": 2e-4}
"""What the fixtures' README expects: the gated norm of the first tokens' tiny outputs amplifies rounding."""


# --- the rule ---------------------------------------------------------------------------------------------------------


def inputs(T, dtype=torch.float64, B=2, N=2, H=4, K=8, V=12):
    """Inputs of the rule: unit queries and keys, decays from none to nearly all, negative eigenvalues."""
    torch.manual_seed(T)
    q, k = (F.normalize(torch.randn(B, N, T, K, dtype=dtype), dim=-1) for _ in range(2))
    g = -torch.rand(B, H, T, dtype=dtype) * torch.tensor([0.0, 0.1, 3.0, 200.0])[:, None].to(dtype)
    v, beta = torch.randn(B, H, T, V, dtype=dtype), 2 * torch.rand(B, H, T, dtype=dtype)
    return q, k, v, g, beta


def ages(*documents):
    """How many tokens of its document stand before each position, of rows of document lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (7, 64), (64, 64), (130, 64), (100, 16), (33, 8)])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_compute_the_recurrence(dtype, tolerance, T, chunk, packed):
    """From any state, over any length, with documents: results and the state behind them."""
    given, state = inputs(T, dtype), torch.randn(2, 4, 8, 12, dtype=dtype)
    age = ages((T // 3, T - T // 3), (T - T // 5, T // 5)) if packed else None
    found, definition = chunked(*given, state, age, chunk), recurrent(*given, state, age)
    for ours, expected in zip(found, definition, strict=True):
        assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_a_document_is_computed_as_if_it_were_alone():
    """Whether it begins with a chunk, or inside of one, or is one token."""
    lengths, given = (64, 5, 1, 30, 60), inputs(160)
    age, start = ages(lengths, lengths), 0
    packed = chunked_over(Axis(), *given, age)
    for length in lengths:
        alone = chunked_over(Axis(), *(x[:, :, start : start + length] for x in given))
        assert_close(packed[:, :, start : start + length], alone, rtol=1e-12, atol=1e-12)
        start += length


def test_a_state_that_is_wiped_out_leaves_no_rounding_behind():
    """Decays of e^-500, between which small ones are to be told apart, in fp32."""
    q, k, v, g, beta = inputs(60, torch.float32)
    g = torch.where(torch.arange(60) % 20 == 3, -500.0, -0.01 * torch.rand_like(g))
    exact = recurrent(*(x.double() for x in (q, k, v, g, beta)), torch.zeros(2, 4, 8, 12, dtype=torch.float64))[0]
    assert_close(chunked_over(Axis(), q, k, v, g, beta).double(), exact, rtol=1e-5, atol=2e-6)


def test_half_precision_is_computed_in_fp32():
    given = inputs(70, torch.float32)
    half = [x.bfloat16() if i < 3 else x for i, x in enumerate(given)]
    ours = chunked_over(Axis(), *half)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, chunked_over(Axis(), *(x.float() for x in half)).bfloat16())


def test_the_rule_is_differentiable_twice_and_under_vmap():
    """torch.func: gradients of chunks are those of the recurrence, jvps agree with them, and so do second derivatives."""
    given, state = inputs(20, B=1), torch.zeros(1, 4, 8, 12, dtype=torch.float64)
    age = ages((9, 11))

    def total(rule, *args):
        return rule(*args, state, age, *([8] if rule is chunked else []))[0].square().sum()

    tangents = tuple(torch.randn_like(x) for x in given)
    results = []
    for rule in (chunked, recurrent):
        gradient = torch.func.grad(lambda *args, rule=rule: total(rule, *args), argnums=tuple(range(5)))
        results.append((gradient(*given), torch.func.jvp(gradient, given, tangents)[1]))
    for ours, expected in zip(*results, strict=True):
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-10)
    many = [torch.stack((x, 0.5 * x)) for x in given]
    mapped = torch.func.vmap(lambda *args: chunked(*args, state, age, 8)[0])(*many)
    assert_close(mapped[1], chunked(*(0.5 * x for x in given), state, age, 8)[0], rtol=1e-12, atol=1e-12)


# --- the model --------------------------------------------------------------------------------------------------------


def hybrid(**options):
    """Three blocks with states and one with attention; more heads of values than of keys."""
    mixer = GatedDelta(n_heads=2, n_value_heads=4, **options)
    recurrent_block = PreNorm(mixer=mixer, feed_forward=SwiGLU(hidden_size=24))
    attention = Block(mixer=Attention(n_heads=4, n_kv_heads=2), feed_forward=SwiGLU(hidden_size=24))
    return Model(16, 4, 32, pattern=(recurrent_block,) * 3 + (attention,), init_std=0.3)


def ids_and_labels(T=70, rows=2):
    ids = torch.randint(32, (rows, T + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


@pytest.mark.parametrize("options", [{}, {"conv_size": 1}, {"conv_size": 7}, {"negative_eigenvalues": False}])
def test_documents_of_a_model_are_alone(options):
    """State and convolution begin anew in each."""
    cfg, batch = hybrid(**options), ids_and_labels()
    params = init(transformer.specs(cfg), 0, dtype=torch.float64)
    numbers = torch.tensor([0] * 33 + [1] * 2 + [2] * 35).expand(2, -1)
    packed = transformer.logits(cfg, params, {**batch, "documents": numbers})
    alone = [transformer.logits(cfg, params, {"input_ids": ids}) for ids in batch["input_ids"].split([33, 2, 35], dim=1)]
    assert_close(packed, torch.cat(alone, 1), rtol=1e-11, atol=1e-11)


def test_both_engines_agree():
    """Law 9: the tape, whose rule runs again for backward, and torch.func, which differentiates it."""
    cfg, batch = hybrid(), ids_and_labels()
    batch["documents"] = torch.tensor([0] * 40 + [1] * 30).expand(2, -1)
    params = init(transformer.specs(cfg), 0, dtype=torch.float64)
    tape, func = (pipe(transformer.loss(cfg), grad(engine, dtype=torch.float64))(params, batch)[0] for engine in ENGINES)
    for path, g in tree.items(tape):
        expected = tree.at(func, path)
        assert expected.abs().max() > 0, path
        assert_close(g, expected, rtol=1e-10, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("remat", ["full", "selective", "every-2", "feed_forward"])
def test_rematerialisation_changes_no_bit(remat):
    cfg, batch = hybrid(), ids_and_labels()
    params = init(transformer.specs(cfg), 0)
    kept, again = (pipe(transformer.loss(cfg), grad(remat=how))(params, batch)[0] for how in ("none", remat))
    for path, g in tree.items(again):
        assert torch.equal(g, tree.at(kept, path)), path


def test_second_derivatives_of_a_model():
    """A Hessian-vector product, against a difference of gradients."""
    cfg, batch = hybrid(), ids_and_labels(T=20)
    params = init(transformer.specs(cfg), 0, dtype=torch.float64)
    direction = tree.map(torch.randn_like, params)
    f = mean_loss(transformer.loss(cfg), batch)
    product, gradient = hessian_product(f, params)(direction), torch.func.grad(f)
    moved = [gradient(tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (1e-6, -1e-6)]
    for path, h in tree.items(product):
        difference = (tree.at(moved[0], path) - tree.at(moved[1], path)) / 2e-6
        assert_close(h, difference, rtol=1e-4, atol=1e-5 * difference.abs().max().item() + 1e-6, msg=lambda m, p=path: p + m)


def test_compiled_steps_are_the_same():
    """Whole steps, with documents, of compiled pieces and of plain ones."""
    cfg, batch = hybrid(), ids_and_labels()
    batch["documents"] = torch.tensor([0] * 40 + [1] * 30).expand(2, -1)
    states = []
    for more in ((), (compile(),)):
        step = pipe(transformer.loss(cfg), grad(), clip(1.0), adamw(1e-3), *more)
        state = step.init(init(transformer.specs(cfg), 0))
        for _ in range(2):
            state, _ = step(state, batch)
        states.append(state.params)
    for path, p in tree.items(states[0]):
        assert_close(tree.at(states[1], path), p, rtol=1e-4, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("parts", [[37] + [1] * 33, [1] * 70, [3, 64, 3]])
def test_decoding(parts):
    """With its state and last columns, each part gives the logits of the forward pass."""
    cfg, batch = hybrid(), ids_and_labels()
    params = init(transformer.specs(cfg), 0, dtype=torch.float64)
    cache, expected = empty_cache(cfg, 2, 70, dtype=torch.float64), transformer.logits(cfg, params, batch)
    ends = torch.tensor(parts).cumsum(0) - 1
    for part, end in zip(batch["input_ids"].split(parts, dim=1), ends, strict=True):
        logits, cache = extend(cfg, params, part, cache)
        assert_close(logits, expected[:, end], rtol=1e-11, atol=1e-11)


def test_decoding_of_padded_rows():
    """Each row as if it were alone, though its prompt is padded at the left; columns come in parts that end in the padding."""
    cfg, lengths = hybrid(), (60, 45, 3)
    params = init(transformer.specs(cfg), 0, dtype=torch.float64)
    rows = [torch.randint(32, (1, n + 2), generator=torch.Generator().manual_seed(n)) for n in lengths]
    padding = torch.tensor([60 - n for n in lengths])
    ids = torch.cat([F.pad(row, (60 + 2 - row.shape[1], 0)) for row in rows])
    cache = empty_cache(cfg, 3, 62, padding, dtype=torch.float64)
    for part in ids.split([10, 49, 2, 1], dim=1):
        logits, cache = extend(cfg, params, part, cache)
    for row, found in zip(rows, logits, strict=True):
        alone = transformer.logits(cfg, params, {"input_ids": row})[:, -1]
        assert_close(found[None], alone, rtol=1e-11, atol=1e-11)


def test_initial_values_are_those_of_the_paper():
    """Rates uniform up to 16, step sizes between 0.001 and 0.1, on a logarithmic scale."""
    mixer = replace(hybrid().pattern[0].mixer, n_heads=512, n_value_heads=512, head_dim=2, value_head_dim=2)
    cfg = Model(16, 1, 32, block=PreNorm(mixer=mixer, feed_forward=SwiGLU(hidden_size=8)))
    p = init(transformer.specs(cfg), 0)["blocks"]["0"]["attention"]
    rates, steps = p["rate_bias"].exp(), F.softplus(p["dt_bias"])
    assert 0 < rates.min() < 0.5
    assert 15.5 < rates.max() < 16
    assert rates.mean().item() == pytest.approx(8, abs=0.6)
    assert 1e-3 < steps.min() < 1.1e-3
    assert 0.09 < steps.max() < 0.1
    assert steps.log().mean().item() == pytest.approx(torch.tensor(1e-2).log().item(), abs=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_size": 0}, "--model.conv-size is 0; it must be at least 1"),
        ({"n_value_heads": 3}, "--model.n-value-heads 3 is no multiple of --model.n-heads 2"),
        ({"n_heads": 3, "n_value_heads": 3}, "--model.n-heads 3 does not divide --model.d-model 16; choose one of 1, 2, 4"),
        ({"head_dim": 0}, "--model.head-dim is 0; it must be at least 1"),
        ({"gate_norm_eps": 0.0}, "--model.gate-norm-eps is 0.0; it must be positive"),
        ({"rule": "triton"}, "--model.rule is 'triton'; choose auto, chunked or fla"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    cfg = hybrid()
    wrong = replace(cfg.pattern[0], mixer=replace(cfg.pattern[0].mixer, **change))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        replace(cfg, pattern=(wrong,)).check()


def test_heads_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"--mesh.tp 4 does not divide --model.n-heads 2, and a head stays on one rank"):
        hybrid().check_mesh(4, 1, "gather")


# --- OLMo-core --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["olmo_hybrid", "qwen3_5_hybrid"])
def case(request):
    facts = json.loads((FIXTURES / f"{request.param}.json").read_text())
    tensors = load_file(FIXTURES / f"{request.param}.safetensors")
    cfg = model({"model": facts["olmo_core_config"]})
    batch = {name: tensors[name] for name in ("input_ids", "labels")}
    return cfg, tensors, facts, load(under("param.", tensors), cfg), batch


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


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_and_gradients(case, engine):
    """The mean losses and the gradient of every parameter."""
    cfg, tensors, facts, params, batch = case
    grads, metrics = pipe(transformer.loss(cfg, z_loss=facts["z_loss_multiplier"]), grad(engine))(params, batch)
    for ours, theirs in (("loss", "loss"), ("ce", "ce_loss"), ("z", "z_loss")):
        assert metrics[ours].item() == pytest.approx(facts["mean"][theirs], rel=1e-5)
    assert_grads(grads, load(under("grad.", tensors), cfg), params, atol=1e-4)


def test_documents_as_olmo_core_has_them(case):
    """Logits and the loss, where the fixture has them; its labels cross the borders."""
    cfg, tensors, facts, params, batch = case
    if "doc.logits" not in tensors:
        pytest.skip("the fixture has no documents")
    numbers = torch.stack([torch.arange(row.numel()).repeat_interleave(row) for row in tensors["doc.doc_lens"]])
    batch = {**batch, "documents": numbers}
    assert_close(transformer.logits(cfg, params, batch), tensors["doc.logits"], **CLOSE)
    _, metrics = pipe(transformer.loss(cfg, z_loss=facts["z_loss_multiplier"]), grad())(params, batch)
    assert metrics["loss"].item() == pytest.approx(facts["doc"]["loss"], rel=1e-5)


def test_counts(case):
    """Parameters as OLMo-core counts them. FLOPs: it adds 2 of a forward pass for each entry of a state."""
    cfg, _, facts, params, _ = case
    assert count.num_params(cfg) == facts["counts"]["num_params"]
    mixers = [block.mixer for block in cfg.layers if isinstance(block.mixer, GatedDelta)]
    states = sum(m.value_heads * m.width(cfg.d_model) * m.value_width(cfg.d_model) for m in mixers)
    attention = [p["attention"] for p in params["blocks"].values() if "q_norm" in p["attention"]]
    gains = sum(p["q_norm"].numel() + p["k_norm"].numel() for p in attention) + params["head"]["norm"].numel()
    for length, theirs in facts["counts"]["flops_per_token"].items():
        rest = theirs - count.flops_per_token(cfg, int(length)) - 6 * states - 6 * gains
        assert -12 * 64 < rest <= 0, "its pairs are rounded down"
