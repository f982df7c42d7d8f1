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
from olmo_fn.train.process import ProcessContext
from olmo_fn.train.session import Weights, find_run, open_run


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

    ``run`` is the run's folder, of which the newest whole checkpoint is taken or that of ``step``, or one of its checkpoints.
    ``weights``: the parameters, their moving average, or the mean of the last steps; adapters are merged into them. The
    context is the sequence length of training. ``say`` gets a line for each broken checkpoint that is passed over.
    ValueError for what is not there.
    """
    folder, checkpoint = find_run(Path(run), step)
    session = open_run(folder, ProcessContext(torch.device(device)))
    found = session.read_model(checkpoint or folder, weights, on_skip=say)
    if found is None:
        raise ValueError(f"{run} holds no whole checkpoint; one is written every --run.checkpoint-every steps")
    params = tree.map(lambda leaf: leaf.to(dtype), found[0])
    return LanguageModel(session.cfg.model, params, session.tokenizer, session.cfg.recipe.sequence_length), found[1]


def sample_run(folder: Path, prompt: str, tokens: int = 160) -> str:
    """What the run in ``folder`` makes of ``prompt`` by now, to be printed; empty without a prompt or a tokenizer."""
    if not prompt or not (folder / "tokenizer.json").is_file():
        return ""
    return f"sample:\n{prompt}{generate_text(load_model(folder)[0], prompt, Sampling(max_tokens=tokens))}\n"
