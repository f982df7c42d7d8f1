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
from olmo_fn.kernels import identity, on_triton
from olmo_fn.kernels.attention_backend import AttentionBackend, Need, capability
from olmo_fn.kernels.attention_cp import AttendVJP, attend_over, attend_over_vjp, check_attend
from olmo_fn.kernels.attention_table import attend_vjp
from olmo_fn.mesh.axis import Axis, CPMethod
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
    """What computes softmax attention and its pullback on the fast path; `attend_vjp`: the backend that is chosen."""

    def need(
        self, device: torch.device, dtype: torch.dtype, length: int, documents: bool, cp: int = 1, method: CPMethod = "gather"
    ) -> Need:
        """What its attention needs of a backend, with sequences of ``length`` shared by ``cp`` ranks."""
        return Need(
            device.type,
            dtype,
            self.head_dim,
            self.n_heads != self.n_kv_heads,
            self.window is not None and self.window < length,
            documents,
            self.cap is not None,
            "whole" if cp == 1 or method == "ulysses" else "ring" if method == "ring" else "rows",
            capability(device),
            torch.are_deterministic_algorithms_enabled(),
        )

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

    def project(p: Tree, x: Tensor, ctx: Context, order: MemoryOrder) -> tuple[Tensor, ...]:
        """Queries, keys, values, and the gate if there is one."""
        weights = [p[name] for name in ("w_q", "w_k", "w_v", "w_gate") if name in p]
        q, k, v, *gate = ctx.column_linear(x, *weights)
        known = dict(zip(("cos", "sin"), ctx.tables[form.rope], strict=True)) if form.rope else {}
        if form.scalable_softmax:
            known["log_visible"] = ctx.tables["log_visible", form.window]
        tensors = [known[name] if name in known else p[name] for name in place.tensors]
        if order is BY_POSITION and rotates_norms(ctx, place, q, *tensors):
            return *rotated_norms(ctx, place, q, k, v, *tensors), *gate
        return *ctx.fuse(order.place, place, ctx.backend.axes.tp)(q, k, v, *tensors), *gate

    def output(p: Tree, rows: Tensor, gate: Sequence[Tensor], ctx: Context) -> Tensor:
        for g in gate:
            rows = ctx.fuse(gated_heads)(rows, g)
        y = ctx.row_linear(rows, p["w_out"])
        return ctx.fuse(add_bias, ctx.backend.axes.tp)(y, p["out_bias"]) if form.bias else y

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        attend = backend(form, ctx, x)
        q, k, v, *gate = project(p, x, ctx, memory_order(attend))
        return output(p, attention(ctx, q, k, v, form.window, attend, sinks=p.get("sinks"), cap=form.cap), gate, ctx)

    def extend(p: Tree, x: Tensor, ctx: Context, cache: Tree) -> tuple[Tensor, Tree]:
        q, k, v, *gate = project(p, x, ctx, BY_HEAD)
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


def backend(form: AttentionForm, ctx: Context, x: Tensor) -> AttendVJP:
    """What attends in a layer: the backend that is chosen for it, or the form's own way."""
    how = ctx.backend
    if form.attend is not attend_vjp or not how.primitive:
        return form.attend
    cp = how.axes.cp.size
    length = ctx.input_ids.shape[1] * cp
    return how.attention(form.need(x.device, x.dtype, length, ctx.documents is not None, cp, how.cp_method))


