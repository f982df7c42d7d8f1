"""Every part of a model computes what OLMo-core does; the families have the released sizes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_models import CLOSE, ENGINES, assert_grads, under
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.chain import PLAIN
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.formats.names import stored
from olmo_fn.formats.olmo_core_model import model
from olmo_fn.generate.decode import empty_cache, extend
from olmo_fn.models import count, transformer
from olmo_fn.models.config import Attention, Block, Hybrid, Model, MoE, MultiToken, modified
from olmo_fn.models.families import FAMILIES, LLAMA3, OLMO3
from olmo_fn.models.settings.rope_scaling import Stepwise, YaRN
from olmo_fn.nn import router
from olmo_fn.optim import adamw
from olmo_fn.presets import CONFIGS
from olmo_fn.train.recipe import first_parameters, recipe
from olmo_fn.transforms.balance import balance_experts
from olmo_fn.transforms.normalize import dims_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
MOE = (
    "moe_capacity",
    "moe_dropless_prenorm_shared",
    "moe_hybrid",
    "moe_hybrid_reordered",
    "moe_sigmoid_bias",
    "olmoe_dropless",
)
NAMES = (
    *MOE,
    "complex_rope_bias",
    "gates_nope",
    "gemma3",
    "llama3_stepwise",
    "lns",
    "ngpt",
    "ngpt_gqa",
    "olmo3_swa_yarn",
    "qwen3",
    "scalable_softmax",
    "sinks",
    "yarn_all_layers",
)


def load(tensors, cfg, without=""):
    """OLMo-core's flat dict as a tree of ours, with 0 for what ends in ``without``; it must hold nothing else."""
    table = stored(cfg, "olmo_core")
    left = set(tensors) - {one.name for one in table.values()}
    assert not left, f"no place for {sorted(left)}"

    def leaf(path, spec):
        if without and path.endswith(without):
            return torch.zeros(spec.shape)
        one = table[path]
        ours = one.ours(tensors[one.name]).clone()
        assert one.offset or one.theirs(ours).equal(tensors[one.name])
        return ours

    return tree.map_with_path(leaf, transformer.specs(cfg))


def as_sorted_there(experts, E):
    """`router.ranks_of` by a sort that is not stable, as OLMo-core has it: what it drops is not the last of a sequence."""
    keys = experts.flatten()
    order, counts = keys.sort()[1], torch.bincount(keys, minlength=E)
    ranks, starts = torch.empty_like(keys), counts.cumsum(0) - counts
    ranks[order] = torch.arange(len(keys)) - starts[keys[order]]
    return ranks.view_as(experts)


@pytest.fixture(params=NAMES)
def case(request, monkeypatch):
    facts = json.loads((FIXTURES / f"{request.param}.json").read_text())
    tensors = load_file(FIXTURES / f"{request.param}.safetensors")
    cfg = model({"model": facts["olmo_core_config"]})
    batch = {name: tensors[name] for name in ("input_ids", "labels")}
    if request.param == "moe_capacity":
        monkeypatch.setattr(router, "ranks_of", as_sorted_there)
    weights = under("param.", tensors) | under("buffer.", tensors)
    return cfg, tensors, facts, load(weights, cfg), batch


def of_aux(cfg, factor):
    """The model with the weights of its auxiliary losses times a factor."""
    ff = cfg.block.feed_forward
    return modified(cfg, balance_loss=ff.balance_loss * factor, router_z_loss=ff.router_z_loss * factor)


def drops(cfg):
    return getattr(cfg.block.feed_forward, "capacity_factor", None) is not None


