"""Say what is wrong with a stored checkpoint, without loading it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from olmo_fn.checkpoint.index import BrokenCheckpoint
from olmo_fn.checkpoint.pool import default_threads, in_order
from olmo_fn.checkpoint.stored import Files, read_index


def verify(path: str | Path, *, deep: bool = True, threads: int | None = None) -> list[str]:
    """What is wrong with the checkpoint at ``path``, a line for each problem; an empty list if it is whole.

    ``deep`` reads every byte; without it only the index, and the files' presence, lengths and headers are
    looked at.

    >>> verify("/nowhere/step5")
    ['/nowhere/step5/index.json: missing, so /nowhere/step5 is not a whole checkpoint']
    """
    path = Path(path)
    try:
        index = read_index(path)
    except BrokenCheckpoint as error:
        return [str(error)]
    problems: dict[str, None] = {}

    def jobs(files: Files) -> Iterator[Callable[[], str]]:
        for name, entry in index.tensors.items():
            for box in entry.boxes:
                try:
                    stored = files.bytes(name, box)
                except BrokenCheckpoint as error:
                    problems[str(error)] = None
                    continue
                for start, stop in stored.jobs(0, stored.size) if deep else ():
                    yield partial(stored.read, start, stop)

    with ExitStack() as stack, ThreadPoolExecutor(threads or default_threads()) as pool:
        files = Files(path, index, stack)
        for name in index.files:
            try:
                files.open(name)
            except BrokenCheckpoint as error:
                problems[str(error)] = None
        for problem in stack.enter_context(closing(in_order(pool, jobs(files)))):
            if problem:
                problems[problem] = None
    return list(problems)
