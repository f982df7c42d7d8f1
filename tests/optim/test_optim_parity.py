"""The optimizers beside AdamW against the numbers of OLMo-core, torch and dion, or against a few lines of numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.gradients import Gradients
from olmo_fn.core.pipe import grad, pipe, skip_spikes
from olmo_fn.optim import adafactor, dion, lion, normuon, partition, sgd, soap
from olmo_fn.optim.adamw import adam, adamw
from olmo_fn.optim.base import Decay
from olmo_fn.optim.muon import DION, JORDAN, muon, orthogonalize
from olmo_fn.optim.schedule_free import schedule_free_adamw
from olmo_fn.spec import Init, Spec

torch.set_num_threads(1)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "optim"
CASES = json.loads((FIXTURES / "optim.json").read_text())
TENSORS = load_file(FIXTURES / "optim.safetensors")
SPECS = {
    "w": Spec((6, 8), ("embed", "mlp"), Init("zeros")),
    "t": Spec((4, 10), ("mlp", "embed"), Init("zeros")),
    "v": Spec((5,), ("embed",), Init("zeros")),
    "e": Spec((9, 4), ("vocab", "embed"), Init("zeros")),
}
SCALE = {"rms_norm": "rms", "spectral_norm": "spectral", None: "none", "original": "original", "match_rms_adamw": "rms"}


def tensors(case, kind, turned=("w", "t")):
    """The tensors ``<case>/<kind>.<name>``; matrices as ours, (in, out)."""
    found = {name: TENSORS.get(f"{case}/{kind}.{name}") for name in SPECS}
    return {k: (v.T if k in turned else v).contiguous().clone() for k, v in found.items() if v is not None}


def schedule(case):
    rates = torch.tensor([0.0, *CASES[case]["lr_per_step"]], dtype=torch.float64)
    return lambda step: rates[step]


def run(case, optimizer, *more, turned=("w", "t"), scale=1.0):
    """Yield number, state before and after, and metrics of each step of a case."""
    step = pipe(lambda params, batch: None, grad(engine="func"), optimizer, *more)
    state = step.init(tensors(case, "param0", turned))
    for i in range(CASES[case]["steps"]):
        of = lambda name: torch.tensor(float((CASES[case][name] or [1.0] * (i + 1))[i]))  # noqa: B023, E731
        before = state
        grads = tree.map(lambda g: g * scale, tensors(case, f"grad.{i}", turned))
        state, metrics = step.update(state, Gradients(grads, {"loss": of("loss"), "grad_norm": of("grad_norm")}))
        yield i + 1, before, state, metrics


def check_updates(case, before, after, i, names, tolerance, turned=("w", "t")):
    """Each update differs from theirs by less than ``tolerance`` of its largest entry."""
    old = tensors(case, f"param.{i - 1}" if i > 1 else "param0", turned)
    new = tensors(case, f"param.{i}", turned)
    for name in names:
        theirs = new[name] - old[name]
        ours = after[name] - before[name]
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), (name, i)


# --- OLMo-core, torch, dion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lion", "skip_step_lion"])
def test_lion(case):
    hyper, skipped = CASES[case]["hyper"], []
    guard = [skip_spikes(6.0, hyper["rolling_interval_length"])] if "rolling_interval_length" in hyper else []
    optimizer = lion(schedule(case), tuple(hyper["betas"]), Decay(hyper["weight_decay"], no_decay=()))
    for i, _, state, metrics in run(case, optimizer, *guard, turned=()):
        skipped.append(metrics["skipped"].item())
        assert_close(state.params, tensors(case, f"param.{i}", ()), rtol=1e-6, atol=1e-7)
        for name in SPECS:
            assert_close(state.slots["lion_m"][name], TENSORS[f"{case}/state.{i}.{name}.exp_avg"], rtol=1e-5, atol=1e-7)
    assert skipped == (CASES[case]["step_skipped"] or [0.0] * 6)


@pytest.mark.parametrize("case", ["torch_muon_original", "torch_muon_match_rms_adamw"])
def test_muon_is_torch(case):
    """With torch's rounding. Its momentum is an average, (1 - μ) times ours; steps do not depend on that, but bf16 does."""
    hyper, turned = CASES[case]["hyper"], ("w", "t", "e")  # there, all three are for Muon
    scale, decay = SCALE[hyper["adjust_lr_fn"]], Decay(hyper["weight_decay"], no_decay=())
    optimizer = muon(schedule(case), hyper["momentum"], True, decay, JORDAN, scale)
    for i, before, state, _ in run(case, optimizer, turned=turned, scale=1 - hyper["momentum"]):
        check_updates(case, before.params, state.params, i, turned, 2e-2, turned)
        for name in turned:
            theirs = TENSORS[f"{case}/state.{i}.{name}.momentum_buffer"].T
            assert_close(state.slots["muon_momentum"][name], theirs, rtol=1e-5, atol=1e-6)


