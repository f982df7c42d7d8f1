"""The presets: one whole run a name. ``python train.py NAME --optim.lr 6e-3`` changes any field of one.

Learning rates, batches and lengths are those of the OLMo 2 and OLMo 3 reports where they name them (1b, 7b, 13b, 32b), and
in between for the sizes that OLMo-core has for experiments. Imports no torch, so that ``--help`` is quick.
"""

from __future__ import annotations

from olmo_fn.models.config import OLMO2, OLMO3, Model, dense
from olmo_fn.train.config import Config, Optim, Recipe, Run, Schedule

TINY = Config(
    model=dense(d_model=192, n_layers=4, n_heads=3, hidden_size=512, vocab_size=4096, init_method="llama"),
    optim=Optim(lr=3e-2),
    schedule=Schedule("linear", warmup=30, final=0.02),
    recipe=Recipe(batch_size=4, sequence_length=256, z_loss=1e-5),
    run=Run(steps=1000, checkpoint_every=250, log_every=50),
)
"""Learns Python from the standard library's sources in a few minutes on two cores."""


def _learning_rate(name: str) -> float:
    size = name.split("-")[1]
    known = {"1b": 4e-4, "7b": 3e-4, "13b": 9e-4, "32b": 6e-4, "3b": 4e-4}
    return known.get(size, 4e-4 if size == "760m" else 1e-3)


def _pretrain(name: str, model: Model) -> Config:
    large = model.d_model >= 4096
    return Config(
        model=model,
        optim=Optim(lr=_learning_rate(name)),
        schedule=Schedule("cosine", warmup=2000, final=0.1),
        recipe=Recipe(batch_size=1024 if large else 512, sequence_length=8192 if "olmo3" in name else 4096),
        run=Run(steps=100_000, checkpoint_every=1000, keep_last=3, keep_every=10_000),
    )


CONFIGS: dict[str, Config] = {
    "olmo2-tiny": TINY,
    **{name: _pretrain(name, model) for name, model in {**OLMO2, **OLMO3}.items()},
}
