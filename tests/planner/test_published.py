"""The clock's constants are tried on programs that others ran, and on this project's own step apart from them."""

from __future__ import annotations

import pytest

from olmo_fn.cli import main as cli
from olmo_fn.planner import published
from olmo_fn.planner.published import PUBLISHED, predicted


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.source)
def test_published_figures_are_predicted_within_15_percent(run):
    assert run.rows * 8192 / sum(predicted(run)) == pytest.approx(run.tokens, rel=0.15)


def test_what_the_programs_do_is_in_the_prediction():
    """Each of what is known of a program costs what it should."""
    plain, float8 = (sum(predicted(run)) for run in PUBLISHED[2:4])
    assert 1.2 < plain / float8 < 1.4  # 8,532 / 6,667 is 1.28
    alone, many = (predicted(PUBLISHED[i]) for i in (2, 4))
    assert many.products == alone.products
    assert many.exposed > alone.exposed
    assert many.moved < alone.moved  # a smaller part of the update


@pytest.mark.slow
def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(published, "PUBLISHED", PUBLISHED[1:4])
    assert cli.main(["plan", "--published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "--recipe.remat selective" in lines[1]  # 32B does not fit without
    assert cli.main(["plan"]) == 2
    assert "Type a preset and --gpus" in capsys.readouterr().err
