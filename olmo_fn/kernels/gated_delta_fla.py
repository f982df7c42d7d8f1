"""The gated delta rule by the Triton kernels of the package fla-core, on a GPU. Nobody has run this on one."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from olmo_fn.kernels.packing import Packing

Rule: TypeAlias = Literal["auto", "chunked", "fla"]
"""What computes the rule: `olmo_fn.kernels.gated_delta.chunked`, or fla-core; auto: fla-core where it can."""


def choose_rule(name: Rule, x: Tensor, cp: int = 1, once: bool = True) -> Rule:
    """Which one computes it for inputs such as ``x`` on ``cp`` ranks, differentiable ``once`` or more often; ValueError where
    fla is asked for, and cannot.

    >>> import torch
    >>> choose_rule("auto", torch.zeros(1))
    'chunked'
    >>> choose_rule("fla", torch.zeros(1))
    Traceback (most recent call last):
    ValueError: --model.rule fla needs a GPU, and the tensors are on cpu; choose chunked, or auto
    """
    lack = _lack(x, cp, once)
    if name == "fla" and lack:
        raise ValueError(f"--model.rule fla {lack}; choose chunked, or auto")
    return "chunked" if name == "chunked" or lack else "fla"


def _lack(x: Tensor, cp: int, once: bool) -> str:
    if not x.is_cuda:
        return f"needs a GPU, and the tensors are on {x.device.type}"
    if find_spec("fla") is None:
        return "needs the package fla-core, which is not installed: pip install 'olmo-fn[fla]'"
    if not once:
        return "can be differentiated once, and not by --recipe.engine func"
    if cp > 1:
        return f"knows no states of other ranks, and --mesh.cp is {cp}"
    if x.is_meta or is_fake(x):
        return "computes no tensors without memory"
    return ""


def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: Tensor | None, packing: Packing | None) -> Tensor:
    """`olmo_fn.kernels.gated_delta.chunked_over` of one rank, with the backward of the package.

    ``documents`` (B, T): first positions of each position's document. The package wants positions before heads, as many key
    heads as value heads, and documents as cumulative lengths of a single row.
    """
    kernels: Any = importlib.import_module("fla.ops.gated_delta_rule")
    B, H, T, _ = v.shape
    q, k = (x.repeat_interleave(H // x.shape[1], 1) for x in (q, k))
    q, k, v, g, beta = (x.transpose(1, 2).contiguous() for x in (q, k, v, g, beta))
    lengths = None
    if documents is not None:
        q, k, v, g, beta = (x.flatten(0, 1)[None] for x in (q, k, v, g, beta))
        lengths = (packing or Packing.of(documents)).cumulative(0, T)
    out, _ = kernels.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=lengths)
    return out.view(B, T, H, -1).transpose(1, 2)
