"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a mixer whose state does not grow, instead of keys and values that do.

    q, k, v = silu(conv(x w_q)), …           the last few positions of each channel, weighted
    beta = sigmoid(x to_beta)                times 2 with negative eigenvalues (Grazzi et al. 2024, arXiv 2411.12537)
    g = -exp(rate_bias) softplus(x to_decay + dt_bias)
    y = (rms_norm(rule(unit(q), unit(k), v, g, beta)) · silu(x w_gate)) w_out

B batch, T positions, D model width, N key heads, H value heads, of which H / N have the same key head, K and V their widths. On
an axis ``tp`` a rank has some of the key heads and the value heads that belong to them; on ``cp`` some positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.core.primitive import VJP
from olmo_fn.kernels.gated_delta import Inputs, chunked, chunked_over, recurrent
from olmo_fn.kernels.gated_delta_fla import Rule, choose_rule, fla
from olmo_fn.kernels.recurrence_cp import columns_before
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import enter
from olmo_fn.nn.context import Context
from olmo_fn.nn.norm import rms_norm, rms_norm_spec
from olmo_fn.nn.sublayer import Names, Sublayer
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


@dataclass(frozen=True, kw_only=True)
class GatedDeltaForm:
    """A layer's gated delta net in numbers: `olmo_fn.models.config.GatedDelta` says what each is for."""

    d_model: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int
    negative: bool
    eps: float
    std: float
    std_out: float
    rule: Rule = "auto"

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim

    def specs(self) -> Tree:
        """Its parameters. Matrices are (in, out), weights of convolutions (channel, 1, tap), the newest position last."""
        D, H, (keys, _, values) = self.d_model, self.value_heads, self.widths
        read = Init("trunc_normal", self.std)
        taps = Init("trunc_normal", (3 * self.conv_size) ** -0.5)  # as wide as torch's own for convolutions
        conv = {"q": (keys, "kv_heads"), "k": (keys, "kv_heads"), "v": (values, "heads")}
        return {
            "w_q": Spec((D, keys), ("embed", "kv_heads"), read),
            "w_k": Spec((D, keys), ("embed", "kv_heads"), read),
            "w_v": Spec((D, values), ("embed", "heads"), read),
            "w_gate": Spec((D, values), ("embed", "heads"), read),
            "to_decay": Spec((D, H), ("embed", "heads"), read),
            "to_beta": Spec((D, H), ("embed", "heads"), read),
            **{f"{name}_conv": Spec((n, 1, self.conv_size), (axis, "one", "taps"), taps) for name, (n, axis) in conv.items()},
            "rate_bias": Spec((H,), ("heads",), Init("log_uniform", low=0.0, high=16.0)),
            "dt_bias": Spec((H,), ("heads",), Init("step_size", low=1e-3, high=0.1)),
            "out_norm": rms_norm_spec(self.value_dim, "head_dim"),
            "w_out": Spec((values, D), ("heads", "embed"), Init("trunc_normal", self.std_out)),
        }

    def flops(self, length: int) -> int:
        """FLOPs of a forward pass over a sequence: 2 for each entry of a matrix or convolution and token, and of the rule as it
        is defined 6 for each entry of a state: k is multiplied with it, a product is added to it, and q is multiplied with it.

        OLMo-core 3.0 counts 8 for an entry of a state: its decay too, which is no matrix product. Chunks compute more.
        """
        entries = sum(spec.size for spec in self.specs().values() if len(spec.shape) > 1)
        return length * (2 * entries + 6 * self.value_heads * self.key_dim * self.value_dim)


class Heads(NamedTuple):
    """How projections become heads."""

    conv_size: int
    key_dim: int
    value_dim: int
    negative: bool


