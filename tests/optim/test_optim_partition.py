"""Several optimizers in one step: who gets which parameter, with which rate; and the optimizers of the command line."""

import inspect
from dataclasses import fields, replace

import pytest
import torch

from olmo_fn import tree
from olmo_fn.core.gradients import Gradients
from olmo_fn.core.pipe import clip, ema, grad, pipe, skip_spikes
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.models.families import OLMO2
from olmo_fn.optim import adamw, dion, lion, muon, normuon, sgd
from olmo_fn.optim.base import OLMO_CORE_NO_DECAY, Decay
from olmo_fn.optim.partition import assign, partition
from olmo_fn.optim.schedule_free import schedule_free_adamw
from olmo_fn.optim.schedules import warmup_linear
from olmo_fn.spec import Init, Spec, init
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.optimizers import OPTIMIZERS, SGD, AdamW, Dion, Lion, Muon, NorMuon, ScheduleFree
from olmo_fn.train.recipe import recipe
from olmo_fn.train.report import dry_run
from olmo_fn.train.schedules import Constant

MODEL = dense(8, 2, 2, 12, vocab_size=32)
SPECS = transformer.specs(MODEL)


def step_of(transform, *more):
    return pipe(lambda params, batch: None, grad(engine="func"), transform, *more)


def metrics(loss=1.0):
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0)}


def ones(params):
    return tree.map(torch.ones_like, params)


# --- who gets what ----------------------------------------------------------------------------------------------------


