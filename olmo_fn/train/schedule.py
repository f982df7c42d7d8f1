"""From the config to functions of the step: the learning rate, and the sizes of the batch."""

from __future__ import annotations

from olmo_fn.data.sizes import Sizes, batch_phases, length_phases, together
from olmo_fn.optim.schedules import Schedule, in_tokens, scale
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
    if cfg.schedule.units == "tokens":
        found = in_tokens(cfg.schedule.build(cfg.optim.lr, steps.tokens_before(cfg.run.steps)), steps.tokens)
    else:
        found = cfg.schedule.build(cfg.optim.lr, cfg.run.steps)
    return scale(found, steps.lr_ratio) if cfg.growth.sqrt_lr else found
