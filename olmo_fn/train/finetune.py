"""The run that a Hugging Face directory describes by itself: its model, its tokenizer, and a recipe to fine-tune it.

Imports no torch, so that ``--help`` is quick.
"""

from __future__ import annotations

from pathlib import Path

from olmo_fn.data.settings import Data
from olmo_fn.formats.config_json import CONFIG, differences, model_of, read_json
from olmo_fn.formats.text_files import eos_of
from olmo_fn.train.config import Config, Init, Recipe, Run
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.schedules import Linear

LENGTH = 1024
"""Tokens a sequence, if the model's context is not shorter."""


def finetuning(directory: Path) -> Config:
    """A run that fine-tunes the model in ``directory``: a low rate that falls to 0, short sequences, 200 steps."""
    raw = read_json(directory)
    context = raw.get("max_position_embeddings")
    return Config(
        model=model_of(raw, str(directory / CONFIG)),
        data=data_of(directory),
        optim=AdamW(lr=1e-5),
        schedule=Linear(warmup=0.1, final=0.0),
        recipe=Recipe(batch_size=8, sequence_length=min(LENGTH, context) if type(context) is int and context > 0 else LENGTH),
        run=Run(steps=200, checkpoint_every=100, keep_last=2, sample="The "),
        init=Init(from_hf=str(directory)),
    )


def data_of(directory: Path) -> Data:
    """Settings of data that the tokenizer in ``directory`` made, if it has one that is read here."""
    path = directory / "tokenizer.json"
    return Data(tokenizer=str(path), eos=eos_of(directory)) if path.is_file() else Data()


def described(cfg: Config) -> str:
    """Where the weights of a run come from, and what is done with them, in a line."""
    r, names = cfg.recipe, read_json(Path(cfg.init.from_hf)).get("architectures") or ["?"]
    how = f"lr {cfg.optim.lr:g}, {cfg.run.steps:,} steps of {r.batch_size:,} x {r.sequence_length:,} tokens"
    return f"weights of {cfg.init.from_hf}: {names[0]}; {how}"


def check_model(cfg: Config) -> None:
    """ValueError, with all that differs, unless the config's model is that of the directory that its weights come from."""
    folder = Path(cfg.init.from_hf)
    if differ := differences(model_of(read_json(folder), str(folder / CONFIG)), cfg.model):
        raise ValueError(f"--init.from-hf {folder} holds another model: {', '.join(differ)}")
