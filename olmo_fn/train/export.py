"""A Hugging Face directory from a checkpoint; and while a run goes on, from those of every so many steps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from olmo_fn.formats.huggingface import DTYPES, write_directory
from olmo_fn.formats.text_files import config_of, dtype_of, write_text_files
from olmo_fn.train.events import Event, Observer, Saved, Started
from olmo_fn.train.session import Session, Weights

FOLDER = "hf"


def write_checkpoint(
    session: Session,
    checkpoint: Path,
    target: Path,
    dtype: str = "auto",
    weights: Weights = "params",
    advance: Callable[[int], Any] = lambda nbytes: None,
) -> str:
    """Write the directory ``target`` with the model of one of the run's checkpoints, a tensor at a time; the dtype that it has.

    ``dtype`` auto: what the run's weights came in, or else float32. ValueError as `write_directory`.
    """
    cfg, run = session.cfg, session.folder
    tokenizer = session.tokenizer if (run / "tokenizer.json").is_file() or cfg.data.tokenizer else None
    chosen, context = dtype_of(run) if dtype == "auto" else dtype, cfg.recipe.sequence_length
    write_directory(
        target,
        cfg.model,
        session.stream_model(checkpoint, weights),
        DTYPES[chosen],
        more=lambda draft: write_text_files(draft, run, context, tokenizer),
        config=config_of(cfg.model, run, context, tokenizer),
        advance=advance,
    )
    return chosen


class Exporter(Observer):
    """Writes ``hf/step{N}`` below the run's folder from the checkpoint of step N, in a thread while training goes on.

    It reads hard links to the checkpoint's files, so that the run may delete that meanwhile.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.settings = session, session.cfg.export
        self.folder = session.folder / FOLDER
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="export")
        self.jobs: list[Future[None]] = []

    def __call__(self, event: Event) -> None:
        """Begin to export what was saved; raises what went wrong with an earlier one."""
        while self.jobs and self.jobs[0].done():
            self.jobs.pop(0).result()
        match event:
            case Started():
                for left in self.folder.glob(".*"):  # of a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
            case Saved(step, path) if step == self.session.cfg.run.steps or step % self.settings.hf_every == 0:
                self.folder.mkdir(exist_ok=True)
                links = linked(path, self.folder)
                self.jobs.append(self.pool.submit(self.export, links, step))

    def export(self, checkpoint: Path, step: int) -> None:
        """Export one, and delete those that are too old."""
        target = self.folder / f"step{step}"
        try:
            if not target.exists():
                write_checkpoint(self.session, checkpoint, target, self.settings.dtype, self.settings.weights)
        finally:
            if checkpoint.parent == self.folder:
                shutil.rmtree(checkpoint, ignore_errors=True)
        steps = sorted(int(path.name[4:]) for path in self.folder.glob("step*") if path.name[4:].isdecimal())
        for old in steps[: -self.settings.keep_last] if self.settings.keep_last else ():
            gone = self.folder / f".deleted-step{old}"
            with suppress(OSError):
                (self.folder / f"step{old}").rename(gone)
                shutil.rmtree(gone)

    def close(self) -> None:
        """Wait for those that are under way."""
        self.pool.shutdown()
        for job in self.jobs:
            job.result()


def linked(checkpoint: Path, folder: Path) -> Path:
    """A hidden folder with hard links to a checkpoint's files; the checkpoint itself where there are no such links."""
    links = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}-", dir=folder))
    try:
        for file in checkpoint.iterdir():
            os.link(file, links / file.name)
    except OSError:
        shutil.rmtree(links, ignore_errors=True)
        return checkpoint
    return links
