"""Kinds of block: how a mixer and a feed-forward network are put together on the residual stream.

A kind of block is a function of two sublayers that gives the block's *parts*, one stage of the model each. A part is
written once, for training and decoding alike: what runs a sublayer is handed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import enter
from olmo_fn.nn.context import Context
from olmo_fn.nn.norm import Norm, unit_norm
from olmo_fn.nn.residual import Residual
from olmo_fn.nn.sublayer import Names, Sublayer
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

Run: TypeAlias = Callable[[Sublayer, Tensor], Tensor]
"""Runs a sublayer on a tensor (B, T, D)."""


Residuals: TypeAlias = tuple[Residual, Residual]
"""Those of the mixer and of the feed-forward network."""
PLAIN = Residual(), Residual()
FFN = "feed_forward"


class Part(NamedTuple):
    """A part of a block: ``fn(p, x, run, ctx)`` takes the stream x (B, T, D) to the stream after it.

    ``sublayers`` are those that it runs, ``norms`` the parameters of the model's `Norm` that it uses, by their names in p and
    in other programs; ``others`` are parameters of other kinds, each with its names there.
    """

    name: str
    fn: Callable[[Tree, Tensor, Run, Context], Tensor]
    sublayers: tuple[Sublayer, ...]
    norms: dict[str, Names | None]
    others: Mapping[str, tuple[Spec, Names | None]] = {}


def reordered(mixer: Sublayer, feed_forward: Sublayer, norm: Norm, residuals: Residuals = PLAIN) -> tuple[Part, ...]:
    """``x + norm(f(x))`` for each: the norm is on the sublayer's output (OLMo 2 report, section 3.2)."""

    def part(f: Sublayer, name: str, names: Names, residual: Residual) -> Part:
        gain = f"{f.name}_norm"

        def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
            return residual.add_normed(ctx, norm, p[gain], x, run(f, x))

        return Part(name, fn, (f,), {gain: names})

    return (
        part(mixer, mixer.name, Names("post_attention_layernorm.weight", f"{mixer.name}_norm.weight"), residuals[0]),
        part(feed_forward, FFN, Names("post_feedforward_layernorm.weight", "feed_forward_norm.weight"), residuals[1]),
    )


def pre_norm(mixer: Sublayer, feed_forward: Sublayer, norm: Norm, residuals: Residuals = PLAIN) -> tuple[Part, ...]:
    """``x + f(norm(x))`` for each: the norm is on the sublayer's input (Llama, GPT-2)."""

    def part(f: Sublayer, name: str, names: Names, residual: Residual) -> Part:
        gain = f"{f.name}_norm"

        def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
            return residual.add(ctx, x, run(f, norm(ctx, p[gain], x)))

        return Part(name, fn, (f,), {gain: names})

    return (
        part(mixer, mixer.name, Names("input_layernorm.weight", f"{mixer.name}_norm.weight"), residuals[0]),
        part(feed_forward, FFN, Names("post_attention_layernorm.weight", "feed_forward_norm.weight"), residuals[1]),
    )


def peri_norm(mixer: Sublayer, feed_forward: Sublayer, norm: Norm, residuals: Residuals = PLAIN) -> tuple[Part, ...]:
    """``x + norm(f(norm(x)))`` for each: norms on a sublayer's input and output (Gemma 2 and 3)."""

    def part(f: Sublayer, name: str, before: Names, after: Names, residual: Residual) -> Part:
        first, second = f"{f.name}_norm", f"post_{f.name}_norm"

        def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
            return residual.add_normed(ctx, norm, p[second], x, run(f, norm(ctx, p[first], x)))

        return Part(name, fn, (f,), {first: before, second: after})

    return (
        part(
            mixer,
            mixer.name,
            Names("input_layernorm.weight", f"{mixer.name}_norm.weight"),
            Names("post_attention_layernorm.weight", f"post_{mixer.name}_norm.weight"),
            residuals[0],
        ),
        part(
            feed_forward,
            FFN,
            Names("pre_feedforward_layernorm.weight", "feed_forward_norm.weight"),
            Names("post_feedforward_layernorm.weight", "post_feed_forward_norm.weight"),
            residuals[1],
        ),
    )


