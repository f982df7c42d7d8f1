"""From the config to functions of the step: the learning rate, and the sizes of the batch. `sizes` imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from olmo_fn.data.sizes import Sizes, batch_phases, length_phases, together

if TYPE_CHECKING:
    from olmo_fn.optim.schedules import Schedule
    from olmo_fn.train.config import Config

LENGTHS = 1024  # most sequence lengths of a run that grows


def sizes(cfg: Config) -> Sizes:
    """Batch size and sequence length of every step."""
    g, r = cfg.growth, cfg.recipe
    if len(g.batch_sizes) != len(g.until):
        raise ValueError(
            f"--growth.batch-sizes has {len(g.batch_sizes)} sizes and --growth.until {len(g.until)} ends; give one end for each"
        )
    window, parts = r.sequence_length, _parts(cfg)
    if parts > 1:
        return together(window * parts, [(0, r.batch_size // parts)], [(0, window)])
    if g.min_length and window // g.length_multiple > LENGTHS:
        raise ValueError(
            f"--growth.length-multiple {g.length_multiple} makes {window // g.length_multiple:,} lengths of "
            f"--recipe.sequence-length {window}; take {-(-window // LENGTHS)} or more"
        )
    try:
        batches = batch_phases((*g.batch_sizes, r.batch_size), (0, *g.until), window, g.units)
        lengths = [(0, window)]
        if g.min_length:
            lengths = length_phases(g.min_length, g.length_steps, window, g.length_multiple, g.truncate)
        return together(window, batches, lengths, g.truncate and g.min_length > 0)
    except ValueError as error:
        given = f"--recipe.batch-size {r.batch_size}, --recipe.sequence-length {window} and --growth"
        raise ValueError(f"{given} do not fit together: {error}") from None


def _parts(cfg: Config) -> int:
    """Sequences that a window is cut into, for datasets that are cut as for a longer sequence length."""
    r, longest = cfg.recipe, getattr(cfg.data.instances, "longest", 0)
    if not longest or longest == r.sequence_length:
        return 1
    parts = longest // r.sequence_length
    if longest % r.sequence_length or r.batch_size % parts or cfg.growth.batch_sizes or cfg.growth.min_length:
        raise ValueError(
            f"--data.longest {longest} must be a multiple of --recipe.sequence-length {r.sequence_length}, "
            f"--recipe.batch-size {r.batch_size} a multiple of how often, and there can be no --growth"
        )
    return parts


def schedule(cfg: Config) -> Schedule:
    """The learning rate as a function of the step."""
    from olmo_fn.optim.schedules import in_tokens, scale

    steps, found = sizes(cfg), cfg.schedule.build(cfg.optim.lr, total(cfg))
    if cfg.schedule.units == "tokens":
        found = in_tokens(found, steps.tokens)
    return scale(found, steps.lr_ratio) if cfg.growth.sqrt_lr else found


def total(cfg: Config) -> int:
    """The length of the run, in steps or tokens as its schedule counts."""
    return sizes(cfg).tokens_before(cfg.run.steps) if cfg.schedule.units == "tokens" else cfg.run.steps
