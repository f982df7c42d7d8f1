"""What goes from rank to rank, and when, changes no number: law 2 for each way to save traffic, and what it catches."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch
from helpers import Broken
from strategies import Case, batches_of
from test_law_layouts import recipe

from olmo_fn.core.pipe import Transform, with_execution
from olmo_fn.core.step import Step
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules, placements
from olmo_fn.models import transformer
from olmo_fn.models.config import MultiToken, dense, modified
from olmo_fn.nn import async_tp, embedding
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import shard
from olmo_fn.parallel.sharded import ShardedWeights, sharded
from olmo_fn.spec import init
from olmo_fn.testing import Layout, Pool, assert_equivalent
from olmo_fn.testing.equivalence import record

MODEL = dense(6, 2, 4, 5, vocab_size=11, n_kv_heads=2, head_dim=2, init_std=0.3)
ODD = dense(5, 2, 4, 5, vocab_size=13, n_kv_heads=2, head_dim=2, init_std=0.3)
ROWS = Rules(exchanged=("embed",))
HSDP = Mesh(dp_replicate=2, dp_shard=2)


def verify(pool, model, layout, engine="tape", remat="none", parts=1, **options):
    case = Case(model, *layout, 8, 8, parts, remat, engine, True, 0.5, seed=3)
    make = partial(recipe, model, torch.float64, engine, remat, parts)
    return assert_equivalent(make, transformer.specs(model), [layout], batches_of(case, 2), pool=pool, **options)[0]


LAYOUTS = {
    "rows": (MODEL, Layout(Mesh(dp_shard=2), ROWS), {"parts": 2}),
    "rows, a part of the columns empty": (ODD, Layout(Mesh(dp_shard=4), ROWS), {}),
    "rows, differentiated as a whole": (ODD, Layout(Mesh(dp_shard=2), ROWS), {"engine": "func"}),
    "rows in copies": (MODEL, Layout(HSDP, ROWS), {"remat": "full"}),
    "rows of a part of the vocabulary": (ODD, Layout(Mesh(dp_shard=2, tp=2), ROWS), {}),
    "rows of a part of the sequence": (ODD, Layout(Mesh(dp_shard=2, cp=2), ROWS), {}),
    "rows in a pipeline": (MODEL, Layout(Mesh(pp=2, dp_shard=2), ROWS, Pipeline("zero_bubble", 2)), {}),
    "rows, for several tokens ahead": (modified(MODEL, multi_token=MultiToken(depth=2)), Layout(Mesh(dp_shard=2), ROWS), {}),
    "three ahead": (MODEL, Layout(Mesh(dp_shard=2), Rules(prefetch=3)), {"remat": "feed_forward"}),
    "more ahead than there are": (ODD, Layout(Mesh(dp_shard=2), Rules(prefetch=99, keep_gathered=True)), {}),
    "a chain of two sums": (MODEL, Layout(HSDP), {"parts": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_those_of_one_process(pool: Pool, name: str) -> None:
    model, layout, how = LAYOUTS[name]
    assert verify(pool, model, layout, **how) < 1e-12


# --- mutants ----------------------------------------------------------------------------------------------------------

to_askers, to_owners = embedding._to_askers, embedding._to_owners


def to_the_next_one(columns, d_model, fsdp):
    return to_askers(columns.chunk(fsdp.size)[1:][0].repeat(fsdp.size, 1, 1) if fsdp.size > 1 else columns, d_model, fsdp)


def doubled(rows, columns, fsdp):
    return to_owners(rows, columns, fsdp) * fsdp.size


def own_rows_only(rows, columns, fsdp):
    """As if the rows of other ranks had no gradient."""
    found = to_owners(rows, columns, fsdp)
    return torch.cat([part if i == fsdp.index else 0 * part for i, part in enumerate(found.chunk(fsdp.size))])


def without_the_copies(begun, axes, split):
    return lambda: split(torch.ops._c10d_functional.wait_tensor(begun))


def not_waited_for(begun, axes, split):
    """The second sum begins before the first one's result is there: of what it was given instead."""
    total = torch.ops._c10d_functional.wait_tensor(begun)
    for axis in axes:
        total = torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(torch.zeros_like(total), "sum", axis.group)
        )
    return lambda: split(total)


fetch, remembered = ShardedWeights.fetch, {}


def stale(self, params, paths, *more):
    """Weights that are not gathered again after an update."""
    key = (id(self), *paths)
    if key not in remembered:
        remembered[key] = self, fetch(self, params, paths, *more)
    weights = remembered[key][1]
    weights.ready()
    weights.keep = True
    return weights


