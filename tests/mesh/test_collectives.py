"""Each collective on real processes against the same computation of all ranks in one: values, gradients, second derivatives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import olmo_fn
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, all_to_all, enter, pmax, psum, reduce_scatter, ring_shift
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.testing.traffic import Traffic

SHAPE = (6, 12, 6)  # divided by 2 and by 3

# What a rank runs, and the same for the list of all ranks' tensors.
CASES = {
    "enter": (enter, lambda xs: xs),
    "psum": (psum, lambda xs: [sum(xs)] * len(xs)),
    "all_gather 0": (lambda x, axis: all_gather(x, 0, axis), lambda xs: [torch.cat(xs, 0)] * len(xs)),
    "all_gather -1": (lambda x, axis: all_gather(x, -1, axis), lambda xs: [torch.cat(xs, 2)] * len(xs)),
    "reduce_scatter 0": (lambda x, axis: reduce_scatter(x, 0, axis), lambda xs: sum(xs).chunk(len(xs), 0)),
    "reduce_scatter 1": (lambda x, axis: reduce_scatter(x, 1, axis), lambda xs: sum(xs).chunk(len(xs), 1)),
    "all_to_all 1 0": (
        lambda x, axis: all_to_all(x, 1, 0, axis),
        lambda xs: [torch.cat([x.chunk(len(xs), 1)[i] for x in xs], 0) for i in range(len(xs))],
    ),
    "all_to_all 0 -1": (
        lambda x, axis: all_to_all(x, 0, -1, axis),
        lambda xs: [torch.cat([x.chunk(len(xs), 0)[i] for x in xs], 2) for i in range(len(xs))],
    ),
    "ring_shift": (ring_shift, lambda xs: [xs[i - 1] for i in range(len(xs))]),
    "ring_shift -2": (
        lambda x, axis: ring_shift(x, axis, -2),
        lambda xs: [xs[(i + 2) % len(xs)] for i in range(len(xs))],
    ),
}
REPLICATED_IN, REPLICATED_OUT = {"enter"}, {"psum"}

# The mistakes that are easily made, each in place of the case of the same name: the tests below must see them.
MUTANTS = {
    "enter": lambda x, axis: x,  # all-reduce of the gradient dropped
    "psum": lambda x, axis: psum(enter(x, axis), axis),  # summed again in the backward
    "all_gather 0": lambda x, axis: all_gather(x.detach(), 0, axis) + 0 * x.sum(),  # no gradient
    "reduce_scatter 1": lambda x, axis: reduce_scatter(x, 1, axis) / axis.size,  # mean
    "all_to_all 1 0": lambda x, axis: torch.cat(all_to_all(x, 1, 0, axis).chunk(axis.size)[::-1]),  # order
    "ring_shift": lambda x, axis: ring_shift(x, axis, -1),  # the other way round
}


def draw(name: str, seed: int, shape: tuple[int, ...], replicated: bool, ranks: int) -> list[Tensor]:
    """A tensor a rank, equal ones if ``replicated``; every second one is not contiguous."""
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(ranks)]
    drawn = [drawn[0]] * ranks if replicated else drawn
    return [x if i % 2 else x.mT.contiguous().mT for i, x in enumerate(drawn)]


def inputs(name: str, seed: int, ranks: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The ranks' x, the weights of their losses, and directions of differentiation."""
    xs = draw(name, seed, SHAPE, name in REPLICATED_IN, ranks)
    shapes = {tuple(y.shape) for y in CASES[name][1](xs)}
    ws = draw(name, seed + 1, shapes.pop(), name in REPLICATED_OUT, ranks)
    return xs, ws, draw(name, seed + 2, SHAPE, name in REPLICATED_IN, ranks)


def loss(y: Tensor, w: Tensor) -> Tensor:
    return (w * (y + y**3 / 3)).sum()


def local(connection, axis_name: str, engine: str, mutated: bool = False):
    """On each rank and for each case: value, gradient and Hessian-vector product, all as this rank sees them."""
    axis = getattr(connection.axes, axis_name)
    cases = MUTANTS if mutated else {name: f for name, (f, _) in CASES.items()}
    return axis.index, {name: differentiate(f, *inputs(name, 0, axis.size), axis, engine) for name, f in cases.items()}


