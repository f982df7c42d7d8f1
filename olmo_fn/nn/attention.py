"""Grouped-query attention with norms of queries and keys and rotary positions, and the primitive that attends.

B batch, T positions, D model width, H query heads, N key/value heads, K head dim. On an axis ``tp`` a rank has some of the
heads; the stream x is its part of the sequence, gathered for the projections (sequence parallelism, Korthikanti et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.core.primitive import VJP
from olmo_fn.kernels.attention_cp import AttendVJP, attend_over, attend_over_vjp, check_attend
from olmo_fn.kernels.attention_tiles import attend_vjp
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import enter
from olmo_fn.nn.cache import attend_seen, kv_cache, remember
from olmo_fn.nn.context import Context
from olmo_fn.nn.linear import add_bias
from olmo_fn.nn.norm import rms_norm, rms_norm_spec, unit_norm
from olmo_fn.nn.rope import Rope, rotate
from olmo_fn.nn.sublayer import Names, Result, Sublayer
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

QKNorm: TypeAlias = Literal["full", "head", "per-head", "unit", "none"]


class Place(NamedTuple):
    """What is done to queries, keys and values between their projections and the scores, in this order: biases, clipping, the
    norm over all heads, the norm of each head, rotation, and a factor of the queries.
    """

    head_dim: int
    eps: float
    norm: QKNorm = "full"
    zero_centred: bool = False
    gain_factor: float = 1.0
    clip: float | None = None
    rotary: Literal["half", "interleaved", "none"] = "half"
    factor: float = 1.0
    tensors: tuple[str, ...] = ()
    """Names of the tensors that it is given behind queries, keys and values."""


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """A layer's attention in numbers: `olmo_fn.models.config.Attention` says what each is for."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None
    """Tokens that a position sees, itself included; None sees all before it."""
    rope: Rope | None
    eps: float
    std: float
    std_out: float
    qk_norm: QKNorm = "full"
    zero_centred: bool = False
    bias: bool = False
    clip: float | None = None
    gate: Literal["none", "head", "element"] = "none"
    sinks: bool = False
    scalable_softmax: bool = False
    cap: float | None = None
    score_scale: float | None = None
    attend: AttendVJP = attend_vjp
    """What computes softmax attention and its pullback on the fast path."""

    def place(self) -> Place:
        """Its `Place`."""
        biases = ("q_bias", "k_bias", "v_bias") if self.bias else ()
        norms = () if self.qk_norm == "none" else ("q_norm", "k_norm")
        scale = ("softmax_scale", "log_visible") if self.scalable_softmax else ()
        return Place(
            self.head_dim,
            self.eps,
            self.qk_norm,
            self.zero_centred,
            self.d_model**0.5 if self.qk_norm == "unit" else 1.0,
            self.clip,
            "none" if self.rope is None else "interleaved" if self.rope.interleaved else "half",
            1.0 if self.score_scale is None else self.score_scale * self.head_dim**0.5,
            (*biases, *norms, *scale, *(("cos", "sin") if self.rope else ())),
        )

    def specs(self) -> Tree:
        """Its parameters. Matrices are (in, out)."""
        D, heads, kv = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        read = Init("trunc_normal", self.std)
        specs: Tree = {
            "w_q": Spec((D, heads), ("embed", "heads"), read),
            "w_k": Spec((D, kv), ("embed", "kv_heads"), read),
            "w_v": Spec((D, kv), ("embed", "kv_heads"), read),
            "w_out": Spec((heads, D), ("heads", "embed"), Init("trunc_normal", self.std_out)),
        }
        if self.gate != "none":
            specs["w_gate"] = Spec((D, heads if self.gate == "element" else self.n_heads), ("embed", "heads"), read)
        if self.bias:
            widths = {
                "q_bias": (heads, "heads"),
                "k_bias": (kv, "kv_heads"),
                "v_bias": (kv, "kv_heads"),
                "out_bias": (D, "embed"),
            }
            specs |= {name: Spec((width,), (axis,), Init("zeros")) for name, (width, axis) in widths.items()}
        if self.qk_norm == "head":
            specs |= {name: rms_norm_spec(self.head_dim, "head_dim", self.zero_centred) for name in ("q_norm", "k_norm")}
        elif self.qk_norm == "unit":
            start = Init("constant", value=D**-0.5)
            specs |= {"q_norm": Spec((heads,), ("heads",), start), "k_norm": Spec((kv,), ("kv_heads",), start)}
        elif self.qk_norm != "none":
            specs["q_norm"] = rms_norm_spec(heads, "heads", self.zero_centred)
            specs["k_norm"] = rms_norm_spec(kv, "kv_heads", self.zero_centred)
        if self.sinks:
            specs["sinks"] = Spec((self.n_heads,), ("heads",), Init("zeros"))
        if self.scalable_softmax:
            specs["softmax_scale"] = Spec((self.n_heads,), ("heads",), Init("ones"))
        return specs

    def tables(self) -> dict[Any, Callable[[Tensor], Any]]:
        """What it wants to know of the positions."""
        found: dict[Any, Callable[[Tensor], Any]] = {self.rope: self.rope.table} if self.rope else {}
        if self.scalable_softmax:
            found["log_visible", self.window] = partial(log_visible, self.window)
        return found

    def names(self) -> dict[str, Names]:
        """What its parameters are called in other programs' files."""
        if self.qk_norm == "unit":
            return NAMES | {"q_norm": Names("self_attn.sq", "attention.sq"), "k_norm": Names("self_attn.sk", "attention.sk")}
        heads = {"q_norm": self.n_heads, "k_norm": self.n_kv_heads} if self.qk_norm == "per-head" else {}
        flat = {name: NAMES[name]._replace(shape=(count, self.head_dim)) for name, count in heads.items()}
        gains = {
            name: names._replace(olmo_core_offset=-1.0) for name, names in (NAMES | flat).items() if name.endswith("_norm")
        }
        return NAMES | (gains if self.zero_centred else flat)

    def flops(self, length: int) -> int:
        """FLOPs of a forward pass over a sequence."""
        matrices = sum(spec.size for spec in self.specs().values() if len(spec.shape) == 2)
        return 2 * length * matrices + 4 * self.n_heads * self.head_dim * causal_pairs(length, self.window)


