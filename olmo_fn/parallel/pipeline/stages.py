"""Which stages of a chain, and so which parameters, a pipeline rank has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from olmo_fn import tree
from olmo_fn.core.chain import Chain, Stage
from olmo_fn.parallel.pipeline.schedule import Kind, schedule
from olmo_fn.parallel.pipeline.split import parse_split, split
from olmo_fn.spec import Spec
from olmo_fn.tree import Tree


@dataclass(frozen=True)
class Pipeline:
    """How a chain is cut into stages, and in which order these see the micro-batches.

    ``microbatches``: parts of each rank's sequences; 0 takes twice the ranks. ``chunks``: virtual stages a rank (interleaved).
    ``split``: the blocks of every virtual stage, such as ``0-7,8-15``; empty balances the matrix products.
    """

    kind: Kind = "1f1b"
    microbatches: int = 0
    chunks: int = 1
    split: str = ""

    def parts(self, ranks: int) -> int:
        """Micro-batches on ``ranks`` ranks."""
        return self.microbatches or 2 * ranks


@dataclass(frozen=True, eq=False)
class Cut:
    """A chain cut for ``ranks`` pipeline ranks; ``specs`` are all its parameters."""

    chain: Chain
    specs: Tree
    ranks: int
    pipeline: Pipeline

    def __post_init__(self) -> None:
        schedule(self.pipeline.kind, self.ranks, self.pipeline.parts(self.ranks), self.pipeline.chunks)  # refuses wrong sizes
        _ = self.stages

    @cached_property
    def stages(self) -> tuple[tuple[Stage, ...], ...]:
        """The stages of every virtual stage."""
        return self.cut(self.chain)

    def cut(self, chain: Chain) -> tuple[tuple[Stage, ...], ...]:
        """The same cut of the chain as one rank computes it."""
        blocks = [tuple(group) for block, group in groupby(chain.stages, key=lambda s: s.block) if block is not None]
        before = tuple(s for s in chain.stages[: chain.stages.index(blocks[0][0])])
        after = tuple(s for s in chain.stages[chain.stages.index(blocks[-1][-1]) + 1 :])
        many = self.ranks * self.pipeline.chunks
        if self.pipeline.split:
            ranges = parse_split(self.pipeline.split, len(blocks), many)
        else:
            ranges = split(len(blocks), many, 0.0, self._matrices(after) / max(1, self._matrices(blocks[0])))
        found = [tuple(stage for block in blocks[start:stop] for stage in block) for start, stop in ranges]
        found[0] = before + found[0]
        found[-1] = found[-1] + after  # of one virtual stage, the same one
        return tuple(found)

    def _matrices(self, stages: tuple[Stage, ...]) -> float:
        """Entries of the matrices that stages multiply with: their cost."""
        subtrees = (tree.items(tree.at(self.specs, path), path) for stage in stages for path in stage.paths)
        return sum(spec.size for items in subtrees for _, spec in items if len(spec.shape) > 1)

    @cached_property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """The ranks that have each parameter: one, or for tied weights two."""
        found: dict[str, list[int]] = {}
        for i, stages in enumerate(self.stages):
            for path in dict.fromkeys(path for stage in stages for path in stage.paths):
                for leaf, _ in tree.items(tree.at(self.specs, path), path):
                    ranks = found.setdefault(leaf, [])
                    if i % self.ranks not in ranks:
                        ranks.append(i % self.ranks)
        return {path: tuple(ranks) for path, ranks in found.items()}

    def own(self, rank: int) -> dict[str, Spec]:
        """The parameters of a rank, by path, in the order of the model."""
        return {path: spec for path, spec in tree.items(self.specs) if rank in self.owners[path]}
