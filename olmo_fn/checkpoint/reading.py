"""Load a checkpoint, or part of it, into fresh tensors; every byte that is used is checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from olmo_fn.checkpoint.index import Index
from olmo_fn.checkpoint.leaves import put_together, take_apart
from olmo_fn.checkpoint.pool import default_threads, in_order
from olmo_fn.checkpoint.shards import box_of
from olmo_fn.checkpoint.spans import Span, overlap, strides
from olmo_fn.checkpoint.stored import Files, read_index, read_part
from olmo_fn.checkpoint.tensorfile import DTYPE_NAMES, DTYPES
from olmo_fn.tree import Tree, matches


def load(
    path: str | Path,
    like: Mapping[str, Any] | Callable[[Index], Mapping[str, Any]] | None = None,
    *,
    select: Collection[str] | None = None,
    subset: bool = False,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> tuple[Tree, dict[str, Any]]:
    """The tree and the ``meta`` of the checkpoint at ``path``, bitwise as they were saved, in whatever layout.

    ``like`` is a tree of tensors (on the meta device, perhaps) that says what is expected: names, shapes and
    dtypes must agree, the result has its order, and goes to its devices; ``device`` is for all the others. It
    may be a function of the checkpoint's index.
    Of a DTensor in ``like`` the result has mesh and placements, and only this rank's shard is read. With
    ``subset``, ``like`` may leave tensors out, as that of a pipeline stage does. ``select`` are patterns of
    the paths to load, such as ``["params.*"]``; of ``like``, too, only these count. A leaf of ``like`` that is
    None may be there, and is left out of the result.

    Every byte that is used is checked: of each stored box the chunks (1 MiB) are read that hold a byte asked
    for, whole. Shards of the first dim therefore cost what they hold; a shard of columns, whose rows are
    closer together than that, costs the rows of the stored box that it crosses.

    Raises `BrokenCheckpoint` (a ValueError) that names file and tensor if a byte is not as it was written,
    and ValueError that says all the differences if the checkpoint is whole but not like ``like``.

    >>> import tempfile
    >>> from olmo_fn.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save({"params": {"w": torch.ones(2)}, "step": torch.tensor(5)}, folder, step=5)
    ...     load(path, select=["params.*"])
    ({'params': {'w': tensor([1., 1.])}}, {})
    """
    path = Path(path)
    index = read_index(path)
    like = like(index) if callable(like) else like
    select = [select] if isinstance(select, str) else select
    wanted = take_apart(like) if like is not None else None
    names = list(index.tensors)
    empty = index.empty if wanted is None else wanted.empty
    if select is not None:
        names, empty = _select(path, names, select), ()
    if wanted is not None:
        counts = {name: leaf for name, leaf in wanted.by_path.items() if select is None or matches(name, select)}
        expected = {name: leaf for name, leaf in counts.items() if leaf is not None}
        _check_like(path, index, [] if subset else [n for n in names if counts.get(n, n) is not None], expected)
        names = list(expected)
    leaves = {name: wanted.by_path[name] if wanted is not None else None for name in names}
    loaded: dict[str, torch.Tensor] = {}

    def finish(name: str, out: torch.Tensor) -> None:
        loaded[name] = _as_like(out, leaves[name], device)

    def jobs(files: Files) -> Iterator[Callable[[], Callable[[], None] | None]]:
        for name, leaf in leaves.items():
            entry = index.tensors[name]
            want = Span((0,) * len(entry.shape), entry.shape) if leaf is None else box_of(leaf)
            out = torch.empty(want.shape, dtype=DTYPES[entry.dtype])
            for box in entry.boxes:
                if part := overlap(box.span, want):
                    yield from read_part(files.bytes(name, box), box.span, part, out, want)
            # Results come in order: when this one does, all the tensor's bytes are in place.
            yield partial(partial, finish, name, out)

    with ExitStack() as stack, ThreadPoolExecutor(threads or default_threads()) as pool:
        results = stack.enter_context(closing(in_order(pool, jobs(Files(path, index, stack)))))
        for done in results:
            if done is not None:
                done()
    return put_together(loaded, empty), index.meta


def _as_like(local: torch.Tensor, leaf: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    local = local.to(device if leaf is None or leaf.is_meta else leaf.device)
    if not isinstance(leaf, DTensor):
        return local
    return DTensor.from_local(
        local, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=strides(tuple(leaf.shape))
    )


def _select(path: Path, names: list[str], patterns: Collection[str]) -> list[str]:
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"{path}: select pattern {pattern!r} matches nothing; there are {_some(names)}")
    return [name for name in names if matches(name, patterns)]


def _check_like(path: Path, index: Index, names: list[str], expected: Mapping[str, Any]) -> None:
    differences = []
    if missing := [name for name in expected if name not in index.tensors]:
        differences.append(f"asked for but not there: {_some(missing)}")
    if extra := [name for name in names if name not in expected]:
        differences.append(f"there but not asked for: {_some(extra)}")
    for name, entry in index.tensors.items():
        if name in expected:
            leaf = expected[name]
            there, asked = (entry.dtype, entry.shape), (DTYPE_NAMES[leaf.dtype], tuple(leaf.shape))
            if there != asked:
                differences.append(f"{name} is {_spell(*there)}, asked for {_spell(*asked)}")
    if differences:
        more = [f"… ({len(differences)} differences in all)"] if len(differences) > 8 else []
        shown = "\n  ".join(differences[:8] + more)
        raise ValueError(
            f"{path} does not hold the state asked for:\n  {shown}\n"
            'use the config it was saved with, or load a part of it, such as select=["params.*"]'
        )


def _spell(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
