"""A language model out of the folder of a run, or a directory in Hugging Face's format."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from olmo_fn import tree
from olmo_fn.data.template import read_json
from olmo_fn.data.tokenizer import Tokenizer
from olmo_fn.formats.huggingface import open_directory
from olmo_fn.formats.text_files import KEPT, load_tokenizer
from olmo_fn.generate.config import Sampling
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

    Or that of a directory in Hugging Face's format, which has no steps and no averages. The context is the sequence length of
    training, or what the directory's config says. What stands before every text there, and ends it, does so here, also in a run
    that was begun from such a directory.
    """
    folder = Path(run)
    if is_huggingface(folder):
        if step is not None or weights != "params":
            raise ValueError(f"{run} is a Hugging Face directory, without steps and averages; leave out --step and --weights")
        return _load_directory(folder, dtype, device), folder
    session, stored, path = load_parameters(run, step=step, weights=weights, device=device, say=say)
    cfg, tokenizer, files = session.cfg, session.tokenizer, text_files(session.folder)
    first = first_ids(tokenizer) if files.name == KEPT else ()
    params = arranged(tree.map(lambda leaf: leaf.to(dtype), stored))
    stops = end_ids(files, cfg.model.vocab_size)
    return LanguageModel(cfg.model, params, tokenizer, cfg.recipe.sequence_length, first, stops), path


def _load_directory(folder: Path, dtype: torch.dtype, device: torch.device | str) -> LanguageModel:
    directory, tokenizer = open_directory(folder), load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer.json; put the one there that the model was trained with")
    cfg = directory.model
    params = tree.unflatten((path, directory.parameter(path).to(device, dtype)) for path in directory.names)
    return LanguageModel(
        cfg, arranged(params), tokenizer, directory.context, first_ids(tokenizer), end_ids(folder, cfg.vocab_size)
    )


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is a directory in Hugging Face's format, and no run."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def text_files(folder: Path) -> Path:
    """Where the chat template and the like of a run are: one that was begun from a Hugging Face directory keeps that one's."""
    own = any((folder / name).is_file() for name in ("chat_template.jinja", "tokenizer_config.json"))
    return folder if own or not (folder / KEPT).is_dir() else folder / KEPT


def folder_of(model: str | Path, step: int | None = None) -> Path:
    """The folder with the chat template of what `load_model` is given."""
    return Path(model) if is_huggingface(Path(model)) else text_files(find_run(Path(model), step)[0])


def first_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that a tokenizer with a post-processor puts before every text, such as a beginning-of-text token."""
    text = "a"
    plain, ids = tokenizer.encode(text), tokenizer.backend.encode(text, add_special_tokens=True).ids
    return tuple(ids[: next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)])


def end_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """``eos_token_id``, one or several, of the folder's ``generation_config.json``, or else of its ``config.json``."""
    found = read_json(folder / "generation_config.json").get("eos_token_id")
    found = read_json(folder / "config.json").get("eos_token_id") if found is None else found
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(i for i in ids if 0 <= i < vocab_size)


def sample_run(folder: Path, prompt: str, tokens: int = 160) -> str:
    """What the run in ``folder`` makes of ``prompt`` by now, to be printed; empty without a prompt or a tokenizer."""
    if not prompt or not (folder / "tokenizer.json").is_file():
        return ""
    return f"sample:\n{prompt}{generate_text(load_model(folder)[0], prompt, Sampling(max_tokens=tokens))}\n"


def arranged(params: Tree) -> Tree:
    """The same parameters, laid out in memory as a product with few rows reads them fastest: the matrix of logits by columns.

    Measured on a CPU in fp32, with 1 and 8 rows; the others, (in, out), are as they should be.
    """
    w_out = "embed" if "w_out" not in params["head"] else "head.w_out"
    return tree.replace(params, w_out, tree.at(params, w_out).T.contiguous().T)
