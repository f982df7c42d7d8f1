"""Train a model: ``python train.py olmo2-tiny``, ``python train.py olmo2-1b --optim.lr 6e-3``.

The presets are those of ``configs.py``. All else is `olmo_fn.cli.training`: ``python train.py --help``.
"""

from __future__ import annotations

import sys

from olmo_fn.cli.process import exit_code, run_process


def main(words: list[str]) -> int:
    """Run the command line; returns the exit code: 2 for wrong input, 128 + n when signal n ended the run."""
    return exit_code(lambda: _run(words))


def _run(words: list[str]) -> int:
    from configs import CONFIGS  # here, so that Ctrl-C while all this is read is told in one line
    from olmo_fn.cli import training

    return training.main(words, CONFIGS, "train.py", (__file__,))


if __name__ == "__main__":
    run_process(lambda: main(sys.argv[1:]))