MUTANTS = {
    "rows for another rank": (Layout(Mesh(dp_shard=2), ROWS), "olmo_fn.nn.embedding._to_askers", to_the_next_one),
    "a gradient of rows doubled": (Layout(Mesh(dp_shard=2), ROWS), "olmo_fn.nn.embedding._to_owners", doubled),
    "a gradient of own rows only": (Layout(Mesh(dp_shard=2), ROWS), "olmo_fn.nn.embedding._to_owners", own_rows_only),
    "a table's copies not summed": (Layout(HSDP, ROWS), "olmo_fn.parallel.sharded.summed_further", without_the_copies),
    "copies not summed": (Layout(HSDP), "olmo_fn.parallel.sharded.summed_further", without_the_copies),
    "a sum of what is not there yet": (Layout(HSDP), "olmo_fn.parallel.sharded.summed_further", not_waited_for),
    "weights of the step before": (Layout(Mesh(dp_shard=2)), "olmo_fn.parallel.sharded.ShardedWeights.fetch", stale),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_law_2_catches(pool: Pool, name: str) -> None:
    layout, target, mutant = MUTANTS[name]
    with pytest.raises(AssertionError, match=r"step \d, \w+ .* on rank \d differs by .*; the tolerance is 1e-10"):
        verify(Broken(pool, target, mutant), MODEL, layout)


def test_sums_in_bf16_are_another_number(pool: Pool) -> None:
    """And not far from it: each of two summands, and their sum, is rounded to 8 bits."""
    with pytest.raises(AssertionError, match=r"tolerance is 1e-10"):
        verify(pool, MODEL, Layout(Mesh(dp_shard=2), Rules(reduce_dtype="bfloat16")))
    for mesh in (Mesh(dp_shard=2), Mesh(dp_replicate=2)):
        found = pool.run(gradients_of, Rules(), mesh=mesh), pool.run(gradients_of, Rules(reduce_dtype="bfloat16"), mesh=mesh)
        for exact, rounded in zip(*found, strict=True):
            errors = {name: exact[name] - g for name, g in rounded.items()}
            error, size = (float(sum(x.square().sum() for x in one.values()) ** 0.5) for one in (errors, exact))
            print(f"{mesh}: the gradient is {error / size:.1e} of its norm off")
            assert 1e-4 < error / size < 2**-8


def gradients_of(connection, rules):
    case = Case(MODEL, connection.mesh, rules, None, 8, 8, 1, "none", "tape", False, 0.3, seed=3)
    step = shard(connection, transformer.specs(MODEL), rules)(recipe(MODEL, torch.float32))
    found = record(step, init(transformer.specs(MODEL), 0), batches_of(case, 1))
    return {name: leaf for (_, name), (leaf, _) in found.items() if name.startswith("gradient") and leaf.any()}


def losses_of(connection, rules):
    """Of one forward sweep in bf16."""
    case = Case(MODEL, connection.mesh, rules, None, 8, 8, 1, "none", "tape", False, 0.3, seed=3)
    step = shard(connection, transformer.specs(MODEL), rules)(recipe(MODEL, torch.bfloat16))
    return record(step, init(transformer.specs(MODEL), 0), batches_of(case, 1))[0, "metric loss"][0]


def test_rows_have_the_bits_of_the_table(pool: Pool) -> None:
    mesh = Mesh(dp_shard=2)
    assert pool.run(losses_of, ROWS, mesh=mesh) == pool.run(losses_of, Rules(), mesh=mesh)


def test_rows_that_nobody_looks_up_are_refused(pool: Pool) -> None:
    tied, mesh = modified(MODEL, tie_embeddings=True), Mesh(dp_shard=2)
    for model, path in ((MODEL, "head.w_out"), (tied, "embed")):
        with pytest.raises(Exception, match=f"exchanges the rows of '{path}', which the loss does not say that it looks up"):
            verify(pool, model, Layout(mesh, Rules(exchanged=(path,))))
    with pytest.raises(ValueError, match=r"'blocks.0.attention.w_q', which is no table"):
        placements(transformer.specs(MODEL), Rules(exchanged=("blocks.0.attention.w_q",)), mesh)


# --- products that overlap their collectives --------------------------------------------------------------------------

OVERLAPPED = Rules(async_tp=True)


def gather_into_a_new_one(x, size, group):
    """``all_gather_into_tensor`` in the form that gloo can be given (`olmo_fn.mesh.collectives.gather_into`)."""
    return torch.ops._c10d_functional.all_gather_into_tensor_out(x, size, group, out=x.new_empty(size * len(x), *x.shape[1:]))


def fallback(name):
    """torch's own plain form of a product, on CPU tensors and gloo ranks."""
    plain = getattr(torch.distributed._symmetric_memory, f"_{name}_fallback")

    def run(*args, **more):
        with patch.object(torch.ops._c10d_functional, "all_gather_into_tensor", gather_into_a_new_one):
            return plain(*args, **more)

    return run


def overlapping(connection, specs, rules):
    """`shard`, which refuses this on a processor, where torch has the fused products for CUDA alone."""
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        setattr(torch.ops.symm_mem, name, fallback(name))
    layout = sharded(connection, specs, rules)
    return Transform("overlapping", Step, Step, lambda step: with_execution(step, layout=layout))


gather_products, products_scatter = async_tp.gather_products, async_tp.products_scatter


def ranks_swapped(x, weights, tp):
    h, products = gather_products(x, weights, tp)
    return h.unflatten(0, (x.shape[0], tp.size, -1)).flip(1).flatten(0, 2), products


def one_summand(xs, weights, B, tp):
    return products_scatter(xs[:1], weights[:1], B, tp)


def test_overlapped_products_are_the_same(pool: Pool) -> None:
    assert verify(pool, MODEL, Layout(Mesh(tp=2), OVERLAPPED), sharding=overlapping) < 1e-12
    for name, mutant in (("gather_products", ranks_swapped), ("products_scatter", one_summand)):
        broken = Broken(pool, f"olmo_fn.nn.async_tp.{name}", mutant)
        with pytest.raises(AssertionError, match=r"step 0, \w+ .* differs"):
            verify(broken, MODEL, Layout(Mesh(tp=2), OVERLAPPED), sharding=overlapping)


def test_overlapped_products_are_refused_on_a_processor(pool: Pool) -> None:
    with pytest.raises(Exception, match=r"--mesh\.async-tp sends over NVLink"):
        verify(pool, MODEL, Layout(Mesh(tp=2), OVERLAPPED))
