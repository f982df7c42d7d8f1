"""Replay a step of a run: load the newest whole checkpoint before it, and make the steps from there again.

A batch is a function of the step and nothing is remembered outside the state, so the replayed steps are the old ones, bit
for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo_fn import tree
from olmo_fn.checkpoint import steps
from olmo_fn.core.chain import Batch
from olmo_fn.core.step import State
from olmo_fn.research.per_example import per_example_loop
from olmo_fn.train.config import Config
from olmo_fn.train.folder import read_config
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.recipe import recipe
from olmo_fn.train.session import Loaded, Session, open_run
from olmo_fn.tree import Tree


@dataclass(frozen=True)
class Sequence:
    """One row of the step's batch. ``loss`` is a token's; gradients of the rows add up to the batch's."""

    row: int
    loss: float
    tokens: int
    grad_norm: float
    file: str
    offset: int
    """Where in the token file it begins, in tokens."""
    ids: np.ndarray = field(repr=False)
    text: str | None = field(repr=False)
    """Decoded; None without a tokenizer."""


@dataclass(frozen=True)
class Replay:
    """Step ``step`` of a run, made again."""

    step: int
    start: int
    """The step after which the replay began."""
    checkpoint: Path | None
    """What it began from; None: the initial weights."""
    differences: tuple[str, ...]
    """One line a value that is not the same, bit for bit, as in metrics.jsonl; empty when all are."""
    metrics: Mapping[str, Any]
    sequences: tuple[Sequence, ...]
    """Those of the batch, the largest gradient first."""
    cfg: Config = field(repr=False)
    params: Tree = field(repr=False)
    """The parameters before the step."""
    batch: Batch = field(repr=False)
    state: State = field(repr=False)
    """The state after the step."""


def replay(run: Session | str | Path, step: int, say: Callable[[str], Any] = lambda line: None) -> Replay:
    """Replay ``run`` to ``step`` (from 1) and look at each sequence of its batch, before the step and by itself.

    Begins at the newest whole checkpoint of an earlier step, or at the initial weights. ``say`` gets a line for each broken
    checkpoint that is passed over. ValueError when the run has no such step.
    """
    session = open_run(run)
    recorded = {line["step"]: line for line in read_metrics(session.folder / "metrics.jsonl")}
    if step not in recorded:
        has = f"steps {min(recorded)} to {max(recorded)}" if recorded else "no steps"
        raise ValueError(f"{session.folder / 'metrics.jsonl'} has no step {step}; it has {has}")
    if session.cfg.run.threads:
        torch.set_num_threads(session.cfg.run.threads)
    state, checkpoint, _ = state_before(session, step, say)
    start = int(state.step)
    differences: list[str] = []
    for n in range(start, step):
        batch = session.batch(n)
        if n == step - 1:
            rows = sequences(session, state, batch)
            params = tree.map(torch.clone, state.params)  # the step may overwrite them
        state, found = session.step(state, batch)
        metrics = {name: value.tolist() for name, value in found.items()}
        differences += compare(n + 1, metrics, recorded.get(n + 1, {}))
    return Replay(step, start, checkpoint, tuple(differences), metrics, rows, session.cfg, params, batch, state)


def state_before(session: Session, step: int, say: Callable[[str], Any]) -> Loaded:
    """The newest state that is whole and from before ``step``."""
    if found := session.newest(session.folder, before=step, on_skip=say):
        return found
    if origin := session.cfg.run.start_from:
        saved = ", ".join(map(str, steps(session.folder / "checkpoints"))) or "none"
        raise ValueError(
            f"{session.folder} has no whole checkpoint before step {step} (there are {saved}), "
            f"and it began from {origin}, not from initial weights; replay a later step"
        )
    return Loaded(session.first_state())


def compare(step: int, found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """A line for each value, a number or a list of them, that is not exactly the recorded one.

    >>> compare(3, {"loss": 0.5, "lr": 0.1}, {"step": 3, "loss": 0.25, "lr": 0.1})
    ['step 3: loss is 0.5, was 0.25']
    >>> compare(3, {"loss": float("nan"), "load": [1.0, 2.0]}, {"loss": float("nan"), "load": [1.0, 2.0]})
    []
    """
    return [
        f"step {step}: {name} is {value}, was {recorded.get(name, 'not recorded')}"
        for name, value in found.items()
        if value != recorded.get(name) and repr(value) != repr(recorded.get(name))  # NaN is not equal to itself
    ]


def sequences(session: Session, state: State, batch: Batch) -> tuple[Sequence, ...]:
    """Each row of the batch by itself, where the step takes its gradient, the largest gradient first.

    Loss and gradient are the recipe's own, with its adapters and frozen parameters, before anything is clipped.
    """
    r = replace(session.cfg.recipe, accumulate=1, clip=0.0, clip_value=0.0, noise_scale=0.0)
    grads = recipe(replace(session.cfg, recipe=r), session.dtype).grads
    each = per_example_loop(grads, session.step.point(state), batch)
    ids, loader = batch["input_ids"].cpu().numpy(), session.source.train
    rows = [
        Sequence(
            row,
            float(each.loss[row] / each.tokens[row].clamp(min=1)),
            int(each.tokens[row]),
            float(each.grad_norm[row]),
            *loader.origin(int(state.step), row),
            ids[row],
            session.source.tokenizer.decode(ids[row]) if session.source.tokenizer else None,
        )
        for row in range(len(ids))
    ]
    return tuple(sorted(rows, key=lambda s: math.inf if math.isnan(s.grad_norm) else s.grad_norm, reverse=True))


def largest_spike(run: str | Path, window: int = 32) -> int:
    """The step whose loss is furthest above the mean of up to ``window`` steps before it, in their standard deviations.

    The first eight steps count only as history. A loss that is not finite comes before all others.
    """
    read_config(Path(run))  # refuses a folder that is no run
    lines = read_metrics(Path(run) / "metrics.jsonl", "loss")
    if len(lines) < 10:
        raise ValueError(f"{run} has {len(lines)} steps, too few to look for a spike; name one with --step")
    loss = np.array([line["loss"] for line in lines])

    def height(i: int) -> float:
        if not math.isfinite(loss[i]):
            return math.inf
        past = loss[max(0, i - window) : i]
        past = past[np.isfinite(past)]
        return float((loss[i] - past.mean()) / max(past.std(), 1e-12)) if len(past) > 1 else -math.inf

    return int(lines[max(range(8, len(lines)), key=height)]["step"])
