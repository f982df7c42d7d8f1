"""Routers of mixtures of experts: which experts each token goes to, with which weights, and what keeps their loads even.

B batch, R positions of a rank, N tokens, D model width, E experts, k of them for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.core.chain import Metric, wide
from olmo_fn.core.random import of_entries
from olmo_fn.mesh.axis import Axes
from olmo_fn.mesh.collectives import all_gather, enter, psum
from olmo_fn.nn.context import Context
from olmo_fn.tree import Tree

Gating: TypeAlias = Literal["softmax", "sigmoid"]
Over: TypeAlias = Literal["batch", "sequence"]
MULTIPLE = 8  # of which a capacity is, as in OLMo-core


@dataclass(frozen=True, kw_only=True)
class RouterForm:
    """A layer's router in numbers; see `olmo_fn.models.settings.moe.MoE` for what they mean."""

    experts: int
    top_k: int
    gating: Gating = "softmax"
    weight_norm: float | None = None
    weight_scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0
    place: int = 0
    """Number of the layer, by which jitter differs."""
    balance: float = 0.0
    balance_over: Over = "batch"
    z: float = 0.0
    biased: bool = False
    capacity_factor: float | None = None
    capacity_over: Over = "sequence"


class Routed(NamedTuple):
    """What a router says of its tokens: ``experts`` (B, R, k) int64 and ``weights`` (B, R, k) in at least fp32; ``loss``, a sum
    over them, or None; and what it reports.
    """

    experts: Tensor
    weights: Tensor
    loss: Tensor | None
    metrics: dict[str, Tensor]


METRICS = {"routed": Metric("sum"), "router_entropy": Metric("sum"), "router_balance": Metric(), "router_z": Metric()}
"""Those of every router, added up over the layers: tokens, the entropy of their scores, and what it adds to the loss. Beside
them is ``load``, of each layer."""


def route(ctx: Context, form: RouterForm, p: Tree, x: Tensor) -> Routed:
    """Send the tokens of ``x`` (B, R, D) to experts; p has ``w_router`` (D, E) and, if ``form.biased``, ``router_bias`` (E,).

        scores = softmax(x w_router), or sigmoid(x w_router) + 1e-7          all in at least fp32
        chosen: the k largest of scores + router_bias; of equal ones those with lower numbers
        weights = scores of the chosen / their p-norm · weight_scale

    With ``groups`` the experts are chosen from the ``top_groups`` groups whose two best add up to the most (DeepSeek-V3, Liu et
    al. 2024, section 2.1.2). ``jitter`` multiplies entries of x by numbers between 1 - jitter and 1 + jitter while training
    (Fedus et al. 2021). ``loss`` has two terms:

        balance / k · E · Σ over e of  n_e · mean of the tokens' scores of e         (Shazeer et al. 2017; Fedus et al. 2021)
        z · Σ over tokens of  logsumexp(logits)²                                     (Zoph et al. 2022)

    where n_e tokens went to e, and tokens are those of a sequence, or of all sequences, on all ranks, that are computed at once
    (``balance_over``). Scores of a sigmoid are first divided by their sum.
    """
    axes = ctx.backend.axes
    w = enter(p["w_router"], axes.tp)  # each rank routes its own positions
    x = _jittered(ctx, form, x)
    logits = wide(x) @ wide(w)
    scores = logits.softmax(-1) if form.gating == "softmax" else logits.sigmoid() + 1e-7
    experts = choose(form, scores.detach() + p["router_bias"] if form.biased else scores.detach())
    weights = scores.gather(-1, experts)
    if form.weight_norm is not None:
        weights = weights / torch.linalg.vector_norm(weights, form.weight_norm, dim=-1, keepdim=True)
    if form.weight_scale != 1:
        weights = weights * form.weight_scale
    share = scores if form.gating == "softmax" else scores / scores.sum(-1, keepdim=True)
    loads = torch.zeros_like(scores).scatter(-1, experts, torch.ones_like(weights)).sum(1)  # (B, E) of this rank's positions
    metrics = {
        "load": psum(loads.sum(0), axes.tp),
        "router_entropy": psum(_entropy(share.detach()), axes.tp),
        "routed": loads.new_full((), x.shape[0] * x.shape[1] * axes.tp.size),
    }
    losses = {}
    if form.balance:
        losses["router_balance"] = psum(form.balance * balance(form, share, loads, axes), axes.tp)
    if form.z:
        losses["router_z"] = psum(form.z * logits.logsumexp(-1).square().sum(), axes.tp)
    metrics |= {name: loss.detach() for name, loss in losses.items()}
    return Routed(experts, weights, sum(losses.values()) if losses else None, metrics)  # type: ignore[arg-type]


