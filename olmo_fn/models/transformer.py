"""The dense transformer of OLMo 2 and 3: specs of its parameters, and its loss as a chain of stages.

    x = embed[ids];   for each block:  x = x + norm(attention(x));  x = x + norm(feed_forward(x));   head(norm(x))

The norm is on each sublayer's *output* ("reordered norm", OLMo 2 report, section 3.2).
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.chain import Batch, Chain, Context, Function, Kernel, Metrics, Pullback, Stage, subtrees
from olmo_fn.kernels.attention_cp import attend_over, attend_over_vjp, positions_of
from olmo_fn.kernels.attention_tiles import document_starts
from olmo_fn.mesh.axis import ALONE, Axes, Axis, CPMethod, chunk
from olmo_fn.mesh.collectives import all_gather, enter, reduce_scatter
from olmo_fn.models.config import Model
from olmo_fn.nn.attention import attention_specs, merge_heads, merge_heads_vjp, place_heads, project, project_vjp
from olmo_fn.nn.cross_entropy import head_loss, head_vjp
from olmo_fn.nn.embedding import embed, embed_vjp
from olmo_fn.nn.feed_forward import feed_forward, feed_forward_specs, feed_forward_vjp
from olmo_fn.nn.norm import rms_norm, rms_norm_spec
from olmo_fn.nn.rope import rope_table
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


def specs(cfg: Model) -> Tree:
    """The parameters of a model, by path: ``embed``, ``blocks.<i>.…``, ``head.norm``, and ``head.w_out`` unless tied."""
    head: Tree = {"norm": rms_norm_spec(cfg.d_model)}
    if not cfg.tie_embeddings:
        std = cfg.init_std if cfg.init_method == "normal" else cfg.d_model**-0.5
        head["w_out"] = Spec((cfg.vocab_size, cfg.d_model), ("vocab", "embed"), Init("trunc_normal", std))
    return {
        "embed": Spec((cfg.vocab_size, cfg.d_model), ("vocab", "embed"), _embed_init(cfg)),
        "blocks": {str(layer): block_specs(cfg, layer) for layer in range(cfg.n_layers)},
        "head": head,
    }


def block_specs(cfg: Model, layer: int) -> Tree:
    """The parameters of one block; the standard deviations are OLMo-core's table of init methods."""
    std, residual, depth = cfg.init_std, cfg.init_std, 2 * cfg.n_layers
    std_up, std_down, std_out = std, std, std
    if cfg.init_method in ("llama", "llama_depth"):
        depth = depth if cfg.init_method == "llama" else 2 * (layer + 1)
        residual = std / depth**0.5
        std_up, std_down, std_out = residual, residual, residual
    elif cfg.init_method == "normalized":
        std = std_up = cfg.d_model**-0.5
        std_down = std_out = std / depth**0.5
    elif cfg.init_method == "fan_in":
        std = std_up = cfg.d_model**-0.5
        std_down, std_out = cfg.hidden_size**-0.5, (cfg.n_heads * cfg.k) ** -0.5
    return {
        "attention": attention_specs(cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.k, std=std, std_out=std_out),
        "attention_norm": rms_norm_spec(cfg.d_model),
        "feed_forward": feed_forward_specs(cfg.d_model, cfg.hidden_size, std=std, std_up=std_up, std_down=std_down),
        "feed_forward_norm": rms_norm_spec(cfg.d_model),
    }


def _embed_init(cfg: Model) -> Init:
    if cfg.init_method == "normal":
        return Init("trunc_normal", cfg.init_std)
    return Init("normal", cfg.d_model**-0.5 if cfg.init_method == "normalized" else 1.0)


def loss(cfg: Model, *, z_loss: float = 0.0, axes: Axes = ALONE) -> Chain:
    """The training loss as a chain: ``(params, batch) -> (sum of losses, metrics)``.

    ``batch`` holds ``input_ids`` and ``labels`` (B, T) int64, and optionally ``documents`` (B, T): numbers that tell the
    documents of a row apart. With them attention stays inside a document and positions restart in each.

    On ``axes`` it is one rank's share: with tensor parallelism the residual stream between stages is a rank's part of the
    sequence (Korthikanti et al. 2022, sequence parallelism), with context parallelism everything but attention is. The
    sum is that of this rank's tokens.
    """
    cfg.check()
    tp = axes.tp
    blocks = [stage for layer in range(cfg.n_layers) for stage in block_stages(cfg, layer, axes)]
    w_out = "embed" if cfg.tie_embeddings else "head.w_out"
    first, _ = chunk(cfg.vocab_size, tp.index, tp.size)
    head, head_pullback = _head(z_loss, tp, first)
    return Chain(
        partial(context, cfg, cp=axes.cp),
        (
            # eager also where LoRA leaves it to autograd: a compiled scatter-add is not deterministic
            Stage("embed", ("embed",), *_embed(tp, first), compiled=False, stored=True),
            *blocks,
            Stage("head_input", (), _beside_nothing, _beside_nothing_vjp),
            Stage("head_norm", ("head.norm",), _add_normed(cfg.norm_eps, tp)),
            Stage("head_output", (), *_whole_sequence(tp)),
            Stage("head", (w_out,), head, head_pullback, rowwise=True, stored=True),
        ),
        on=lambda axes: loss(cfg, z_loss=z_loss, axes=axes),
        carry=partial(_carry, cfg.d_model, tp),
        sums=("ce", "z"),
    )


