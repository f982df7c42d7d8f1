"""Ways to stretch rotary positions over a longer context than a model was trained for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Suppress

from olmo_fn.fields import POSITIVE, Range

if TYPE_CHECKING:
    from torch import Tensor

STRETCH = Range(1)
CONTEXT = Range(1, 1 << 40)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """What a scaling's settings must have: a ``name``, and ``scale``."""

    name: Suppress[str] = ""

    def scale(self, inverse_frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """Other inverse frequencies (dims/2,) fp32, and a factor of all cosines and sines."""
        raise NotImplementedError(f"{type(self).__name__} has no scale")

    def check(self) -> None:
        """ValueError, in one line, if the numbers do not fit together."""


@dataclass(frozen=True, kw_only=True)
class NoScaling(RopeScaling):
    """Frequencies as they are."""

    name: Suppress[Literal["none"]] = "none"

    def scale(self, inverse_frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """The same frequencies."""
        return inverse_frequency, 1.0


@dataclass(frozen=True, kw_only=True)
class AdjustedBase(RopeScaling):
    """Another base of the frequencies (ABF, Xiong et al. 2023)."""

    name: Suppress[Literal["abf"]] = "abf"
    new_theta: Annotated[float, POSITIVE] = 8_000_000.0
    """The base in the place of --model.rope-theta."""

    def scale(self, inverse_frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """``new_theta^(-2i/dims)``."""
        even = inverse_frequency.new_ones(len(inverse_frequency)).cumsum(0).sub(1).mul(2)
        return 1.0 / self.new_theta ** (even / (2 * len(inverse_frequency))), 1.0


@dataclass(frozen=True, kw_only=True)
class Interpolation(RopeScaling):
    """Positions divided by a factor (Chen et al. 2023)."""

    name: Suppress[Literal["linear"]] = "linear"
    factor: Annotated[float, STRETCH] = 2.0
    """The new context over the old one."""

    def scale(self, inverse_frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """All frequencies divided by the factor."""
        return inverse_frequency / self.factor, 1.0


@dataclass(frozen=True, kw_only=True)
class Stepwise(RopeScaling):
    """Long waves stretched, short ones kept (Llama 3.1)."""

    name: Suppress[Literal["llama3"]] = "llama3"
    factor: Annotated[float, STRETCH] = 32.0
    """The new context over the old one."""
    low_freq_factor: Annotated[float, POSITIVE] = 1.0
    """Waves are long of which fewer than this fit into the old context."""
    high_freq_factor: Annotated[float, POSITIVE] = 4.0
    """Waves are short of which more than this fit into the old context."""
    old_context: Annotated[int, CONTEXT] = 8192
    """The context that the model was trained for, in tokens."""

    def scale(self, inverse_frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """`olmo_fn.nn.rope.stepwise`."""
        from olmo_fn.nn.rope import stepwise

        return stepwise(inverse_frequency, self.factor, self.low_freq_factor, self.high_freq_factor, self.old_context), 1.0

    def check(self) -> None:
        """ValueError if no wave is between long and short."""
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"--model.rope-scaling.low-freq-factor {self.low_freq_factor} must be below --model.rope-scaling."
                f"high-freq-factor {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class YaRN(RopeScaling):
    """Frequencies interpolated by a ramp over the dims, and scores sharpened (Peng et al. 2023; OLMo 3's long context)."""

    name: Suppress[Literal["yarn"]] = "yarn"
    factor: Annotated[float, STRETCH] = 8.0
    """The new context over the old one."""
    beta_fast: Annotated[float, POSITIVE] = 32.0
    """Waves of which more than this fit into the old context are kept."""
    beta_slow: Annotated[float, POSITIVE] = 1.0
    """Waves of which fewer than this fit into the old context are stretched by the whole factor."""
    old_context: Annotated[int, CONTEXT] = 8192
    """The context that the model was trained for, in tokens."""
    attention_factor: Annotated[float | None, POSITIVE] = None
    """Factor of cosines and sines; 0.1 ln(factor) + 1 when not given."""

    def scale(self, inverse_frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """`olmo_fn.nn.rope.yarn`."""
        from olmo_fn.nn.rope import yarn

        factor = 0.1 * log(self.factor) + 1 if self.attention_factor is None else self.attention_factor
        return yarn(inverse_frequency, theta, self.factor, self.beta_fast, self.beta_slow, self.old_context), factor

    def check(self) -> None:
        """ValueError if there is no ramp."""
        if not self.beta_slow < self.beta_fast:
            raise ValueError(
                f"--model.rope-scaling.beta-slow {self.beta_slow} must be below --model.rope-scaling.beta-fast {self.beta_fast}"
            )


SCALINGS: tuple[Any, ...] = (NoScaling, AdjustedBase, Interpolation, Stepwise, YaRN)
