"""Killed at any file operation, and at any moment, a run loses nothing: the same command goes on to the same bits."""

from __future__ import annotations

import pytest
from kills import in_clean_process, kill_and_go_on

KINDS = ("plain", "accumulate", "growth", "ema", "muon", "lora", "start-from")


@pytest.mark.parametrize("kind", ["plain", "start-from"])
def test_some_kills(tmp_path, kind):
    assert in_clean_process(kill_and_go_on, tmp_path, kind, 3) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_kills(tmp_path, kind):
    """29 of each of seven kinds."""
    assert in_clean_process(kill_and_go_on, tmp_path, kind, 29, 1) >= 29