def differentiate(f, xs, ws, vs, axis: Axis, engine: str):
    x, w, v = xs[axis.index], ws[axis.index], vs[axis.index]
    if engine == "func":
        slope = torch.func.grad(lambda x: loss(f(x, axis), w))
        return f(x, axis), slope(x), torch.func.grad(lambda x: (slope(x) * v).sum())(x)
    stage = f if engine == "eager" else torch.compile(f, fullgraph=True, dynamic=False)
    leaf = x.detach().requires_grad_()
    y = stage(leaf, axis)
    again = engine == "eager"
    (g,) = torch.autograd.grad(loss(y, w), leaf, create_graph=again)
    return y.detach(), g.detach(), torch.autograd.grad((g * v).sum(), leaf)[0] if again else None


def expected(name: str, ranks: int):
    """What `local` must give, by autograd of the plain formula over all ranks' tensors in one process."""
    xs, ws, vs = inputs(name, 0, ranks)
    leaves = [xs[0].clone().requires_grad_()] if name in REPLICATED_IN else [x.clone().requires_grad_() for x in xs]
    ys = CASES[name][1](leaves * ranks if name in REPLICATED_IN else leaves)
    pairs = list(zip(ys, ws, strict=True))[: 1 if name in REPLICATED_OUT else ranks]  # a replicated loss counts once
    gs = torch.autograd.grad(sum(loss(y, w) for y, w in pairs), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum((g * v).sum() for g, v in zip(gs, vs, strict=False)), leaves)
    times = ranks // len(leaves)
    return [(y.detach(), g.detach(), h) for y, g, h in zip(ys, gs * times, seconds * times, strict=True)]


@pytest.mark.parametrize(
    ("mesh", "axis", "engine"),
    [
        (Mesh(tp=2), "tp", "eager"),
        (Mesh(tp=3), "world", "func"),
        (Mesh(dp_shard=2, tp=2), "dp_shard", "eager"),
        (Mesh(dp_shard=2, tp=2), "tp", "func"),
        pytest.param(Mesh(tp=2), "tp", "compile", marks=pytest.mark.slow),  # test_compiled_layouts has whole steps
    ],
)
def test_values_and_gradients(pool, mesh: Mesh, axis: str, engine: str) -> None:
    size = mesh.size if axis == "world" else getattr(mesh, axis)
    for index, found in pool.run(local, axis, engine, mesh=mesh):
        for name, tensors in found.items():
            check(name, tensors, expected(name, size)[index])


def check(name: str, found, expected) -> None:
    for what, a, b in zip(("value", "gradient", "second derivative"), found, expected, strict=True):
        if a is not None:
            assert_close(a, b, rtol=1e-12, atol=1e-11, msg=lambda m, what=what: f"{name}: {what}: {m}")


def test_mutants_are_caught(pool) -> None:
    for index, found in pool.run(local, "tp", "eager", True, mesh=Mesh(tp=3)):
        for name, tensors in found.items():
            with pytest.raises(AssertionError, match=r"value: |gradient: "):
                check(name, tensors, expected(name, 3)[index])


def differences(connection, name: str):
    """The gradient, and central differences of the sum of all ranks' losses, at three elements of rank 1's tensor."""
    axis = connection.axes.tp
    xs, ws, _ = inputs(name, 5, axis.size)
    f = CASES[name][0]
    total = lambda x: psum(loss(f(x, axis), ws[axis.index]), axis).item()  # noqa: E731
    found = []
    for i in (0, 100, 431):
        e = torch.zeros(SHAPE, dtype=torch.float64)
        e.view(-1)[i] = 1e-5 if axis.index == 1 else 0.0
        found.append((total(xs[axis.index] + e) - total(xs[axis.index] - e)) / 2e-5)
    x = xs[axis.index].clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(f(x, axis), ws[axis.index]), x)
    return found, g.reshape(-1)[[0, 100, 431]]


@pytest.mark.parametrize("name", [name for name in CASES if name not in REPLICATED_IN | REPLICATED_OUT])
def test_finite_differences(pool, name: str) -> None:
    """Where every rank has values of its own, the gradient is that of the sum of the losses."""
    _, (found, g) = pool.run(differences, name, mesh=Mesh(tp=2))
    assert_close(torch.tensor(found, dtype=torch.float64), g, rtol=1e-6, atol=1e-6)


