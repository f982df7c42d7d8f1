"""A transformer out of its config: the specs of its parameters, and its loss as a chain of stages.

    x = embed[ids];   for each block, part after part;   head(norm(x))

A stage is the embedding, a part of a block (`olmo_fn.models.blocks`), or the head.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import NOTHING, PLAIN, Aux, Backend, Batch, Chain, Metric, Stage, add_metrics, agreed
from olmo_fn.kernels.attention import document_starts
from olmo_fn.kernels.attention_cp import positions_of
from olmo_fn.kernels.packing import Packing
from olmo_fn.mesh.axis import Axes, CPMethod
from olmo_fn.mesh.collectives import all_gather
from olmo_fn.models import multi_token
from olmo_fn.models.batch import TokenBatch
from olmo_fn.models.blocks import Part
from olmo_fn.models.config import Model
from olmo_fn.nn.context import Context
from olmo_fn.nn.cross_entropy import capped, cross_entropy
from olmo_fn.nn.embedding import embedding
from olmo_fn.nn.linear import Weight, merged
from olmo_fn.nn.norm import Norm
from olmo_fn.nn.sublayer import Sublayer, with_aux
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


class Layer(NamedTuple):
    """A block of the model, built: its parts, and the sublayers that they run."""

    parts: tuple[Part, ...]
    sublayers: tuple[Sublayer, ...]

    def specs(self, norm: Norm, d_model: int) -> Tree:
        """The block's parameters: a subtree for each sublayer, then what the parts use beside them."""
        every: Tree = {sub.name: sub.specs for sub in self.sublayers}
        for part in self.parts:
            every |= {name: norm.specs(d_model) for name in part.norms}
            every |= {name: spec for name, (spec, _) in part.others.items()}
        return {name: every[name] for part in self.parts for name in names_of(part)}


def names_of(part: Part) -> list[str]:
    """What a part uses of its block's parameters: subtrees of sublayers, norms, and others."""
    return [*(sub.name for sub in part.sublayers), *part.norms, *part.others]


@lru_cache(16)
def layers(cfg: Model) -> tuple[Layer, ...]:
    """The blocks of a model, built from its config."""
    found = []
    for i, block in enumerate(cfg.layers):
        parts = block.parts(cfg, i)
        sublayers: dict[str, Sublayer] = {}
        for sub in (sub for part in parts for sub in part.sublayers):
            if sublayers.setdefault(sub.name, sub) is not sub:
                raise ValueError(f"block {i} has two sublayers of the name {sub.name!r}; give one another name")
        found.append(Layer(parts, tuple(sublayers.values())))
    return tuple(found)


def specs(cfg: Model) -> Tree:
    """The parameters of a model, by path: ``embed``, ``blocks.<i>.…``, ``head.norm``, and ``head.w_out`` unless tied."""
    norm, V = cfg.norm.build(cfg.norm_eps), cfg.vocab_size
    head: Tree = {"norm": norm.specs(cfg.d_model)} if cfg.head.norm else {}
    if not cfg.tie_embeddings:
        std = cfg.init_std if cfg.init_method == "normal" else cfg.d_model**-0.5
        head["w_out"] = Spec((V, cfg.d_model), ("vocab", "embed"), Init("trunc_normal", std))
    if cfg.head.bias:
        head["bias"] = Spec((V,), ("vocab",), Init("zeros"))
    if cfg.head.scales:
        head["scales"] = Spec((V,), ("vocab",), Init("constant", value=cfg.d_model**-0.5))
    return {
        "embed": Spec((V, cfg.d_model), ("vocab", "embed"), _embed_init(cfg)),
        **({"embed_norm": norm.specs(cfg.d_model)} if cfg.embed_norm else {}),
        "blocks": {str(i): layer.specs(norm, cfg.d_model) for i, layer in enumerate(layers(cfg))},
        "head": head,
        **({"mtp": multi_token.specs(cfg, layers(cfg)[-1])} if cfg.multi_token.depth else {}),
    }


def _embed_init(cfg: Model) -> Init:
    if cfg.init_method == "normal":
        return Init("trunc_normal", cfg.init_std)
    return Init("normal", cfg.d_model**-0.5 if cfg.init_method == "normalized" else 1.0)


