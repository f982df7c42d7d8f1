"""A model out of the folder of a run: its config, the parameters of a checkpoint, its tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from olmo_fn import tree
from olmo_fn.checkpoint import load, load_newest, step_path, steps
from olmo_fn.data.tokenizer import Tokenizer
from olmo_fn.data.tokenizer import load as load_tokenizer
from olmo_fn.generate.text import LanguageModel
from olmo_fn.spec import abstract
from olmo_fn.train.config import Config
from olmo_fn.train.folder import read_config
from olmo_fn.train.recipe import is_trained, model_parameters, parameters

Weights: TypeAlias = Literal["params", "ema", "merge"]


def load_model(
    run: str | Path,
    *,
    step: int | None = None,
    weights: Weights = "params",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    say: Callable[[str], Any] = lambda line: print(line, file=sys.stderr),
) -> tuple[LanguageModel, Path]:
    """The model of a run, and the checkpoint that it is from.

    ``run`` is the run's folder, of which the newest whole checkpoint is taken or that of ``step``, or one of
    its checkpoints. ``weights``: the parameters, their moving average, or the mean of the last steps. Adapters are merged
    into the model. The context is the sequence length
    of training. ``say`` gets a line for each broken checkpoint that is passed over. ValueError for what is
    not there.
    """
    folder, path = find(Path(run), step)
    cfg = read_config(folder)
    if weights == "ema" and not cfg.recipe.ema:
        raise ValueError(f"{run} kept no moving average of its weights (--recipe.ema was 0); use --weights params")
    if weights == "merge" and not cfg.recipe.merge_last:
        raise ValueError(f"{run} kept no mean of its weights (--recipe.merge-last was 0); use --weights params")
    own = tree.flatten(abstract(parameters(cfg)))
    averaged = {path for path in own if weights != "params" and is_trained(cfg, path)}
    places = {path: f"slots.{weights}.{path}" if path in averaged else f"params.{path}" for path in own}
    like = tree.unflatten((places[path], leaf) for path, leaf in own.items())
    select = ["params.*"] if weights == "params" else list(places.values())
    read = partial(load, like=like, select=select, device=device)
    if path is not None:
        state, _ = read(path)
    else:
        found = load_newest(folder / "checkpoints", read, on_skip=say)
        if found is None:
            raise ValueError(f"{run} holds no whole checkpoint; one is written every --run.checkpoint-every steps")
        path, (state, _) = found
    params = model_parameters(cfg, tree.unflatten((path, tree.at(state, place)) for path, place in places.items()))
    params = tree.map(lambda leaf: leaf.to(dtype), params)
    return LanguageModel(cfg.model, params, _tokenizer(folder, cfg), cfg.recipe.sequence_length), path


def find(where: Path, step: int | None) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint where ``where`` or ``step`` names one; ValueError if not there."""
    inside = where.resolve()
    if (inside / "index.json").is_file() and (inside.parent.parent / "config.yaml").is_file():
        if step is not None:
            raise ValueError(f"{where} is one checkpoint already; leave out --step, or give the run's folder")
        return inside.parent.parent, inside
    if not (inside / "config.yaml").is_file():
        what = "is no run, it holds no config.yaml" if where.is_dir() else "is not there"
        there = sorted(str(path.parent) for path in where.parent.glob("*/config.yaml"))
        hint = f"; there are {', '.join(there[:8])}" if there else ""
        raise ValueError(f"{where} {what}; give the folder of a run, or one of its checkpoints{hint}")
    if step is None:
        return inside, None
    if step not in (found := steps(inside / "checkpoints")):
        raise ValueError(f"{where} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}")
    return inside, step_path(inside / "checkpoints", step)


def _tokenizer(folder: Path, cfg: Config) -> Tokenizer:
    """The run's own copy, or else the one that its config names."""
    own = folder / "tokenizer.json"
    path = own if own.is_file() else cfg.data.tokenizer
    if not path:
        raise ValueError(f"{folder} holds no tokenizer.json; put the one there that its data was tokenized with")
    tokenizer = load_tokenizer(path, cfg.data.eos)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size:,} ids and the model {cfg.model.vocab_size:,}; "
            f"put the tokenizer.json into {folder} that its data was tokenized with"
        )
    return tokenizer