def gated_delta_sublayer(form: GatedDeltaForm) -> Sublayer:
    """Gated DeltaNet as a sublayer."""
    how, kept = Heads(form.conv_size, form.key_dim, form.value_dim, form.negative), form.conv_size - 1
    small = "q_conv", "k_conv", "v_conv", "rate_bias", "dt_bias"

    def project(p: Tree, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Queries, keys and values beside each other (B, T, 2 N K + H V), the gate, and what decay and beta are made of."""
        q, k, v, gate, a, b = ctx.column_linear(x, *(p[name] for name in READ))
        return torch.cat((q, k, v), -1), gate, torch.cat((a, b), -1), [p[name] for name in small]

    def output(p: Tree, heads: Tensor, gate: Tensor, ctx: Context) -> Tensor:
        rows = ctx.fuse(gated_norm, form.eps, ctx.backend.axes.tp)(heads, gate, p["out_norm"])
        return ctx.row_linear(rows, p["w_out"])

    def apply(p: Tree, x: Tensor, ctx: Context) -> Tensor:
        qkv, gate, ab, weights = project(p, x, ctx)
        cp, age = ctx.backend.axes.cp, ctx.positions if ctx.documents is not None else None
        pieces = torch.stack(qkv.chunk(1 if cp.size == 1 else 2, 1))  # (P, B, L, …)
        before = pieces.new_zeros(1, len(x), kept, qkv.shape[-1]) if cp.size == 1 else columns_before(pieces, kept, cp)
        heads = ctx.fuse(ready, how)(before, pieces, ab, age, *weights)
        return output(p, rule(ctx, form.rule, heads, age), gate, ctx)

    def extend(p: Tree, x: Tensor, ctx: Context, cache: Tree) -> tuple[Tensor, Tree]:
        qkv, gate, ab, weights = project(p, x, ctx)
        age = None if ctx.padding is None else ctx.positions
        heads = ready(how, cache["columns"][None], qkv[None], ab, age, *weights)
        step = recurrent if x.shape[1] == 1 else chunked
        out, state = step(*heads, cache["state"], age)
        columns = torch.cat((cache["columns"], qkv), 1)
        return output(p, out.to(x.dtype), gate, ctx), {"columns": columns[:, columns.shape[1] - kept :], "state": state}

    def empty_cache(rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> Tree:
        wide = torch.promote_types(dtype, torch.float32)
        state = torch.zeros(rows, form.value_heads, form.key_dim, form.value_dim, dtype=wide, device=device)
        return {"columns": torch.zeros(rows, kept, sum(form.widths), dtype=dtype, device=device), "state": state}

    return Sublayer(
        "attention",
        specs=form.specs(),
        apply=apply,
        flops=form.flops,
        extend=extend,
        cache=empty_cache,
        divided=("tp", "cp"),
        names=NAMES,
    )


READ = ("w_q", "w_k", "w_v", "w_gate", "to_decay", "to_beta")

NAMES = {
    "w_q": Names("linear_attn.q_proj.weight", "attention.w_q.weight"),
    "w_k": Names("linear_attn.k_proj.weight", "attention.w_k.weight"),
    "w_v": Names("linear_attn.v_proj.weight", "attention.w_v.weight"),
    "w_gate": Names("linear_attn.g_proj.weight", "attention.w_g.weight"),
    "to_decay": Names("linear_attn.a_proj.weight", "attention.w_a.weight"),
    "to_beta": Names("linear_attn.b_proj.weight", "attention.w_b.weight"),
    "q_conv": Names("linear_attn.q_conv1d.weight", "attention.q_conv1d.weight"),
    "k_conv": Names("linear_attn.k_conv1d.weight", "attention.k_conv1d.weight"),
    "v_conv": Names("linear_attn.v_conv1d.weight", "attention.v_conv1d.weight"),
    "rate_bias": Names("linear_attn.A_log", "attention.A_log"),
    "dt_bias": Names("linear_attn.dt_bias", "attention.dt_bias"),
    "out_norm": Names("linear_attn.o_norm.weight", "attention.o_norm.weight"),
    "w_out": Names("linear_attn.o_proj.weight", "attention.w_out.weight"),
}


def ready(
    how: Heads,
    before: Tensor,
    pieces: Tensor,
    ab: Tensor,
    age: Tensor | None,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    rate_bias: Tensor,
    dt_bias: Tensor,
) -> Inputs:
    """Queries and keys (B, N, R, K), values (B, H, R, V), g and beta (B, H, R), of projections.

    ``pieces`` (P, B, L, …): queries, keys and values of P L = R positions; ``before`` (P, B, conv_size - 1, …): the ones before
    each piece; ``ab`` (B, R, 2 H). The convolution does not look back further than ``age`` (B, R).
    """
    P, _, L, _ = pieces.shape
    x = torch.cat((before.to(pieces.dtype), pieces), 2)
    taps = torch.cat((q_conv, k_conv, v_conv))[:, 0]
    wide = torch.promote_types(x.dtype, torch.float32)
    ages = None if age is None else torch.stack(age.chunk(P, 1))[..., None]
    y = None
    for back in range(how.conv_size):
        start = how.conv_size - 1 - back
        seen = x[:, :, start : start + L].to(wide)
        seen = seen if ages is None or back == 0 else seen.where(ages >= back, 0)
        term = seen * taps[:, start].to(wide)
        y = term if y is None else y + term
    assert y is not None
    y = F.silu(y).transpose(0, 1).flatten(1, 2)
    q, k, v = y.split((len(q_conv), len(k_conv), len(v_conv)), -1)
    q, k = (unit(z.unflatten(-1, (-1, how.key_dim))) for z in (q, k))
    q, k, v = (z.to(x.dtype).transpose(1, 2).contiguous() for z in (q, k, v.unflatten(-1, (-1, how.value_dim))))
    a, b = ab.to(wide).transpose(1, 2).chunk(2, 1)
    g = -rate_bias.to(wide).exp()[:, None] * F.softplus(a + dt_bias.to(wide)[:, None])
    beta = torch.sigmoid(b)
    return q, k, v, g, 2 * beta if how.negative else beta


def unit(x: Tensor) -> Tensor:
    """``x / √(|x|² + 1e-6)`` over the last dim."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_norm(eps: float, tp: Axis, heads: Tensor, gate: Tensor, gain: Tensor) -> Tensor:
    """``rms_norm(heads) · silu(gate)`` beside each other, (B, R, H V), of heads (B, H, R, V) and a gate (B, R, H V).

    The gain (V,) is that of all heads, of which a rank of ``tp`` has some: its gradients are summed.
    """
    wide = torch.promote_types(heads.dtype, torch.float32)
    normed = rms_norm(enter(gain, tp), heads.transpose(1, 2).to(wide), eps).flatten(2)
    return (normed * F.silu(gate.to(wide))).to(heads.dtype)


def rule(ctx: Context, name: Rule, heads: Inputs, age: Tensor | None) -> Tensor:
    """The gated delta rule over this rank's positions, (B, H, R, V), by what computes it best there. What was chosen for a GPU
    says nothing of a CPU that reads the run (`olmo_fn.train.check_attention` refuses to train there).
    """
    how = ctx.backend
    if heads[0].is_cuda and choose_rule(name, heads[0], how.axes.cp.size, bool(how.primitive)) == "fla":
        return fla(*heads, ctx.documents, ctx.packing)
    over = partial(chunked_over, how.axes.cp)
    if not how.primitive:
        return over(*heads, age)
    return how.primitive(_rule_vjp(over, age), [], heads, how.weight_grads, costly=True)


def _rule_vjp(over: Callable[..., Tensor], age: Tensor | None) -> VJP:
    """Keeps its inputs alone: what it computes on its way is many times as large, and is computed again for backward."""

    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        def pullback(cotangent: Tensor) -> tuple[Sequence[Any], Sequence[Tensor]]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = over(*leaves, age)
            return (), torch.autograd.grad(out, leaves, cotangent)

        return over(*inputs, age), pullback

    return vjp
