"""The folder of a run: its config, the one process that writes there, and whether this run may go on in it."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from olmo_fn.data.identity import Identity, difference
from olmo_fn.fields import expanded, values
from olmo_fn.files import make_folder, try_lock, unlock, write_whole
from olmo_fn.train.choices import locate, with_files
from olmo_fn.train.config import CHOICES, Config
from olmo_fn.train.serialize import LARGEST, files_of, parse, plain, structure, to_yaml
from olmo_fn.train.upgrade import upgrade

NOTHING = {".lock", "config.yaml.new", "started-from.json", "logs", "lost+found", ".DS_Store"}
"""What a folder may hold and still be empty: the traces of a start that was killed, and of systems."""
STARTED_FROM = "started-from.json"
ACCEPT = "--run.accept-changes"


def read_config(run: Path) -> Config:
    """The config that a run folder, or a config file, holds."""
    run = run.expanduser()
    path = run / "config.yaml" if run.is_dir() else run
    if not path.is_file():
        what = "is no run folder: there is no config.yaml in it" if run.is_dir() else "is not there"
        raise ValueError(f"{str(run)!r} {what}{runs_near(run)}")
    try:
        with path.open(encoding="utf-8") as file:
            value = upgrade(parse(file.read(LARGEST + 1)))
        use = locate(files_of(value), path.parent)
        config = structure(value, Config, with_files(CHOICES, use)[0])
        return expanded(replace(config, use=use))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8, at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def runs_near(run: Path) -> str:
    """``; there are runs/a, …``: the runs in the folder where ``run`` was looked for, or the one above; empty without any."""
    folders = dict.fromkeys((run.parent, run.parent.parent))  # the same for a bare name
    found = [str(path.parent) for above in folders for path in sorted(above.glob("*/config.yaml"))]
    return f"; there are {', '.join(found[:8])}" if found else ""


@contextmanager
def claimed(cfg: Config) -> Iterator[None]:
    """Make the run's folder and hold it, as the only process that writes there, until the block or the process ends.

    ValueError as of `check_folder`, or if another process trains there; nothing is written then.
    """
    folder = Path(cfg.run.folder)
    check_folder(cfg)
    make_folder(folder)
    with held(folder):
        check_folder(cfg)  # once more: a run may have begun and ended meanwhile
        try:
            yield
        finally:
            if not (folder / "config.yaml").exists():  # it was refused for another reason
                with suppress(OSError):
                    (folder / ".lock").unlink()
                    folder.rmdir()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, by a lock on a file in it that says which process it is; ValueError if another one does."""
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if try_lock(fd) is False:
            who = os.pread(fd, 200, 0).decode(errors="replace") or "another process"
            raise ValueError(f"{who} trains in {folder}; wait until it ends, or choose another --run.folder")
        with suppress(OSError):  # a full disk is no reason
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        unlock(fd)


def check_folder(cfg: Config) -> None:
    """Raise ValueError unless this config may begin, or go on, in its folder. Writes nothing.

    Fields that cannot change the numbers may differ from those of the run that is there, and so may more steps, if the rate
    of those that are done stays; any other is an error that names the flags, unless ``run.accept_changes``.
    """
    folder = Path(cfg.run.folder)
    if not (folder / "config.yaml").exists():
        if (folder.exists() or folder.is_symlink()) and (not folder.is_dir() or holds_something(folder)):
            raise ValueError(f"{folder} exists and is no run folder; choose another with --run.folder")
        return
    if not cfg.run.resume:
        raise ValueError(f"{folder} already holds a run; choose another --run.folder, or leave out --run.no-resume")
    check_same(cfg, {"config": numbers(read_config(folder))})


