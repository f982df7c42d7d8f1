"""A language model out of the folder of a run, or a directory in Hugging Face's format."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from olmo_fn import tree
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.template import read_json
from olmo_fn.generate.text import LanguageModel, generate_text
from olmo_fn.train.session import Weights, find_run, load_parameters
from olmo_fn.tree import Tree


def load_model(
    run: str | Path,
    *,
    step: int | None = None,
    weights: Weights = "params",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    say: Callable[[str], Any] = lambda line: print(line, file=sys.stderr),
) -> tuple[LanguageModel, Path]:
    """The model of a run, and the checkpoint that it is from; the arguments are those of `load_parameters`.

    The context is the sequence length of training. Where the run's folder has a ``generation_config.json``, as one that was
    begun from a published model, the ids that end a text there end it here.
    """
    session, stored, path = load_parameters(run, step=step, weights=weights, device=device, say=say)
    params = tree.map(lambda leaf: leaf.to(dtype), stored)
    stop_ids = end_ids(session.folder, session.cfg.model.vocab_size)
    context = session.cfg.recipe.sequence_length
    return LanguageModel(session.cfg.model, params, session.tokenizer, context, stop_ids=stop_ids), path


def folder_of(model: str | Path, step: int | None = None) -> Path:
    """The folder with a model's tokenizer and its chat template, given what `load_model` is given."""
    return find_run(Path(model), step)[0]


def end_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """``eos_token_id`` of the folder's ``generation_config.json``, one or several; none without it."""
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(i for i in ids if 0 <= i < vocab_size)


def sample_run(folder: Path, prompt: str, tokens: int = 160) -> str:
    """What the run in ``folder`` makes of ``prompt`` by now, to be printed; empty without a prompt or a tokenizer."""
    if not prompt or not (folder / "tokenizer.json").is_file():
        return ""
    return f"sample:\n{prompt}{generate_text(load_model(folder)[0], prompt, Sampling(max_tokens=tokens))}\n"


def arranged(params: Tree) -> Tree:
    """The same parameters, laid out in memory as products with few rows read them fastest."""
    return params
