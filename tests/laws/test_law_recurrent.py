"""Law 2 for recurrences: drawn layouts of hybrids, sequences of several chunks, what the law catches, and what travels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import Broken, examples
from hypothesis import HealthCheck, Phase, given
from strategies import Case, batches_of, cases
from test_law_layouts import check, recipe

from olmo_fn.kernels import gated_delta, recurrence_cp
from olmo_fn.mesh.collectives import all_gather
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, GatedDelta, Model, PreNorm, SwiGLU
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import shard
from olmo_fn.spec import init
from olmo_fn.testing import Layout, Moved, Pool, Traffic, assert_equivalent

RECURRENT = PreNorm(
    mixer=GatedDelta(n_heads=2, n_value_heads=4, head_dim=3, value_head_dim=5), feed_forward=SwiGLU(hidden_size=9)
)
HYBRID = Model(
    6,
    2,
    11,
    init_std=0.3,
    pattern=(RECURRENT, Block(mixer=Attention(n_heads=4, n_kv_heads=2, head_dim=2), feed_forward=SwiGLU(hidden_size=5))),
)


def hybrid_of(case: Case) -> Case:
    """The case with a recurrence in every layer but each third, of as many heads; how far it looks back depends on the seed."""
    model = case.model
    mixer, rest = model.block.mixer, model.block.feed_forward
    recurrent = GatedDelta(
        n_heads=mixer.kv_heads, n_value_heads=mixer.n_heads, head_dim=mixer.head_dim, conv_size=1 + case.seed % 5
    )
    kinds = (PreNorm(mixer=recurrent, feed_forward=rest), Block(mixer=recurrent, feed_forward=rest), model.block)
    return case._replace(model=replace(model, pattern=kinds))


@pytest.mark.parametrize(("ranks", "count"), [(2, 5), (3, 2), (4, 5), (8, 2)])
def test_law_2_layouts_of_hybrids(pool: Pool, ranks: int, count: int) -> None:
    """Any mesh, schedule, rematerialisation and engine that fits, documents or not, in fp64 to 1e-10."""
    phases = (Phase.explicit, Phase.reuse, Phase.generate)

    @examples(count, phases=phases, suppress_health_check=[HealthCheck.too_slow])
    @given(cases(ranks))
    def law(case: Case) -> None:
        check(pool, hybrid_of(case), torch.float64)

    law()


LONG = {
    "cp": Layout(Mesh(cp=2)),
    "cp, four ranks": Layout(Mesh(cp=4)),
    "cp and tp": Layout(Mesh(cp=2, tp=2)),
    "cp, other gathers": Layout(Mesh(dp_shard=2, cp=2), Rules(cp_method="ring", keep_gathered=True)),
    "cp in a pipeline": Layout(Mesh(cp=2, pp=2), DEFAULT, Pipeline("zero_bubble", 2)),
}


def verify(pool: Pool, layout: Layout, length: int = 320, remat: str = "none", parts: int = 1, **options) -> float:
    """Two steps of a model with 4 sequences, whose pieces are longer than a chunk, or than what a convolution sees."""
    case = Case(HYBRID, *layout, 4, length, parts, remat, "tape", True, 0.5, seed=3)
    batches = batches_of(case, 2)
    for batch in batches if length > 100 else []:  # documents that are longer than a chunk
        batch["documents"] = batch["documents"] // 19
    make = partial(recipe, HYBRID, torch.float64, "tape", remat, parts)
    return assert_equivalent(make, transformer.specs(HYBRID), [layout], batches, pool=pool, **options)[0]


@pytest.mark.parametrize("name", LONG)
def test_long_sequences(pool: Pool, name: str) -> None:
    verify(pool, LONG[name], remat="selective" if name == "cp" else "none")


# --- mutants ----------------------------------------------------------------------------------------------------------


def without_documents(cp, q, k, v, g, beta, age=None):
    return gated_delta.chunked_over(cp, q, k, v, g, beta)


def zeros_before(x, count, cp):
    return x.new_zeros(*x.shape[:2], count, x.shape[3])


def no_states(A, b, cp):
    return torch.zeros_like(b)


def undealt(x, cp):
    return all_gather(x, 0, cp)


def sums_only(A, b, cp):
    """As if a piece left the states before it as they are."""
    return states_before(torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A), b, cp)


def nothing(x, axis):
    return x


states_before = recurrence_cp.states_before
CP, TP = Layout(Mesh(cp=2)), Layout(Mesh(tp=2))
SUBLAYER, RULE = "olmo_fn.nn.gated_delta.", "olmo_fn.kernels.gated_delta."
MUTANTS = {
    "a state goes on into the next document": (CP, SUBLAYER + "chunked_over", without_documents),
    "a convolution does not see the piece before": (CP, SUBLAYER + "columns_before", zeros_before),
    "pieces begin without a state": (CP, RULE + "states_before", no_states),
    "states are not carried through pieces": (CP, RULE + "states_before", sums_only),
    "pieces in the order of the ranks": (CP, "olmo_fn.kernels.recurrence_cp.all_pieces", undealt),
    "a gain that all heads share is not summed": (TP, SUBLAYER + "enter", nothing),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_law_2_catches(pool: Pool, name: str) -> None:
    layout, target, mutant = MUTANTS[name]
    with pytest.raises(AssertionError, match=r"step 0, \w+ .* on rank \d differs by .*; the tolerance is 1e-10"):
        verify(Broken(pool, target, mutant), layout, length=24)


@pytest.mark.parametrize("layout", [CP, TP], ids=str)
def test_what_is_not_broken_passes(pool: Pool, layout: Layout) -> None:
    assert verify(Broken(pool, RULE + "states_before", states_before), layout, length=24, parts=2) < 1e-11


# --- what travels -----------------------------------------------------------------------------------------------------

ALONE = replace(HYBRID, n_layers=2, pattern=(RECURRENT,))


def travelled(connection, length: int, documents: bool) -> dict[tuple[str, str], Moved]:
    """Collectives of a step over sequences of that length, in fp32."""
    specs = transformer.specs(ALONE)
    step = recipe(ALONE, torch.float32, "tape", "none", 1)
    step = shard(connection, specs)(step)
    case = Case(ALONE, Mesh(cp=2), DEFAULT, Pipeline(), 2, length, 1, "none", "tape", documents, 0.0, seed=3)
    state = step.init(init(specs, 0))
    with Traffic(connection.axes) as traffic:
        step(state, batches_of(case, 1)[0])
    return traffic.moved


@pytest.mark.parametrize("documents", [False, True])
def test_what_travels_over_cp_does_not_grow_with_the_sequence(pool: Pool, documents: bool) -> None:
    """Beside what FSDP moves over the same ranks: of each piece A (K, K) and b (K, V) of a head, forward and
    again for backward, and the last three columns; and cotangents of both.
    """
    short, long = (pool.run(travelled, length, documents, mesh=Mesh(cp=2))[0] for length in (32, 640))
    assert short == long
    weights = pool.run(travelled, 32, documents, mesh=Mesh(dp_shard=2))[0]

    m, B, layers, pieces = RECURRENT.mixer, 2, 2, 4
    states = 4 * pieces * B * m.value_heads * m.head_dim * (m.head_dim + m.value_head_dim)
    columns = 4 * pieces * B * 3 * (2 * m.n_heads * m.head_dim + m.value_heads * m.value_head_dim)
    more = {kind: long[kind, "cp"].whole - weights[kind, "dp_shard"].whole for kind in ("all_gather", "reduce_scatter")}
    assert more == {"all_gather": layers * (2 * states + columns), "reduce_scatter": layers * (states + columns)}
    assert ("all_to_all", "cp") not in long
