"""What cannot be laid out is refused on paper, with flags, arithmetic and a way out; what is not refused runs (law 2)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import examples
from hypothesis import given
from strategies import cases

from olmo_fn.core.gradients import Execution
from olmo_fn.core.layout import Layout, Sharing
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.mesh.axis import Axes, Axis
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.models.config import dense, modified
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


@examples(200)
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


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_a_plain_loss_is_for_data_parallelism_only(axis: str) -> None:
    axes = Axes(**{axis: Axis(axis, 2, 0, "group")})
    layout = Layout(sharing=Sharing(axes))
    gradients = pipe(lambda params, batch: (torch.zeros(()), {}), grad("func"))
    with pytest.raises(ValueError, match=rf"--mesh.{axis} is 2, but the loss is not written for it; .* Chain"):
        gradients({"w": torch.zeros(4)}, {"labels": torch.tensor([1])}, Execution(layout=layout))