Three: TypeAlias = tuple[Residual, Residual, Residual]
"""Those of the mixer, of the dense network, and of the experts."""
MOE_NAMES = Names("post_moe_layernorm.weight", "feed_forward_moe_norm.weight")


def hybrid(mixer: Sublayer, dense: Sublayer, experts: Sublayer, norm: Norm, residuals: Three) -> tuple[Part, ...]:
    """``h = x + norm(mixer(x)); h + norm(dense(h)) + norm(experts(x))``: the experts see what comes into the block, so that
    they need not wait for the rest of it, and all is one part.
    """
    first, second, third = (f"{f.name}_norm" for f in (mixer, dense, experts))

    def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
        sparse = run(experts, x)
        h = residuals[0].add_normed(ctx, norm, p[first], x, run(mixer, x))
        h = residuals[1].add_normed(ctx, norm, p[second], h, run(dense, h))
        return residuals[2].add_normed(ctx, norm, p[third], h, sparse)

    names = Names("post_attention_layernorm.weight", f"{mixer.name}_norm.weight")
    dense_names = Names("post_feedforward_layernorm.weight", "feed_forward_norm.weight")
    return (Part("hybrid", fn, (mixer, dense, experts), {first: names, second: dense_names, third: MOE_NAMES}),)


def hybrid_pre_norm(mixer: Sublayer, dense: Sublayer, experts: Sublayer, norm: Norm, residuals: Three) -> tuple[Part, ...]:
    """``h = x + mixer(norm(x)); h + dense(norm(h)) + experts(norm(x))``: the same with the norms on the inputs."""
    first, second, third = (f"{f.name}_norm" for f in (mixer, dense, experts))

    def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
        sparse = run(experts, norm(ctx, p[third], x))
        h = residuals[0].add(ctx, x, run(mixer, norm(ctx, p[first], x)))
        h = residuals[1].add(ctx, h, run(dense, norm(ctx, p[second], h)))
        return residuals[2].add(ctx, h, sparse)

    names = Names("input_layernorm.weight", f"{mixer.name}_norm.weight")
    dense_names = Names("post_attention_layernorm.weight", "feed_forward_norm.weight")
    return (Part("hybrid", fn, (mixer, dense, experts), {first: names, second: dense_names, third: MOE_NAMES}),)


def normalized(mixer: Sublayer, feed_forward: Sublayer, d_model: int, step: float = 0.05) -> tuple[Part, ...]:
    """``unit(x + a · (unit(f(x)) - x))`` for each: the stream stays on the unit sphere (nGPT, Loshchilov et al. 2024).

    ``a`` (D,) is ``|alpha| · step · √D`` with a learned alpha that starts at 1/√D.
    """

    def part(f: Sublayer, name: str, names: Names) -> Part:
        alpha = f"{f.name}_alpha"

        def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
            return ctx.fuse(move_on_sphere, step * d_model**0.5, ctx.backend.axes.tp)(x, run(f, x), p[alpha])

        spec = Spec((d_model,), ("embed",), Init("constant", value=d_model**-0.5))
        return Part(name, fn, (f,), {}, {alpha: (spec, names)})

    return (
        part(mixer, mixer.name, Names("attn_alpha", "attn_alpha")),
        part(feed_forward, FFN, Names("mlp_alpha", "mlp_alpha")),
    )


def move_on_sphere(factor: float, tp: Axis, x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """``x`` moved by ``factor · |alpha|`` towards the unit vector of ``y``, and back to length 1; both (B, T, D)."""
    x32, y32 = (z if z.dtype == torch.float64 else z.float() for z in (x, y))
    step = (factor * enter(alpha, tp)).abs().to(x32.dtype)
    return unit_norm(torch.lerp(x32, unit_norm(y32), step.expand_as(x32))).to(x.dtype)
