"""Whether a run fits into the memory there is: said before anything is allocated, with the flags that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from olmo_fn.kernels.attention_tiles import TILE
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models.count import num_params
from olmo_fn.planner.estimate import peaks, profile_of
from olmo_fn.planner.job import Job, changed, check
from olmo_fn.planner.tables import GIB, sequences
from olmo_fn.train.config import Config

PROCESS = 0.5e9  # bytes of Python, torch and what they compiled


def check_memory(cfg: Config, mesh: Mesh, dtype: str, memory: float) -> None:
    """ValueError if a step of ``cfg`` on ``mesh``, in ``dtype``, needs more than ``memory`` bytes a process.

    It is the plan's figure (`olmo_fn.planner`), to which half a gigabyte of the process itself comes.

    >>> from configs import CONFIGS
    >>> check_memory(CONFIGS["olmo2-tiny"], Mesh(), "float32", 2e9)
    >>> check_memory(CONFIGS["olmo2-190m"], Mesh(), "bfloat16", 16e9)
    Traceback (most recent call last):
    ValueError: a step needs 740.1 GiB, for 512 sequences of 4,096 at once; there are 14.9. This fits: --recipe.accumulate 128
    """
    job = changed(Job(cfg, mesh), dtype=dtype)
    if _at_most(job) < memory / 2 or (need := _need(job)) <= memory:
        return
    words = f"a step needs {need / GIB:,.1f} GiB, for {sequences(job)} at once; there are {memory / GIB:,.1f}"
    for flags, smaller in _smaller(job):
        tries = _accumulated(smaller)
        least = _need(tries[-1])
        if least <= memory:
            fits = next(one for one in tries if _need(one) <= memory)
            raise ValueError(f"{words}. This fits: --recipe.accumulate {fits.cfg.recipe.accumulate}{flags}")
    raise ValueError(
        f"{words}. Even --recipe.accumulate {tries[-1].cfg.recipe.accumulate}{flags} needs {least / GIB:,.1f}: take a smaller "
        "model, or more processes, for which olmo-fn plan finds the best layouts"
    )


def _at_most(job: Job) -> float:
    """Bytes, more than any step needs, and quick to say; of SOAP, whose state grows with the square of a dim, nothing is."""
    if job.cfg.optim.name == "soap":
        return inf
    m, length = job.cfg.model, job.cfg.recipe.sequence_length
    activations = 4 * job.rows * length * m.n_layers * (20 * max(m.d_model, m.n_heads * m.k) + 6 * m.hidden_size)
    scores = 16 * job.rows * m.n_heads * min(TILE, length) * length
    return PROCESS + 64 * num_params(m) + activations + scores + 8 * 2048 * m.vocab_size


def _need(job: Job) -> float:
    return PROCESS + max(peak.total for peak in peaks(job, profile_of(job)))


def _smaller(job: Job) -> Iterator[tuple[str, Job]]:
    """The job with less and less to keep, with the flags for it; but for the last, of the same numbers."""
    yield "", job
    full = changed(job, remat="full")
    yield " --recipe.remat full", full
    yield " --recipe.remat full --optim.moments bfloat16", changed(full, moments="bfloat16")


def _accumulated(job: Job) -> list[Job]:
    """The job, and it with twice, four times, … as many parts of a batch, as far as they go."""
    found = [job]
    while True:
        try:
            found.append(check(changed(job, accumulate=2 * found[-1].cfg.recipe.accumulate)))
        except ValueError:
            return found
