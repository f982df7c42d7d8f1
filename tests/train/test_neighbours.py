"""Waiting threads spin alone, and sleep beside busy programs; no bit of a result changes."""

import subprocess
import sys
import time

import pytest
import torch

from olmo_fn.train import neighbours
from olmo_fn.train.environment import SETTINGS
from olmo_fn.train.neighbours import FEW, LONG, MANY, SHORT, Neighbours


def test_it_sleeps_beside_busy_programs_and_bits_stay():
    """More busy programs than processors take turns with this one's threads."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * torch.get_num_threads() + 2)]
    watch, before, end = Neighbours(), x @ x, time.monotonic() + 60
    try:
        while watch.spinning and time.monotonic() < end:
            x @ x
            watch()
        assert not watch.spinning
        assert torch.equal(x @ x, before)
    finally:
        watch.close()
        for program in busy:
            program.kill()
            program.wait()
    assert watch.spinning


@pytest.mark.parametrize(
    ("spinning", "seconds", "rate", "after"),
    [
        (True, SHORT, MANY + 1, False),
        (True, SHORT, MANY - 1, True),
        (True, SHORT / 2, 9 * MANY, True),  # too short a time to tell
        (False, LONG, FEW - 1, True),
        (False, LONG, FEW + 1, False),
        (False, LONG / 2, 0, False),
    ],
)
def test_when_it_changes(monkeypatch, spinning, seconds, rate, after):
    now, switches = 100.0, 0.0
    monkeypatch.setattr(neighbours, "_used", lambda: (now, switches))
    watch = Neighbours()
    if not spinning:
        now, switches = now + SHORT, switches + 10 * MANY
        watch()
    assert watch.spinning == spinning
    now, switches = now + seconds, switches + rate * seconds
    watch()
    assert watch.spinning == after
    watch.close()


def test_the_environment_is_what_this_builds_on():
    """Sleeping at once is what OpenMP does under these settings when it has more threads than processors."""
    assert {"GOMP_SPINCOUNT": "50000", "OMP_WAIT_POLICY": "passive"}.items() <= SETTINGS.items()
