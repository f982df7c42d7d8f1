"""What is planned: a config on a mesh, and how its chain of stages is cut. Refuses, in one line, what cannot run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import groupby
from math import prod
from typing import TypeAlias

from olmo_fn import tree
from olmo_fn.core.chain import Chain, Stage
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.parallel.pipeline.schedule import Action, Program, schedule
from olmo_fn.parallel.pipeline.stages import Cut, Pipeline
from olmo_fn.train.config import Config
from olmo_fn.train.recipe import parameters, pipeline, recipe
from olmo_fn.tree import Tree

Label: TypeAlias = str | int  # a block's number, or the name of the last of the stages that stand before or behind all blocks


def labels(stages: tuple[Stage, ...]) -> list[Label]:
    """The label of every stage."""
    groups = [(block, [stage.name for stage in group]) for block, group in groupby(stages, key=lambda stage: stage.block)]
    return [names[-1] if block is None else block for block, names in groups for _ in names]


def by_label(stages: tuple[Stage, ...]) -> dict[Label, tuple[Stage, ...]]:
    """The stages of every label, in their order."""
    pairs = groupby(zip(labels(stages), stages, strict=True), key=lambda pair: pair[0])
    return {label: tuple(stage for _, stage in group) for label, group in pairs}


def owners(chain: Chain, specs: Tree) -> dict[str, Label]:
    """For the path of every parameter, and of every subtree that a stage uses, the first label that uses it."""
    found: dict[str, Label] = {}
    for label, stage in zip(labels(chain.stages), chain.stages, strict=True):
        for path in stage.paths:
            for leaf in (path, *(leaf for leaf, _ in tree.items(tree.at(specs, path), path))):
                found.setdefault(leaf, label)
    return found


def without_layout(cfg: Config) -> Config:
    """The config of the same step on one process, in one part."""
    return replace(cfg, gpus=0, nproc=0, mesh=MeshConfig(), recipe=replace(cfg.recipe, accumulate=1, noise_scale=0.0))


@lru_cache(256)
def _cut(cfg: Config, ranks: int, how: Pipeline) -> Cut:
    chain = recipe(cfg).grads.chain
    assert chain is not None
    return Cut(chain, parameters(cfg), ranks, how)


@lru_cache(256)
def _labels(cut: Cut) -> tuple[tuple[Label, ...], ...]:
    return tuple(tuple(by_label(stages)) for stages in cut.stages)


@dataclass(frozen=True)
class PlanInput:
    """A config, the mesh that it runs on, and the type of its devices: ``cuda`` or ``cpu``."""

    cfg: Config
    mesh: Mesh
    device: str = "cuda"

    @property
    def microbatches(self) -> int:
        """Parts in which one part of the batch (of `recipe.accumulate`) goes through the pipeline; 1 without one."""
        return pipeline(self.cfg).parts(self.mesh.pp) if self.mesh.pp > 1 else 1

    @property
    def rows(self) -> int:
        """Sequences that a rank computes at once, each divided further by context and tensor parallelism."""
        return self.cfg.recipe.batch_size // (self.mesh.degree("data") * self.cfg.recipe.accumulate) // self.microbatches

    @property
    def dtype(self) -> str:
        """Compute dtype; every accelerator of the table multiplies bf16 natively."""
        return "bfloat16" if self.cfg.recipe.dtype == "auto" else self.cfg.recipe.dtype

    @cached_property
    def cut(self) -> Cut:
        """The virtual stages of the chain; one without a pipeline."""
        how = pipeline(self.cfg) if self.mesh.pp > 1 else Pipeline()
        return _cut(without_layout(self.cfg), self.mesh.pp, how)

    @property
    def at_once(self) -> str:
        """What a rank computes at once, in words."""
        rows = f"{self.rows:,} sequences" if self.rows > 1 else "a sequence"
        return f"{rows} of {self.cfg.recipe.sequence_length:,}"

    @property
    def labels(self) -> tuple[tuple[Label, ...], ...]:
        """What every virtual stage computes, in its order."""
        return _labels(self.cut)

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """What every pipeline rank runs for one part of the batch."""
        if self.mesh.pp == 1:
            return ((Action("F", 0, 0), Action("B", 0, 0)),)
        return schedule(self.cut.pipeline.kind, self.mesh.pp, self.microbatches, self.cut.pipeline.chunks)

    def held(self, rank: int) -> list[Label]:
        """What a pipeline rank computes, in the order of the model."""
        return [label for stage in self.labels[rank :: self.mesh.pp] for label in stage]

    def stored(self, rank: int) -> set[Label]:
        """The labels whose parameters a pipeline rank has: its own, and that of tied weights."""
        first = owners(self.cut.chain, self.cut.specs)
        return {first[path] for path in self.cut.own(rank)}

    def changed(self, *, mesh: Mesh | None = None, **changes: object) -> PlanInput:
        """With another mesh, or other fields of ``recipe``, ``optim`` and ``mesh``, which have no name in common."""
        cfg, degrees = (
            self.cfg,
            {**mesh.degrees, "ep": mesh.ep, "dp_replicate": mesh.dp_replicate if mesh.dp_replicate > 1 else None}
            if mesh
            else {},
        )
        for section in ("recipe", "optim", "mesh"):
            part = getattr(cfg, section)
            new = {k: v for k, v in {**degrees, **changes}.items() if hasattr(part, k)}
            cfg = replace(cfg, **{section: replace(part, **new)})
        return PlanInput(cfg, mesh or self.mesh, self.device)


def plan_input(cfg: Config) -> PlanInput:
    """What a dry run plans: ``cfg.gpus`` processes, or else as many as the given degrees make.

    ValueError for a config or a mesh that cannot run.
    """
    c = cfg.mesh
    size = cfg.gpus or cfg.nproc or prod(n for n in (c.pp, c.dp_replicate, c.dp_shard, c.cp, c.tp) if n)
    return check(PlanInput(cfg.on(size), c.on(size)))


def check(plan: PlanInput) -> PlanInput:
    """The input itself. ValueError, with the fix, if its numbers do not fit together."""
    cfg, mesh = plan.cfg, plan.mesh
    cfg.check()
    cfg.check_processes(mesh.size)
    check_skew(cfg)
    if cfg.recipe.engine != "tape":
        raise ValueError(
            f"what --recipe.engine {cfg.recipe.engine} keeps is not known on paper; plan with --recipe.engine tape"
        )
    assert cfg.mesh.on(mesh.size) == mesh, f"{mesh} is not the config's {cfg.mesh}"
    if mesh.pp > 1:
        _ = plan.cut  # refuses what it cannot do
    elif cfg.mesh.pp_chunks > 1 or cfg.mesh.pp_split:
        raise ValueError("--mesh.pp-chunks and --mesh.pp-split are for pipelines; add --mesh.pp 2 or more")
    return plan


def check_skew(cfg: Config) -> None:
    """ValueError for a skew without experts."""
    if cfg.skew > 1 and not cfg.model.num_experts:
        raise ValueError(f"--skew {cfg.skew:g} is of the tokens for experts, and the model has none; leave it out")


def can_run(plan: PlanInput) -> bool:
    """Whether `check` refuses nothing."""
    try:
        return check(plan) is plan
    except ValueError:
        return False


def flags(cfg: Config, base: Config) -> str:
    """What to type, beside what gives ``base``, for the mesh, recipe and optimizer of ``cfg``.

    >>> from configs import CONFIGS
    >>> base = CONFIGS["olmo2-1b"]
    >>> flags(PlanInput(base, Mesh()).changed(mesh=Mesh(dp_shard=4, tp=2), weights="zero-2").cfg, base)
    '--mesh.dp-shard 4 --mesh.tp 2 --mesh.weights zero-2'
    """
    words = []
    for section in ("mesh", "recipe", "optim"):
        new, old = getattr(cfg, section), getattr(base, section)
        for name in (f.name for f in fields(new) if f.name != "micro_batch"):  # accumulate says it, and alone it wins
            value, dashed = getattr(new, name), name.replace("_", "-")
            if value == getattr(old, name) and not (name == "accumulate" and old.micro_batch and not new.micro_batch):
                continue
            if isinstance(value, bool):
                words.append(f"--{section}.{'' if value else 'no-'}{dashed}")
            elif value is not None:
                words.append(f"--{section}.{dashed} {value}")
    return " ".join(words)
