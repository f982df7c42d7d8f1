"""All hypothesis strategies of the tests, named after what they make."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from olmo_fn.core.chain import Batch
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.models.config import Model, dense
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.spec import Box

degree = st.integers(1, 3)


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """Small meshes, of up to 4 ``dp_shard``, so that ``ep`` may be all of it, half, or none."""
    pp, dp_replicate, cp, tp = (draw(degree) for _ in range(4))
    dp_shard = draw(st.integers(1, 4))
    ep = draw(st.sampled_from([n for n in range(1, dp_shard + 1) if dp_shard % n == 0]))
    return Mesh(pp, dp_replicate, dp_shard, cp, tp, ep)


def finest(mesh: Mesh, rank: int) -> dict[str, int]:
    """Where a rank stands, ``dp_shard`` in its two parts."""
    here = mesh.coordinates(rank)
    outer, ep = divmod(here.pop("dp_shard"), mesh.ep)
    return {**here, "dp_outer": outer, "ep": ep}


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Small transformers: grouped heads, odd depths, windows, tied or not."""
    kv = draw(st.sampled_from([1, 2]))
    heads = kv * draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([2, 4]))
    windows = draw(st.sampled_from([(), (3, -1), (2, 5, -1)]))
    return dense(
        d_model=draw(st.sampled_from([6, 8])),
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=head_dim,
        hidden_size=draw(st.sampled_from([5, 8])),
        vocab_size=draw(st.integers(7, 19)),
        window_pattern=windows,
        tie_embeddings=draw(st.booleans()),
        init_std=0.3,
    )


@st.composite
def batches(draw: st.DrawFn, vocab_size: int, rows: int = 4) -> Batch:
    """Token batches with labels masked unevenly, at least one of them left; sometimes with documents."""
    length = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    labels = torch.randint(vocab_size, (rows, length), generator=generator)
    masked = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    masked[draw(st.integers(0, rows - 1)), draw(st.integers(0, length - 1))] = False
    batch = {"input_ids": ids, "labels": labels.masked_fill(masked, -100)}
    if draw(st.booleans()):
        steps = torch.rand(rows, length, generator=generator) < 0.3
        batch["documents"] = steps.long().cumsum(1)
    return batch


@st.composite
def boxes(draw, shape):
    """A part of a tensor, empty ones included."""
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))


def part_of(tensor, box):
    """That part of a tensor."""
    return tensor[box.slices]


class Case(NamedTuple):
    """A model, a layout and a way to carry it out that fit each other."""

    model: Model
    mesh: Mesh
    rules: Rules
    pipeline: Pipeline
    rows: int
    length: int
    accumulate: int
    remat: str
    engine: str
    documents: bool
    masked: float  # part of the labels that do not count
    seed: int


ROWS = {"heads": "fsdp", "kv_heads": "fsdp", "mlp": "fsdp", "vocab": "fsdp"}  # instead of columns; "embed" stays whole
WHOLE = {"heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp"}  # nothing is sharded over fsdp


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    """Anything that ``ranks`` processes can share: widths, vocabulary and feed-forward size as uneven as they come."""
    degrees = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp"), 1)
    rest = ranks
    while rest > 1:
        prime = next(n for n in range(2, rest + 1) if rest % n == 0)
        fits = [axis for axis in sorted(degrees) if axis != "pp" or degrees["pp"] * prime <= 4]
        degrees[draw(st.sampled_from(fits))] *= prime
        rest //= prime
    mesh = Mesh(**degrees)
    pipeline = Pipeline(draw(st.sampled_from(["gpipe", "1f1b", "zero_bubble"])), draw(st.sampled_from([1, 2, 3])))
    if draw(st.booleans()):
        pipeline = replace(pipeline, kind="interleaved", chunks=2)
    parts = pipeline.microbatches if mesh.pp > 1 else 1
    cp_method = draw(st.sampled_from(["gather", "ulysses", "ring"]))
    kv = mesh.tp * (mesh.cp if cp_method == "ulysses" else 1)
    kv *= draw(st.sampled_from([1, 2])) if kv < 4 else 1
    model = dense(
        d_model=draw(st.sampled_from([5, 7, 10])),
        n_layers=draw(st.integers(max(1, mesh.pp * pipeline.chunks - 2), max(3, mesh.pp * pipeline.chunks - 2))),
        n_heads=kv * draw(st.sampled_from([1, 2])),
        n_kv_heads=kv,
        head_dim=draw(st.sampled_from([2, 4])),
        hidden_size=draw(st.sampled_from([3, 5, 11])),
        vocab_size=draw(st.sampled_from([13, 19, 22]).filter(lambda V: -(-V // mesh.tp) * (mesh.tp - 1) < V)),
        window_pattern=draw(st.sampled_from([(), (3, -1), (1, 6, -1)])),
        tie_embeddings=draw(st.booleans()),
        init_std=0.3,
    )
    stores = [None, WHOLE] if mesh.tp > 1 else [None, WHOLE, ROWS]
    store = draw(st.sampled_from(stores))
    gathered = draw(st.booleans())
    rules = Rules(keep_gathered=gathered, cp_method=cp_method)
    if store is not None:
        rules = Rules(store, WHOLE if store is WHOLE else {}, gathered, cp_method)
    accumulate = draw(st.sampled_from([1, 1, 2]))
    engine = draw(st.sampled_from(["tape", "tape", "func"])) if mesh.pp == 1 else "tape"
    return Case(
        model,
        mesh,
        rules,
        pipeline,
        rows=mesh.dp_replicate * mesh.dp_shard * accumulate * parts * draw(st.sampled_from([1, 2] if ranks < 8 else [1])),
        length=2 * mesh.cp * mesh.tp * draw(st.sampled_from([1, 2, 3])),
        accumulate=accumulate,
        remat=draw(st.sampled_from(["none", "full", "selective", "feed_forward", "every-2"])) if engine == "tape" else "none",
        engine=engine,
        documents=draw(st.booleans()),
        masked=draw(st.sampled_from([0.0, 0.3, 0.9])),
        seed=draw(st.integers(0, 2**31)),
    )


def batches_of(case: Case, steps: int) -> list[Batch]:
    """Batches for a case; some ranks may have no label that counts, but not all."""
    found = []
    for i in range(steps):
        generator = torch.Generator().manual_seed(case.seed + i)
        ids = torch.randint(case.model.vocab_size, (case.rows, case.length + 1), generator=generator)
        masked = torch.rand(case.rows, case.length, generator=generator) < case.masked
        masked[-1, -1] = False
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].masked_fill(masked, -100)}
        if case.documents:
            batch["documents"] = (torch.rand(case.rows, case.length, generator=generator) < 0.2).long().cumsum(1)
        found.append(batch)
    return found
