"""What others have published of their speed, beside what the clock's constants say of the programs that they ran.

The programs are described by what is known of them: layout, what they compute again, attention's backend, passes over memory.
Nothing here is read from this project's own step, so that the constants are tried on what they were not made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from olmo_fn import tree
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models.count import num_params
from olmo_fn.models.transformer import layers
from olmo_fn.planner import attention
from olmo_fn.planner.accelerators import ATTENTION, CHANNELS, PROCESSORS, PRODUCTS, PRODUCTS_FP8, STREAM, tiled
from olmo_fn.planner.clock import collective, link
from olmo_fn.planner.estimate import estimate
from olmo_fn.planner.fit import GIB, remedy
from olmo_fn.planner.plan_input import flags, plan_input
from olmo_fn.planner.tables import columns as side_by_side
from olmo_fn.presets import CONFIGS
from olmo_fn.train.accelerators import ACCELERATORS, Accelerator
from olmo_fn.train.config import Config

H100 = ACCELERATORS["h100"]
GOOGLE = H100._replace(network=25e9)
"""a3-megagpu-8g of Google Cloud, where AI2 trained: 200 Gb/s a GPU."""
META = H100._replace(name="H100 96GB, 500 W", peak=H100.peak * (500 / 700) ** (1 / 3), memory=96e9, bandwidth=2.4e12)
"""Grand Teton's H100: HBM2e of 2.4 TB/s, limited to 500 of 700 W; see `olmo_fn.planner.accelerators.PRODUCTS`."""


@dataclass(frozen=True)
class Published:
    """A figure, and what is known of the program behind it."""

    source: str
    preset: str
    gpu: Accelerator
    mesh: Mesh
    tokens: float
    """Tokens a second and GPU, as published."""
    rows: int = 1
    """Sequences of 8,192 that a GPU computes at once, its part of the batch."""
    again: frozenset[str] = frozenset()
    """Matrices of a block whose products run a second time in the backward sweep."""
    float8: bool = False
    """Products of the blocks in 8 bits, all three of each matrix."""
    update: int = 12 + 28
    """Bytes an entry that clipping and the update move: if each is one pass over fp32."""
    beside: int = 0
    """Bytes a token and block that it moves beyond what one compiled pass for each operation does."""
    last: int = 1
    """How many of the two tables of the vocabulary are gathered before everything, and reduced behind everything."""

    @property
    def config(self) -> Config:
        """The preset with the run's layout and batch."""
        cfg, m = CONFIGS[self.preset], self.mesh
        mesh = MeshConfig(dp_replicate=m.dp_replicate, dp_shard=m.dp_shard)
        recipe = replace(cfg.recipe, batch_size=self.rows * self.mesh.size, micro_batch=self.rows, sequence_length=8192)
        recipe = replace(recipe, float8="rowwise" if self.float8 else "none")
        return replace(cfg, mesh=mesh, recipe=recipe)


OLMO_CORE = 12 + 124
"""The same of OLMo-core's SkipStepAdamW, one operation after the other: 31 reads and writes (olmo_core/optim/adamw.py)."""
TITAN = frozenset({"w_k", "w_out", "w_up"})
"""What torchtitan's selective checkpointing computes again: every second product of a block."""
TITAN_MOVES = 3 * 16 * (4096 + 1024) + 2 * 2 * 2 * (4096 + 1024)
"""Its rotation by complex numbers, which Inductor does not fuse: 20 bytes an entry of queries and keys and not 4, three times;
keys and values repeated for all heads, and their gradients summed, in bf16."""
HALF = frozenset({"w_gate", "w_up"})
"""What a budget of half the activations' memory leaves to be computed again: the two largest results."""

PUBLISHED = (
    Published("OLMo 3 report, 7B", "olmo3-7b", GOOGLE, Mesh(dp_replicate=64, dp_shard=8), 7700, update=OLMO_CORE, last=2),
    Published(
        "OLMo 3 report, 32B", "olmo3-32b", GOOGLE, Mesh(dp_replicate=16, dp_shard=64), 1960, again=HALF, update=OLMO_CORE
    ),
    Published("torchtitan, 8B", "llama3-8b", META, Mesh(dp_shard=8), 6667, rows=2, again=TITAN, beside=TITAN_MOVES),
    Published(
        "torchtitan, 8B, float8",
        "llama3-8b",
        META,
        Mesh(dp_shard=8),
        8532,
        rows=2,
        again=TITAN,
        beside=TITAN_MOVES,
        float8=True,
    ),
    Published("torchtitan, 8B, 128", "llama3-8b", META, Mesh(dp_shard=128), 6514, rows=2, again=TITAN, beside=TITAN_MOVES),
    Published(
        "torchtitan, 8B, 128, float8",
        "llama3-8b",
        META,
        Mesh(dp_shard=128),
        8380,
        rows=2,
        again=TITAN,
        beside=TITAN_MOVES,
        float8=True,
    ),
    Published(
        "Trainy, 8B, float8, 32 H200",
        "llama3-8b",
        ACCELERATORS["h200"],
        Mesh(dp_shard=32),
        10938,
        rows=2,
        again=TITAN,
        beside=TITAN_MOVES,
        float8=True,
    ),
)
"""Dense models without tensor parallelism. OLMo 3: arXiv 2512.13961, section 3.2, with the settings of OLMo-core's
src/scripts/train, OLMo2.5-7B.py and OLMo3/OLMo3-32B.py. torchtitan: its benchmarks/llama3_h100_202412_torchtitan.md and
llama3-8b_h200_202506_trainy-whitefiber.md."""


