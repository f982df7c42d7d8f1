"""Laws to hold a gradient transform of one's own to. Each raises AssertionError that names the parameter."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.chain import Batch
from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.tree import Tree


def check_form(transform: Transform, grads: Grads, params: Tree, batch: Batch) -> None:
    """Names, shapes and dtypes stay, no metric is lost, the inputs are not written to, and twice gives the same bits."""
    inputs = {"params": tree.map(torch.clone, params), "batch": tree.map(torch.clone, batch)}
    (plain, before), (once, after), (again, _) = grads(params, batch), *(transform(grads)(params, batch) for _ in range(2))
    _same({"params": params, "batch": batch}, inputs, f"{transform.name} overwrites", exact=True)
    form = {path: (tuple(g.shape), g.dtype) for path, g in tree.items(plain)}
    got = {path: (tuple(g.shape), g.dtype) for path, g in tree.items(once)}
    for path in form | got:
        assert form.get(path) == got.get(path), f"{transform.name} makes {path} {got.get(path)} out of {form.get(path)}"
    _same(once, again, f"{transform.name} gives other numbers the second time for", exact=True)
    assert before.keys() <= after.keys(), f"{transform.name} loses the metrics {', '.join(before.keys() - after.keys())}"


def check_idempotent(transform: Transform, grads: Grads, params: Tree, batch: Batch) -> None:
    """Twice in a row is once: holds for projections and for clipping.

    >>> from olmo_fn.core.pipe import clip, grad, pipe
    >>> grads = pipe(lambda params, batch: ((params["w"] * batch["labels"]).sum(), {}), grad("func"))
    >>> check_idempotent(clip(0.1), grads, {"w": torch.ones(2)}, {"labels": torch.tensor([3, 4])})
    """
    once, twice = transform(grads), transform(transform(grads))
    _same(twice(params, batch)[0], once(params, batch)[0], f"{transform.name} twice is not {transform.name} once for")


def check_commutes(a: Transform, b: Transform, grads: Grads, params: Tree, batch: Batch) -> None:
    """``a`` after ``b`` is ``b`` after ``a``: with ``accumulate(n)`` for ``b`` it holds for linear transforms.

    >>> from olmo_fn.core.pipe import accumulate, clip, grad, pipe
    >>> grads = pipe(lambda params, batch: ((params["w"] * batch["labels"]).sum(), {}), grad("func"))
    >>> check_commutes(clip(0.1), accumulate(2), grads, {"w": torch.ones(2)}, {"labels": torch.tensor([[0, 4], [3, 0]])})
    Traceback (most recent call last):
    AssertionError: clip(0.1) and accumulate(2) do not commute for w: ...
    """
    _same(a(b(grads))(params, batch)[0], b(a(grads))(params, batch)[0], f"{a.name} and {b.name} do not commute for")


def _same(got: Tree, expected: Tree, what: str, exact: bool = False) -> None:
    for path, x in tree.items(expected):
        tolerance = 0.0 if exact else None
        assert_close(tree.at(got, path), x, rtol=tolerance, atol=tolerance, msg=lambda m, path=path: f"{what} {path}: {m}")  # type: ignore[misc]
