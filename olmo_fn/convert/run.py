"""A run of weights that are read a parameter at a time: one checkpoint in fp32, with the files beside weights."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from olmo_fn.train.config import Config


def check_new(run: Path) -> None:
    """ValueError for a folder that is there."""
    if run.exists():
        raise ValueError(f"{run} is there already; choose another folder for the run")


def write_run(
    source: Path,
    run: Path,
    parameter: Callable[[str], Tensor],
    dtype: str,
    meta: Mapping[str, Any],
    change: Callable[[Config], Config] = lambda cfg: cfg,
) -> str:
    """Make the folder ``run``, whole or not at all, and say what to type next.

    ``source``: a directory with the config.json, and the tokenizer and so on, which the run keeps. ``parameter`` gives each
    parameter by its path, in fp32; one at a time is in memory. ``dtype``: what a directory made of the run has, if known.
    ``change``: of the config that the directory has by itself.
    """
    from olmo_fn.formats.text_files import keep
    from olmo_fn.train.config import Init
    from olmo_fn.train.finetune import finetuning

    check_new(run)
    cfg = finetuning(source)
    own = str(run / "tokenizer.json") if cfg.data.tokenizer else ""
    cfg = replace(cfg, init=Init(), run=replace(cfg.run, folder=str(run)), data=replace(cfg.data, tokenizer=own))
    cfg = change(cfg)

    def files(draft: Path) -> None:
        if own:
            shutil.copyfile(source / "tokenizer.json", draft / "tokenizer.json")
        keep(source, draft, dtype)

    save_run(cfg, run, parameter, meta, files)
    sample = f"sample:        olmo-fn generate {shlex.quote(str(run))} 'The '\n" if own else ""
    return sample + train_on(run, " --data.paths 'tokens/part-*.npy'")


def save_run(
    cfg: Config,
    run: Path,
    parameter: Callable[[str], Tensor],
    meta: Mapping[str, Any],
    files: Callable[[Path], Any],
) -> None:
    """Make the folder ``run`` with the config, what ``files`` writes into it, and one checkpoint of the parameters of
    ``cfg.model``, which are asked for one after another in fp32; whole, or not at all.
    """
    import torch

    from olmo_fn import tree
    from olmo_fn.checkpoint import Deferred, save
    from olmo_fn.models import transformer
    from olmo_fn.progress import progress
    from olmo_fn.spec import Spec
    from olmo_fn.train.folder import write_config

    specs = transformer.specs(cfg.model)
    count = sum(spec.size for _, spec in tree.items(specs))
    run.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{run.name}-", dir=run.parent) as beside,
        progress("reading", count) as advance,
    ):

        def make(path: str, size: int) -> Tensor:
            advance(size, path)
            return parameter(path)

        def deferred(path: str, spec: Spec) -> Any:
            return Deferred(spec.shape, torch.float32, partial(make, path, spec.size))

        draft = Path(beside) / "run"
        write_config(cfg, draft)
        files(draft)
        save({"params": tree.map_with_path(deferred, specs)}, draft / "checkpoints", step=0, meta=dict(meta), threads=1)
        draft.rename(run)


def train_on(run: Path, data: str = "") -> str:
    """What to type to train on from the parameters of a run."""
    name = shlex.quote(str(run))
    return f"train on:      olmo-fn train {name} --run.start-from {name} --run.start-with params --run.folder {name}-2{data}"