def test_logits_and_hidden_states(case):
    """Each block's output, and the logits."""
    cfg, tensors, _, params, batch = case
    chain, x = transformer.loss(cfg), None
    context = chain.context(batch, PLAIN)
    for stage in chain.stages[:-1]:
        x, _ = stage.fn({key: tree.at(params, path) for key, path in stage.params}, x, context)
        if stage.name in ("feed_forward", "hybrid"):
            assert_close(x, tensors[f"hidden.{stage.block}"], **CLOSE)
    assert_close(transformer.head_logits(cfg, params, x), tensors["logits"], **CLOSE)
    if not drops(cfg):  # without labels none does
        assert_close(transformer.logits(cfg, params, batch), tensors["logits"], **CLOSE)


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_and_gradients(case, engine):
    """The mean losses and the gradient of every parameter."""
    cfg, tensors, facts, params, batch = case
    if cfg.block.feed_forward.num_experts:  # there these losses are means over all positions, and ours over those with a label
        cfg = of_aux(cfg, facts["n_labels"] / batch["labels"].numel())
    grads, metrics = pipe(transformer.loss(cfg, z_loss=facts["z_loss_multiplier"]), grad(engine))(params, batch)
    aux = sum(metrics[name].item() for name in ("router_balance", "router_z") if name in metrics)
    found = {"loss": metrics["loss"].item() - aux, "ce_loss": metrics["ce"].item(), "z_loss": metrics["z"].item()}
    for name, value in found.items():
        assert value == pytest.approx(facts["mean"][name], rel=1e-5)
    assert_grads(grads, load(under("grad.", tensors), cfg, without="router_bias"), params)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", MOE, indirect=True)
def test_what_routers_report_and_their_gradients(case, engine):
    """Auxiliary losses divided by the number of labels, as OLMo-core trains, their gradient, and the loads of the experts."""
    cfg, tensors, facts, params, batch = case
    grads, metrics = pipe(transformer.loss(cfg, z_loss=facts["z_loss_multiplier"]), grad(engine))(params, batch)
    theirs = facts["sum_div_n"]["aux_metrics"]
    assert metrics["router_balance"].item() == pytest.approx(theirs["load balancing loss"], rel=1e-5)
    assert metrics["router_z"].item() == pytest.approx(theirs["router Z loss"], rel=1e-5)
    for layer in range(cfg.n_layers):
        load = metrics[f"load/{layer}"]
        assert load.sum().item() == batch["input_ids"].numel() * cfg.block.feed_forward.top_k
        assert (load.max() / load.mean()).item() == pytest.approx(theirs[f"block {layer:02}/load imbalance"])
        path = f"blocks.{layer}.moe.w_router"
        expected = tensors[f"grad_sum_div_n.blocks.{layer}.feed_forward_moe.router.weight"]
        found = stored(cfg, "olmo_core")[path].theirs(tree.at(grads, path))
        assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("case", ["moe_sigmoid_bias"], indirect=True)
def test_biases_move_as_there(case):
    """One step with balance_experts against OLMo-core's post_batch."""
    cfg, tensors, _, params, batch = case
    table = stored(cfg, "olmo_core")
    step = pipe(transformer.loss(cfg), grad(), adamw(1e-3), balance_experts(cfg.balance_rate))
    before = tree.map(torch.clone, params)
    after, _ = step(step.init(params), batch)
    for layer in range(cfg.n_layers):
        path = f"blocks.{layer}.moe.router_bias"
        expected = tensors[f"after_post_batch.{table[path].name}"]
        assert not expected.equal(tree.at(before, path))
        assert_close(tree.at(after.params, path), expected)


def test_documents(case):
    """Where OLMo-core's numbers are there: attention inside a document, positions from 0 in each."""
    cfg, tensors, _, params, batch = case
    if "doc.logits" not in tensors:
        documents = torch.tensor([[0] * 9 + [1] * 15, [0] * 24])  # else a document alone is the definition
        packed = transformer.logits(cfg, params, {**batch, "documents": documents})
        alone = [transformer.logits(cfg, params, {"input_ids": ids}) for ids in batch["input_ids"][:1].split([9, 15], dim=1)]
        return assert_close(packed[:1], torch.cat(alone, dim=1), **CLOSE)
    numbers = torch.stack([torch.arange(row.numel()).repeat_interleave(row) for row in tensors["doc.doc_lens"]])
    return assert_close(transformer.logits(cfg, params, {**batch, "documents": numbers}), tensors["doc.logits"], **CLOSE)


