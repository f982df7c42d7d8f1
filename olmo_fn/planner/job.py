"""What is planned: a config on a mesh. Refuses, in one line, what cannot run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from olmo_fn.mesh.mesh import Mesh, flag
from olmo_fn.models.config import Model
from olmo_fn.parallel.pipeline.schedule import Action, Program, schedule
from olmo_fn.parallel.pipeline.split import Ranges, parse_split, split
from olmo_fn.train.config import Config

Label = str | int  # a block's number, or what is before and behind them: "embed", "head"


@dataclass(frozen=True)
class Job:
    """A config and the mesh that it runs on."""

    cfg: Config
    mesh: Mesh

    @property
    def microbatches(self) -> int:
        """Parts in which one part of the batch (of `recipe.accumulate`) goes through the pipeline; 1 without one."""
        return (self.cfg.mesh.pp_microbatches or 2 * self.mesh.pp) if self.mesh.pp > 1 else 1

    @property
    def rows(self) -> int:
        """Sequences that a rank computes at once, each divided further by context and tensor parallelism."""
        return self._part // self.microbatches

    @property
    def _part(self) -> int:
        return self.cfg.recipe.batch_size // (self.mesh.degree("data") * self.cfg.recipe.accumulate)

    @property
    def dtype(self) -> str:
        """Compute dtype; every accelerator of the table multiplies bf16 natively."""
        return "bfloat16" if self.cfg.recipe.dtype == "auto" else self.cfg.recipe.dtype

    @cached_property
    def ranges(self) -> Ranges:
        """The blocks of every virtual stage."""
        m, stages, text = self.cfg.model, self.mesh.pp * self.cfg.mesh.pp_chunks, self.cfg.mesh.pp_split
        return parse_split(text, m.n_layers, stages) if text else split(m.n_layers, stages, 0.0, head_cost(m))

    def labels(self, stage: int) -> tuple[Label, ...]:
        """What virtual stage ``stage`` computes, in its order."""
        start, stop = self.ranges[stage]
        first, last = ("embed",) * (stage == 0), ("head",) * (stage + 1 == len(self.ranges))
        return (*first, *range(start, stop), *last)

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """What every pipeline rank runs for one part of the batch."""
        c = self.cfg.mesh
        if self.mesh.pp == 1:
            return ((Action("F", 0, 0), Action("B", 0, 0)),)
        return schedule(c.pp_schedule, self.mesh.pp, self.microbatches, c.pp_chunks)


def head_cost(model: Model) -> float:
    """FLOPs of the head's matrix in those of a block's matrices."""
    heads = (model.n_heads + model.kv_heads) * model.k
    return model.vocab_size / (2 * heads + 3 * model.hidden_size)


def job(cfg: Config) -> Job:
    """The job of a dry run: ``cfg.gpus`` processes, or else as many as the given degrees make.

    ValueError for a config or a mesh that cannot run.
    """
    c = cfg.mesh
    mesh = c.on(cfg.gpus or cfg.nproc or prod(n for n in (c.pp, c.dp_replicate, c.dp_shard, c.cp, c.tp) if n))
    return check(Job(cfg, mesh))


def check(job: Job) -> Job:
    """The job itself. ValueError, with the fix, if its numbers do not fit together."""
    cfg, mesh = job.cfg, job.mesh
    cfg.check()
    cfg.check_processes(mesh.size)
    assert cfg.mesh.on(mesh.size) == mesh, f"{mesh} is not the config's {cfg.mesh}"
    if mesh.pp > 1:
        job.ranges, job.programs  # noqa: B018  # they refuse what they cannot do
    elif cfg.mesh.pp_chunks > 1 or cfg.mesh.pp_split:
        raise ValueError("--mesh.pp-chunks and --mesh.pp-split are for pipelines; add --mesh.pp 2 or more")
    return job


def flags(job: Job) -> str:
    """What to type for this layout, without what is the default.

    >>> from configs import CONFIGS
    >>> flags(Job(CONFIGS["olmo2-1b"], Mesh(dp_shard=4, tp=2)))
    '--mesh.dp-shard 4 --mesh.tp 2'
    """
    c, words = job.cfg, []
    for axis, degree in job.mesh.degrees.items():
        if degree > 1 or (axis == "dp_shard" and job.mesh.size > 1):
            words.append(f"{flag(axis)} {degree}")
    options = {"cp_method": "gather", "pp_schedule": "1f1b", "pp_microbatches": 0, "pp_chunks": 1, "pp_split": ""}
    for name, default in options.items():
        if getattr(c.mesh, name) != default:
            words.append(f"{flag(name)} {getattr(c.mesh, name)}")
    words += ["--mesh.keep-gathered"] * c.mesh.keep_gathered
    words += [f"--recipe.remat {c.recipe.remat}"] * (c.recipe.remat != "none")
    words += [f"--recipe.accumulate {c.recipe.accumulate}"] * (c.recipe.accumulate > 1)
    return " ".join(words)


def changed(job: Job, *, mesh: Mesh | None = None, **changes: object) -> Job:
    """The job with another mesh, or other fields of ``recipe``, ``optim`` and ``mesh``, which have no name in common.

    >>> from configs import CONFIGS
    >>> changed(Job(CONFIGS["olmo2-1b"], Mesh()), remat="full", pp_chunks=2).cfg.mesh.pp_chunks
    2
    """
    cfg, new = job.cfg, mesh or job.mesh
    recipe = {k: v for k, v in changes.items() if hasattr(cfg.recipe, k)}
    optim = {k: v for k, v in changes.items() if hasattr(cfg.optim, k)}
    rest = {k: v for k, v in changes.items() if k not in recipe and k not in optim}
    degrees = {k: v for k, v in new.degrees.items() if mesh}
    cfg = replace(cfg, recipe=replace(cfg.recipe, **recipe), optim=replace(cfg.optim, **optim))  # type: ignore[arg-type]
    return Job(replace(cfg, mesh=replace(cfg.mesh, **{**degrees, **rest})), new)  # type: ignore[arg-type]
