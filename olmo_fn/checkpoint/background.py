"""Saving in the background: the state is copied, training goes on, a thread writes; then old checkpoints are deleted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from olmo_fn.checkpoint.commit import delete, free_bytes, locked, step_path, steps, sweep, tolerated
from olmo_fn.checkpoint.ranks import SINGLE_PROCESS, Ranks
from olmo_fn.checkpoint.reading import newest_whole
from olmo_fn.checkpoint.shards import Held, LocalState, Plan, assign, local_state
from olmo_fn.checkpoint.stored import verify
from olmo_fn.checkpoint.writing import FILE_BYTES, failures_named, save_planned

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Keep the newest ``keep_last`` checkpoints and all whose step is a multiple of ``keep_every``.

    What neither rule keeps is deleted; without any rule, the default, nothing is.
    """

    keep_last: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.keep_last), ("keep_every", self.keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more; leave it out (None) to do without this rule")


KEEP_ALL = Retention()


def to_delete(steps: Collection[int], retention: Retention, protected: Collection[int] = ()) -> list[int]:
    """The steps that ``retention`` does not keep, oldest first; never the newest and never one in ``protected``.

    >>> to_delete([100, 200, 300, 400, 500], Retention(keep_last=2, keep_every=300))
    [100, 200]
    >>> to_delete([100, 200, 300], Retention())
    []
    """
    if retention == KEEP_ALL or not steps:
        return []
    ordered = sorted(steps)
    kept = {*ordered[-(retention.keep_last or 1) :], *protected}
    if retention.keep_every is not None:
        kept.update(step for step in ordered if step % retention.keep_every == 0)
    return [step for step in ordered if step not in kept]


def retire(folder: str | Path, retention: Retention, *, protected: int, coming: Collection[int] = ()) -> list[int]:
    """Delete what ``retention`` does not keep in ``folder``, never ``protected``; the deleted steps.

    Only what looks intact (index, lengths, headers) counts and is deleted: a broken checkpoint neither takes the place of an
    intact one among the last k, nor is it removed. Steps that are still ``coming`` count as well. What cannot be deleted is
    a warning.
    """
    deleted: list[int] = []
    if retention == KEEP_ALL:
        return deleted
    with tolerated(f"cannot delete old checkpoints in {folder}"), locked(Path(folder)):
        intact = [step for step in steps(folder) if not verify(step_path(folder, step), deep=False)]
        for step in to_delete({*intact, *coming}, retention, [protected, *coming]):
            with tolerated(f"cannot delete {step_path(folder, step)}"):
                delete(step_path(folder, step))
                deleted.append(step)
    return deleted


def make_room(folder: Path, retention: Retention, nbytes: int, step: int) -> None:
    """Where ``nbytes`` are not free, delete what `retire` would after ``step`` already now, but never the newest whole one."""
    if retention == KEEP_ALL or free_bytes(folder) >= nbytes:
        return
    with tolerated(f"cannot delete old checkpoints in {folder}"):
        if newest := newest_whole(folder):
            retire(folder, retention, protected=int(newest.name.removeprefix("step")), coming=[step])


class Saver:
    """Saves one checkpoint at a time into ``folder``, in a thread, then deletes what ``retention`` does not keep.

    `submit` returns when the state is copied, so that training may change or donate its memory. Only what this rank writes is
    copied, into the same buffers each time, pinned for a GPU's tensors. With ``ranks``, all of them submit the same steps (see
    `save`); who writes what is agreed on at the first `submit`, and again when the names or shapes change. A checkpoint that
    fails is logged by the next `settle` or `submit`, and the one after it is waited for: two in a row are an error. Used as a
    context, a saver waits at the end. What a killed run left half written is removed at the start.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Saver(folder, retention=Retention(keep_last=1)) as save:
    ...     for step in (10, 20):
    ...         save.submit({"params": {"w": torch.full((2,), step)}}, step=step)
    ...     save.wait().name, steps(folder)
    ('step20', [20])
    """

    def __init__(
        self, folder: str | Path, *, retention: Retention = KEEP_ALL, threads: int | None = None, ranks: Ranks = SINGLE_PROCESS
    ) -> None:
        self.folder = Path(folder)
        self.retention = retention
        self.threads = threads
        self.ranks = ranks.connection()
        self._plan: tuple[Held, Plan] | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._failure: Exception | None = None
        if ranks.rank == 0:
            sweep(self.folder)

    def submit(self, tree: Mapping[str, Any], *, step: int, meta: Mapping[str, Any] | None = None) -> None:
        """Save ``tree`` as it is now, when the previous checkpoint is done; if that failed, wait for this one, or its error."""
        state = local_state(tree, step, meta, self.ranks)
        self.settle()
        failed, self._failure = self._failure, None
        if self._plan is None or self._plan[0] != state.held():
            with failures_named(step_path(self.folder, step)):
                _, plan = self.ranks.exchange(f"the plan of step {step}", lambda: state, assign, LocalState.held)
            self._plan = state.held(), plan
        plan = self._plan[1]
        shards = plan.written_by(self.ranks.rank, state.shards)
        self._buffers = {name: _copy(shard.tensor(), self._buffers.get(name)) for name, shard in shards.items()}
        copies = {name: shard._replace(data=self._buffers[name]) for name, shard in shards.items()}
        self._running = self._pool.submit(self._save, replace(state, shards=copies), plan)
        if failed and self._running.exception():
            self.wait()

    @property
    def is_done(self) -> bool:
        """Whether a submitted checkpoint is committed, or failed, so that `wait` returns at once."""
        return self._running is not None and self._running.done()

    def wait(self) -> Path | None:
        """The path of the submitted checkpoint when it is committed, or its error; None if there is none."""
        running, self._running = self._running, None
        failure, self._failure = self._failure, None
        if running is None and failure:
            raise failure
        return running.result() if running else None

    def settle(self) -> Path | None:
        """As `wait`, but an error is logged, once; `wait` raises it unless another checkpoint is submitted before."""
        try:
            return self.wait() if self._running else None
        except Exception as error:
            self._failure = error
            if self.ranks.rank == 0:
                log.error("%s. The next checkpoint is tried all the same; two in a row that fail are an error", error)
            return None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as late:
            if error is None:
                raise
            log.error("%s", late)  # it must not hide why the block ended
        finally:
            self._pool.shutdown()
            self._buffers = {}

    def _save(self, state: LocalState, plan: Plan) -> Path:
        if self.ranks.rank == 0:
            make_room(self.folder, self.retention, plan.nbytes, state.step)
        path = save_planned(state, plan, self.folder, self.ranks, replace=False, file_bytes=FILE_BYTES, threads=self.threads)
        if self.ranks.rank == 0:
            retire(self.folder, self.retention, protected=state.step)
        return path


def _copy(leaf: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None or buffer.shape != leaf.shape or buffer.dtype != leaf.dtype:
        buffer = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
    return buffer.copy_(leaf.detach())