def test_decoding(case):
    """With its cache, a prompt and then token after token, each part gives the logits of its forward pass."""
    cfg, tensors, _, params, batch = case
    ids = batch["input_ids"]
    cache, found = empty_cache(cfg, 2, ids.shape[1]), []
    for part in ids.split([10] + [1] * 14, dim=1):
        logits, cache = extend(cfg, params, part, cache)
        found.append(logits)
    expected = transformer.logits(cfg, params, {"input_ids": ids})
    assert_close(torch.stack(found, 1), expected[:, 9:], **CLOSE)
    assert torch.allclose(expected, tensors["logits"], **CLOSE) != drops(cfg), "decoding drops nothing"


def test_counts(case):
    """Parameters as OLMo-core counts them; FLOPs of products, to which it adds 6 for every entry of a vector."""
    cfg, _, facts, params, _ = case
    biases = sum(x.numel() for path, x in tree.items(params) if path.endswith("router_bias"))  # OLMo-core's are buffers
    assert count.num_params(cfg) == facts["counts"]["num_params"] + biases
    vectors = sum(x.numel() for path, x in tree.items(params) if x.ndim == 1)
    without = count.num_params(cfg) - count.num_active_params(cfg)
    assert without == facts["counts"]["num_params"] - facts["counts"].get(
        "config_num_active_params", facts["counts"]["num_params"]
    )
    beside = 6 * 3 * cfg.d_model * cfg.block.dense.hidden_size * cfg.n_layers if isinstance(cfg.block, Hybrid) else 0
    for length, theirs in facts["counts"]["flops_per_token"].items():
        theirs += beside  # OLMo-core leaves the dense network of hybrid blocks out
        ours = count.flops_per_token(cfg, int(length))
        assert ours <= theirs + cfg.n_layers * 12 * 64, "its pairs are rounded down"
        assert theirs - ours <= 6 * vectors


# --- the families -----------------------------------------------------------------------------------------------------

