"""float8 against what it is defined to be, written a second time and more slowly."""

from __future__ import annotations

from math import ceil, log2
from unittest.mock import patch

import pytest
import torch
from helpers import caught

from olmo_fn.core.chain import PLAIN, Backend
from olmo_fn.core.primitive import primitive
from olmo_fn.kernels import float8, identity
from olmo_fn.kernels.float8 import BLOCK, E4M3, Float8, Form, power_of_two, quantise_groups, quantise_rows, tiled
from olmo_fn.nn.linear import linear

RECIPES = [Form("rowwise", 0), Form("rowwise", 1), Form("mx")]


def wild(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Entries over many orders of magnitude, and rows of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    x[1] = 0
    return x.to(dtype)


def rounded(group: torch.Tensor) -> torch.Tensor:
    """A group of entries that share a scale, quantised: three digits after the leading one, none below 2^-9 of the scale."""
    largest = float(group.abs().max())
    if not largest:
        return group
    k = ceil(log2(largest / 448))
    step = [2.0 ** max(int(log2(abs(float(v)) / 2**k) // 1) - 3, -9) for v in group.flatten() + (group.flatten() == 0)]
    steps = torch.tensor(step, dtype=group.dtype).view(group.shape) * 2.0**k
    return (group / steps).round() * steps  # halves to even


def by_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.stack([torch.cat([rounded(part) for part in row.split(width)]) for row in x])


def weight(w: torch.Tensor, form: Form) -> torch.Tensor:
    if form.recipe == "rowwise":
        return by_rows(w, w.shape[1]) if form.dim == 0 else by_rows(w.T, w.shape[0]).T
    return torch.cat([torch.cat([rounded(b) for b in part.split(BLOCK, 1)], 1) for part in w.split(BLOCK)])


def activation(x: torch.Tensor, factor: torch.Tensor | None, form: Form) -> torch.Tensor:
    """Its rows, quantised times a factor that is then divided by."""
    if form.recipe == "mx":
        return by_rows(x, BLOCK)
    return by_rows(x, x.shape[1]) if factor is None else by_rows(x * factor, x.shape[1]) / factor


def expected(x: torch.Tensor, w: torch.Tensor, d: torch.Tensor, form: Form) -> tuple[torch.Tensor, ...]:
    """The product, and the cotangents of x and of w."""
    largest = w.abs().amax(1 - form.dim)
    scales = torch.tensor([2.0 ** ceil(log2(v / 448)) if v else 2.0**-126 for v in largest.tolist()], dtype=w.dtype)
    w_q = weight(w, form)
    y = activation(x, scales if form.dim == 0 else None, form) @ w_q
    d_x = activation(d, scales if form.dim == 1 else None, form) @ w_q.T
    return y, d_x, x.T @ d


def law(form: Form) -> None:
    """`linear` of a quantised weight, as a primitive and as plain operations."""
    x, w, d = wild(48, 64)[None], wild(64, 96, seed=1), wild(48, 96, seed=2)[None]
    wanted = expected(x[0], w, d[0], form)
    plain = (Float8(w.requires_grad_(), None, form), PLAIN)
    quantised = form.quantised(w)
    taken = {}
    take = lambda weight, gradient: taken.setdefault(id(weight), gradient()) is not None  # noqa: E731
    tape = (quantised._replace(data=quantised.data.requires_grad_()), Backend(primitive, weight_grads=take))
    for weights, backend in (plain, tape):
        leaf = x.clone().requires_grad_()
        (y,) = linear(backend, leaf, [weights])
        d_x, d_w = torch.autograd.grad(y, [leaf, weights.data], d, allow_unused=True)
        found = (y[0], d_x[0], taken[id(weights.data)] if d_w is None else d_w)
        for name, a, b in zip(("product", "cotangent", "gradient"), found, wanted, strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max(), name


@pytest.mark.parametrize("form", RECIPES, ids=str)
def test_products_are_those_of_the_definition(form: Form) -> None:
    law(form)


def without_scales(kernel, a, a_scale, *rest):
    return scaled_product(kernel, a, torch.ones_like(a_scale), *rest)


def over_columns(x, *factors):
    found = []
    for factor in factors or (1.0,):
        scale, inverse = power_of_two((x.float() * factor).abs().amax(0, keepdim=True))
        found += [(x.float() * factor * inverse).to(E4M3), scale[:, :1].expand(len(x), 1)]
    return tuple(found)


def in_float8(kernel, x, weights):
    """Keeps for the weights' gradients what was quantised."""
    data, scale = quantise_rows(x)
    x.copy_(data.to(x.dtype) * scale)
    return products(kernel, x, weights)


def not_moved(x, *factors):
    return quantise_rows(x) * (len(factors) or 1)


scaled_product, products = float8.scaled_product, float8.products
MUTANTS = {
    "scales are forgotten": (float8, "scaled_product", without_scales),
    "largest entries of columns": (float8, "quantise_rows", over_columns),
    "a weight's scales are not moved to the other factor": (float8, "quantise_rows", not_moved),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_catches(name: str) -> None:
    module, function, mutant = MUTANTS[name]
    with patch.object(module, function, mutant):
        caught(law, RECIPES[0])


def test_the_law_catches_gradients_of_weights_in_float8() -> None:
    with patch("olmo_fn.nn.linear.products", in_float8):
        caught(law, RECIPES[0])


@pytest.mark.parametrize("dim", [0, 1])
def test_the_emulation_has_the_bits_of_scaled_mm(dim: int) -> None:
    """In bf16: what a GPU's path calls, on a CPU."""
    form, x = Form("rowwise", dim), wild(48, 256, dtype=torch.bfloat16)
    w = form.quantised(wild(256, 96, seed=1))
    data, scale = quantise_rows(x, *([w.scale.flatten()] if dim == 0 else []))
    b_scale = torch.ones(1, 96) if dim == 0 else w.scale
    wanted = torch._scaled_mm(data, w.data.T.contiguous().T, scale, b_scale, out_dtype=torch.bfloat16)
    assert torch.equal(products(identity, x, [w])[0], wanted)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(4, 64)
    x[0, 3], x[2, 5] = torch.inf, torch.nan
    y = products(identity, x, [Form("rowwise").quantised(torch.ones(64, 32))])[0]
    assert y.isfinite().all(1).tolist() == [False, True, False, True]
    groups = products(identity, x, [Form("mx").quantised(torch.ones(64, 32))])[0]
    assert groups.isfinite().all(1).tolist() == [False, True, False, True]


def test_rowwise_and_mx_differ_in_small_entries_only() -> None:
    """Scales that are powers of two change no digit."""
    x = wild(32, 64).clamp(-4, 4)
    rows, groups = (float8.dequantise(*fn(x), torch.float64) for fn in (quantise_rows, quantise_groups))
    large = x.abs() >= 2.0**-14 * x.abs().amax(1, keepdim=True)
    assert torch.equal(rows[large], groups[large])
    assert (rows - groups).abs().max() <= 2.0**-18 * x.abs().max()


def test_tiles_of_scales() -> None:
    """Scale (row, column) lies where cuBLAS's documentation of 1D block scaling says."""
    scale = torch.exp2(torch.randint(-20, 20, (200, 6)).float())
    found = tiled(scale).view(torch.float8_e8m0fnu).float()
    assert len(found) == 256 * 8
    for row in range(200):
        for column in range(6):
            tile = (row // 128) * 2 + column // 4
            place = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
            assert found[place] == scale[row, column]
