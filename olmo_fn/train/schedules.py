"""The learning-rate schedules' settings, one frozen dataclass each. Imports no torch: ``build`` does, when it is called.

A new one, here or in a user's own file, is a subclass of `ScheduleSettings` with a ``name``, its own fields and ``build``; or
of `Warmed`, with ``shape``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Suppress

from olmo_fn.fields import AT_LEAST_ONE, POSITIVE, SIGNED

if TYPE_CHECKING:
    from olmo_fn.optim.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """What every schedule has."""

    name: Suppress[str] = ""
    """By which ``--schedule.name`` chooses it."""
    units: Literal["steps", "tokens"] = "steps"
    """Unit of all its lengths."""

    def build(self, lr: float, total: int) -> Schedule:
        """The rate as a function of the step (or the tokens), with peak ``lr``, over ``total`` of them."""
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def check(self, lr: float, total: int) -> None:
        """ValueError, with the flags, for what `build` would refuse, as far as that is known without torch."""


@dataclass(frozen=True, kw_only=True)
class Warmed(ScheduleSettings):
    """A schedule that begins with a warm-up, and that a line may end early."""

    warmup: int | float = 2000
    """Length of the linear warm-up; with a point, such as 0.02, a fraction of the run."""
    warmup_from: float = 0.0
    """Rate at the start of the warm-up, as a fraction of the peak."""
    final: float = 0.1
    """Rate at the end, as a fraction of the peak."""
    decay: int | float = 0.1
    """Length of the last, linear decay, where there is one; with a point a fraction."""
    anneal_at: int = 0
    """Leave the schedule here, and fall in a line to `final` over `decay`; 0: never."""
    parts: ClassVar[tuple[str, ...]] = ("warmup",)
    """The lengths that must fit into the whole together."""

    def check(self, lr: float, total: int) -> None:
        given, sizes = [f"--schedule.{name} {getattr(self, name):g}" for name in self.parts], []
        for words, value in zip(given, (getattr(self, name) for name in self.parts), strict=True):
            if isinstance(value, float) and value > 1:
                raise ValueError(f"{words} has a point, so it is a fraction of the run; write {value:.0f} for {self.units}")
            sizes.append(round(value * total) if isinstance(value, float) else value)
        if sum(sizes) > total:
            long = " and ".join(given) + (" together are" if len(given) > 1 else " is")
            tenths = " ".join(f"--schedule.{name} 0.1" for name in self.parts)
            raise ValueError(
                f"{long} longer than the whole schedule of {total}; give {tenths}, a tenth of it, or more --run.steps"
            )

    def build(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import anneal, whole

        found = self.shape(lr, total)
        if not self.anneal_at:
            return found
        return anneal(found, self.anneal_at, whole("decay", self.decay, total), self.final * lr)

    def shape(self, lr: float, total: int) -> Schedule:
        """The schedule, if nothing ends it early."""
        raise NotImplementedError(f"{type(self).__name__} has no shape")


@dataclass(frozen=True, kw_only=True)
class Cosine(Warmed):
    """Half a cosine."""

    name: Suppress[Literal["cosine"]] = "cosine"

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import warmup_cosine

        return warmup_cosine(lr, self.warmup, total, self.final, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class Linear(Warmed):
    """A line."""

    name: Suppress[Literal["linear"]] = "linear"

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import warmup_linear

        return warmup_linear(lr, self.warmup, total, self.final, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class WSD(Warmed):
    """Warm-up, stable, decay."""

    name: Suppress[Literal["wsd"]] = "wsd"
    parts: ClassVar[tuple[str, ...]] = ("warmup", "decay")

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import wsd

        return wsd(lr, self.warmup, total, self.decay, self.final * lr, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class Constant(Warmed):
    """The same rate after the warm-up."""

    name: Suppress[Literal["constant"]] = "constant"

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import warmup_constant

        return warmup_constant(lr, self.warmup, total, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class HalfCosine(Warmed):
    """The second half of a cosine: to go on where a run followed a cosine for the first half."""

    name: Suppress[Literal["half-cosine"]] = "half-cosine"

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import warmup_half_cosine

        return warmup_half_cosine(lr, self.warmup, total, self.final, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class InvSqrt(Warmed):
    """One over the root of the step, above `final`."""

    name: Suppress[Literal["inv-sqrt"]] = "inv-sqrt"

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import warmup_inv_sqrt

        return warmup_inv_sqrt(lr, self.warmup, total, self.final, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class CosineLinear(Warmed):
    """A cosine, whose end is a line."""

    name: Suppress[Literal["cosine-linear"]] = "cosine-linear"
    parts: ClassVar[tuple[str, ...]] = ("warmup", "decay")
    floor: float = 0.1
    """What the cosine heads for, as a fraction of the peak."""

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import warmup_cosine_linear

        return warmup_cosine_linear(lr, self.warmup, total, self.floor, self.decay, self.final * lr, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class Power(Warmed):
    """A power of the step, whose end is a line."""

    name: Suppress[Literal["power"]] = "power"
    parts: ClassVar[tuple[str, ...]] = ("warmup", "decay")
    exponent: Annotated[float, SIGNED] = -0.51
    """Exponent of the power."""

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import power

        return power(lr, self.warmup, total, self.exponent, self.decay, self.final * lr, self.warmup_from * lr)


@dataclass(frozen=True, kw_only=True)
class WSDS(Warmed):
    """Stable, decay, again and again: a finished model after each period."""

    name: Suppress[Literal["wsds"]] = "wsds"
    parts: ClassVar[tuple[str, ...]] = ()  # they are of a period
    lengths: Annotated[tuple[int, ...], AT_LEAST_ONE] = ()
    """Lengths of the periods; one that lasts for all of the run when not given."""
    levels: tuple[float, ...] = ()
    """Rates of the periods, as fractions of the peak."""

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import wsds

        start = self.warmup_from * lr
        return wsds(lr, self.warmup, self.lengths or (total,), self.decay, self.levels, self.final * lr, start)


@dataclass(frozen=True, kw_only=True)
class Piecewise(Warmed):
    """Lines and half cosines, each from where the one before ended."""

    name: Suppress[Literal["piecewise"]] = "piecewise"
    lengths: Annotated[tuple[int, ...], AT_LEAST_ONE] = ()
    """Lengths of the pieces."""
    levels: tuple[float, ...] = ()
    """Rates at the ends of the pieces, as fractions of the peak."""
    shapes: tuple[Literal["linear", "cosine", "constant"], ...] = ()
    """Shape of each piece, linear or cosine; lines when not given."""

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import Piece, piecewise, whole

        shapes = self.shapes or ("linear",) * len(self.lengths)
        if not len(self.lengths) == len(self.levels) == len(shapes) or "constant" in shapes:
            raise ValueError(
                "piecewise: give --schedule.lengths and --schedule.levels one value for each piece, and --schedule.shapes "
                f"linear or cosine; there are {len(self.lengths)} lengths, {len(self.levels)} levels, {len(shapes)} shapes"
            )
        up = whole("warmup", self.warmup, total)
        warmup = [Piece(up, 1.0, start=self.warmup_from)] if up else []
        return piecewise(lr, [*warmup, *map(Piece, self.lengths, self.levels, shapes)])  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Sequential(Warmed):
    """Whole schedules one after the other, each from the rate that the one before ended with; the last to the end."""

    name: Suppress[Literal["sequential"]] = "sequential"
    lengths: Annotated[tuple[int, ...], AT_LEAST_ONE] = ()
    """Lengths of the parts but the last, which lasts to the end."""
    shapes: tuple[Literal["linear", "cosine", "constant"], ...] = ()
    """Shape of each part."""

    def shape(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import sequential, whole

        lengths = [*self.lengths, total - sum(self.lengths)]
        if len(self.shapes) != len(lengths):
            raise ValueError(
                f"sequential: {len(self.shapes)} shapes need {max(0, len(self.shapes) - 1)} lengths, the last part lasts to "
                f"the end; there are {len(self.lengths)}: see --schedule.shapes and --schedule.lengths"
            )
        if lengths[-1] < 1:
            given = ", ".join(map(str, self.lengths))
            raise ValueError(f"sequential: lengths {given} leave nothing of the run's {total}; shorten them")

        def part(shape: str, length: int, warmup: int, peak: float) -> Schedule:
            kind = {"linear": Linear, "cosine": Cosine, "constant": Constant}[shape]
            return kind(warmup=warmup, warmup_from=self.warmup_from, final=self.final).build(peak, length)

        up = whole("warmup", self.warmup, total)
        parts = [(partial(part, s, n, 0 if i else up), n) for i, (s, n) in enumerate(zip(self.shapes, lengths, strict=True))]
        return sequential(lr, parts[:-1], parts[-1][0])


@dataclass(frozen=True, kw_only=True)
class RangeTest(ScheduleSettings):
    """Rises exponentially from `lowest` to the rate: the learning-rate range test."""

    name: Suppress[Literal["range-test"]] = "range-test"
    lowest: Annotated[float, POSITIVE] = 1e-7
    """Rate at the start."""

    def check(self, lr: float, total: int) -> None:
        if self.lowest >= lr:
            raise ValueError(f"--schedule.lowest {self.lowest:g} is where the rate starts; it must be below --optim.lr {lr:g}")

    def build(self, lr: float, total: int) -> Schedule:
        from olmo_fn.optim.schedules import exponential

        return exponential(lr, total, self.lowest)


SCHEDULES = (
    Cosine,
    Linear,
    WSD,
    Constant,
    HalfCosine,
    InvSqrt,
    CosineLinear,
    Power,
    WSDS,
    Piecewise,
    Sequential,
    RangeTest,
)