RELEASED = {
    "olmo3-7b": 7_298_617_344,
    "olmo3-32b": 32_234_279_936,
    "llama2-271m": 271_090_688,
    "llama2-1b": 1_055_991_808,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-26b": 25_704_043_520,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "olmoe-1b-7b": 6_919_161_856,
    "olmo3moe-275m": 1_134_875_136,
    "olmo3moe-480m": 2_559_334_400,
    "olmo3moe-810m": 4_927_618_560,
    "olmo3moe-1.2b": 7_758_270_976,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "olmo-hybrid-7b": 7_430_870_688,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3-next-80b-a3b": 79_674_391_296,
}
"""Parameters of the released models (of OLMo 3 with the vocabulary padded as here), and OLMo-core's of its own sizes."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    cfg = next(models[name] for models in FAMILIES.values() if name in models)
    assert count.num_params(cfg) == RELEASED[name]


@pytest.mark.parametrize("name", [name for models in FAMILIES.values() for name in models])
def test_presets_are_sound(name):
    next(models[name] for models in FAMILIES.values() if name in models).check()


def test_where_olmo_cores_presets_are_not_the_released_models():
    assert LLAMA3["llama3-70b"].d_model == 8192
    qwen, gemma = FAMILIES["qwen3"], FAMILIES["gemma3"]
    assert (qwen["qwen3-14b"].n_layers, qwen["qwen3-32b"].block.mixer.n_heads) == (40, 64)
    assert [gemma[f"gemma3-{size}"].block.mixer.head_dim for size in ("1b", "4b", "12b", "27b")] == [256, 256, 256, 128]


def test_yarn_is_on_the_full_layers_of_olmo3_only():
    long = FAMILIES["olmo3"]["olmo3-7b-long"]
    found = [long.block.mixer.rope(long, layer).scaling for layer in range(8)]
    assert [scaling is not None for scaling in found] == [False, False, False, True] * 2
    assert OLMO3["olmo3-7b"].block.mixer.rope(OLMO3["olmo3-7b"], 3).scaling is None


def test_ngpt_starts_and_stays_on_the_sphere():
    """By what its preset asks of a run: after a step too, every matrix has vectors of length 1 along the model's width."""
    preset = CONFIGS["ngpt-271m"]
    small = modified(preset.model, d_model=16, n_layers=1, n_heads=2, hidden_size=24, vocab_size=32)
    small = replace(small, block=replace(small.block, mixer=replace(small.block.mixer, score_scale=8**0.5)))
    cfg = replace(preset, model=small, recipe=replace(preset.recipe, compile=False))
    step = recipe(cfg)
    state = step.init(first_parameters(cfg, step, torch.device("cpu")))
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        for path, dim in dims_of(transformer.specs(small)).items():
            lengths = torch.linalg.vector_norm(tree.at(state.params, path), dim=dim)
            assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=1e-5)
        state, _ = step(state, {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_fraction": 0.1}, "of which 0 are rotated; rotary positions need an even number"),
        ({"score_cap": 0.0}, "--model.score-cap is 0.0; it must be positive"),
        ({"rope_scaling": YaRN(beta_slow=40.0)}, "beta-slow 40.0 must be below"),
        ({"rope_scaling": Stepwise(low_freq_factor=4.0)}, "low-freq-factor 4.0 must be below"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    wrong = modified(Model(32, 1, 64), n_heads=4, **change)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        wrong.check()


def test_sizes_and_flops_of_every_preset():
    """A golden table: parameters, those that a token meets, and training FLOPs a token at 4,096, of all presets."""
    rows = [
        f"{name:<19} {count.num_params(cfg):>15,} {count.num_active_params(cfg):>15,} "
        f"{count.flops_per_sequence(cfg, 4096) // 4096:>19,}"
        for models in FAMILIES.values()
        for name, cfg in models.items()
    ]
    assert "\n".join(rows) + "\n" == (FIXTURES.parents[1] / "golden" / "models.txt").read_text()


@pytest.mark.parametrize(("name", "said"), [("275m", 0.28), ("480m", 0.48), ("810m", 0.82), ("1.2b", 1.22)])
def test_the_ladder_meets_as_many_parameters_as_its_runs_say(name, said):
    """The names of AI2's runs have both numbers, such as 0.28@1.13B; a first layer sees all, and every other one after it."""
    cfg = FAMILIES["olmo3moe"][f"olmo3moe-{name}"]
    assert round(count.num_active_params(cfg) / 1e9, 2) == said
    assert [cfg.block.mixer.window(layer, cfg.n_layers) for layer in range(5)] == [None, None, 2048, None, 2048]
    assert [layer.sublayers[1].name for layer in transformer.layers(cfg)[:2]] == ["feed_forward", "moe"]


def test_a_token_meets_its_experts_the_router_and_all_that_is_dense():
    """Written out for a model with a latent width, a shared network, a dense first layer and a module for the token after."""
    moe = MoE(num_experts=6, top_k=2, expert_size=5, shared_size=3, latent_size=4, dense_layers=1, dense_size=7)
    block = Block(mixer=Attention(n_heads=2), feed_forward=moe)
    cfg = Model(8, 3, 20, block, multi_token=MultiToken(depth=1))
    assert count.num_params(cfg) - count.num_active_params(cfg) == 3 * 4 * 3 * 4 * 5  # 2 blocks and the module's


def test_flops_are_six_for_an_entry_of_a_matrix_and_twelve_for_a_pair_and_a_dim():
    """Written out for a Gemma, which has windows, grouped heads, and a head that is its embedding."""
    m = FAMILIES["gemma3"]["gemma3-1b"]
    d, h, kv, k, f, T = 1152, 4, 1, 256, 6912, 4096
    matrices = m.n_layers * (d * (2 * h + 2 * kv) * k + 3 * d * f) + m.vocab_size * d
    windowed = sum(min(t + 1, 512) for t in range(T))
    full = T * (T + 1) // 2
    layers = [full if (i + 1) % 6 == 0 else windowed for i in range(26)]
    assert count.flops_per_sequence(m, T) == 6 * matrices * T + 12 * h * k * sum(layers)
