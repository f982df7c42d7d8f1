"""``python -m olmo_fn.planner.pipeline_main 1f1b --ranks 4``: see `olmo_fn.planner.pipeline_command`."""

import sys

from olmo_fn.planner.__main__ import command
from olmo_fn.planner.pipeline_command import Show, run


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return command(Show, run, "python -m olmo_fn.planner.pipeline_main", argv)


if __name__ == "__main__":
    sys.exit(main())
