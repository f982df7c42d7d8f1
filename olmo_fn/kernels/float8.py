"""float8: matrices as e4m3 entries times scales, and their products.

Scales are powers of two, the smallest with which no entry exceeds 448. So they change no digit of what they scale: the rounding
of an entry depends on its own exponent alone, except where the entry is 2^-15 of the largest that has the same scale, or less.
By the same reason a scale may be moved from one factor of a product to the other. A weight therefore has one quantised form,
with which the forward and the backward pass both compute: its scales lie along one of its dims, and where a product sums over
that dim they go into the other factor before that is quantised.

Two recipes. ``rowwise``: each row of activations (M, K) has a scale, and each slice of a weight along its `Form.dim`. ``mx``,
the MXFP8 of OCP's microscaling formats: each 32 entries of a row have a scale, and each 32 x 32 of a weight.

On a GPU the products are `torch._scaled_mm`'s. On a CPU they are those of the dequantised matrices, in the dtype of the
computation: in bf16 they have its bits (a test compares them).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function as AutogradFunction

from olmo_fn.kernels import Kernel, identity

Recipe: TypeAlias = Literal["rowwise", "mx"]
E4M3 = torch.float8_e4m3fn
BLOCK = 32  # entries that share a scale in mx


@dataclass(frozen=True)
class Form:
    """How a weight (K, N) is quantised: by which recipe, and for ``rowwise`` along which dim its scales lie."""

    recipe: Recipe
    dim: int = 0

    @property
    def multiple(self) -> int:
        """What both of its dims must be multiples of: tensor cores take 16 entries of e4m3 at a time."""
        return BLOCK if self.recipe == "mx" else 16

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a weight of this shape.

        >>> Form("rowwise", dim=0).scale_shape((64, 96)), Form("mx").scale_shape((64, 96))
        ((64, 1), (2, 3))
        """
        if self.recipe == "mx":
            return tuple(-(-length // BLOCK) for length in shape)
        return tuple(length if i == self.dim else 1 for i, length in enumerate(shape))

    def check_part(self, path: str, dim: int, length: int) -> None:
        """ValueError unless parts of ``length`` along a dim can be quantised each by itself, with the scales of the whole."""
        if length % BLOCK if self.recipe == "mx" else dim != self.dim:
            why = f"parts of {length}" if self.recipe == "mx" else f"parts of its dim {dim}, along which it has no scales,"
            raise ValueError(
                f"ranks have {why} of {path}, which float8 by {self.recipe!r} cannot quantise each by itself; leave it out "
                f"(--recipe.float8-skip '{path}'), or choose other degrees of --mesh"
            )

    def quantised(self, w: Tensor, kernel: Kernel = identity) -> Float8:
        """A weight in this form."""
        fn = quantise_blocks if self.recipe == "mx" else quantise_columns if self.dim else quantise_rows
        data, scale = kernel(fn)(w.detach())
        return Float8(data, scale, self)


class Float8(NamedTuple):
    """A weight (K, N): ``data`` times ``scale``, in e4m3 and fp32. ``scale`` None: in the dtype of the computation, to be
    quantised on its way into a product whose derivatives can be taken (`straight_through`).
    """

    data: Tensor
    scale: Tensor | None
    form: Form

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The matrix that it stands for; exact in bf16."""
        assert self.scale is not None
        return dequantise(self.data, self.scale, dtype)


class Quantise(NamedTuple):
    """Which parameters come into use in float8: the form of each, by path, and what compiles the casts."""

    forms: Mapping[str, Form] = {}
    kernel: Kernel = identity

    def __call__(self, path: str, p: Tensor) -> Float8 | None:
        """The quantised weight, None for a parameter that is not to be."""
        return self.forms[path].quantised(p, self.kernel) if path in self.forms else None

    def parts(self, path: str, p: Tensor) -> tuple[Tensor, Tensor]:
        """Of a parameter that is to be quantised its entries, as bytes, and its scales."""
        data, scale, _ = self.forms[path].quantised(p, self.kernel)
        assert scale is not None
        return data.view(torch.uint8), scale

    def whole(self, path: str, entries: Tensor, scale: Tensor) -> Float8:
        """The weight that these are the parts of."""
        return Float8(entries.view(E4M3), scale, self.forms[path])


# --- casts ------------------------------------------------------------------------------------------------------------


def power_of_two(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest power of two that ``largest`` (>= 0) is at most 448 times of, and its inverse, both fp32.

    By integers, so that compiled and eager code give the same bits. What is not finite stays what it is, so that nobody takes
    its product for a number; of 0 it is the smallest normal number.

    >>> power_of_two(torch.tensor([448.0, 449.0, 1.0]))[0]
    tensor([1.0000, 2.0000, 0.0039])
    """
    largest = largest.float()
    exponent = (((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp(1, 253)  # 448 is 1.75 · 2^8, and 1.75 is 0x600000
    scale, inverse = ((x << 23).view(torch.float32) for x in (exponent, 254 - exponent))
    return torch.where(largest.isfinite(), scale, largest), inverse


def quantise_rows(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """Rows of ``x`` (M, K) in e4m3, and their scales (M, 1); with ``factors`` (K,), that of the product with each of them."""
    found: list[Tensor] = []
    for factor in factors or (None,):
        y = x.float() if factor is None else x.float() * factor
        scale, inverse = power_of_two(y.abs().amax(-1, keepdim=True))
        found += [(y * inverse).to(E4M3), scale]
    return tuple(found)


def quantise_each_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`quantise_rows` of each."""
    return tuple(part for x in tensors for part in quantise_rows(x))


def quantise_each_groups(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`quantise_groups` of each."""
    return tuple(part for x in tensors for part in quantise_groups(x))


def quantise_columns(w: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of ``w`` (K, N) in e4m3, and their scales (1, N)."""
    scale, inverse = power_of_two(w.float().abs().amax(0, keepdim=True))
    return (w.float() * inverse).to(E4M3), scale


def quantise_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each 32 entries of the rows of ``x`` (M, K) in e4m3, and their scales (M, K / 32)."""
    y = x.float().unflatten(1, (-1, BLOCK))
    scale, inverse = power_of_two(y.abs().amax(-1))
    return (y * inverse[..., None]).to(E4M3).flatten(1), scale


def quantise_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Each 32 x 32 entries of ``w`` (K, N) in e4m3, and their scales (K / 32, N / 32)."""
    y = w.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale, inverse = power_of_two(y.abs().amax((1, 3)))
    return (y * inverse[:, None, :, None]).to(E4M3).flatten(2).flatten(0, 1), scale


def dequantise(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``data`` (M, K) times its scales, each of which is for the same part of rows and of columns."""
    for dim, (length, parts) in enumerate(zip(data.shape, scale.shape, strict=True)):
        if 1 < parts < length:
            scale = scale.repeat_interleave(length // parts, dim)
    return data.to(dtype) * scale.to(dtype)


# --- products ---------------------------------------------------------------------------------------------------------


def products(kernel: Kernel, x: Tensor, weights: Sequence[Float8]) -> list[Tensor]:
    """``x`` (M, K), its rows quantised, times each of ``weights`` (K, N): (M, N) each, in the dtype of x."""
    factors, scales = _placed(weights, 0)
    if weights[0].form.recipe == "mx":
        rows = [kernel(quantise_groups)(x)] * len(weights)
    elif None in factors:  # one form for all
        rows = [kernel(quantise_rows)(x)] * len(weights)
    else:
        rows = _pairs(kernel(quantise_rows)(x, *factors))  # x is read once
    columns = [w.data for w in weights]
    if x.device.type != "cpu":
        columns = [w.T for w in kernel(transposed)(*columns)]
    return [
        scaled_product(kernel, a, a_scale, b, b_scale, weights[0].form, x.dtype)
        for (a, a_scale), b, b_scale in zip(rows, columns, scales, strict=True)
    ]


def transposed_products(kernel: Kernel, d_out: Sequence[Tensor], weights: Sequence[Float8]) -> Tensor:
    """The sum over ``weights`` (K, N) of the cotangents ``d_out`` (M, N), their rows quantised, times the transposed weight."""
    factors, scales = _placed(weights, 1)
    if weights[0].form.recipe == "mx":
        rows = _pairs(kernel(quantise_each_groups)(*d_out))
    elif None in factors:
        rows = _pairs(kernel(quantise_each_rows)(*d_out))
    else:
        rows = [kernel(quantise_rows)(d, factor) for d, factor in zip(d_out, factors, strict=True)]
    parts = [
        scaled_product(kernel, a, a_scale, w.data.T, b_scale, w.form, d_out[0].dtype)
        for (a, a_scale), b_scale, w in zip(rows, scales, weights, strict=True)
    ]
    return parts[0] if len(parts) == 1 else kernel(add_all)(*parts)


def _pairs(found: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [*zip(found[::2], found[1::2], strict=True)]


def _placed(weights: Sequence[Float8], summed: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """For a product that sums over a dim of ``weights``, all of the same form: what goes into the other factor (K,), or None,
    and the scales that are left, (1, N) or of blocks.
    """
    scales = [w.scale for w in weights if w.scale is not None]
    form = weights[0].form
    if form.recipe == "mx":
        return [None] * len(scales), [scale.T if summed else scale for scale in scales]
    if form.dim != summed:
        return [None] * len(scales), [scale.view(1, -1) for scale in scales]
    widths = [w.data.shape[1 - summed] for w in weights]
    ones = scales[0].new_ones(1, max(widths))
    return [scale.flatten() for scale in scales], [ones[:, :width] for width in widths]


def scaled_product(
    kernel: Kernel, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, form: Form, dtype: torch.dtype
) -> Tensor:
    """``a`` (M, K) times ``b`` (K, N) with their scales, in ``dtype``; on a GPU the columns of b lie one behind the other."""
    if a.device.type == "cpu":
        return dequantise(a, a_scale, dtype) @ dequantise(b, b_scale, dtype)
    if form.recipe == "rowwise":  # only fast accumulation has kernels that are worth it, as torchao says
        return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=True)
    block, swizzle = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    scales = (x.view(torch.float8_e8m0fnu) for x in (kernel(tiled)(a_scale), kernel(tiled_blocks)(b_scale)))
    return F.scaled_mm(a, b, next(scales), block, next(scales), block, swizzle, swizzle, output_dtype=dtype)


def transposed(*weights: Tensor) -> tuple[Tensor, ...]:
    """Each with its columns as rows: so a GPU's tensor cores want the second factor of a product."""
    return tuple(w.T.contiguous() for w in weights)


def add_all(first: Tensor, *more: Tensor) -> Tensor:
    """The sum of all, in at least fp32 on the way."""
    total = first.to(torch.promote_types(first.dtype, torch.float32))
    for x in more:
        total = total + x
    return total.to(first.dtype)


def tiled(scale: Tensor) -> Tensor:
    """Scales (M, K / 32) as bytes, the exponents (e8m0), in the order that Blackwell's tensor cores read them in: tiles of
    128 x 4, in which rows r, r + 32, r + 64 and r + 96 lie side by side (cuBLAS, "1D block scaling factors layout").
    """
    rows, columns = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    padded = F.pad(exponents, (0, 4 * columns - scale.shape[1], 0, 128 * rows - scale.shape[0]))
    return padded.view(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4).flatten()


def tiled_blocks(scale: Tensor) -> Tensor:
    """The same of a weight's scales (K / 32, N / 32), one for each of its columns."""
    return tiled(scale.T.repeat_interleave(BLOCK, 0))


# --- the definition, of which derivatives can be taken ----------------------------------------------------------------


def straight_through(x: Tensor, w: Float8) -> Tensor:
    """``x`` (M, K) times a weight (K, N) that is not quantised yet: the product of both quantised.

    The derivative by x is the quantised cotangent times the quantised weight, that by the weight is xᵀ times the cotangent,
    neither of them quantised; and derivatives of these take quantising for the identity (Bengio et al. 2013).
    """
    return _Product.apply(x, w.data, w.form)


class _Product(AutogradFunction):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, form: Form) -> Tensor:
        return products(identity, x, [form.quantised(w)])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, ctx.form = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return _Transposed.apply(g, w, ctx.form), x.T @ g, None


class _Transposed(AutogradFunction):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, w: Tensor, form: Form) -> Tensor:
        return transposed_products(identity, [g], [form.quantised(w)])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, w, ctx.form = inputs
        ctx.save_for_backward(g, w)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        g, w = ctx.saved_tensors
        return _Product.apply(d, w, ctx.form), d.T @ g, None


# --- what can be quantised --------------------------------------------------------------------------------------------


def check_shape(path: str, shape: Sequence[int], form: Form, parts: Mapping[int, int] | None = None) -> None:
    """ValueError for a weight whose dims, divided into ``parts`` by dim, are no multiples of what the recipe takes."""
    local = tuple(length // (parts or {}).get(dim, 1) for dim, length in enumerate(shape))
    if any(length % form.multiple for length in local):
        raise ValueError(
            f"{path} is {' x '.join(map(str, local))} on a rank, and float8 by {form.recipe!r} takes multiples of "
            f"{form.multiple}; leave it out: --recipe.float8-skip '*.{path.rsplit('.', 1)[-1]}'"
        )


def tensors_of(weights: Collection[Any]) -> list[Tensor]:
    """What autograd sees of weights: of a quantised one its entries."""
    return [w.data if isinstance(w, Float8) else w for w in weights]
