"""Search the layouts of a number of accelerators: all of them roughly, the best few exactly.

Roughly: traces for each (tp, cp), of 1 and 2 sequences on as many ``dp_shard`` ranks as there are, from which the pieces of
more are extrapolated; a layout's state is divided by its own ``fsdp``, and its bubble is that of equal stages. The best of each
(pp, tp, cp, remat) are then estimated like any dry run, until enough of them fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.parallel.pipeline.schedule import Kind, schedule
from olmo_fn.planner.accelerators import ACCELERATORS
from olmo_fn.planner.clock import LAUNCH, bandwidth, before_and_after, clock, piece_seconds, update
from olmo_fn.planner.estimate import RESERVED, Estimate, estimate, profile_of
from olmo_fn.planner.job import Job, changed, check
from olmo_fn.planner.memory import at_rest, carry, peak_memory
from olmo_fn.planner.pipeline_simulate import simulate
from olmo_fn.planner.profile import Profile
from olmo_fn.planner.scale import extrapolated
from olmo_fn.train.config import Config

ROWS = (1, 2, 4, 8)  # sequences at once that are tried
LONG = 4096  # positions of a rank from which on context parallelism is tried
NODE = 8  # parameters are sharded over at least a machine
PIPELINES: tuple[tuple[Kind, int], ...] = (("1f1b", 1), ("interleaved", 2))


class Rough(NamedTuple):
    """A layout and what it roughly takes."""

    job: Job
    seconds: float
    bytes: float


def silent(words: str, part: float) -> None:
    """No progress is shown."""


def search(cfg: Config, gpus: int, best: int = 5, progress: Callable[[str, float], None] = silent) -> list[Estimate]:
    """The ``best`` layouts of ``gpus`` accelerators for ``cfg``, the fastest first; ValueError if none fits.

    Of layouts that differ only in how data-parallel ranks are split, or in micro-batches, only the best is named. ``progress``
    is called with what is being done, and how much of all is.
    """
    gpu = ACCELERATORS[cfg.gpu]
    found: dict[tuple[object, ...], list[Rough]] = {}
    pairs = [(tp, cp) for tp in _powers(gpu.node) for cp in _powers(8) if cp == 1 or cfg.recipe.sequence_length // cp >= LONG]
    for i, (tp, cp) in enumerate(pairs):
        progress(f"tp {tp}, cp {cp}", 0.7 * i / len(pairs))
        for one in _rough(cfg, gpus, tp, cp):
            key = one.job.mesh.pp, tp, cp, one.job.cfg.recipe.remat
            if one.bytes <= 1.1 * (gpu.memory - RESERVED):
                found.setdefault(key, []).append(one)
    order = sorted((min(ones, key=lambda one: one.seconds) for ones in found.values()), key=lambda one: one.seconds)
    exact: list[Estimate] = []
    for i, one in enumerate(order):
        progress(f"layout {i + 1}", 0.7 + 0.3 * len(exact) / best)
        exact += [e for e in (estimate(one.job),) if e.fits]
        if len(exact) == best or i == 3 * best:
            break
    if not exact:
        raise ValueError(
            f"no layout of {gpus} x {gpu.name} fits this model and batch; use more (--gpus), a larger --gpu, or a smaller batch"
        )
    progress("done", 1.0)
    return sorted(exact, key=lambda e: e.clock.seconds)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def layouts(cfg: Config, gpus: int, tp: int, cp: int) -> Iterator[Job]:
    """All layouts with these degrees that the model and the batch allow."""
    for pp in _powers(min(8, cfg.model.n_layers)):
        rest, uneven = divmod(gpus, pp * tp * cp)
        if uneven:
            continue
        for dp_shard in (d for d in range(1, rest + 1) if rest % d == 0 and (d * cp * tp >= NODE or d == rest)):
            mesh = Mesh(pp, rest // dp_shard, dp_shard, cp, tp)
            part, uneven = divmod(cfg.recipe.batch_size, rest)
            if uneven:
                continue
            for rows in (r for r in ROWS if part % r == 0):
                for remat in ("none", "full"):
                    base = changed(Job(cfg, mesh), mesh=mesh, remat=remat, accumulate=1)
                    if pp == 1:
                        yield changed(base, accumulate=part // rows)
                    elif part // rows >= pp:
                        for kind, chunks in PIPELINES:
                            yield changed(base, pp_schedule=kind, pp_chunks=chunks, pp_microbatches=part // rows)


def _rough(cfg: Config, gpus: int, tp: int, cp: int) -> Iterator[Rough]:
    shard = max(2 if cp == 1 else 1, gpus // (tp * cp))
    mesh = MeshConfig(dp_shard=shard, cp=cp, tp=tp, cp_method=cfg.mesh.cp_method)
    guesses: dict[int, Profile] = {}
    for one in layouts(cfg, gpus, tp, cp):
        try:
            check(one)
        except ValueError:
            continue
        if not guesses:  # of 1 and 2 sequences, every second block computed again
            recipes = (replace(cfg.recipe, remat="every-2", accumulate=1, batch_size=rows * shard) for rows in (1, 2))
            jobs = (Job(replace(cfg, mesh=mesh, recipe=recipe), mesh.on(shard * cp * tp)) for recipe in recipes)
            single, double = map(profile_of, jobs)
            guesses = {rows: extrapolated(single, double, rows - 1) for rows in ROWS}
        guess = _adapted(guesses[one.rows], one, shard * cp / one.mesh.degree("fsdp"))
        yield Rough(one, _seconds(one, guess), _bytes(one, guess))


def _adapted(guess: Profile, one: Job, spread: float) -> Profile:
    """The profile with blocks all of the kind that a layout has, and with its part of the state."""
    last = one.cfg.model.n_layers - 1
    kind = [i for i in guess.forward if isinstance(i, int) and (i % 2 == 0) == (one.cfg.recipe.remat == "full")]
    block = min(kind, key=lambda i: (i in (0, last - 1, last), i), default=0)
    state = {label: Counter({k: round(n * spread) for k, n in part.items()}) for label, part in guess.state.items()}
    gradients = {label: round(n * spread) for label, n in guess.gradients.items()}
    return replace(guess, state=state, gradients=gradients, alike=dict.fromkeys(range(last + 1), block))


def _seconds(one: Job, guess: Profile) -> float:
    """By `clock`, but for the pipeline, whose stages are taken to be equal."""
    if one.mesh.pp == 1:
        return clock(one, guess, ACCELERATORS[one.cfg.gpu]).seconds
    c, gpu, sweep = one.cfg.mesh, ACCELERATORS[one.cfg.gpu], 0.0
    for label, times in (("embed", 1), (guess.of(0), one.cfg.model.n_layers), ("head", 1)):
        sweep += times * sum(piece_seconds(one, pieces[label].seen, gpu)[1] for pieces in (guess.forward, guess.backward))
    busy = sweep * one.microbatches / one.mesh.pp
    speed, hop = bandwidth(one.mesh, "pp", gpu)
    sent = 2 * (one.mesh.pp - 1) * (carry(one) / speed + LAUNCH + hop)  # until the first comes back
    waited = sent + before_and_after(one, guess, gpu) + update(one, guess, gpu)
    return busy / (1 - _bubble(c.pp_schedule, one.mesh.pp, one.microbatches, c.pp_chunks)) + waited


@lru_cache(1024)
def _bubble(kind: Kind, ranks: int, microbatches: int, chunks: int) -> float:
    return simulate(schedule(kind, ranks, microbatches, chunks)).bubble


@lru_cache(1024)
def _live(kind: Kind, ranks: int, microbatches: int, chunks: int) -> int:
    return simulate(schedule(kind, ranks, microbatches, chunks)).peak_live[0]


def _bytes(one: Job, guess: Profile) -> float:
    """The largest moment; in a pipeline that of the first rank, with as many micro-batches as its schedule keeps."""
    if one.mesh.pp == 1:
        return peak_memory(one, guess).total
    c, inside = one.cfg.mesh, [label for label in one.labels(0) if label != "embed"]
    labels = [guess.of(label) for label in one.labels(0)] * c.pp_chunks
    kept = sum(guess.forward[guess.of(label)].grown["activations"] for label in inside)
    live = _live(c.pp_schedule, one.mesh.pp, one.microbatches, c.pp_chunks)
    weights = sum(guess.in_use[label] + guess.whole.get(label, 0) for label in labels)
    return at_rest(one, guess).total() + live * kept + weights
