"""Load a checkpoint, or part of it, into fresh tensors; every byte that is used is checked on the way."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch.distributed.tensor import DTensor

from olmo_fn.checkpoint.boxes import bands, contiguous, covering, overlap, strides
from olmo_fn.checkpoint.commit import step_path, steps
from olmo_fn.checkpoint.format import DTYPE_NAMES, DTYPES, Index, host_bytes
from olmo_fn.checkpoint.ranks import SINGLE_PROCESS, Ranks
from olmo_fn.checkpoint.schema import BrokenCheckpoint
from olmo_fn.checkpoint.shards import leaves_of, local_box
from olmo_fn.checkpoint.stored import JOB_BYTES, OpenFiles, PartBytes, default_threads, read_index, some, verify
from olmo_fn.spec import Box
from olmo_fn.tree import Tree, matches, unflatten

log = logging.getLogger(__name__)
T = TypeVar("T")
# Reads that are under way at once, or waiting for a thread.
JOBS_AHEAD = 16


def load(
    path: str | Path,
    like: Mapping[str, Any] | None = None,
    *,
    select: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> tuple[Tree, dict[str, Any]]:
    """The tree and the ``meta`` of the checkpoint at ``path``, bitwise as they were saved, in whatever layout.

    ``like`` is a tree of tensors (on the meta device, perhaps) that says what is expected: names, shapes and dtypes must
    agree, and the result has its order and its devices; ``device`` is for all other tensors. Of a DTensor in ``like`` the
    result has mesh and placements, and only this rank's shard is read. ``select`` are paths or patterns of paths, such as
    ``["params.*"]``: only these are loaded, and of ``like``, too, only these count.

    Every byte that is used is checked: of each stored box the chunks (1 MiB) are read that hold a byte asked for, whole.
    Shards of the first dim therefore cost what they hold; a shard of columns, whose rows are closer together than that, costs
    the rows of the stored box that it crosses.

    Raises `BrokenCheckpoint` (a ValueError) that names file and tensor if a byte is not as it was written, and ValueError
    that lists the differences if the checkpoint is intact but not like ``like``.

    >>> import tempfile
    >>> from olmo_fn.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save({"params": {"w": torch.ones(2)}, "step": torch.tensor(5)}, folder, step=5)
    ...     load(path, select=["params.*"])
    ({'params': {'w': tensor([1., 1.])}}, {})
    """
    index = read_index(path)
    stored: dict[str, Any] = {**dict.fromkeys(index.tensors), **{path: {} for path in index.empty}}
    leaves = dict(leaves_of(like)) if like is not None else stored
    if select is not None:
        chosen = _chooser(path, [select] if isinstance(select, str) else select, stored | leaves)
        stored, leaves = ({name: leaf for name, leaf in x.items() if chosen(name)} for x in (stored, leaves))
    wanted = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Mapping)}
    if like is not None:
        _check_like(path, index, wanted, [name for name in stored if name in index.tensors and name not in wanted])
    for name, local in _read_tensors(Path(path), index, wanted, threads or default_threads()):
        leaves[name] = _as_like(local, wanted[name], device)
    return unflatten(leaves), index.meta


def stream(path: str | Path, like: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the checkpoint at ``path`` that ``like`` names by their paths, one after another, on the CPU.

    In memory is the one that was given last, and those of which threads read the beginning meanwhile: 256 MiB, and the rest of
    the largest of them. Checks and errors as `load`.

    >>> import tempfile
    >>> from olmo_fn.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save({"params": {"w": torch.ones(2)}}, folder, step=5)
    ...     list(stream(path, {"params.w": torch.empty(2, device="meta")}))
    [('params.w', tensor([1., 1.]))]
    """
    index = read_index(path)
    _check_like(path, index, like, [])
    yield from _read_tensors(Path(path), index, like, default_threads())


def load_newest(
    folder: str | Path,
    read: Callable[[Path], T],
    *,
    on_skip: Callable[[str], None] = log.warning,
    ranks: Ranks = SINGLE_PROCESS,
    before: int | None = None,
) -> tuple[Path, T] | None:
    """Path of the newest intact checkpoint in ``folder`` and what ``read`` gives for it; None if there is none.

    With ``before``, of those of a step below it.

    ``read`` is `load`, perhaps with some of its arguments (``lambda path: load(path, like)``). A checkpoint in which it finds
    damage is skipped, and ``on_skip`` gets a line that says why; any other error of ``read`` is raised. Each byte is read
    once, so this is the way to resume. With ``ranks``, all of them call this and get the same checkpoint: the newest in which
    none of them finds damage. If one of them fails, the others raise `RankLost`, which names it.

    >>> load_newest("/nowhere", load) is None
    True
    """

    def attempt() -> tuple[T | None, str]:
        try:
            return read(path), ""
        except BrokenCheckpoint as error:
            return None, str(error)

    for step in reversed(ranks.broadcast("the load", lambda: [n for n in steps(folder) if before is None or n < before])):
        path = step_path(folder, step)
        (result, _), problems = ranks.exchange(f"the load of step {step}", attempt, list, tell=itemgetter(1))
        if not any(problems):
            return path, cast(T, result)
        on_skip(f"skipping {path}, it is broken: {next(filter(None, problems))}")
    return None


