"""What the settings of every sublayer have, and the checks that they share."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar

import tyro

from olmo_fn.fields import Range

if TYPE_CHECKING:
    from olmo_fn.models.config import Model
    from olmo_fn.nn.sublayer import Sublayer

WIDTH = Range(1, 1 << 24)


@dataclass(frozen=True, kw_only=True)
class MixerSettings:
    """What a mixer's settings must have: a ``name``, and ``build``. Derive your own from it."""

    name: tyro.conf.Suppress[str] = ""

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def check(self, model: Model) -> None:
        """ValueError, in one line with the fix, if the numbers do not fit together."""

    def check_mesh(self, model: Model, tp: int, cp: int, cp_method: str) -> None:
        """ValueError, with the flags and a way out, if ranks of these degrees cannot share it."""


@dataclass(frozen=True, kw_only=True)
class FeedForwardSettings(MixerSettings):
    """What the settings of a feed-forward network must have: the same as a mixer's."""

    num_experts: ClassVar[int] = 0
    """Those of a mixture of experts."""
    balance_rate: ClassVar[float] = 0.0
    """How far biases of experts' scores move in a step."""

    @property
    def drops(self) -> bool:
        """Whether training wants to know the numbers of sequences, by which it draws."""
        return False

    def at(self, layer: int) -> FeedForwardSettings:
        """The settings of layer ``layer``: these, unless some layers have another network."""
        return self

    def check_experts(self, ep: int) -> None:
        """ValueError, with the arithmetic, if ``ep`` ranks cannot share its experts."""


def check_positive(settings: Any, *names: str, above: float | None = None) -> None:
    """ValueError for a field of these that is below 1, or is not ``above``; what is not given is left alone."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and (value < 1 if above is None else not value > above):
            must = "at least 1" if above is None else "positive"
            raise ValueError(f"--model.{name.replace('_', '-')} is {value}; it must be {must}")


def divisors(n: int) -> str:
    """The divisors of ``n``, in words.

    >>> divisors(6)
    '1, 2, 3, 6'
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return ", ".join(map(str, sorted({*small, *(n // d for d in small)})))
