"""Files that grow together in a folder inside of the one that they are for, with a journal: a kill loses seconds of work.

A line of the journal says how long every file was, and where the work stood. A later process that is to do the same cuts the
files back to that, and goes on; so they end as if nobody had been killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmo_fn.files import sync, try_lock, unlock

FOLDER, JOURNAL = ".unfinished", "journal.jsonl"


@dataclass
class Draft:
    """Files in ``folder``; ``state``, as last recorded, is None before anything was."""

    folder: Path
    state: Any = None
    sizes: dict[str, int] = field(default_factory=dict)
    grown: set[str] = field(default_factory=set)
    """Files that were appended to since the last record."""

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Put ``data`` behind what is in the file ``name``."""
        with open(self.folder / name, "ab") as file:
            file.write(data)
        self.sizes[name] = self.sizes.get(name, 0) + len(data)
        self.grown.add(name)

    def record(self, state: Any) -> None:
        """Make what was appended durable, and ``state``, which JSON can hold, the one that a later process goes on from."""
        for name in sorted(self.grown):
            sync(self.folder / name)
        self.grown.clear()
        self.state = state
        self._line({"sizes": self.sizes, "state": state})

    def publish(self, old: Callable[[], Iterator[Path]], last: str) -> None:
        """Move the files to the folder above, ``last`` at the end, in the place of the ``old`` ones there.

        Those whose names begin with a dot are of use only here.
        """
        output = self.folder.parent
        if (self.folder / last).exists():
            (output / last).unlink(missing_ok=True)
        for path in old():
            if path.name not in self.sizes:
                path.unlink(missing_ok=True)
        for name in sorted(self.sizes, key=lambda name: name == last):
            if not name.startswith(".") and (self.folder / name).exists():  # or a killed process has moved it
                os.replace(self.folder / name, output / name)
        sync(output)

    def _line(self, record: Mapping[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def draft(output: Path, what: Mapping[str, Any], difference: Callable[[Any, Any], str], overwrite: bool) -> Iterator[Draft]:
    """The unfinished files in ``output``, of work that is ``what``, cut back to what was last recorded; or none.

    ``difference`` says how the work of the files, and that of this process, differ; empty if not. ValueError, if they do,
    unless ``overwrite``; and when another process is at it. What is left behind on an error is what can be gone on from.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(lock) is False:
            raise ValueError(f"another process is writing to --output {str(output)!r}; wait for it, or give another folder")
        what = json.loads(json.dumps(what))
        made = _opened(folder, what, difference, overwrite)
        try:
            yield made
        except BaseException:
            if made.state is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
    finally:
        unlock(lock)


def _opened(folder: Path, what: Any, difference: Callable[[Any, Any], str], overwrite: bool) -> Draft:
    records = _records(folder / JOURNAL)
    if records and (other := difference(records[0], what)):
        if not overwrite:
            hint = "run the command that it was begun with to go on, or --overwrite to begin anew"
            raise ValueError(f"--output {str(folder.parent)!r} is unfinished, and {other}; {hint}")
        records = []
    made = Draft(folder, **records[-1]) if len(records) > 1 else Draft(folder)
    for path in folder.iterdir():
        if path.name not in made.sizes and (path.name != JOURNAL or not records):
            path.unlink()
    for name, size in made.sizes.items():
        if (folder / name).exists():
            os.truncate(folder / name, size)
    # A line that was cut off by a kill goes as well.
    if records:
        (folder / f"{JOURNAL}.new").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(folder / f"{JOURNAL}.new", folder / JOURNAL)
    else:
        made._line(what)
    return made


def _records(path: Path) -> list[Any]:
    """The whole lines of a journal: what the work is, and the records."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(True) if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # a kill in the middle of it
            break
    return found