def holds_something(folder: Path) -> bool:
    """Whether a folder without a config.yaml holds anything of somebody's."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".nfs")} - NOTHING
    return bool(names - {"checkpoints"}) or ("checkpoints" in names and any((folder / "checkpoints").iterdir()))


def check_same(cfg: Config, meta: Mapping[str, Any], data: Identity | None = None) -> list[str]:
    """What is not as in the ``meta`` of a checkpoint, or of the run's config, a line each.

    ValueError that names the flags or the file, unless ``run.accept_changes``. What the meta does not have is not compared.
    """
    from olmo_fn.checkpoint import steps  # here, for it imports torch

    folder = Path(cfg.run.folder)
    done = max(steps(folder / "checkpoints"), default=0)
    flags, found = [], []
    for flag, old, new in differences(meta.get("config", {}), numbers(cfg)):
        why = steps_changed(cfg, old, done) if flag == "--run.steps" else ""
        if flag != "--run.steps" or why:
            flags.append(f"{flag} was {old}, is {new}{why}")
    if flags:
        hint = f" with --run.start-from {folder} to go on from its state," if done else ""
        found.append(
            f"{folder} holds a run of another config ({', '.join(flags)}); choose another --run.folder,{hint}"
            f" or go on in it all the same with {ACCEPT}"
        )
    if data is not None and "data" in meta and (what := difference(meta["data"], data)):
        found.append(
            f"the data is not that of the run in {folder}: {what}; put it back, choose another --run.folder,"
            f" or go on all the same with {ACCEPT}"
        )
    if found and not cfg.run.accept_changes:
        raise ValueError(found[0])
    return [f"accepted: {text.partition(';')[0]}" for text in found]


def steps_changed(cfg: Config, old: int, done: int) -> str:
    """Why a run of ``old`` steps, of which ``done`` are done, cannot go on to those of ``cfg``; empty if it can."""
    import torch

    from olmo_fn.train.schedule import schedule

    if cfg.run.steps < done:
        return f", and {done} are done"
    at = torch.arange(1, done + 1)  # fp32, as an update sees it
    before, after = (schedule(replace(cfg, run=replace(cfg.run, steps=steps)))(at).float() for steps in (old, cfg.run.steps))
    if len(changed := (before != after).nonzero()):
        first = int(changed[0])
        rates = f"{float(before[first]):.6g}, would have been {float(after[first]):.6g}"
        return f": the rate of step {first + 1} was {rates}, as {cfg.schedule.name} depends on the steps in all"
    last, every = cfg.recipe.merge_last, cfg.recipe.merge_every
    end = (min(old, cfg.run.steps) // every + 1) * every  # the first at which only one of the two merges
    if last and end - last < done and end <= max(old, cfg.run.steps):
        return f": --recipe.merge-last {last} up to step {end} has begun with the steps that are done"
    return ""


def write_config(cfg: Config, folder: Path) -> None:
    """Make the folder and write its ``config.yaml``, whole or not at all, the user's files by their absolute paths."""
    make_folder(folder)
    kept = replace(cfg, use=locate(cfg.use), run=replace(cfg.run, accept_changes=False))
    write_whole(folder / "config.yaml", to_yaml(kept).encode())


def origin(cfg: Config) -> Path:
    """Where a run with ``run.start_from`` begins: at the checkpoint that its first start found there, which is written down.

    ValueError if that is gone, or another by now.
    """
    note = Path(cfg.run.folder) / STARTED_FROM
    if not note.is_file() or cfg.run.accept_changes:
        return Path(cfg.run.start_from)
    first = json.loads(note.read_text())
    path = Path(first["path"])
    if first["start_from"] == cfg.run.start_from and first["index_crc32"] != _index_crc32(path):
        what = "another" if path.exists() else "gone"
        raise ValueError(
            f"{cfg.run.folder} began from {path}, which is {what} by now; put it back, choose another --run.folder, "
            f"or begin from what --run.start-from {cfg.run.start_from} names now with {ACCEPT}"
        )
    return path if first["start_from"] == cfg.run.start_from else Path(cfg.run.start_from)


def write_origin(cfg: Config, checkpoint: Path) -> None:
    """Write down from which checkpoint the run begins."""
    path = checkpoint.resolve()
    note = {"start_from": cfg.run.start_from, "path": str(path), "index_crc32": _index_crc32(path)}
    write_whole(Path(cfg.run.folder) / STARTED_FROM, json.dumps(note, indent=1).encode() + b"\n")


def _index_crc32(checkpoint: Path) -> str:
    """Of the index, which has the checksums of all else; empty if there is none."""
    try:
        return f"{zlib.crc32((checkpoint / 'index.json').read_bytes()):08x}"
    except OSError:
        return ""


def numbers(cfg: Config) -> dict[str, Any]:
    """The fields that can change the numbers of a run, by flag, as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps({field.flag: plain(field.value) for field in values(cfg) if field.visible}))
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """``(flag, old, new)`` for each of the `numbers` of two configs that differs.

    Where another class is chosen, such as another optimizer, it is the name that differs, and what both have.

    >>> list(differences({"--run.steps": 1000, "--run.seed": 0}, {"--run.steps": 5, "--run.seed": 0, "--optim.lr": 1e-3}))
    [('--run.steps', 1000, 5)]
    """
    return ((flag, value, new[flag]) for flag, value in old.items() if new.get(flag, value) != value)