def count(connection):
    """Collectives forward, and forward and backward together."""
    axis, found = connection.axes.tp, {}
    for name, (f, _) in CASES.items():
        x = torch.ones(SHAPE, requires_grad=True)
        with Traffic(connection.axes) as forward:
            y = f(x, axis)
        with Traffic(connection.axes) as backward:
            y.sum().backward()
        found[name] = [{kind: moved.calls for (kind, _), moved in seen.moved.items()} for seen in (forward, backward)]
    return found


def test_no_collective_too_many(pool) -> None:
    found = pool.run(count, mesh=Mesh(tp=3))[0]
    gather, scatter = {"all_gather": 1}, {"reduce_scatter": 1}
    exchange = {"all_to_all": 1}
    assert found == {
        "enter": [{}, {"all_reduce": 1}],
        "psum": [{"all_reduce": 1}, {}],
        **{name: [gather, scatter] for name in CASES if name.startswith("all_gather")},
        **{name: [scatter, gather] for name in CASES if name.startswith("reduce_scatter")},
        **{name: [exchange, exchange] for name in CASES if name.startswith(("all_to_all", "ring_shift"))},
    }


def maxima(connection, dtype: torch.dtype):
    axis = connection.axes.tp
    x = torch.tensor([1.0, -5.0, 3.0], dtype=dtype) * (1 - 2 * axis.index)
    slope = torch.func.grad(lambda x: (pmax(x, axis) * x).sum())(x)
    leaf = x.clone().requires_grad_()
    (pmax(leaf, axis) * leaf).sum().backward()
    sums = [psum(x + 4, axis), all_gather(x, 0, axis), reduce_scatter(x.repeat(2), 0, axis), ring_shift(x, axis)]
    return pmax(x, axis), slope, leaf.grad, sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pmax_has_no_gradient_and_every_dtype(pool, dtype: torch.dtype) -> None:
    found = pool.run(maxima, dtype, mesh=Mesh(tp=2))
    top, x = torch.tensor([1.0, 5.0, 3.0], dtype=dtype), torch.tensor([1.0, -5.0, 3.0], dtype=dtype)
    for index, (value, *slopes, sums) in enumerate(found):
        own = x if index == 0 else -x
        for tensor in (value, *slopes):
            assert_close(tensor, top, rtol=0, atol=0)
        for tensor, exact in zip(sums, [0 * x + 8, torch.cat((x, -x)), 0 * x, -own], strict=True):
            assert_close(tensor, exact, rtol=0, atol=0)


def uneven(connection):
    messages = []
    for f in (lambda x, axis: reduce_scatter(x, 1, axis), lambda x, axis: all_to_all(x, -1, 0, axis)):
        with pytest.raises(ValueError, match="cannot share") as error:
            f(torch.ones(2, 5), connection.axes.tp)
        messages.append(str(error.value))
    return messages


def test_uneven_shards_are_refused(pool) -> None:
    text = "of a tensor of shape (2, 5) has size 5, which the 2 ranks of axis 'tp' cannot share evenly"
    assert pool.run(uneven, mesh=Mesh(tp=2)) == [[f"dim {dim} {text}" for dim in (1, -1)]] * 2


def test_alone_every_collective_is_the_argument_itself() -> None:
    x = torch.ones(3, 5)
    assert all(f(x, Axis("tp")) is x for f, _ in CASES.values())
    assert pmax(x, Axis("tp")) is x


def test_no_gather_by_the_name_that_races():
    """A functional gather into a new tensor, or a coalesced one, ends gloo ranks now and then: see `gather_into`."""
    root = Path(olmo_fn.__file__).parent
    racing = re.compile(r"_c10d\w*\.(all_gather_into_tensor\b(?!_out)|\w+_coalesced)")
    found = [f"{path.name}: {m[0]}" for path in root.rglob("*.py") for m in racing.finditer(path.read_text())]
    assert not found
    assert racing.search("_c10d.all_gather_into_tensor(x, 2, group)"), "the pattern finds what it must"
    assert not racing.search("_c10d.all_gather_into_tensor_out(x, 2, group)")