def norm_and_rotate(how: Place, tp: Axis, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K), keys and values (B, N, T, K) ready for scores, of projections (B, T, H·K) and (B, T, N·K): views of
    them, or of as much memory in the same order.

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
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def norm_and_rotate_by_head(how: Place, tp: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`norm_and_rotate` with the positions of each head side by side in memory."""
    return tuple(x.contiguous() for x in norm_and_rotate(how, tp, *tensors))


class MemoryOrder(NamedTuple):
    """How (B, H, T, K) lies in memory where it goes to attention: ``place`` makes queries, keys and values, ``cotangent`` that
    of the result, of a view of (B, T, H, K).
    """

    place: Callable[..., tuple[Tensor, ...]]
    cotangent: Callable[[Tensor], Tensor]


BY_HEAD = MemoryOrder(norm_and_rotate_by_head, Tensor.contiguous)
BY_POSITION = MemoryOrder(norm_and_rotate, identity)  # type: ignore[arg-type]


def memory_order(attend: AttendVJP) -> MemoryOrder:
    """The order that ``attend`` is fastest with; of one that is no backend of ours nobody knows it."""
    return BY_POSITION if isinstance(attend, AttentionBackend) and not attend.by_head else BY_HEAD


def rotates_norms(ctx: Context, how: Place, q: Tensor, *tensors: Tensor) -> bool:
    """Whether `rotated_norms` does what ``how`` says: on a GPU, where steps are compiled."""
    usual = Place(how.head_dim, how.eps, how.norm, how.zero_centred, tensors=("q_norm", "k_norm", "cos", "sin"))
    half = how.head_dim // 2
    return (
        on_triton(ctx.backend.kernel, q)
        and ctx.backend.primitive is not None
        and ctx.backend.axes.tp.size == 1
        and how == usual
        and how.norm in ("full", "head", "per-head")
        and tensors[-1].shape[-1] == half
        and half & (half - 1) == 0
    )


def rotated_norms(ctx: Context, how: Place, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`norm_and_rotate` by `olmo_fn.kernels.triton_rotation`, a launch each way; results are views of (B, T, H, K)."""
    q_gain, k_gain, cos, sin = tensors
    gains = [1 + gain if how.zero_centred else gain for gain in (q_gain, k_gain)]
    q, k = ctx.backend.primitive(_rotated_norms_vjp(how, cos, sin), gains, [q, k], ctx.backend.weight_grads)  # type: ignore[misc]
    return q, k, v.unflatten(-1, (-1, how.head_dim)).transpose(1, 2)


def _rotated_norms_vjp(how: Place, cos: Tensor, sin: Tensor) -> VJP:
    from olmo_fn.kernels.triton_rotation import rotated_norms_vjp

    def vjp(gains: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        (q, k), (q_gain, k_gain) = inputs, gains
        outs, back = rotated_norms_vjp((q, k), (q_gain, k_gain), cos, sin, how.eps, how.norm == "full")
        return outs, lambda d_q, d_k: back((d_q, d_k))

    return vjp


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
    part in the softmax. ``cap``: scores are soft-capped at it. Both as in `olmo_fn.kernels.attention.attend_masked`.
    """
    how, documents = ctx.backend, ctx.documents
    options: dict[str, Any] = {"cp": how.axes.cp, "method": how.cp_method, "window": window, "documents": documents, "cap": cap}
    if not how.primitive:
        return _side_by_side(attend_over(q, k, v, sinks=sinks, **options))
    over = partial(attend_over_vjp, kernel=how.kernel, attend=attend, packing=ctx.packing, **options)
    vjp = _attention_vjp(over, memory_order(attend).cotangent)
    return how.primitive(vjp, [] if sinks is None else [sinks], [q, k, v], how.weight_grads, costly=True)


def _attention_vjp(attend: Callable[..., Any], placed: Callable[[Tensor], Tensor]) -> VJP:
    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        q, k, v = inputs
        out, back = attend(q, k, v, sinks=weights[0] if weights else None)
        # What the next product keeps as well; so the other order of the heads is not kept, nor does a view keep what it is of.
        rows = _side_by_side(out).detach()

        def pullback(cotangent: Tensor) -> tuple[Sequence[Any], Sequence[Tensor]]:
            by_head = rows.view(*rows.shape[:2], -1, q.shape[-1]).transpose(1, 2)
            d_rows = cotangent.view(by_head.transpose(1, 2).shape).transpose(1, 2)
            d_q, d_k, d_v, *d_sinks = back(by_head, placed(d_rows))
            return [lambda d=d: d for d in d_sinks], (d_q, d_k, d_v)

        return rows, pullback

    return vjp


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, T, K) as (B, T, H·K)."""
    return heads.transpose(1, 2).flatten(2)