class Seconds(NamedTuple):
    """Of a step: products, attention, elementwise kernels, what collectives occupy, and those that nothing hides."""

    products: float
    attention: float
    moved: float
    slowed: float
    exposed: float


def predicted(run: Published) -> Seconds:
    """The step of one GPU by the clock's constants."""
    model, gpu, n, T = run.config.model, run.gpu, run.mesh.dp_shard, run.rows * 8192
    table, entries, products, attended, moved = model.vocab_size * model.d_model, num_params(model), 0.0, 0.0, 0.0
    for block, layer in enumerate(layers(model)):
        matrices = {path: spec.shape for sub in layer.sublayers for path, spec in tree.items(sub.specs) if len(spec.shape) == 2}
        for path, (width, columns) in matrices.items():
            flops = _both_ways(T, width, columns) + (path in run.again) * tiled(2 * T * width * columns, T, columns)
            products += flops / (2 * PRODUCTS_FP8 if run.float8 else PRODUCTS)
            moved += T * 5 * (width + columns) * run.float8  # a pass for the largest, one to scale
        attended += attention.flops(run.config, run.mesh, block, run.rows)
        moved += (
            T * 2 * _passes(model.d_model, {path: columns for path, (_, columns) in matrices.items()}, bool(run.again))
            + T * run.beside
        )
    products += _both_ways(T, model.d_model, model.vocab_size) / PRODUCTS
    forward, backward = ATTENTION["flash"]
    moved += T * model.vocab_size * (2 + 4 + 2 * 4 + 4 + 2)  # widened, two passes for the loss, one for its gradient
    moved += entries * (2 * (2 + 2) + 2 + 4)  # copies out of two gathers, and into a reduction
    moved += entries / n * run.update
    whole = _traffic(run, entries)
    first_and_last = _traffic(run, run.last * table)
    seconds = (products / gpu.peak, attended * (1 / forward + attention.BACKWARD / backward) / gpu.peak)
    computing = sum(seconds) + moved / (STREAM * gpu.bandwidth)
    slowed = sum(time * CHANNELS[link(run.mesh, axis, gpu)] / PROCESSORS for axis, time in whole.items())
    longer = max(0.0, sum(whole.values()) - computing - slowed)
    return Seconds(*seconds, computing - sum(seconds), slowed, sum(first_and_last.values()) + longer)


def _both_ways(T: int, width: int, columns: int) -> int:
    """FLOPs of a product and of the two of its gradients, filled up to whole rounds."""
    return sum(tiled(2 * T * width * columns, a, b) for a, b in ((T, columns), (T, width), (width, columns)))


def _passes(D: int, columns: Mapping[str, int], again: bool) -> int:
    """Entries a token that a block's compiled elementwise kernels read and write, both ways: norms and residuals, rotation,
    SwiGLU.
    """
    heads, F = columns["w_q"] + columns["w_k"], columns["w_gate"]
    forward, backward = 9 * D + 2 * heads + 3 * F, 15 * D + 2 * heads + 6 * F
    return (1 + again) * forward + backward


def _traffic(run: Published, entries: int) -> dict[str, float]:
    """Seconds by axis of the collectives for parameters of so many entries: gathered twice in bf16, reduced in fp32."""
    n, times = run.mesh.dp_shard, {"fsdp": 0.0, "dp_replicate": 0.0}
    for axis, kind, size in (("fsdp", "all_gather", 4), ("fsdp", "reduce_scatter", 4), ("dp_replicate", "all_reduce", 4 / n)):
        if run.mesh.degree(axis) > 1:
            times[axis] += collective(run.mesh, axis, kind, 0, entries * size, run.gpu)
    return times


def report() -> str:
    """Every figure beside the prediction of its program, and what the clock says of this project's step on the same GPUs."""
    rows = [("tokens/s a GPU", "GPUs", "published", "predicted", "off", "ours", "GiB", "with")]
    for run in PUBLISHED:
        tokens = run.rows * 8192 / sum(predicted(run))
        cells = (run.source, f"{run.mesh.size:,}", f"{run.tokens:,.0f}", f"{tokens:,.0f}", f"{tokens / run.tokens - 1:+.1%}")
        rows.append((*cells, *_ours(run)))
    width = max(len(row[-1]) for row in rows)
    return side_by_side([(*row[:-1], row[-1].ljust(width)) for row in rows])


def _ours(run: Published) -> tuple[str, str, str]:
    """Tokens a second, memory, and the flags that make it fit, if it needs any."""
    plan = plan_input(run.config)
    found = estimate(plan, run.gpu)
    if not found.fits:
        fitting, least = remedy(plan, lambda smaller: estimate(smaller, run.gpu).fits)
        found = estimate(fitting or least, run.gpu)
    return f"{found.clock.tokens:,.0f}", f"{found.largest.total / GIB:.1f}", flags(found.plan.cfg, plan.cfg)
