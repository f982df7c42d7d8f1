"""Multi-token prediction: modules behind the last block that predict further tokens than the next (DeepSeek-V3, section 2.2).

Module k = 1, 2, … takes what the one before it gave (the first takes the last block's output) at position t, and the embedding
of token t + k, and predicts token t + k + 1 with the model's own embedding and head:

    h = block(w_join [norm(h); norm(embed[ids[t + k]])]);   logits = head(norm(h))

B batch, T positions, R of them on a rank, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from olmo_fn.core.chain import IGNORE, Aux, Batch
from olmo_fn.mesh.collectives import all_gather
from olmo_fn.models.config import Model
from olmo_fn.nn.context import Context
from olmo_fn.nn.cross_entropy import cross_entropy
from olmo_fn.nn.embedding import embedding
from olmo_fn.nn.sublayer import Result, Sublayer, with_aux
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

if TYPE_CHECKING:
    from olmo_fn.models.transformer import Layer


class Ahead(NamedTuple):
    """What a module wants of the batch: ids k positions on, and the labels there, `IGNORE` beyond the end or the document."""

    input_ids: Tensor
    labels: Tensor


def ahead(batch: Batch, depth: int) -> tuple[Ahead, ...]:
    """For each module its ids and labels (B, T).

    >>> ids = torch.tensor([[1, 2, 3]])
    >>> [part.tolist() for part in ahead({"input_ids": ids, "labels": ids + 1}, 1)[0]]
    [[[2, 3, 0]], [[3, 4, -100]]]
    """
    ids, labels, found = batch["input_ids"], batch["labels"], []
    for k in range(1, depth + 1):
        some_ids, some_labels = torch.zeros_like(ids), torch.full_like(labels, IGNORE)
        some_ids[:, :-k], some_labels[:, :-k] = ids[:, k:], labels[:, k:]
        if "documents" in batch:
            numbers = batch["documents"]
            some_labels[:, :-k] = some_labels[:, :-k].where(numbers[:, k:] == numbers[:, :-k], IGNORE)
        found.append(Ahead(some_ids, some_labels))
    return tuple(found)


def join(cfg: Model) -> Sublayer:
    """The product that takes two streams, side by side (B, T, 2D), to one."""
    shape = 2 * cfg.d_model, cfg.d_model
    std = cfg.init_std if cfg.init_method in ("normal", "llama", "llama_depth") else shape[0] ** -0.5

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        return ctx.linear(x, p["w_join"])[0]

    specs = {"w_join": Spec(shape, ("streams", "embed"), Init("trunc_normal", std))}
    return Sublayer("join", specs, apply, flops=lambda length: 2 * length * shape[0] * shape[1], divided=("cp",))


def specs(cfg: Model, layer: Layer) -> Tree:
    """The modules' parameters: ``1``, ``2``, … with their join, three norms, and a block."""
    norm = cfg.norm.build(cfg.norm_eps)
    norms = {name: norm.specs(cfg.d_model) for name in ("stream_norm", "embed_norm", "head_norm")}
    module = {"join": join(cfg).specs, **norms, "block": layer.specs(norm, cfg.d_model)}
    return {str(k): module for k in range(1, cfg.multi_token.depth + 1)}


def flops(cfg: Model, layer: Layer, length: int) -> int:
    """FLOPs of a forward pass of all modules over a sequence, their heads included."""
    one = sum(sub.flops(length) for sub in (join(cfg), *layer.sublayers)) + 2 * cfg.vocab_size * cfg.d_model * length
    return cfg.multi_token.depth * one


def further(cfg: Model, layer: Layer, p: Tree, x: Tensor, ctx: Context) -> Aux:
    """The modules' loss, ``weight / depth`` times the sum of their cross entropies, with that as the metric ``mtp``.

    ``p`` has ``mtp``, ``embed`` and ``w_out``; ``x`` (B, R, D) is the last block's output.
    """
    norm, sub, tp = cfg.norm.build(cfg.norm_eps), join(cfg), ctx.backend.axes.tp
    share = cfg.multi_token.weight / cfg.multi_token.depth
    hint = ctx.backend.loss_weight
    scaled = replace(ctx.backend, loss_weight=None if hint is None else hint * share)
    losses: list[Tensor] = []

    def run(inner: Sublayer, h: Tensor) -> Tensor:
        y, aux = with_aux(inner.on(tp)(module["block"][inner.name], h, ctx))
        losses.extend([] if aux.loss is None else [aux.loss])
        return y

    for k, part in enumerate(ctx.ahead, 1):
        module = p["mtp"][str(k)]
        token = embedding(replace(ctx, input_ids=part.input_ids), p["embed"], cfg.vocab_size, cfg.d_model)
        both = torch.cat((norm.once(ctx, module["stream_norm"], x), norm.once(ctx, module["embed_norm"], token)), -1)
        x, _ = with_aux(sub.on(tp)(module["join"], both, ctx))
        for piece in layer.parts:
            x = piece.fn(module["block"], x, run, ctx)
        h = all_gather(norm.once(ctx, module["head_norm"], x), 1, tp)
        own = replace(ctx, backend=scaled)
        ce, _ = cross_entropy(own, p["w_out"], h, part.labels, cfg.vocab_size, cap=cfg.head.cap)
        losses.append(share * ce)
    total = sum(losses[1:], losses[0])
    return Aux(total, {"mtp": total.detach()})
