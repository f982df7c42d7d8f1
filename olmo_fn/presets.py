"""The presets: one whole run a name. ``olmo-fn train NAME --optim.lr 6e-3`` changes any field of one.

Learning rates, batches and lengths are those of the OLMo 2 and OLMo 3 reports where they name them (1b, 7b, 13b, 32b), and
in between for the sizes that OLMo-core has for experiments. Imports no torch, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from olmo_fn.models.config import Model, dense
from olmo_fn.models.families import (
    GEMMA3,
    LLAMA2,
    LLAMA3,
    NGPT,
    OLMO2,
    OLMO3,
    OLMO3_LONG,
    QWEN3,
    SMOLLM2,
)
from olmo_fn.models.families_hybrid import OLMO_HYBRID, OLMO_HYBRID_LONG, QWEN3_5, QWEN3_NEXT, olmo_hybrid
from olmo_fn.models.families_moe import MIXTRAL, OLMO3MOE, OLMOE, QWEN3MOE, SMALLMOE
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.loss import CrossEntropy
from olmo_fn.train.optimizers import AdamW, Muon
from olmo_fn.train.schedules import Cosine, Linear

TINY = Config(
    model=dense(d_model=192, n_layers=4, n_heads=3, hidden_size=512, vocab_size=4096, init_method="llama"),
    optim=Muon(lr=0.04),
    schedule=Linear(warmup=30, final=0.02),
    recipe=Recipe(batch_size=4, sequence_length=512),
    run=Run(steps=1000, checkpoint_every=250, log_every=50),
)
"""Learns Python from the standard library's sources in a few minutes on two cores."""

TINY_EXPERTS = replace(TINY, model=OLMOE["olmoe-tiny"])
"""The same with experts in the place of each feed-forward network, of which a token meets as many numbers."""

HYBRID_TINY = replace(TINY, model=olmo_hybrid(192, 4, 3, 512, vocab_size=4096, init_method="llama"))
"""The same with a state in three of its four blocks."""

LEARNING_RATES = {"760m": 4e-4, "1b": 4e-4, "1b-18l": 4e-4, "3b": 4e-4, "7b": 3e-4, "13b": 9e-4, "32b": 6e-4}
"""Of OLMo's larger sizes, as its reports have them."""


def rate(model: Model, size: str) -> float:
    """The peak rate of a model: OLMo's of this ``size``, or else one that falls with the width."""
    widths = {1536: 1e-3, 3072: 4e-4, 8192: 3e-4}
    return LEARNING_RATES.get(size) or next((lr for width, lr in widths.items() if model.d_model < width), 2e-4)


STREAM = 1 << 24
"""Entries of the residual stream that a process computes at once: so that 7b and 13b fit on eight devices of 80 GB."""


def pretraining(models: Mapping[str, Model], family: str, sequence_length: int) -> dict[str, Config]:
    """A pretraining run for each size of a family, whose models are named ``<family>-<size>``."""
    return {
        name: Config(
            model=model,
            optim=AdamW(lr=rate(model, name.removeprefix(f"{family}-") if family.startswith("olmo") else "")),
            schedule=Cosine(),
            recipe=Recipe(
                batch_size=1024 if model.d_model >= 4096 else 512,
                sequence_length=sequence_length,
                micro_batch=max(1, STREAM // (model.d_model * sequence_length)),
                normalize=model.init_method == "normalized",
            ),
            run=Run(steps=100_000, checkpoint_every=1000, keep_last=3, keep_every=10_000),
        )
        for name, model in models.items()
    }


LADDER = {"olmo3moe-275m": (2e-3, 15_365), "olmo3moe-480m": (1.2e-3, 29_022), "olmo3moe-810m": (6e-4, 52_648)}
LADDER["olmo3moe-1.2b"] = (4e-4, 81_190)
"""Rates and steps of AI2's runs of its ladder, with batches of 32 sequences."""


def ladder(model: Model, lr: float, steps: int) -> Config:
    """A run of the ladder: about 20 tokens for each parameter that is no embedding and that a token meets."""
    return Config(
        model=model,
        loss=CrossEntropy(z_loss=1e-5),
        optim=AdamW(lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=Cosine(warmup=0.1, final=0.1),
        recipe=Recipe(batch_size=32, sequence_length=8192, micro_batch=4, clip=1.0, skip_sigma=12.0),
        run=Run(steps=steps, checkpoint_every=1000, keep_last=3, keep_every=10_000),
    )


CONFIGS: dict[str, Config] = {
    "olmo2-tiny": TINY,
    "olmoe-tiny": TINY_EXPERTS,
    **pretraining(OLMO2, "olmo2", 4096),
    **pretraining(OLMO3, "olmo3", 8192),
    **pretraining(OLMO3_LONG, "olmo3", 65_536),
    **pretraining(LLAMA2, "llama2", 4096),
    **pretraining(LLAMA3, "llama3", 8192),
    **pretraining(QWEN3, "qwen3", 4096),
    **pretraining(GEMMA3, "gemma3", 8192),
    **pretraining(NGPT, "ngpt", 4096),
    **pretraining(SMOLLM2, "smollm2", 2048),
    **pretraining({name: model for name, model in OLMOE.items() if name != "olmoe-tiny"}, "olmoe", 4096),
    **pretraining(SMALLMOE, "smallmoe", 4096),
    **{name: ladder(OLMO3MOE[name], *facts) for name, facts in LADDER.items()},
    **pretraining(QWEN3MOE, "qwen3moe", 4096),
    **pretraining(MIXTRAL, "mixtral", 4096),
    "olmo-hybrid-tiny": HYBRID_TINY,
    **pretraining(OLMO_HYBRID, "olmo-hybrid", 8192),
    **pretraining(OLMO_HYBRID_LONG, "olmo-hybrid", 65_536),
    **pretraining(QWEN3_5, "qwen3.5", 8192),
    **pretraining(QWEN3_NEXT, "qwen3next", 8192),
}