def newest_whole(folder: str | Path, *, on_skip: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint in ``folder`` in which `verify` finds nothing; None if there is none. As `load_newest`."""

    def check(path: Path) -> None:
        for problem in verify(path):
            raise BrokenCheckpoint(problem)

    found = load_newest(folder, check, on_skip=on_skip)
    return found and found[0]


def _read_tensors(
    path: Path, index: Index, wanted: Mapping[str, torch.Tensor | None], threads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of each tensor, one after another, while threads read those that come next."""
    ahead: deque[tuple[str, torch.Tensor, list[Future[None]]]] = deque()

    def next_one() -> tuple[str, torch.Tensor]:
        name, out, reads = ahead.popleft()
        for read in reads:
            read.result()
        return name, out

    with ExitStack() as stack:
        files = OpenFiles(path, index, stack)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(pool.shutdown, cancel_futures=True)
        for name, leaf in wanted.items():
            tensor = index.tensors[name]
            box = Box.whole(tensor.shape) if leaf is None else local_box(leaf)
            parts = [(files.part(name, part), part.box, shared) for part in tensor.parts if (shared := overlap(part.box, box))]
            out = torch.empty(box.shape, dtype=DTYPES[tensor.dtype])  # the files are as long as the index says
            reads = (read for part in parts for read in _reads(*part, out, box))
            ahead.append((name, out, [pool.submit(read) for read in reads]))
            while len(ahead) > 1 and sum(len(futures) for *_, futures in ahead) > JOBS_AHEAD:
                yield next_one()
        while ahead:
            yield next_one()


def _reads(stored: PartBytes, box: Box, part: Box, out: torch.Tensor, out_box: Box) -> Iterator[Callable[[], None]]:
    """Calls that read ``part`` of the stored ``box`` to its place in ``out``, which holds ``out_box`` of the tensor."""
    item = out.element_size()
    for band in bands(part, box, JOB_BYTES // item, max(1, 2 * stored.chunk // item)):
        start, stop = (item * i for i in covering(band, box))
        if contiguous(band, box) and contiguous(band, out_box):
            data = host_bytes(out)[item * covering(band, out_box)[0] :]
            for first, last in stored.spans(start, stop):
                yield partial(stored.read, first, last, data[first - start : last - start])
        else:
            yield partial(_read_strided, stored, start, stop, box, band, out, out_box)


def _read_strided(stored: PartBytes, start: int, stop: int, box: Box, band: Box, out: torch.Tensor, out_box: Box) -> None:
    rows = torch.empty((stop - start) // out.element_size(), dtype=out.dtype)
    stored.read(start, stop, host_bytes(rows))
    place = Box(tuple(i - j for i, j in zip(band.offset, out_box.offset, strict=True)), band.shape)
    out[place.slices] = rows.as_strided(band.shape, strides(box.shape))


def _as_like(local: torch.Tensor, leaf: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    local = local.to(device if leaf is None or leaf.is_meta else leaf.device)
    if not isinstance(leaf, DTensor):
        return local
    return DTensor.from_local(
        local, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=strides(leaf.shape)
    )


def _chooser(path: str | Path, select: Collection[str], names: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether ``select`` names a path; ValueError for a pattern that matches none of ``names``."""
    patterns = [pattern for pattern in select if pattern not in names]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"{path}: select pattern {pattern!r} matches nothing; there are {some(names)}")
    exact = set(select)
    return lambda name: name in exact or matches(name, patterns)


def _check_like(path: str | Path, index: Index, wanted: Mapping[str, Any], extra: list[str]) -> None:
    differences = []
    if missing := [name for name in wanted if name not in index.tensors]:
        differences.append(f"asked for but not there: {some(missing)}")
    if extra:
        differences.append(f"there but not asked for: {some(extra)}")
    stored = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in index.tensors.items() if name in wanted}
    asked = {name: f"{DTYPE_NAMES.get(leaf.dtype, leaf.dtype)} {list(leaf.shape)}" for name, leaf in wanted.items()}
    differences += [f"{name} is {x}, asked for {asked[name]}" for name, x in stored.items() if x != asked[name]]
    if differences:
        more = [f"… ({len(differences)} differences in all)"] if len(differences) > 8 else []
        raise ValueError(
            f"{path} does not hold the state asked for:\n  " + "\n  ".join(differences[:8] + more) + "\n"
            'use the config it was saved with, or load a part of it, such as select=["params.*"]'
        )