def test_kinds_and_axes():
    """The dense model's parameters, and stacked ones."""
    of = assign({"m": ("matrix",), "e": ("embedding",), "v": ("vector",)}, SPECS)
    assert {p for p, g in of.items() if g == "e"} == {"embed", "head.w_out"}
    assert {p.rsplit(".", 1)[-1] for p, g in of.items() if g == "m"} == {
        "w_q",
        "w_k",
        "w_v",
        "w_out",
        "w_gate",
        "w_up",
        "w_down",
    }
    assert all(p.endswith("norm") for p, g in of.items() if g == "v")
    assert of.keys() == tree.flatten(SPECS).keys()
    stacked = {
        "experts": Spec((3, 4, 5), ("experts", "embed", "mlp"), Init("zeros")),
        "layers": Spec((2, 3, 4, 5), ("layers", "experts", "embed", "mlp"), Init("zeros")),
        "norms": Spec((2, 4), ("layers", "embed"), Init("zeros")),
        "router": Spec((4, 3), ("embed", "experts"), Init("zeros")),
        "heads": Spec((4, 2, 3), ("embed", "heads", "head_dim"), Init("zeros")),
    }
    of = assign({"m": ("matrix",), "v": ("vector",), "r": ("axis:head_dim",), "d": ("default",)}, stacked)
    assert of == {"experts": "m", "layers": "m", "norms": "v", "router": "v", "heads": "r"} | {"router": of["router"]}
    assert of["router"] != "m"
    assert set(assign({"mlp": ("axis:mlp",), "d": ("default",)}, SPECS).values()) == {"mlp", "d"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"matrix": 0, "vector": 0}, 'no group takes embed, head.w_out; add a group, such as "default"'),
        ({"*.w_x": 0, "default": 0}, "'*.w_x' chooses no parameter; there are embed, blocks.0.attention.w_q, "),
        ({"axis:banana": 0, "default": 0}, "'axis:banana' chooses no parameter"),
        ({"matrix": 0, "*.w_q": 0, "default": 0}, "blocks.0.attention.w_q is taken by two groups, 'matrix' and '*:w_q'"),
        ({("head.*", "emb"): 0, "default": 0}, "'emb' chooses no parameter"),
    ],
)
def test_wrong_groups(groups, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        partition(dict.fromkeys(groups, sgd(0.1)), SPECS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: partition({"matrix": sgd(0.1)}, {"w": torch.zeros(2, 2)}), "needs the declared axes"),
        (lambda: partition({"default": clip(1.0)}, SPECS), "group 'default' is clip(1.0), which is no optimizer"),
        (
            lambda: step_of(muon(0.1)).init({"b": torch.zeros(3)}),
            "muon takes matrices, and b has shape (3,); give it to another",
        ),
        (lambda: step_of(partition({"w": sgd(0.1)}, {"w": 0})).init({"v": torch.zeros(1)}), "v is not among the parameters"),
        (lambda: muon(0.1, scale="big"), "there are rms, spectral, original, none"),
        (lambda: sgd(0.1, nesterov=True), "needs a momentum"),
    ],
)
def test_wrong_use(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- what each group does ---------------------------------------------------------------------------------------------


def test_groups_are_apart():
    """Rates, schedules and decay of their own, counts by group; each parameter moves as under its optimizer alone."""
    params = init(SPECS, 0)
    rate = warmup_linear(0.5, 2, 10)
    parts = {"matrix": adamw(rate), ("embed", "head.w_out"): sgd(0.1), "default": adamw(0.01, weight_decay=Decay(0.3, ()))}
    step, alone = step_of(partition(parts, SPECS), ema(0.9)), [step_of(t) for t in parts.values()]
    state, states = step.init(params), [s.init(params) for s in alone]
    for _ in range(3):
        state, report = step.update(state, Gradients(ones(params), metrics()))
        states = [s.update(before, Gradients(ones(params), metrics()))[0] for s, before in zip(alone, states, strict=True)]
    assert report["lr/matrix"] == rate(torch.tensor(3))
    assert report["lr"] == report["lr/default"] == 0.01
    for path, p in tree.items(state.params):
        group = 0 if ".w_" in path and "head" not in path else 1 if "norm" not in path else 2
        assert torch.equal(p, tree.at(states[group].params, path)), path
    assert [next(iter(slot.values()))["count"].item() for slot in state.slots["partition"].values()] == [3, 3, 3]
    assert "embed" not in state.slots["adamw_m"]


def test_a_partition_in_a_partition():
    params = init(SPECS, 0)
    inner = partition({"embed": sgd(0.1), "default": sgd(0.2)}, SPECS)
    step = step_of(partition({"matrix": sgd(0.4), "default": inner}, SPECS))
    state, report = step.update(step.init(params), Gradients(ones(params), metrics()))
    moved = {path: round(float((tree.at(params, path) - p).mean()), 4) for path, p in tree.items(state.params)}
    assert moved["embed"] == 0.1
    assert moved["head.w_out"] == moved["head.norm"] == 0.2
    assert moved["blocks.0.attention.w_q"] == 0.4
    assert report["lr/default"] == 0.2


def test_a_spike_is_skipped_in_all_groups():
    step = step_of(partition({"matrix": muon(0.1), "default": adamw(0.1)}, SPECS), skip_spikes(window=4))
    params = init(SPECS, 0)
    state, report = step.update(step.init(params), Gradients(ones(params), metrics(float("nan"))))
    assert report["skipped"]
    assert [next(iter(slot.values()))["count"].item() for slot in state.slots["partition"].values()] == [0, 0]
    assert all(torch.equal(p, tree.at(params, path)) for path, p in tree.items(state.params))


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "kept"),
    [
        (0.5, {"embed", "head.norm", "b_bias"}),
        (Decay(0.5, OLMO_CORE_NO_DECAY), {"embed"}),
        (Decay(0.5, ()), set()),
        (0.0, None),
    ],
)
def test_decay_masks(decay, kept):
    """With no gradient only the decay moves: lr · weight · p where the mask lets it."""
    params = {"embed": torch.ones(2), "head": {"norm": torch.ones(2)}, "w": torch.ones(2, 2), "b_bias": torch.ones(2)}
    step = step_of(sgd(0.1, weight_decay=decay))
    state, _ = step.update(step.init(params), Gradients(tree.map(torch.zeros_like, params), metrics()))
    for path, p in tree.items(state.params):
        assert torch.all(p == (1.0 if kept is None or path in kept else 0.95)), path