def grouped(case, transform, **options):
    """dion's groups: ``transform`` for matrices, AdamW for the rest, without decay on the embedding."""
    hyper = CASES[case]["hyper"]
    cautious, weight = hyper.get("cautious_wd", False), hyper["weight_decay"]
    matrix = transform(schedule(case), hyper["mu"], weight_decay=Decay(weight, (), cautious), **options)
    other = adamw(schedule(case), tuple(hyper["betas"]), 1e-8, Decay(weight, ("e",), cautious))
    return partition({"matrix": matrix, "default": other}, SPECS)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("dion_muon", "dion_normuon"))])
def test_muon_and_normuon_are_dion(case):
    hyper = CASES[case]["hyper"]
    transform = normuon if "normuon" in case else muon
    options = {"nesterov": hyper.get("nesterov", False), "scale": SCALE[hyper["adjust_lr"]]}
    for i, before, state, _ in run(case, grouped(case, transform, **options)):
        check_updates(case, before.params, state.params, i, ("w", "t"), 2e-2)
        expected = tensors(case, f"param.{i}")
        assert_close({k: state.params[k] for k in "ve"}, {k: expected[k] for k in "ve"}, rtol=1e-5, atol=1e-6)
        assert state.slots["adamw_m"].keys() == {"v", "e"}
        for name in ("w", "t"):
            theirs = TENSORS[f"{case}/state.{i}.{name}.momentum"].T
            assert_close(state.slots[f"{transform.__name__}_momentum"][name], theirs, rtol=1e-5, atol=1e-6)
            if transform is normuon:
                theirs = TENSORS[f"{case}/state.{i}.{name}.variance_neuron"].T
                assert_close(state.slots["normuon_v"][name], theirs, rtol=2e-2, atol=0)


@pytest.mark.parametrize("case", ["dion_dion_r100", "dion_dion_r50"])
def test_dion(case):
    """From step 2 on, starting with their Q; columns of Q may have the other sign."""
    optimizer = grouped(case, dion, rank=CASES[case]["hyper"]["rank_fraction"])
    step = pipe(lambda params, batch: None, grad(engine="func"), optimizer)
    state = step.init(tensors(case, "param.1"))
    first = {name: TENSORS[f"{case}/state.1.{name}.Q"].clone() for name in ("w", "t")}
    assert tree.map(lambda x: x.shape, state.slots["dion_q"]) == tree.map(lambda x: x.shape, first)
    momentum = {name: TENSORS[f"{case}/state.1.{name}.momentum"].T.clone() for name in ("w", "t")}
    moments = [{name: TENSORS[f"{case}/state.1.{name}.{kind}"].clone() for name in "ve"} for kind in ("momentum", "variance")]
    counts = {name: {next(iter(slot)): {"count": torch.tensor(1)}} for name, slot in state.slots["partition"].items()}
    slots = {"partition": counts, "dion_q": first, "dion_momentum": momentum, "adamw_m": moments[0], "adamw_v": moments[1]}
    assert slots.keys() == state.slots.keys()
    state = state._replace(step=torch.tensor(1), slots=slots)
    for i in range(1, CASES[case]["steps"]):
        before = state
        state, _ = step.update(
            state, Gradients(tensors(case, f"grad.{i}"), {"loss": torch.ones(()), "grad_norm": torch.ones(())})
        )
        check_updates(case, before.params, state.params, i + 1, ("w", "t", "v", "e"), 1e-3)
        for name in ("w", "t"):
            theirs = TENSORS[f"{case}/state.{i + 1}.{name}.Q"]
            signs = (theirs * state.slots["dion_q"][name]).sum(0).sign()
            assert_close(state.slots["dion_q"][name] * signs, theirs, rtol=1e-3, atol=1e-3)


# --- no fixture: torch, or the published algorithm in numpy -----------------------------------------------------------