def choose(form: RouterForm, scores: Tensor) -> Tensor:
    """The numbers (..., k) of the k largest of ``scores`` (..., E), the largest first; of equal ones the lowest, everywhere.

    >>> choose(RouterForm(experts=4, top_k=2), torch.tensor([1.0, 2.0, 2.0, 2.0])).tolist()
    [1, 2]
    >>> choose(RouterForm(experts=4, top_k=2, groups=2), torch.tensor([9.0, 0.0, 5.0, 5.0])).tolist()
    [2, 3]
    """
    if form.groups > 1:
        grouped = scores.unflatten(-1, (form.groups, -1))
        best = grouped.sort(-1, descending=True).values[..., :2].sum(-1)
        kept = _largest(best, form.top_groups)
        outside = torch.ones_like(best).scatter(-1, kept, torch.zeros_like(best[..., : form.top_groups])) > 0
        scores = grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
    return _largest(scores, form.top_k)


def _largest(scores: Tensor, k: int) -> Tensor:
    """`torch.topk` breaks ties in another way for other shapes and devices; a stable sort in the order of the numbers."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def balance(form: RouterForm, share: Tensor, loads: Tensor, axes: Axes) -> Tensor:
    """The loss that is smallest for even loads, of this rank's tokens: ``share`` (B, R, E) of the scores, ``loads`` (B, E)."""
    here = axes.tp.size * axes.cp.size  # ranks that share a sequence
    tokens = share.shape[1] * here
    loads = psum(loads, axes.tp)
    if form.balance_over == "sequence":
        loads = psum(loads, axes.cp)
    else:
        loads = psum(loads.sum(0), axes.tokens)
        tokens *= share.shape[0] * axes.data.size
    return form.experts / form.top_k * (loads * share.sum(1) / tokens).sum()


def _entropy(share: Tensor) -> Tensor:
    return -(share * share.clamp(min=1e-30).log()).sum()


def _jittered(ctx: Context, form: RouterForm, x: Tensor) -> Tensor:
    if not form.jitter or ctx.rows is None:
        return x
    assert ctx.columns is not None
    columns = ctx.columns.chunk(ctx.backend.axes.tp.size)[ctx.backend.axes.tp.index]
    words = of_entries(ctx.rows, columns, x.shape[-1], (form.place, 0x317E))
    return x * (1 + form.jitter * (words * 2.0**-31 - 1)).to(x.dtype)


def capacity(form: RouterForm, tokens: int) -> int:
    """How many of ``tokens`` an expert takes at most: `capacity_factor` times its even share, up to a multiple of 8.

    >>> capacity(RouterForm(experts=6, top_k=2, capacity_factor=0.75), 48)
    16
    """
    assert form.capacity_factor is not None
    return -(-int(form.capacity_factor * form.top_k * tokens / form.experts) // MULTIPLE) * MULTIPLE


def within_capacity(ctx: Context, form: RouterForm, experts: Tensor) -> tuple[Tensor, int]:
    """Which choices ``experts`` (B, R, k), of the R positions that ranks of ``tp`` have together, are among the first of their
    expert in the order of tokens, a mask of that shape; and how many of one expert they can be. The order is that of the whole
    sequence, or of all sequences.
    """
    axes, (B, R, k), every = ctx.backend.axes, experts.shape, experts
    T = R * axes.cp.size
    columns = ctx.columns if ctx.columns is not None else ctx.positions
    if axes.cp.size > 1:  # ranks have pieces of the sequence that are no neighbours
        at = all_gather(columns, 0, axes.cp)
        every = torch.zeros_like(every.repeat(1, axes.cp.size, 1)).index_copy(1, at, all_gather(every, 1, axes.cp))
    groups = every.flatten(1)
    if form.capacity_over == "batch":
        groups = all_gather(every, 0, axes.data).flatten()[None]
    most = capacity(form, groups.shape[1] // k)
    kept = (ranks_of(groups, form.experts) < most).view(-1, T, k)
    if form.capacity_over == "batch":
        kept = kept.chunk(axes.data.size)[axes.data.index]
    kept = kept[:, columns] if axes.cp.size > 1 else kept
    return kept, min(most, B * R) if form.capacity_over == "batch" else B * min(most, R)


def ranks_of(experts: Tensor, E: int) -> Tensor:
    """Of each entry of ``experts`` (G, M), how many of the same expert are before it in its row.

    >>> ranks_of(torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]), 2).tolist()
    [[0, 0, 1, 2], [0, 1, 0, 1]]
    """
    G, M = experts.shape
    keys = (torch.arange(G, device=experts.device)[:, None] * E + experts).flatten()
    order = keys.argsort(stable=True)
    counts = torch.zeros(G * E, dtype=torch.int64, device=experts.device).index_add(0, keys, torch.ones_like(keys))
    starts = counts.cumsum(0) - counts
    places = torch.arange(G * M, device=experts.device) - starts[keys[order]]
    return torch.zeros_like(keys).scatter(0, order, places).view(G, M)
