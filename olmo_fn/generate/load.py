"""A language model out of the folder of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from olmo_fn import tree
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.text import LanguageModel, generate_text
from olmo_fn.train.session import Weights, load_parameters


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

    The context is the sequence length of training.
    """
    session, stored, path = load_parameters(run, step=step, weights=weights, device=device, say=say)
    params = tree.map(lambda leaf: leaf.to(dtype), stored)
    return LanguageModel(session.cfg.model, params, session.tokenizer, session.cfg.recipe.sequence_length), path


def sample_run(folder: Path, prompt: str, tokens: int = 160) -> str:
    """What the run in ``folder`` makes of ``prompt`` by now, to be printed; empty without a prompt or a tokenizer."""
    if not prompt or not (folder / "tokenizer.json").is_file():
        return ""
    return f"sample:\n{prompt}{generate_text(load_model(folder)[0], prompt, Sampling(max_tokens=tokens))}\n"