def drive(transform, shapes, steps=6, dtype=torch.float64):
    """Parameters before the first and after each step, and the gradients, which are random."""
    generator = torch.Generator().manual_seed(1)
    random = lambda: {k: torch.randn(shape, generator=generator, dtype=dtype) for k, shape in shapes.items()}  # noqa: E731
    step = pipe(lambda params, batch: None, grad(engine="func"), transform)
    state = step.init(random())
    history, grads = [state.params], [random() for _ in range(steps)]
    for g in grads:
        state, _ = step.update(state, Gradients(dict(g), {"loss": torch.ones(()), "grad_norm": torch.ones(())}))
        history.append(state.params)
    return history, grads, state


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (sgd(0.1), torch.optim.SGD, {"lr": 0.1}),
        (sgd(0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (sgd(0.1, momentum=0.9, nesterov=True), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (adam(0.1), torch.optim.Adam, {"lr": 0.1}),
        (adafactor(0.3), torch.optim.Adafactor, {"lr": 0.3}),
        (adafactor(0.01, weight_decay=Decay(0.1, ())), torch.optim.Adafactor, {"lr": 0.01, "weight_decay": 0.1}),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adafactor", "adafactor-decay"],
)
def test_is_torch(ours, theirs, options):
    """fp64, six steps, a matrix and a vector."""
    history, grads, _ = drive(ours, {"w": (4, 3), "v": (5,)})
    params = {k: torch.nn.Parameter(p.clone()) for k, p in history[0].items()}
    optimizer = theirs(params.values(), **options)
    for g, after in zip(grads, history[1:], strict=True):
        for k, p in params.items():
            p.grad = g[k].clone()
        optimizer.step()
        assert_close(after, {k: p.data for k, p in params.items()}, rtol=1e-9, atol=1e-9)


def test_schedule_free():
    """Algorithm 1 of the paper; x, z and the point of the gradient."""
    lr, beta1, beta2, eps, decay = 0.1, 0.9, 0.95, 1e-8, 0.1
    transform = schedule_free_adamw(lr, (beta1, beta2), eps, Decay(decay, ()))
    history, grads, state = drive(transform, {"w": (4, 3)})
    x = z = history[0]["w"].numpy()
    v, total = np.zeros_like(x), 0.0
    for t, (g, after) in enumerate(zip(grads, history[1:], strict=True), start=1):
        g, y = g["w"].numpy(), (1 - beta1) * z + beta1 * x
        v = beta2 * v + (1 - beta2) * g**2
        gamma = lr * np.sqrt(1 - beta2**t)
        z = z - gamma * (g / (np.sqrt(v) + eps) + decay * y)
        total += gamma**2
        x = (1 - gamma**2 / total) * x + gamma**2 / total * z
        np.testing.assert_allclose(after["w"].numpy(), x, rtol=1e-10)
    np.testing.assert_allclose(state.slots["schedule_free_z"]["w"].numpy(), z, rtol=1e-10)


def test_schedule_free_takes_gradients_at_y():
    """The gradient of ½ p² is the point itself."""
    seen = []

    def loss(params, batch):
        return (params["w"] ** 2).sum() / 2, {"at": params["w"].detach().sum()}

    step = pipe(loss, grad(engine="func", dtype=torch.float64), schedule_free_adamw(0.1, (0.8, 0.95)))
    state = step.init({"w": torch.ones(1, dtype=torch.float64)})
    for _ in range(3):
        expected = 0.2 * state.slots["schedule_free_z"]["w"] + 0.8 * state.params["w"]
        state, metrics = step(state, {"labels": torch.zeros(1, dtype=torch.int64)})
        seen.append(metrics["at"].item())
        assert_close(metrics["at"], expected.sum())
    assert len(set(seen)) == 3


def test_soap():
    """The algorithm in numpy, the basis renewed every third step; a long side keeps its own. eps hides the null space of g."""
    lr, b1, b2, bs, eps, decay, every = 0.1, 0.9, 0.95, 0.8, 1e-3, 0.1, 3
    for max_dim, sides in ((8, "lr"), (3, "r")):
        transform = soap(lr, (b1, b2), bs, eps, every, max_dim, Decay(decay, ()))
        history, grads, state = drive(transform, {"w": (4, 3)}, steps=8)
        assert {k[5:] for k in state.slots if k.startswith("soap_") and len(k) == 6} >= set(sides)
        w = history[0]["w"].numpy()
        m, v = np.zeros_like(w), np.zeros_like(w)
        left, right, q_left, q_right = np.zeros((4, 4)), np.zeros((3, 3)), np.eye(4), np.eye(3)
        for t, (g, after) in enumerate(zip(grads, history[1:], strict=True), start=1):
            g = g["w"].numpy()
            left, right = bs * left + (1 - bs) * g @ g.T, bs * right + (1 - bs) * g.T @ g
            if t == 1:
                q_left, q_right = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
            elif t % every == 0:
                q_left, q_right = np.linalg.qr(left @ q_left)[0], np.linalg.qr(right @ q_right)[0]
            if "l" not in sides:
                q_left = np.eye(4)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (q_left.T @ g @ q_right) ** 2
            turned = (q_left.T @ m @ q_right / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            w = w - lr * decay * w - lr * q_left @ turned @ q_right.T
            np.testing.assert_allclose(after["w"].numpy(), w, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("iteration", "low", "high"), [(JORDAN, 0.6, 1.3), (DION, 0.85, 1.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (2, 3, 16, 16)])
def test_orthogonalize(iteration, low, high, dtype, shape):
    """Singular values near 1 and the singular vectors of the input, for each matrix of a batch."""
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = orthogonalize(m, iteration, dtype)
    assert x.dtype == m.dtype
    s = torch.linalg.svdvals(x)
    assert s.max() < high
    assert s.median() > low
    u, sv, vh = torch.linalg.svd(m, full_matrices=False)
    inner = (u.mT @ x @ vh.mT).diagonal(dim1=-2, dim2=-1)[sv > 0.2 * sv.amax(-1, keepdim=True)]
    assert inner.min() > low - 0.1