def attention_sublayer(form: AttentionForm) -> Sublayer:
    """Attention as a sublayer. ValueError if its ``attend`` cannot do what the form asks for."""
    check_attend(form.attend, *(["sinks"] if form.sinks else []), *(["cap"] if form.cap is not None else []))
    place = form.place()

    def project(p: Tree, x: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """Queries, keys, values, and the gate if there is one."""
        weights = [p[name] for name in ("w_q", "w_k", "w_v", "w_gate") if name in p]
        q, k, v, *gate = ctx.column_linear(x, *weights)
        known = dict(zip(("cos", "sin"), ctx.tables[form.rope], strict=True)) if form.rope else {}
        if form.scalable_softmax:
            known["log_visible"] = ctx.tables["log_visible", form.window]
        tensors = (known[name] if name in known else p[name] for name in place.tensors)
        return *ctx.fuse(norm_and_rotate, place, ctx.backend.axes.tp)(q, k, v, *tensors), *gate

    def output(p: Tree, rows: Tensor, gate: Sequence[Tensor], ctx: Context) -> Tensor:
        for g in gate:
            rows = ctx.fuse(gated_heads)(rows, g)
        y = ctx.row_linear(rows, p["w_out"])
        return ctx.fuse(add_bias, ctx.backend.axes.tp)(y, p["out_bias"]) if form.bias else y

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        q, k, v, *gate = project(p, x, ctx)
        return output(p, attention(ctx, q, k, v, form.window, form.attend, sinks=p.get("sinks"), cap=form.cap), gate, ctx)

    def extend(p: Tree, x: Tensor, ctx: Context, cache: Tree) -> tuple[Tensor, Tree]:
        q, k, v, *gate = project(p, x, ctx)
        out = attend_seen(q, remember(cache, k, v, ctx, form.window), sinks=p.get("sinks"), cap=form.cap)
        return output(p, _side_by_side(out), gate, ctx), cache

    def empty_cache(rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> Tree:
        return kv_cache(rows, form.n_kv_heads, capacity, form.head_dim, form.window, dtype, device)

    return Sublayer(
        "attention",
        specs=form.specs(),
        apply=apply,
        flops=form.flops,
        extend=extend,
        cache=empty_cache,
        remembers=inf if form.window is None else form.window,
        tables=form.tables(),
        divided=("tp", "cp"),
        names=form.names(),
    )


NAMES = {
    "w_q": Names("self_attn.q_proj.weight", "attention.w_q.weight"),
    "w_k": Names("self_attn.k_proj.weight", "attention.w_k.weight"),
    "w_v": Names("self_attn.v_proj.weight", "attention.w_v.weight"),
    "w_out": Names("self_attn.o_proj.weight", "attention.w_out.weight"),
    "w_gate": Names("self_attn.g_proj.weight", "attention.w_g.weight"),
    "q_bias": Names("self_attn.q_proj.bias", "attention.w_q.bias"),
    "k_bias": Names("self_attn.k_proj.bias", "attention.w_k.bias"),
    "v_bias": Names("self_attn.v_proj.bias", "attention.w_v.bias"),
    "out_bias": Names("self_attn.o_proj.bias", "attention.w_out.bias"),
    "q_norm": Names("self_attn.q_norm.weight", "attention.q_norm.weight"),
    "k_norm": Names("self_attn.k_norm.weight", "attention.k_norm.weight"),
    "sinks": Names("self_attn.sinks", "attention.sinks"),
    "softmax_scale": Names("self_attn.softmax_scale", "attention.ssmax_scale"),
}


def causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in one sequence: ``S (S + 1) / 2``, or with a window w below S
    ``w (w + 1) / 2 + (S - w) w``.

    >>> causal_pairs(4), causal_pairs(4, window=2)
    (10, 7)
    """
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w


def log_visible(window: int | None, positions: Tensor) -> Tensor:
    """The logarithm of how many tokens each of integer ``positions`` sees, fp32.

    >>> log_visible(2, torch.arange(3))
    tensor([0.0000, 0.6931, 0.6931])
    """
    visible = (positions + 1).float()
    return (visible if window is None else visible.clamp(max=window)).log()


def norm_and_rotate(how: Place, tp: Axis, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K), keys and values (B, N, T, K) ready for scores, of projections (B, T, H·K) and (B, T, N·K).

    ``tensors`` are those that ``how`` names. Norms over all heads span the heads of all ranks of ``tp``.
    """
    p, K = dict(zip(how.tensors, tensors, strict=True)), how.head_dim
    if "q_bias" in p:
        q, k, v = ((x + p[name]).to(x.dtype) for x, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")))
    if how.clip is not None:
        q, k, v = (x.clamp(-how.clip, how.clip) for x in (q, k, v))

    def ready(x: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            x = x.unflatten(-1, (-1, K))
        elif how.norm == "full":
            x = rms_norm(1 + gain if how.zero_centred else gain, x, how.eps, tp).unflatten(-1, (-1, K))
        elif how.norm == "unit":
            x = (unit_norm(x, tp) * (how.gain_factor * gain)).to(x.dtype).unflatten(-1, (-1, K))
        else:
            gain = enter(gain, tp) if how.norm == "head" else gain.unflatten(-1, (-1, K))
            x = rms_norm(1 + gain if how.zero_centred else gain, x.unflatten(-1, (-1, K)), how.eps)
        return x if how.rotary == "none" else rotate(x, p["cos"], p["sin"], how.rotary == "interleaved")

    q, k, v = ready(q, p.get("q_norm")), ready(k, p.get("k_norm")), v.unflatten(-1, (-1, K))
    if "softmax_scale" in p:
        q = (q * (p["log_visible"][..., None] * p["softmax_scale"])[..., None]).to(q.dtype)
    if how.factor != 1:
        q = q * how.factor
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def gated_heads(rows: Tensor, gate: Tensor) -> Tensor:
    """``rows`` (B, T, H·K) times the sigmoid, in fp32, of a gate (B, T, H·K), or (B, T, H), one for each head."""
    g = torch.sigmoid(gate if gate.dtype == torch.float64 else gate.float())
    return (rows.unflatten(-1, (gate.shape[-1], -1)) * g[..., None]).flatten(-2).to(rows.dtype)


def attention(
    ctx: Context,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    attend: AttendVJP = attend_vjp,
    *,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal softmax(q kᵀ / √K) v, inside documents if there are any, with the heads side by side: (B, T, H·K).

    ``q`` (B, H, T, K), ``k``, ``v`` (B, N, T, K) of this rank's positions and heads. ``sinks`` (H,), a weight: logits that take
    part in the softmax. ``cap``: scores are soft-capped at it. Both as in `olmo_fn.kernels.attention_tiles.attend_masked`.
    """
    backend, documents = ctx.backend, ctx.documents
    options: dict[str, Any] = {"cp": backend.axes.cp, "method": backend.cp_method, "window": window, "documents": documents}
    options["cap"] = cap
    if not backend.primitive:
        return _side_by_side(attend_over(q, k, v, sinks=sinks, **options))
    vjp = _attention_vjp(partial(attend_over_vjp, kernel=backend.kernel, attend=attend, **options))
    return backend.primitive(vjp, [] if sinks is None else [sinks], [q, k, v], backend.weight_grads, costly=True)


def _attention_vjp(attend: Callable[..., Any]) -> VJP:
    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        q, k, v = inputs
        out, back = attend(q, k, v, sinks=weights[0] if weights else None)
        rows = _side_by_side(out)  # what the next product keeps as well; so the other order of the heads is not kept

        def pullback(cotangent: Tensor) -> tuple[Sequence[Any], Sequence[Tensor]]:
            by_head = rows.view(*rows.shape[:2], -1, q.shape[-1]).transpose(1, 2)
            d_rows = cotangent.view(by_head.transpose(1, 2).shape).transpose(1, 2).contiguous()
            d_q, d_k, d_v, *d_sinks = back(by_head, d_rows)
            return [lambda d=d: d for d in d_sinks], (d_q, d_k, d_v)

        return rows, pullback

    return vjp


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, T, K) as (B, T, H·K)."""
    return heads.transpose(1, 2).flatten(2)
