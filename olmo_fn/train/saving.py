"""What a run leaves in its folder: config, tokenizer, where it began, and checkpoints that say what they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from olmo_fn import tree
from olmo_fn.checkpoint import BrokenCheckpoint, Retention, Saver, read_index, step_path, steps
from olmo_fn.checkpoint.commit import free_bytes
from olmo_fn.core.step import State
from olmo_fn.data.identity import identity
from olmo_fn.files import make_folder, sync, write_whole
from olmo_fn.formats.huggingface import READ, open_directory
from olmo_fn.formats.text_files import KEPT, keep
from olmo_fn.train.events import Event, Saved
from olmo_fn.train.folder import check_same, claimed, held, numbers, write_config, write_origin
from olmo_fn.train.schedule import sizes
from olmo_fn.train.session import Session, abstract_state, as_tree


class Keeper:
    """The folder of a run that goes on: claimed on the main process until ``stack`` closes, and checked when it is made.

    ValueError if another process trains there, or if data or config are not those of its newest checkpoint. ``notes`` are
    what there is to say of it.
    """

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self.session, self.stack, self.notes = session, stack, list[str]()
        self.meta: dict[str, Any] = {}
        if session.process.is_main:
            stack.enter_context(claimed(session.cfg))
            self.meta = {"config": numbers(session.cfg), "data": identity(session.source.files)}
            self.notes += check_same(session.cfg, newest_meta(session.folder), self.meta["data"])

    def begin(self, start: int, checkpoint: Path | None) -> None:
        """Write what the run needs to go on, and be ready to save: the state after ``start`` steps is from ``checkpoint``."""
        run, context = self.session.cfg.run, self.session.process
        self.newest, self.checkpoint = start, checkpoint
        self.retention = Retention(keep_last=run.keep_last or None, keep_every=run.keep_every or None)
        if context.is_main:
            self._write()
        context.barrier()
        self.saver = self.stack.enter_context(Saver(self.session.folder / "checkpoints", ranks=context.ranks))

    def submit(self, state: State, step: int, keep_all: bool = False) -> None:
        """Save the state after ``step`` in the background, unless it is saved; with ``keep_all`` nothing older is deleted."""
        folder = self.session.folder
        if step == self.newest:
            return
        if self.session.process.is_main:
            if not (folder / ".lock").exists():  # somebody deleted the folder
                make_folder(folder)
                self.stack.enter_context(held(folder))
                self._write()
            with suppress(OSError):  # not there, or the disk fails: it is no reason not to save
                sync(folder / "metrics.jsonl")
        self.saver.retention = Retention() if keep_all else self.retention
        self.saver.submit(as_tree(state), step=step, meta={"tokens": sizes(self.session.cfg).tokens_before(step), **self.meta})
        self.newest = step

    def collect(self, last: bool = False) -> Iterator[Event]:
        """Wait for the checkpoint that is being written, if one is; only the ``last`` one must not fail."""
        if path := self.saver.wait() if last else self.saver.settle():
            yield Saved(int(path.name.removeprefix("step")), path)

    def _write(self) -> None:
        """Config, tokenizer and origin. A tokenizer that checkpoints were made with stays."""
        session, tokenizer = self.session, self.session.source.tokenizer
        write_config(session.cfg, session.folder)
        path = session.folder / "tokenizer.json"
        if tokenizer:
            text = tokenizer.backend.to_str(pretty=True).encode()
            if path.exists() and steps(session.folder / "checkpoints") and path.read_bytes() != text:
                self.notes.append(f"{path} is not the tokenizer of the data, and stays: checkpoints were made with it")
            else:
                write_whole(path, text)
        self._keep_text_files()
        own = session.folder.resolve() / "checkpoints"
        if self.checkpoint and session.cfg.run.start_from and self.checkpoint.resolve().parent != own:
            write_origin(session.cfg, self.checkpoint)
        self.notes += room(session)

    def _keep_text_files(self) -> None:
        """Tokenizer, chat template and the like of the Hugging Face directory that the weights are from, for an export."""
        cfg, folder = self.session.cfg, self.session.folder
        if (folder / KEPT).exists():
            return
        if cfg.init.from_hf and self.newest == 0:
            keep(Path(cfg.init.from_hf), folder, READ[open_directory(cfg.init.from_hf).dtype])
        elif self.checkpoint and (source := self.checkpoint.parent.parent / KEPT).is_dir():
            keep(source, folder)


def newest_meta(folder: Path) -> Mapping[str, Any]:
    """The meta of the newest checkpoint in a run's folder that has a whole index; empty if there is none."""
    for step in reversed(steps(folder / "checkpoints")):
        with suppress(BrokenCheckpoint, OSError):
            return read_index(step_path(folder / "checkpoints", step)).meta
    return {}


def room(session: Session) -> list[str]:
    """A warning where the disk has no room for two checkpoints, as many as there are while one is written."""
    size = sum(leaf.nbytes for _, leaf in tree.items(abstract_state(session.step, session.specs)))
    if (free := free_bytes(session.folder)) >= 2 * size:
        return []
    return [f"{free:,} bytes are free in {session.folder}, and a checkpoint has {size:,}: two at a time do not fit"]