def _carry(d_model: int, tp: Axis, ctx: Context, dtype: torch.dtype) -> Tensor:
    B, T = ctx["input_ids"].shape
    return torch.empty(B, T // tp.size, d_model, dtype=dtype, device=ctx["input_ids"].device)


def logits(cfg: Model, params: Tree, batch: Batch) -> Tensor:
    """Logits (B, T, V) of ``batch["input_ids"]`` (B, T)."""
    chain, x = loss(cfg), None
    ctx = chain.context({"labels": batch["input_ids"], **batch})
    for stage in chain.stages[:-1]:
        x = stage.fn(*subtrees(params, stage), x, ctx)
    assert x is not None
    return x @ output_matrix(params).T


def head_logits(cfg: Model, params: Tree, x: Tensor) -> Tensor:
    """Logits (..., V) of the last block's output ``x`` (..., D)."""
    return rms_norm(params["head"]["norm"], x, cfg.norm_eps) @ output_matrix(params).T


def output_matrix(params: Tree) -> Tensor:
    """The head's matrix (V, D): its own, or the embedding when tied."""
    return params["head"].get("w_out", params["embed"])


def context(cfg: Model, batch: Batch, cp: Axis = Axis()) -> Context:  # noqa: B008
    """What all stages share: ids, labels, the rotary table of the positions, and the documents if there are any.

    On an axis ``cp``, those of this rank's positions; documents are whole, for the masks: the first position of each.
    """
    T = batch["input_ids"].shape[1]
    own = positions_of(T, cp, batch["input_ids"].device)
    documents = document_starts(batch["documents"]) if "documents" in batch else None
    positions = own if documents is None else own - documents[:, own]
    cos, sin = rope_table(positions, cfg.k, cfg.rope_theta)
    shared = {"input_ids": batch["input_ids"][:, own], "labels": batch["labels"][:, own], "cos": cos, "sin": sin}
    return shared if documents is None else {**shared, "documents": documents}


# --- stages -----------------------------------------------------------------------------------------------------------


@cache
def _embed(tp: Axis, first: int) -> tuple[Function, Function]:
    def fn(weight: Tensor, carry: None, ctx: Context) -> Tensor:
        return embed(weight, ctx["input_ids"], tp, first)

    def vjp(weight: Tensor, carry: None, ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
        rows, pullback = embed_vjp(weight, ctx["input_ids"], tp, first)
        return rows, lambda c: (lambda: (pullback(c),), None)

    return fn, vjp


def block_stages(cfg: Model, layer: int, axes: Axes) -> tuple[Stage, ...]:
    """The stages of a block. Blocks with the same window share their functions, so they compile once.

    Every matrix product is in a stage with a pullback of its own; what is compiled is what fuses, between them. The carry is x
    (B, T, D), inside the block beside what a sublayer works on.
    """
    at, attention = f"blocks.{layer}", f"blocks.{layer}.attention"
    matrices = tuple(f"{attention}.{name}" for name in ("w_q", "w_k", "w_v"))
    gains = tuple(f"{attention}.{name}" for name in ("q_norm", "k_norm"))
    tp, add = axes.tp, _add_normed(cfg.norm_eps, axes.tp)
    return (
        Stage("project", matrices, *_project(tp), layer),
        Stage("place_heads", gains, _place_heads(cfg.k, cfg.norm_eps, tp), None, layer),
        Stage("attend", (), *_attend(cfg.window(layer), axes.cp, axes.cp_method), layer),
        Stage("merge_heads", (f"{attention}.w_out",), *_merge_heads(tp), layer),
        Stage("attention_norm", (f"{at}.attention_norm",), add, None, layer),
        Stage("feed_forward", (f"{at}.feed_forward",), *_feed_forward(tp), layer),
        Stage("feed_forward_norm", (f"{at}.feed_forward_norm",), add, None, layer),
    )


@cache
def _project(tp: Axis) -> tuple[Function, Function]:
    def fn(w_q: Tensor, w_k: Tensor, w_v: Tensor, x: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        return x, *project(w_q, w_k, w_v, x, tp)

    def vjp(w_q: Tensor, w_k: Tensor, w_v: Tensor, x: Tensor, ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
        qkv, pullback = project_vjp(w_q, w_k, w_v, x, tp)
        return (x, *qkv), lambda c: pullback(c[1:], c[0])

    return fn, vjp


@cache
def _place_heads(head_dim: int, eps: float, tp: Axis) -> Function:
    def fn(q_norm: Tensor, k_norm: Tensor, carry: tuple[Tensor, ...], ctx: Context) -> tuple[Tensor, ...]:
        x, q, k, v = carry
        return x, *place_heads(q_norm, k_norm, (q, k, v), ctx["cos"], ctx["sin"], head_dim, eps, tp)

    return fn


@cache
def _attend(window: int | None, cp: Axis, cp_method: CPMethod) -> tuple[Function, Function]:
    def fn(carry: tuple[Tensor, ...], ctx: Context) -> tuple[Tensor, ...]:
        x, *qkv = carry
        return x, attend_over(*qkv, cp=cp, method=cp_method, window=window, documents=ctx.get("documents"))

    def vjp(carry: tuple[Tensor, ...], ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
        x, *qkv = carry
        documents = ctx.get("documents")
        out, pullback = attend_over_vjp(*qkv, cp=cp, method=cp_method, window=window, documents=documents, kernel=kernel)
        return (x, out), lambda c: ((), (c[0], *pullback(c[1])))

    return fn, vjp


@cache
def _merge_heads(tp: Axis) -> tuple[Function, Function]:
    def fn(w_out: Tensor, carry: tuple[Tensor, Tensor], ctx: Context) -> tuple[Tensor, Tensor]:
        return carry[0], merge_heads(w_out, carry[1], tp)

    def vjp(w_out: Tensor, carry: tuple[Tensor, Tensor], ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
        out, pullback = merge_heads_vjp(w_out, carry[1], tp)

        def stage_pullback(c: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
            later, d_heads = pullback(c[1])
            return later, (c[0], d_heads)

        return (carry[0], out), stage_pullback

    return fn, vjp


@cache
def _add_normed(eps: float, tp: Axis) -> Function:
    def fn(norm: Tensor, carry: tuple[Tensor, Tensor], ctx: Context) -> Tensor:
        return residual(enter(norm, tp), *carry, eps)

    return fn


@cache
def _feed_forward(tp: Axis) -> tuple[Function, Function]:
    def fn(p: Tree, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return x, feed_forward(p, x, tp)

    def vjp(p: Tree, x: Tensor, ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
        out, pullback = feed_forward_vjp(p, x, tp, kernel)

        def stage_pullback(c: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
            later, d_x = pullback(c[1], c[0])
            return lambda: (later(),), d_x

        return (x, out), stage_pullback

    return fn, vjp


def residual(norm: Tensor, x: Tensor, out: Tensor, eps: float) -> Tensor:
    """The stream ``x`` plus the normed output of a sublayer, both (B, T, D)."""
    return x + rms_norm(norm, out, eps)


def _beside_nothing(x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """A stream of zeros beside ``x``: the head's norm is then the same function as a block's, and compiles no more."""
    return torch.zeros_like(x), x


def _beside_nothing_vjp(x: Tensor, ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
    return _beside_nothing(x, ctx), lambda c: ((), c[1])


@cache
def _whole_sequence(tp: Axis) -> tuple[Function, Function]:
    def fn(x: Tensor, ctx: Context) -> Tensor:
        return all_gather(x, 1, tp)

    def vjp(x: Tensor, ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
        return fn(x, ctx), lambda c: ((), reduce_scatter(c, 1, tp))

    return fn, vjp


@cache
def _head(z_loss: float, tp: Axis, first: int) -> tuple[Function, Function]:
    """``fn`` and ``vjp`` of the head's stage."""

    def fn(w_out: Tensor, h: Tensor, ctx: Context) -> tuple[Tensor, Metrics]:
        return head_loss(w_out, h, ctx["labels"], z_loss=z_loss, tp=tp, first=first)

    def vjp(w_out: Tensor, h: Tensor, ctx: Context, kernel: Kernel) -> tuple[tuple[Tensor, Metrics], Pullback]:
        given, known = partial(head_vjp, z_loss=z_loss, tp=tp, first=first), ctx.get("cotangent")
        out, pullback = given(w_out, h, ctx["labels"], cotangent=known, kernel=kernel)

        def stage_pullback(cotangent: Tensor) -> tuple[tuple[Tensor], Tensor]:
            d_w, d_h = pullback(cotangent)
            return (d_w,), d_h

        return out, stage_pullback

    return fn, vjp
