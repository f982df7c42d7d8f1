"""What cannot be laid out is refused on paper, with flags, arithmetic and a way out; what is not refused runs (law 2)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from strategies import cases

from olmo_fn.core.gradients import Execution
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.mesh.axis import Axes, Axis
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Rules, placements
from olmo_fn.models import transformer
from olmo_fn.models.config import dense, modified
from olmo_fn.parallel.sharded import sharded
from olmo_fn.spec import Init, Spec
from olmo_fn.train.check_mesh import check_layout

MODEL = dense(12, 2, 4, 7, vocab_size=13, n_kv_heads=2, head_dim=4)
ULYSSES = Rules(cp_method="ulysses")


@pytest.mark.parametrize(
    ("mesh", "rules", "sizes", "message"),
    [
        (
            Mesh(tp=3),
            DEFAULT,
            (4, 12, 1),
            "--mesh.tp 3 does not divide --model.n-heads 4, and a head stays on one rank; choose --mesh.tp 1, 2",
        ),
        (
            Mesh(tp=4),
            DEFAULT,
            (4, 16, 1),
            "--mesh.tp 4 does not divide --model.n-kv-heads 2, and a head stays on one rank; choose --mesh.tp 1, 2",
        ),
        (
            Mesh(cp=4),
            ULYSSES,
            (4, 16, 1),
            "--mesh.cp 4 does not divide --model.n-kv-heads 2, and ulysses gives each rank whole heads; choose --mesh.cp 1, 2, "
            "or the method gather or ring",
        ),
        (
            Mesh(cp=2, tp=2),
            ULYSSES,
            (4, 16, 1),
            "--mesh.cp 2 x --mesh.tp 2 = 4 does not divide --model.n-kv-heads 2, and ulysses gives each rank whole heads; "
            "choose --mesh.cp 1, or the method gather or ring",
        ),
        (
            Mesh(dp_replicate=2, dp_shard=2),
            DEFAULT,
            (12, 16, 2),
            "--recipe.batch-size 12 is not a multiple of --recipe.accumulate 2 x --mesh.dp-replicate 2 x --mesh.dp-shard 2 = "
            "8; choose 8 or 16",
        ),
        (Mesh(dp_shard=4), DEFAULT, (2, 16, 1), "--recipe.batch-size 2 is not a multiple of --mesh.dp-shard 4; choose 4"),
        (
            Mesh(cp=3),
            DEFAULT,
            (4, 16, 1),
            "--recipe.sequence-length 16 is not a multiple of 2 x --mesh.cp 3 = 6, the pieces that are dealt to the ranks; "
            "choose 12 or 18",
        ),
        (
            Mesh(tp=2),
            DEFAULT,
            (4, 15, 1),
            "--recipe.sequence-length 15 is not a multiple of --mesh.tp 2, the ranks that share a sequence between the blocks; "
            "choose 14 or 16",
        ),
    ],
)
def test_messages(mesh: Mesh, rules: Rules, sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        check_layout(MODEL, mesh, rules, *sizes)
    assert str(error.value) == message


def test_a_vocabulary_that_leaves_a_rank_without_rows() -> None:
    model = modified(MODEL, n_heads=8, n_kv_heads=8, vocab_size=17)
    with pytest.raises(ValueError, match=r"17 over --mesh.tp 8 is 3 rows a rank, .* none for the last 2; choose .* 6"):
        check_layout(model, Mesh(tp=8), DEFAULT, 8, 16)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(cases(8))
def test_what_it_advises_is_right(case) -> None:
    """A drawn case passes; one more row, or a token too many, is refused or was no constraint; the advice then passes."""
    rest = (case.model, case.mesh, case.rules)
    check_layout(*rest, case.rows, case.length, case.accumulate)
    for rows, length in ((case.rows + 1, case.length), (case.rows, case.length + 1)):
        try:
            check_layout(*rest, rows, length, case.accumulate)
        except ValueError as error:
            advised = int(str(error).split()[-1])
            check_layout(*rest, *((advised, length) if rows > case.rows else (rows, advised)), case.accumulate)


def test_it_imports_no_torch() -> None:
    code = "import sys, olmo_fn.train.check_mesh; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


# --- what would be silently wrong -------------------------------------------------------------------------------------


def test_rules_must_shard_what_the_stages_share_over_tp() -> None:
    """A feed-forward network that every rank computes whole would be counted by each."""
    rules = Rules(
        {"embed": "fsdp", "heads": "tp", "kv_heads": "tp", "vocab": "tp"}, {"heads": "tp", "kv_heads": "tp", "vocab": "tp"}
    )
    message = r"--mesh.tp is 2, but the rules do not use 'mlp' over 'tp'"
    with pytest.raises(ValueError, match=message):
        placements(transformer.specs(MODEL), rules, Mesh(tp=2))
    placements(transformer.specs(MODEL), rules, Mesh(dp_shard=2))


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_plain_loss_is_for_data_parallelism_only(axis: str) -> None:
    axes = Axes(**{axis: Axis(axis, 2, 0, "group")})
    layout = sharded(Connection(Mesh(**{axis: 2}), 0, axes, None), {"w": Spec((4,), ("embed",), Init("ones"))})
    step = pipe(lambda params, batch: (torch.zeros(()), {}), grad(engine="func"))
    with pytest.raises(ValueError, match=rf"--mesh.{axis} is 2, but the loss is not written for it; .* Chain"):
        step.fn({}, {"loss_tokens": torch.ones(())}, Execution(layout=layout))
