"""``olmo-fn checkpoint FOLDER``: list the checkpoints of a run, and say which are whole. Imports no torch but to do so."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Arguments:
    """List the checkpoints of a run, and say which are whole."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """A run's folder, its checkpoints folder, or one checkpoint."""
    quick: bool = False
    """Look at the index, lengths and headers only."""


def checkpoints(where: Path) -> list[Path]:
    """The checkpoints meant by ``where``: one of them, a folder of them, or a run; else ValueError."""
    from olmo_fn.checkpoint import step_path, steps

    if not where.is_dir():
        raise ValueError(f"{where}: no such folder; give a run's folder, its checkpoints folder or one checkpoint")
    if os.path.lexists(where / "index.json"):
        return [where]
    for folder in (where, where / "checkpoints"):
        if found := steps(folder):
            return [step_path(folder, step) for step in found]
    raise ValueError(f"{where}: no checkpoints in it (no step* folder, neither there nor in checkpoints/)")


def row(path: Path, problems: list[str]) -> tuple[str, str, str, str]:
    """One line of the table: name, size, number of tensors, whole or broken."""
    from rich.markup import escape

    from olmo_fn.checkpoint import BrokenCheckpoint, read_index

    size, tensors = "?", "?"
    with suppress(BrokenCheckpoint):
        index = read_index(path)
        size, tensors = f"{sum(file.bytes for file in index.files.values()) / 1e6:,.1f}", str(len(index.tensors))
    return escape(path.name), size, tensors, "[red]broken[/]" if problems else "[green]whole[/]"


def run(args: Arguments) -> int:
    """Print the table; 0 if all checkpoints are whole, 1 if one is broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from olmo_fn.checkpoint import verify

    paths = checkpoints(args.folder)
    table = Table(title=escape(str(paths[0].parent)), title_justify="left")
    for column in ("checkpoint", "MB", "tensors", "state"):
        table.add_column(column, justify="right" if column in ("MB", "tensors") else "left")
    problems = {path: verify(path, deep=not args.quick) for path in paths}
    for path in paths:
        table.add_row(*row(path, problems[path]))
    Console().print(table)
    for problem in (line for lines in problems.values() for line in lines):
        print(problem)
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":  # as version 0.1 called it
    raise SystemExit("the command is: olmo-fn checkpoint")
