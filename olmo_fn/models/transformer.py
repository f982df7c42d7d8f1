"""The dense transformer of OLMo 2 and 3: specs of its parameters, and its loss as a chain of stages.

    x = embed[ids];   for each block:  x = x + norm(attention(x));  x = x + norm(feed_forward(x));   head(norm(x))

The norm is on each sublayer's *output* ("reordered norm", OLMo 2 report, section 3.2).
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.grad import Batch, Chain, Context, Function, Kernel, Metrics, Pullback, Stage, subtrees
from olmo_fn.models.config import Model
from olmo_fn.nn.attend import attend, attend_vjp
from olmo_fn.nn.attention import attention_specs, merge_heads, project
from olmo_fn.nn.feed_forward import feed_forward, feed_forward_specs, feed_forward_vjp
from olmo_fn.nn.head import head_loss, head_vjp
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


def loss(cfg: Model, *, z_loss: float = 0.0) -> Chain:
    """The training loss as a chain: ``(params, batch) -> (sum of losses, metrics)``.

    ``batch`` holds ``input_ids`` and ``labels`` (B, T) int64, and optionally ``documents`` (B, T): numbers that tell the
    documents of a row apart. With them attention stays inside a document and positions restart in each.
    """
    cfg.check()
    blocks = [stage for layer in range(cfg.n_layers) for stage in block_stages(cfg, layer)]
    w_out = "embed" if cfg.tie_embeddings else "head.w_out"
    head, head_vjp_ = _head(z_loss)
    return Chain(
        partial(context, cfg),
        (
            Stage("embed", ("embed",), embed, compiled=False),  # compiled scatter-add is not deterministic
            *blocks,
            Stage("head_norm", ("head.norm",), _head_norm(cfg.norm_eps)),
            Stage("head", (w_out,), head, vjp=head_vjp_),
        ),
    )


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


def context(cfg: Model, batch: Batch) -> Context:
    """What all stages share: ids, labels, the rotary table of the positions, and the documents if there are any."""
    ids = batch["input_ids"]
    documents = batch.get("documents")
    if documents is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    else:
        positions = restarting_positions(documents)
    cos, sin = rope_table(positions, cfg.k, cfg.rope_theta)
    shared = {"input_ids": ids, "labels": batch["labels"], "cos": cos, "sin": sin}
    return shared if documents is None else {**shared, "documents": documents}


def restarting_positions(documents: Tensor) -> Tensor:
    """Positions (B, T) that count from 0 in each run of equal numbers.

    >>> restarting_positions(torch.tensor([[4, 4, 7, 7, 7]]))
    tensor([[0, 1, 0, 1, 2]])
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(first, index, 0).cummax(dim=1).values


# --- stages -----------------------------------------------------------------------------------------------------------


def embed(weight: Tensor, carry: None, ctx: Context) -> Tensor:
    """Rows of ``weight`` (V, D) for the ids (B, T): (B, T, D)."""
    return F.embedding(ctx["input_ids"], weight)


def block_stages(cfg: Model, layer: int) -> tuple[Stage, ...]:
    """The stages of a block. Blocks with the same window share their functions, so they compile once.

    The carry is x (B, T, D), and between the projections and the output of attention also what attention works on.
    """
    at, attention = f"blocks.{layer}", f"blocks.{layer}.attention"
    projections = tuple(f"{attention}.{name}" for name in PROJECTIONS)
    mix, mix_vjp = _attend(cfg.window(layer))
    return (
        Stage("project", projections, _project(cfg.k, cfg.norm_eps), layer),
        Stage("attend", (), mix, layer, mix_vjp),
        Stage("attention_out", (f"{attention}.w_out", f"{at}.attention_norm"), _attention_out(cfg.norm_eps), layer),
        Stage("feed_forward", (f"{at}.feed_forward",), _feed_forward, layer, _feed_forward_vjp),
        Stage("feed_forward_out", (f"{at}.feed_forward_norm",), _feed_forward_out(cfg.norm_eps), layer),
    )


PROJECTIONS = ("w_q", "w_k", "w_v", "q_norm", "k_norm")


@cache
def _project(head_dim: int, eps: float) -> Function:
    def project_heads(*args: Any) -> tuple[Tensor, ...]:
        *weights, x, ctx = args
        p = dict(zip(PROJECTIONS, weights, strict=True))
        return x, *project(p, x, ctx["cos"], ctx["sin"], head_dim=head_dim, eps=eps)

    return project_heads


@cache
def _attend(window: int | None) -> tuple[Function, Function]:
    """``fn`` and ``vjp`` of the stage between the projections and the output of attention."""

    def fn(carry: tuple[Tensor, ...], ctx: Context) -> tuple[Tensor, ...]:
        x, q, k, v = carry
        return x, attend(q, k, v, window=window, documents=ctx.get("documents"))

    def vjp(carry: tuple[Tensor, ...], ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
        x, q, k, v = carry
        out, pullback = attend_vjp(q, k, v, window=window, documents=ctx.get("documents"), kernel=kernel)
        return (x, out), lambda cotangent: ((), (cotangent[0], *pullback(cotangent[1])))

    return fn, vjp


@cache
def _attention_out(eps: float) -> Function:
    def attention_out(w_out: Tensor, norm: Tensor, carry: tuple[Tensor, Tensor], ctx: Context) -> Tensor:
        x, heads = carry
        return residual(norm, x, merge_heads(w_out, heads), eps)

    return attention_out


def _feed_forward(p: Tree, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    return x, feed_forward(p, x)


def _feed_forward_vjp(p: Tree, x: Tensor, ctx: Context, kernel: Kernel) -> tuple[Any, Pullback]:
    out, pullback = feed_forward_vjp(p, x, kernel)

    def stage_pullback(cotangent: tuple[Tensor, Tensor]) -> tuple[tuple[Tree], Tensor]:
        d_p, d_x = pullback(cotangent[1])
        return (d_p,), d_x.add_(cotangent[0])

    return (x, out), stage_pullback


@cache
def _feed_forward_out(eps: float) -> Function:
    def feed_forward_out(norm: Tensor, carry: tuple[Tensor, Tensor], ctx: Context) -> Tensor:
        return residual(norm, *carry, eps)

    return feed_forward_out


def residual(norm: Tensor, x: Tensor, out: Tensor, eps: float) -> Tensor:
    """The stream ``x`` plus the normed output of a sublayer, both (B, T, D)."""
    return x + rms_norm(norm, out, eps)


@cache
def _head_norm(eps: float) -> Function:
    def head_norm(norm: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return rms_norm(norm, x, eps)

    return head_norm


@cache
def _head(z_loss: float) -> tuple[Function, Function]:
    """``fn`` and ``vjp`` of the head's stage."""

    def fn(w_out: Tensor, h: Tensor, ctx: Context) -> tuple[Tensor, Metrics]:
        return head_loss(w_out, h, ctx["labels"], z_loss=z_loss)

    def vjp(w_out: Tensor, h: Tensor, ctx: Context, kernel: Kernel) -> tuple[tuple[Tensor, Metrics], Pullback]:
        out, pullback = head_vjp(w_out, h, ctx["labels"], z_loss=z_loss, kernel=kernel)

        def stage_pullback(cotangent: Tensor) -> tuple[tuple[Tensor], Tensor]:
            d_w, d_h = pullback(cotangent)
            return (d_w,), d_h

        return out, stage_pullback

    return fn, vjp
