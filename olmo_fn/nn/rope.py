"""Rotary position embedding (Su et al. 2021, RoFormer) in fp32, and what stretches it over longer contexts."""

from __future__ import annotations

from math import ceil, floor, log, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """The rotation of a layer's heads: of the first ``dims`` of each head, by ``position · theta^(-2i/dims)``.

    ``scaling``: settings with ``scale(inverse_frequency, theta)``, which gives other frequencies and a factor of cosines and
    sines (`olmo_fn.models.settings.rope_scaling`); None: as they are. ``interleaved``: pairs are neighbours (2i, 2i + 1), as
    in the complex form, and not (i, i + dims/2).
    """

    dims: int
    theta: float
    scaling: Any = None
    interleaved: bool = False

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (..., T, dims/2) of integer ``positions`` (..., T), in fp32."""
        return rope_table(positions, self.dims, self.theta, self.scaling)


def rope_table(positions: Tensor, head_dim: int, theta: float, scaling: Any = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position · theta^(-2i/head_dim)``.

    ``positions`` (..., T) of integers; both results are (..., T, head_dim/2) in fp32, since bf16 cannot even
    tell position 257 from 256. ``scaling`` as in `Rope`.

    >>> cos, sin = rope_table(torch.arange(3), head_dim=4, theta=10_000.0)
    >>> cos.shape
    torch.Size([3, 2])
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    inverse_frequency, factor = 1.0 / theta ** (even / head_dim), 1.0
    if scaling is not None:
        inverse_frequency, factor = scaling.scale(inverse_frequency, theta)
    angles = positions.float()[..., None] * inverse_frequency
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the pairs ``(x[i], x[i + dims/2])``, or neighbours, of the first dims of each head by the table's angles.

    ``x`` (B, T, H, K); ``cos``, ``sin`` (T, dims/2) or (B, T, dims/2); dims is at most K, and what is behind it stays. The
    result has ``x``'s dtype.

    >>> x, quarter = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), torch.zeros(1, 2)
    >>> rotate(x, quarter, quarter + 1).flatten(), rotate(x, quarter, quarter + 1, interleaved=True).flatten()
    (tensor([-3., -4.,  1.,  2.]), tensor([-2.,  1., -4.,  3.]))
    """
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]  # one angle for all heads
    dims, wide = 2 * cos.shape[-1], x if x.dtype == torch.float64 else x.float()
    turned = wide[..., :dims]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    first, second = a * cos - b * sin, b * cos + a * sin
    both = torch.stack((first, second), dim=-1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
    return (both if dims == x.shape[-1] else torch.cat((both, wide[..., dims:]), dim=-1)).to(x.dtype)


def stepwise(inverse_frequency: Tensor, factor: float, low: float, high: float, old_context: int) -> Tensor:
    """Frequencies of long waves divided by ``factor``, of short ones kept, and between them a mean of both (Llama 3.1).

    A wave is long if fewer than ``low`` of it fit into ``old_context``, and short if more than ``high`` do.
    """
    waves = old_context * inverse_frequency / (2 * pi)
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return inverse_frequency * (kept + (1 - kept) / factor)


def yarn(
    inverse_frequency: Tensor, theta: float, factor: float, beta_fast: float, beta_slow: float, old_context: int
) -> Tensor:
    """Frequencies of YaRN (Peng et al. 2023, section 3.2): divided by ``factor`` where fewer than ``beta_slow`` waves fit
    into ``old_context``, kept where more than ``beta_fast`` do, along a ramp over the dims between.
    """
    half = len(inverse_frequency)

    def dim(waves: float) -> float:
        return half * log(old_context / (2 * pi * waves)) / log(theta)

    low, high = max(floor(dim(beta_fast)), 0), min(ceil(dim(beta_slow)), 2 * half - 1)
    index = torch.arange(half, dtype=torch.float32, device=inverse_frequency.device)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inverse_frequency * (ramp / factor + (1 - ramp))
