"""Can the backend of attention that was asked for do what this run needs? Answered before anything runs."""

from __future__ import annotations

from dataclasses import replace

import torch

from olmo_fn.models.config import Attention, GatedDelta
from olmo_fn.train.config import Config


def attention_of(cfg: Config, device: torch.device) -> Config:
    """The config as a device reads it: a backend that was chosen for a GPU says nothing of a CPU that reads its run."""
    if device.type == "cuda" or cfg.recipe.attention == "tiles":
        return cfg
    return replace(cfg, recipe=replace(cfg.recipe, attention="auto"))


def check_attention(cfg: Config, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError, with those that can, if a layer needs what the backend ``--recipe.attention`` lacks; ``auto`` lacks nothing.

    >>> from olmo_fn.models.config import dense
    >>> from olmo_fn.train.config import Recipe
    >>> cfg = Config(dense(64, 2, 4, 96), recipe=Recipe(attention="flash"))
    >>> check_attention(cfg, torch.device("cpu"), torch.bfloat16)
    Traceback (most recent call last):
    ValueError: --recipe.attention flash needs a GPU; choose tiles, or auto
    """
    name, r, mesh = cfg.recipe.attention, cfg.recipe, cfg.mesh
    for block in cfg.model.layers:
        if isinstance(block.mixer, GatedDelta):  # what computes its rule is a setting of its own
            block.mixer.check_rule(device, mesh.cp, once=r.engine != "func")
    if name == "auto":
        return
    if r.engine == "func":
        raise ValueError(f"--recipe.engine func attends by plain operations, and not by {name}; leave out one of both")
    for i, block in enumerate(cfg.model.layers):
        if isinstance(block.mixer, Attention):
            need = device, dtype, r.sequence_length, cfg.data.mask_documents, mesh.cp, mesh.cp_method
            block.mixer.check_backend(name, cfg.model, i, *need)
