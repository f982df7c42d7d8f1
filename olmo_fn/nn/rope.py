"""Rotary position embedding (Su et al. 2021, RoFormer), the half-rotation form of OLMo and Llama, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position · theta^(-2i/head_dim)``.

    ``positions`` (..., T) of integers; both results are (..., T, head_dim/2) in fp32, since bf16 cannot even
    tell position 257 from 256.

    >>> cos, sin = rope_table(torch.arange(3), head_dim=4, theta=10_000.0)
    >>> cos.shape
    torch.Size([3, 2])
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    inverse_frequency = 1.0 / theta ** (even / head_dim)
    angles = positions.float()[..., None] * inverse_frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[i], x[i + head_dim/2])`` by the table's angles.

    ``x`` (B, T, H, K); ``cos``, ``sin`` (T, K/2) or (B, T, K/2). The result has ``x``'s dtype.
    """
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]  # one angle for all heads
    a, b = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
