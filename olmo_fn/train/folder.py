"""The folder of a run: its config, and whether this run may go on in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from olmo_fn.fields import values
from olmo_fn.train.choices import locate, with_files
from olmo_fn.train.config import CHOICES, Config
from olmo_fn.train.serialize import LARGEST, files_of, parse, structure, to_yaml
from olmo_fn.train.upgrade import upgrade


def read_config(run: Path) -> Config:
    """The config that a run folder, or a config file, holds."""
    path = run / "config.yaml" if run.is_dir() else run
    if not path.is_file():
        what = "is no run folder: there is no config.yaml in it" if run.is_dir() else "is not there"
        raise ValueError(f"{str(run)!r} {what}{runs_near(run)}")
    try:
        with path.open(encoding="utf-8") as file:
            value = upgrade(parse(file.read(LARGEST + 1)))
        use = locate(files_of(value), path.parent)
        config = structure(value, Config, with_files(CHOICES, use)[0])
        return replace(config, use=use)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8, at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def runs_near(run: Path) -> str:
    """``; there are runs/a, …``: the runs in the folder where ``run`` was looked for, or the one above; empty without any."""
    found = [str(path.parent) for above in (run.parent, run.parent.parent) for path in sorted(above.glob("*/config.yaml"))]
    return f"; there are {', '.join(found[:8])}" if found else ""


def check_folder(cfg: Config) -> None:
    """Raise ValueError unless this config may begin, or go on, in its folder. Writes nothing.

    Fields that cannot change the numbers may differ from those of the run that is there; any other is an error that
    names the flags.
    """
    folder = Path(cfg.run.folder)
    if not (folder / "config.yaml").exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is no run folder; choose another with --run.folder")
        return
    if not cfg.run.resume:
        raise ValueError(f"{folder} already holds a run; choose another --run.folder, or leave out --run.no-resume")
    from olmo_fn.checkpoint import steps  # here, for it imports torch

    changed = list(differences(read_config(folder), cfg))
    if changed:
        flags = ", ".join(f"{flag} was {old}, is {new}" for flag, old, new in changed)
        hint = f", with --run.start-from {folder} to go on from its state" if steps(folder / "checkpoints") else ""
        raise ValueError(f"{folder} holds a run of another config ({flags}); choose another --run.folder{hint}")


def write_config(cfg: Config, folder: Path) -> None:
    """Make the folder and write its ``config.yaml``, whole or not at all, the user's files by their absolute paths."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "config.yaml.new"
    beside.write_text(to_yaml(replace(cfg, use=locate(cfg.use))))
    os.replace(beside, folder / "config.yaml")


def differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any]]:
    """``(flag, old, new)`` for each field that differs and can change the numbers of a run.

    Where another class is chosen, such as another optimizer, it is the name that differs, and what both have.

    >>> from dataclasses import replace
    >>> from olmo_fn.models.config import OLMO2
    >>> from olmo_fn.train.config import Run
    >>> a = Config(OLMO2["olmo2-1m"])
    >>> list(differences(a, replace(a, run=Run(steps=5, log_every=3))))
    [('--run.steps', 1000, 5)]
    """
    after = {field.path: field.value for field in values(new)}
    for field in values(old):
        if field.visible and after.get(field.path, field.value) != field.value:
            yield field.flag, field.value, after[field.path]
