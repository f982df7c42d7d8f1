"""The dense transformer of OLMo 2 and 3: specs of its parameters, and its loss as a chain of stages.

    x = embed[ids];   for each block:  x = x + norm(attention(x));  x = x + norm(feed_forward(x));   head(norm(x))

The norm is on each sublayer's *output* ("reordered norm", OLMo 2 report, section 3.2).
"""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.grad import Batch, Chain, Context, Function, Metrics, Pullback, Stage, subtrees
from olmo_fn.models.config import Model
from olmo_fn.nn.attention import attention, attention_specs
from olmo_fn.nn.feed_forward import feed_forward, feed_forward_specs
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
    blocks = [half for layer in range(cfg.n_layers) for half in block_stages(cfg, layer)]
    w_out = "embed" if cfg.tie_embeddings else "head.w_out"
    return Chain(
        partial(context, cfg),
        (
            Stage("embed", ("embed",), embed, compiled=False),  # compiled scatter-add is not deterministic
            *blocks,
            Stage("head", ("head.norm", w_out), *_head(cfg.norm_eps, z_loss)),
        ),
    )


def logits(cfg: Model, params: Tree, batch: Batch) -> Tensor:
    """Logits (B, T, V) of ``batch["input_ids"]`` (B, T)."""
    chain, x = loss(cfg), None
    ctx = chain.context({"labels": batch["input_ids"], **batch})
    for stage in chain.stages[:-1]:
        x = stage.fn(*subtrees(params, stage), x, ctx)
    assert x is not None
    return head_logits(cfg, params, x)


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


def block_stages(cfg: Model, layer: int) -> tuple[Stage, Stage]:
    """The two halves of a block. Blocks with the same window share their functions, so they compile once."""
    at = f"blocks.{layer}"
    mix, feed = _attention_half(cfg.k, cfg.norm_eps, cfg.window(layer)), _feed_forward_half(cfg.norm_eps)
    return (
        Stage("attention", (f"{at}.attention", f"{at}.attention_norm"), mix, layer),
        Stage("feed_forward", (f"{at}.feed_forward", f"{at}.feed_forward_norm"), feed, layer),
    )


@cache
def _attention_half(head_dim: int, eps: float, window: int | None) -> Function:
    def attention_half(p: Tree, norm: Tensor, x: Tensor, ctx: Context) -> Tensor:
        tables = ctx["cos"], ctx["sin"], ctx.get("documents")
        return residual(norm, x, attention(p, x, *tables, head_dim=head_dim, eps=eps, window=window), eps)

    return attention_half


@cache
def _feed_forward_half(eps: float) -> Function:
    def feed_forward_half(p: Tree, norm: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return residual(norm, x, feed_forward(p, x), eps)

    return feed_forward_half


def residual(norm: Tensor, x: Tensor, out: Tensor, eps: float) -> Tensor:
    """The stream ``x`` plus the normed output of a sublayer, both (B, T, D)."""
    return x + rms_norm(norm, out, eps)


@cache
def _head(eps: float, z_loss: float) -> tuple[Function, None, Function]:
    """``fn``, ``block`` and ``vjp`` of the head's stage."""

    def fn(norm: Tensor, w_out: Tensor, x: Tensor, ctx: Context) -> tuple[Tensor, Metrics]:
        return head_loss(norm, w_out, x, ctx["labels"], eps=eps, z_loss=z_loss)

    def vjp(norm: Tensor, w_out: Tensor, x: Tensor, ctx: Context) -> tuple[tuple[Tensor, Metrics], Pullback]:
        out, pullback = head_vjp(norm, w_out, x, ctx["labels"], eps=eps, z_loss=z_loss)

        def stage_pullback(cotangent: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            d_norm, d_w, d_x = pullback(cotangent)
            return (d_norm, d_w), d_x

        return out, stage_pullback

    return fn, None, vjp