def test_cautious_decay():
    """Only where step and parameter have one sign, or one of them is 0."""
    p, g = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0])
    step = step_of(sgd(0.1, weight_decay=Decay(0.5, (), cautious=True)))
    state, _ = step.update(step.init({"w": p}), Gradients({"w": g}, metrics()))
    assert torch.allclose(state.params["w"], p * torch.tensor([0.95, 0.95, 1, 1, 0.95]) - 0.1 * g)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.name)
def test_every_optimizer_learns(cls):
    """The recipe of a config, on one batch again and again."""
    lr = {"sgd": 0.3, "adafactor": 0.1}.get(cls.name, 1e-2)
    optim = cls(lr=lr, **{"momentum": 0.9} if cls is SGD else {})
    cfg = Config(MODEL, optim=optim, schedule=Constant(warmup=0), recipe=Recipe(4, 8, compile=False), run=Run(steps=40))
    cfg.check()
    step = recipe(cfg)
    state = step.init(init(SPECS, 0))
    ids = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(40):
        state, report = step(state, {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
        losses.append(report["loss"].item())
    assert losses[-1] < losses[0] - 1
    assert report["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.name)
def test_every_field_reaches_the_optimizer(cls):
    """Each of them changes what a step does."""
    base = Config(MODEL, schedule=Constant(warmup=0), recipe=Recipe(4, 8, compile=False))
    params = init(SPECS, 0)
    start = cls(momentum=0.9) if cls is SGD else cls()

    def end(optim):
        step = recipe(replace(base, optim=optim))
        state = step.init(params)
        for i in range(20 if cls is Lion else 3):  # until a moment in bf16 has another sign
            grads = init(SPECS, i + 1)
            state, _ = step.update(state, Gradients(grads, metrics()))
        return torch.cat([p.reshape(-1) for _, p in tree.items(state.params)])

    other = {
        "lr": 0.1, "weight_decay": 1.0, "cautious": True, "no_decay": (), "moments": "bfloat16", "betas": (0.5, 0.6),
        "eps": 0.1, "first_step_bias": True, "momentum": 0.3, "nesterov": cls is SGD, "decay_rate": 0.1, "clip": 1e-3,
        "min_rms": 10.0, "adamw_lr": 1e-2, "scale": "none", "beta2": 0.5, "rank": 0.3, "shampoo_beta": 0.1, "every": 2,
        "max_dim": 3,
    }  # fmt: skip
    for field in fields(cls):
        if field.name != "name":
            changed = replace(start, **{field.name: other[field.name]})
            assert not torch.equal(end(start), end(changed)), field.name


@pytest.mark.parametrize(
    ("cls", "function"),
    [(AdamW, adamw), (Lion, lion), (ScheduleFree, schedule_free_adamw), (Muon, muon), (NorMuon, normuon), (Dion, dion)],
)
def test_defaults_are_those_of_the_functions(cls, function):
    """Of all fields but the shared ones, which the functions take as `Decay` and dtype."""
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    same = [field.name for field in fields(cls) if field.name in defaults and field.name not in ("lr", "moments")]
    assert {"weight_decay"} < set(same)
    assert {name: getattr(cls(), name) for name in same} == {name: defaults[name] for name in same}


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (Dion(rank=2.0), "--optim.rank is 2.0; it must be above 0 and at most 1"),
        (Lion(betas=(0.9, 1.0)), "--optim.betas is 1.0; it must be at least 0 and below 1"),
        (SGD(nesterov=True), "--optim.nesterov needs a momentum in sgd"),
        (Muon(adamw_lr=-1.0), "--optim.adamw-lr is -1.0; it must be positive"),
    ],
)
def test_wrong_combinations(optim, message):
    cfg = Config(MODEL, optim=optim, schedule=Constant(warmup=0))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        cfg.check() or recipe(cfg)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_dry_run_knows_what_an_optimizer_keeps():
    found = dry_run(Config(OLMO2["olmo2-1b"], optim=Muon(moments="bfloat16"), schedule=Constant(warmup=0)))
    assert "muon_momentum 2.00 GiB" in found
    assert "adamw_m 0.77 GiB" in found
