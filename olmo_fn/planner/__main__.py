"""``python -m olmo_fn.planner olmo2-32b --gpus 1024``: see `olmo_fn.planner.plan_command`."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from olmo_fn.planner.plan_command import Plan, run

Arguments = TypeVar("Arguments")


def command(kind: type[Arguments], run: Callable[[Arguments], str], prog: str, argv: list[str] | None = None) -> int:
    """Read the command line, print what ``run`` says; returns the exit code: 2 for what cannot be done, told in one line."""
    args = tyro.cli(kind, args=argv, prog=prog)
    try:
        print(run(args), flush=True)
    except BrokenPipeError:  # whoever read the text has enough of it
        sys.stdout = None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return command(Plan, run, "python -m olmo_fn.planner", argv)


if __name__ == "__main__":
    sys.exit(main())
