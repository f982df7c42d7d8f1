"""From the config to functions of the step: the learning rate, and the sizes of the batch."""

from __future__ import annotations

from functools import partial

from olmo_fn.data.sizes import Sizes, batch_phases, length_phases, together
from olmo_fn.optim import schedules
from olmo_fn.optim.schedules import Piece, Schedule
from olmo_fn.train import config
from olmo_fn.train.config import Config


def sizes(cfg: Config) -> Sizes:
    """Batch size and sequence length of every step."""
    g, r = cfg.growth, cfg.recipe
    if len(g.batch_sizes) != len(g.until):
        raise ValueError(
            f"--growth.batch-sizes has {len(g.batch_sizes)} sizes and --growth.until {len(g.until)} ends; give one end for each"
        )
    window = r.sequence_length
    batches = batch_phases((*g.batch_sizes, r.batch_size), (0, *g.until), window, g.units)
    lengths = [(0, window)]
    if g.min_length:
        lengths = length_phases(g.min_length, g.length_steps, window, g.length_multiple, g.truncate)
    return together(window, batches, lengths, g.truncate and g.min_length > 0)


def schedule(cfg: Config) -> Schedule:
    """The learning rate as a function of the step."""
    steps = sizes(cfg)
    in_tokens = cfg.schedule.units == "tokens"
    total = steps.tokens_before(cfg.run.steps) if in_tokens else cfg.run.steps
    found = named(cfg.schedule, cfg.optim.lr, total)
    found = schedules.in_tokens(found, steps.tokens) if in_tokens else found
    return schedules.scale(found, steps.lr_ratio) if cfg.growth.sqrt_lr else found


def named(s: config.Schedule, lr: float, total: int) -> Schedule:
    """The schedule of that name and peak over ``total`` steps or tokens. ValueError for settings that do not fit."""
    found = _shape(s, lr, total)
    if not s.anneal_at:
        return found
    return schedules.anneal(found, s.anneal_at, schedules.whole("decay", s.decay, total), s.final * lr)


def _shape(s: config.Schedule, lr: float, total: int) -> Schedule:
    start, final = s.warmup_from * lr, s.final * lr
    match s.name:
        case "constant":
            return schedules.warmup_constant(lr, s.warmup, total, start)
        case "linear":
            return schedules.warmup_linear(lr, s.warmup, total, s.final, start)
        case "cosine":
            return schedules.warmup_cosine(lr, s.warmup, total, s.final, start)
        case "half-cosine":
            return schedules.warmup_half_cosine(lr, s.warmup, total, s.final, start)
        case "inv-sqrt":
            return schedules.warmup_inv_sqrt(lr, s.warmup, total, s.final, start)
        case "wsd":
            return schedules.wsd(lr, s.warmup, total, s.decay, final, start)
        case "cosine-linear":
            return schedules.warmup_cosine_linear(lr, s.warmup, total, s.floor, s.decay, final, start)
        case "power":
            return schedules.power(lr, s.warmup, total, s.exponent, s.decay, final, start)
        case "wsds":
            return schedules.wsds(lr, s.warmup, s.lengths or (total,), s.decay, s.levels, final, start)
        case "range-test":
            return schedules.exponential(lr, total, s.lowest)
        case "piecewise":
            return schedules.piecewise(lr, _pieces(s, total))
        case "sequential":
            return _sequential(s, lr, total)
    raise ValueError(f"--schedule.name {s.name!r} is unknown")


def _pieces(s: config.Schedule, total: int) -> list[Piece]:
    shapes = s.shapes or ("linear",) * len(s.lengths)
    if not len(s.lengths) == len(s.levels) == len(shapes) or "constant" in shapes:
        raise ValueError(
            "piecewise: give --schedule.lengths and --schedule.levels one value for each piece, and --schedule.shapes "
            f"linear or cosine; there are {len(s.lengths)} lengths, {len(s.levels)} levels, {len(shapes)} shapes"
        )
    up = schedules.whole("warmup", s.warmup, total)
    warmup = [Piece(up, 1.0, start=s.warmup_from)] if up else []
    return [*warmup, *map(Piece, s.lengths, s.levels, shapes)]  # type: ignore[arg-type]


def _sequential(s: config.Schedule, lr: float, total: int) -> Schedule:
    lengths = [*s.lengths, total - sum(s.lengths)]
    if len(s.shapes) != len(lengths):
        raise ValueError(
            f"sequential: {len(s.shapes)} shapes need {max(0, len(s.shapes) - 1)} lengths, the last part lasts to the end; "
            f"there are {len(s.lengths)}: see --schedule.shapes and --schedule.lengths"
        )
    if lengths[-1] < 1:
        raise ValueError(
            f"sequential: lengths {', '.join(map(str, s.lengths))} leave nothing of the run's {total}; shorten them"
        )

    def part(shape: str, length: int, warmup: int, peak: float) -> Schedule:
        own = config.Schedule(shape, warmup, s.warmup_from, s.final)  # type: ignore[arg-type]
        return named(own, peak, length)

    up = schedules.whole("warmup", s.warmup, total)
    make = [partial(part, shape, n, 0 if i else up) for i, (shape, n) in enumerate(zip(s.shapes, lengths, strict=True))]
    return schedules.sequential(lr, list(zip(make, lengths, strict=True))[:-1], make[-1])
