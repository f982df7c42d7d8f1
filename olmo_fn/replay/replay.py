"""Replay a step of a run: load the newest whole checkpoint before it, and make the steps from there again.

A batch is a function of the step and nothing is remembered outside the state, so the replayed steps are the old ones, bit
for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmo_fn import tree
from olmo_fn.checkpoint import BrokenCheckpoint, load, step_path, steps
from olmo_fn.core.chain import Batch
from olmo_fn.core.compile import prepare_cache
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.core.step import State, Step
from olmo_fn.data.config import cache_dir
from olmo_fn.data.source import Source, open_data
from olmo_fn.models import transformer
from olmo_fn.research.per_example import per_example_loop
from olmo_fn.spec import init
from olmo_fn.train import machine
from olmo_fn.train.config import Config
from olmo_fn.train.folder import read_config
from olmo_fn.train.loop import abstract_state
from olmo_fn.train.metrics import read_metrics
from olmo_fn.train.recipe import recipe
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
    metrics: Mapping[str, float]
    sequences: tuple[Sequence, ...]
    """Those of the batch, the largest gradient first."""
    cfg: Config = field(repr=False)
    params: Tree = field(repr=False)
    """The parameters before the step."""
    batch: Batch = field(repr=False)
    state: State = field(repr=False)
    """The state after the step."""


def replay(run: str | Path, step: int, say: Callable[[str], Any] = lambda line: None) -> Replay:
    """Replay ``run`` to ``step`` (from 1) and look at each sequence of its batch, before the step and by itself.

    Begins at the newest whole checkpoint of an earlier step, or at the initial weights. ``say`` gets a line for each broken
    checkpoint that is passed over. ValueError when the run has no such step.
    """
    folder = Path(run)
    cfg = read_config(folder)
    recorded = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl")}
    if step not in recorded:
        there = f"steps {min(recorded)} to {max(recorded)}" if recorded else "no steps"
        raise ValueError(f"{folder / 'metrics.jsonl'} has no step {step}; it has {there}")
    device = machine.pick_device(cfg.run.device)
    dtype = machine.compute_dtype(cfg.recipe.dtype, device)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    if cfg.recipe.compile:
        prepare_cache(cache_dir(cfg.data) / "compiled")
    advance = recipe(cfg, dtype)
    state, checkpoint = state_before(folder, cfg, advance, step, device, say)
    start = int(state.step)
    source = open_data(cfg.data, cfg.model.vocab_size, cfg.recipe.sequence_length, cfg.recipe.batch_size)
    differences: list[str] = []
    for n in range(start + 1, step + 1):
        batch = {name: value.to(device) for name, value in source.train(n - 1).items()}
        if n == step:
            params = tree.map(torch.clone, state.params)  # the step may overwrite them
        state, found = advance(state, batch)
        metrics = {name: float(value) for name, value in found.items()}
        differences += compare(n, metrics, recorded.get(n, {}))
    rows = sequences(cfg, source, params, batch, step, dtype)
    return Replay(step, start, checkpoint, tuple(differences), metrics, rows, cfg, params, batch, state)


def state_before(
    folder: Path, cfg: Config, advance: Step, step: int, device: torch.device, say: Callable[[str], Any]
) -> tuple[State, Path | None]:
    """The newest state that is whole and from before ``step``, with its checkpoint."""
    there = steps(folder / "checkpoints")
    like = abstract_state(cfg, advance)
    for n in reversed([n for n in there if n < step]):
        path = step_path(folder / "checkpoints", n)
        try:
            state, _ = load(path, like, device=device)
            return State(state["step"], state["params"], state["slots"]), path
        except BrokenCheckpoint as error:
            say(f"skipping {path}, it is broken: {error}")
    if cfg.run.start_from:
        raise ValueError(
            f"{folder} has no whole checkpoint before step {step} (there are {', '.join(map(str, there)) or 'none'}), "
            f"and it began from {cfg.run.start_from}, not from initial weights; replay a later step"
        )
    return advance.init(init(transformer.specs(cfg.model), cfg.run.seed, device=device)), None


def compare(step: int, found: Mapping[str, float], recorded: Mapping[str, Any]) -> list[str]:
    """A line for each value that is not exactly the recorded one.

    >>> compare(3, {"loss": 0.5, "lr": 0.1}, {"step": 3, "loss": 0.25, "lr": 0.1})
    ['step 3: loss is 0.5, was 0.25']
    >>> compare(3, {"loss": float("nan")}, {"loss": float("nan")})
    []
    """

    def same(a: float, b: float | None) -> bool:
        return a == b or (b is not None and math.isnan(a) and math.isnan(b))

    return [
        f"step {step}: {name} is {value}, was {recorded.get(name, 'not recorded')}"
        for name, value in found.items()
        if not same(value, recorded.get(name))
    ]


def sequences(cfg: Config, source: Source, params: Tree, batch: Batch, step: int, dtype: torch.dtype) -> tuple[Sequence, ...]:
    """Each row of the batch by itself, the largest gradient first."""
    grads = pipe(cfg.loss.build(cfg.model), grad("tape", cfg.recipe.remat, dtype))
    each = per_example_loop(grads, params, batch)
    which, offsets = source.train.windows.locate(source.train.numbers(step - 1).astype(np.int64))
    ids = batch["input_ids"].cpu().numpy()
    rows = [
        Sequence(
            row,
            float(each.loss[row] / each.tokens[row].clamp(min=1)),
            int(each.tokens[row]),
            float(each.grad_norm[row]),
            source.train.windows.files[which[row]].path,
            int(offsets[row]),
            ids[row],
            source.tokenizer.decode(ids[row]) if source.tokenizer else None,
        )
        for row in range(len(ids))
    ]
    return tuple(sorted(rows, key=lambda s: math.inf if math.isnan(s.grad_norm) else s.grad_norm, reverse=True))


def largest_spike(run: str | Path, window: int = 32) -> int:
    """The step whose loss is furthest above the mean of up to ``window`` steps before it, in their standard deviations.

    The first eight steps count only as history. A loss that is not finite comes before all others.
    """
    read_config(Path(run))  # refuses a folder that is no run
    lines = read_metrics(Path(run) / "metrics.jsonl")
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