def loss(cfg: Model, *, z_loss: float = 0.0, sources: int = 0) -> Chain:
    """The training loss as a chain: ``(params, batch) -> (sum of losses, metrics)``.

    ``batch`` holds ``input_ids`` and ``labels`` (B, T) int64, and optionally ``documents`` (B, T): numbers that tell the
    documents of a row apart. With them attention stays inside a document and positions restart in each. A model with dropout
    drops where the batch has ``rows`` (B,) int64, numbers that no other sequence of the run has. With ``sources``, a number of
    them, the batch says by ``sources`` (B,) int64 which one each sequence is from, and the metrics ``source_ce`` and
    ``source_tokens`` (sources,) have the sum of the cross entropy and the labels of each.

    With tensor parallelism the stream between stages is a rank's part of the sequence (Korthikanti et al. 2022, sequence
    parallelism), with context parallelism everything but the mixing of positions is. The sum is that of this rank's tokens.
    """
    try:
        cfg.check()
    except ValueError as error:  # here there are fields, and no flags
        raise ValueError(re.sub(r"--model\.([\w-]+)", lambda flag: flag[1].replace("-", "_"), str(error))) from None
    built = layers(cfg)
    blocks = [_block_stage(part, i) for i, layer in enumerate(built) for part in layer.parts]
    declared = specs(cfg)
    rest = tuple((name, f"head.{name}") for name in declared["head"] if name != "w_out")
    more = (("mtp", "mtp"), ("embed", "embed")) if cfg.multi_token.depth else ()
    w_out = "embed" if cfg.tie_embeddings else "head.w_out"
    by_source = dict.fromkeys(("source_ce", "source_tokens"), Metric("sum", (sources,))) if sources else {}
    norm, reported = cfg.norm.build(cfg.norm_eps), ("ce", "z", *(["mtp"] if more else []))

    def embed(p: Tree, x: None, ctx: Context) -> tuple[Tensor, Aux]:
        return embedded(cfg, p, ctx), NOTHING

    def head(p: Tree, x: Tensor, ctx: Context) -> tuple[None, Aux]:
        assert ctx.labels is not None
        h = all_gather(norm.once(ctx, p["norm"], x) if cfg.head.norm else x, 1, ctx.backend.axes.tp)
        matrix, h = with_bias_and_scales(p, h)
        loss, metrics = cross_entropy(ctx, matrix, h, ctx.labels, cfg.vocab_size, z_loss, cfg.head.cap, sources)
        if not more:
            return None, Aux(loss, metrics)
        aux = multi_token.further(cfg, built[-1], p, x, ctx)
        assert aux.loss is not None
        return None, Aux(loss + aux.loss, {**metrics, **aux.metrics})

    return Chain(
        partial(context, cfg, built),
        (
            Stage("embed", tuple((name, name) for name in ("embed", "embed_norm") if name in declared), embed),
            *blocks,
            Stage("head", (*rest, ("w_out", w_out), *more), head, metrics=dict.fromkeys(reported, Metric()) | by_source),
        ),
        empty=partial(_empty, cfg.d_model),
        uncast=frozenset({"embed", w_out}),
        looked_up=frozenset({"embed"} - {w_out}),
        check=partial(_check_axes, built),
        takes=TokenBatch(cfg.vocab_size),
        specs=declared,
    )


def embedded(cfg: Model, p: Tree, ctx: Context) -> Tensor:
    """The stream (B, T, D) before the first block, of the parameters ``embed`` and ``embed_norm``."""
    x = embedding(ctx, p["embed"], cfg.vocab_size, cfg.d_model)
    x = x if cfg.embed_scale is None else x * cfg.embed_scale
    return cfg.norm.build(cfg.norm_eps).once(ctx, p["embed_norm"], x) if cfg.embed_norm else x


def with_bias_and_scales(p: Tree, h: Tensor) -> tuple[Weight, Tensor]:
    """A matrix and h (..., D), whose product has the head's scales of logits and their bias in it, if it has any."""
    matrix = p["w_out"]
    if "scales" not in p and "bias" not in p:
        return matrix, h
    w = merged(matrix)
    if "scales" in p:
        w = w * (h.shape[-1] ** 0.5 * p["scales"])[:, None]
    if "bias" in p:
        w, h = torch.cat((w, p["bias"][:, None].to(w.dtype)), -1), torch.cat((h, torch.ones_like(h[..., :1])), -1)
    return w, h


