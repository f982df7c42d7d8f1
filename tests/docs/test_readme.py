"""What the README shows is what happens."""

import re
import shlex
import subprocess
import sys

import pytest
from programs import ROOT, python

README = (ROOT / "README.md").read_text()


def test_the_recipe_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(r"step 3, loss 5\.\d\n", found.stdout)


# a run's config.yaml needs a run; tests/test_train.py has one
COMMANDS = [command for command in re.findall(r"`((?:python|olmo-fn) [^`]+)`", README) if "config.yaml" not in command]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_exist(command, tmp_path):
    """Dry or with --help, so that the test is quick; the rest of each is run by the tests of its module."""
    words = shlex.split(command)
    if words[0] == "olmo-fn":
        words = ["python", "-m", "olmo_fn", words[1], "--help"]
    if "olmo2-1b" in words and "--help" not in words:
        words += ["--dry-run"]
    elif "--help" not in words and "--dry-run" not in words:
        words = [*words[:3], "--help"] if words[1] in ("-m", "train.py") else [*words[:2], "--help"]
    found = python(*words[1:])
    assert found.returncode == 0, found.stderr
