"""Too large for the default suite: ``make test-slow``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_step_of_olmo2_1b_fits_in_20_gb():
    command = [sys.executable, "benchmarks/large_step.py", "olmo2-1b", "--sequence-length", "256"]
    line = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert line["params"] == 1_484_916_736
    assert line["moved"]
    assert line["peak_rss_gb"] < 20