def _block_stage(part: Part, layer: int) -> Stage:
    """A part of a block as a stage; vectors among its metrics get the block's number."""
    names = names_of(part)

    def renamed(name: str, metric: Metric) -> str:
        return f"{name}/{layer}" if metric.shape else name

    declared = agreed((sub.name, {renamed(n, m): m for n, m in sub.metrics.items()}) for sub in part.sublayers)

    def fn(p: Tree, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        total = NOTHING

        def run(sub: Sublayer, x: Tensor) -> Tensor:
            nonlocal total
            y, aux = with_aux(sub.on(ctx.backend.axes.tp)(p[sub.name], x, ctx))
            metrics = {renamed(n, sub.metrics.get(n, Metric())): value for n, value in aux.metrics.items()}
            losses = [loss for loss in (total.loss, aux.loss) if loss is not None]
            total = Aux(sum(losses[1:], losses[0]) if losses else None, add_metrics(dict(total.metrics), metrics, declared))
            return y

        out = part.fn(p, x, run, ctx)
        return out, total

    return Stage(part.name, tuple((name, f"blocks.{layer}.{name}") for name in names), fn, layer, declared)


def _empty(d_model: int, ctx: Context) -> Tensor:
    B, T = ctx.input_ids.shape
    return torch.empty(B, T // ctx.backend.axes.tp.size, d_model, dtype=ctx.backend.dtype, device=ctx.input_ids.device)


def _check_axes(built: tuple[Layer, ...], axes: Axes, cp_method: CPMethod) -> None:
    for i, layer in enumerate(built):
        for sub in layer.sublayers:
            if axes.cp.size > 1 and "cp" not in sub.divided:
                raise ValueError(
                    f"--mesh.cp is {axes.cp.size}, but {sub.name!r} of block {i} does not say how it is divided over cp "
                    "(`Sublayer.divided`); leave --mesh.cp at 1"
                )


def context(cfg: Model, built: tuple[Layer, ...], batch: Batch, backend: Backend) -> Context:
    """What all stages share: ids and labels of this rank's positions, the positions, documents, and the sublayers' tables."""
    T = batch["input_ids"].shape[1]
    local = positions_of(T, backend.axes.cp, batch["input_ids"].device)
    documents = document_starts(batch["documents"]) if "documents" in batch else None
    positions = local if documents is None else local - documents[:, local]
    labels = batch["labels"][:, local] if "labels" in batch else None
    depth = cfg.multi_token.depth if labels is not None else 0
    ahead = tuple(multi_token.Ahead(*(x[:, local] for x in part)) for part in multi_token.ahead(batch, depth)) if depth else ()
    ids, rows, tables = batch["input_ids"][:, local], batch.get("rows"), tables_of(built, positions)
    packing = Packing.in_batch(batch)
    return Context(
        backend, ids, labels, positions, documents, rows, local, ahead, batch.get("sources"), tables, packing=packing
    )


def tables_of(built: tuple[Layer, ...], positions: Tensor) -> dict[Any, Any]:
    """What the sublayers want to know of the positions, each key computed once."""
    makers = {key: make for layer in built for sub in layer.sublayers for key, make in sub.tables.items()}
    return {key: make(positions) for key, make in makers.items()}


def logits(cfg: Model, params: Tree, batch: Batch, backend: Backend = PLAIN) -> Tensor:
    """Logits (B, T, V) of ``batch["input_ids"]`` (B, T); as in decoding, experts drop nothing (`olmo_fn.nn.moe`)."""
    TokenBatch(cfg.vocab_size, labels=False)(batch)
    chain, x = loss(cfg), None
    ctx = chain.context({name: given for name, given in batch.items() if name != "labels"}, backend)
    for stage in chain.stages[:-1]:
        x, _ = stage.fn({key: tree.at(params, path) for key, path in stage.params}, x, ctx)
    assert x is not None
    return head_logits(cfg, params, x)


def head_logits(cfg: Model, params: Tree, x: Tensor) -> Tensor:
    """Logits (..., V) of the last block's output ``x`` (..., D)."""
    p, ctx = {**params["head"], "w_out": output_matrix(params)}, Context(PLAIN, x, None, x)
    matrix, h = with_bias_and_scales(p, cfg.norm.build(cfg.norm_eps)(ctx, p["norm"], x) if cfg.head.norm else x)
    return capped(h @ merged(matrix).T, cfg.head.cap)


def output_matrix(params: Tree) -> Tensor:
    """The head's matrix (V, D): its own, or the embedding when tied."""
    return params["head"].get("w_out", params["embed"])


def extend_layer(layer: Layer, p: Tree, x: Tensor, ctx: Context, caches: Tree) -> tuple[Tensor, Tree]:
    """The same block over new columns x (B, T, D) while decoding: its sublayers read and write ``caches``, by their names."""
    caches = dict(caches)

    def run(sub: Sublayer, x: Tensor) -> Tensor:
        y, caches[sub.name] = sub.decode(p[sub.name], x, ctx, caches[sub.name])
        return y

    for part in layer.parts:
        x = part.fn(p, x, run, ctx)
    return x, caches
