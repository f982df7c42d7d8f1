"""Kinds of block: how a mixer and a feed-forward network are put together on the residual stream.

A kind of block is a function of two sublayers that gives the block's *parts*, one stage of the model each. A part is
written once, for training and decoding alike: what runs a sublayer is handed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from olmo_fn.nn.context import Context
from olmo_fn.nn.sublayer import Names, Sublayer
from olmo_fn.tree import Tree

Run: TypeAlias = Callable[[Sublayer, Tensor], Tensor]
"""Runs a sublayer on a tensor (B, T, D)."""


class Part(NamedTuple):
    """A part of a block: ``fn(p, x, run, ctx)`` takes the stream x (B, T, D) to the stream after it.

    ``sublayers`` are those that it runs, ``norms`` the gains (D,) that it uses, by their names in p and in other programs.
    """

    name: str
    fn: Callable[[Tree, Tensor, Run, Context], Tensor]
    sublayers: tuple[Sublayer, ...]
    norms: dict[str, Names | None]


def reordered(mixer: Sublayer, feed_forward: Sublayer, eps: float) -> tuple[Part, ...]:
    """``x + norm(f(x))`` for each: the norm is on the sublayer's output (OLMo 2 report, section 3.2)."""

    def part(f: Sublayer, name: str, names: Names) -> Part:
        norm = f"{f.name}_norm"

        def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
            return ctx.add_normed(p[norm], x, run(f, x), eps)

        return Part(name, fn, (f,), {norm: names})

    return (
        part(mixer, mixer.name, Names("post_attention_layernorm.weight", f"{mixer.name}_norm.weight")),
        part(feed_forward, "feed_forward", Names("post_feedforward_layernorm.weight", "feed_forward_norm.weight")),
    )


def pre_norm(mixer: Sublayer, feed_forward: Sublayer, eps: float) -> tuple[Part, ...]:
    """``x + f(norm(x))`` for each: the norm is on the sublayer's input (Llama, GPT-2)."""

    def part(f: Sublayer, name: str, names: Names) -> Part:
        norm = f"{f.name}_norm"

        def fn(p: Tree, x: Tensor, run: Run, ctx: Context) -> Tensor:
            return x + run(f, ctx.norm(p[norm], x, eps))

        return Part(name, fn, (f,), {norm: names})

    return (
        part(mixer, mixer.name, Names("input_layernorm.weight", f"{mixer.name}_norm.weight")),
        part(feed_forward, "feed_forward", Names("post_attention_layernorm.weight", "feed_forward_norm.weight")),
    )
