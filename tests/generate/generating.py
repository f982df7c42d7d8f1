"""What the tests of generation need: small models whose attention is far from uniform."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.models import transformer
from olmo_fn.models.config import Model
from olmo_fn.spec import init
from olmo_fn.tree import Tree


def random_params(cfg: Model, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tree:
    """Parameters with attention far from uniform, and gains that are not 1, nor biases 0."""
    params = init(transformer.specs(cfg), seed, dtype=dtype)
    noise = torch.Generator().manual_seed(seed)
    scale = {"*w_q": 3.0, "*w_k": 3.0}

    def shake(path: str, leaf: Tensor) -> Tensor:
        if leaf.ndim == 1:
            return (leaf if leaf.any() else leaf + 1) * (0.5 + torch.rand(leaf.shape, generator=noise, dtype=dtype))
        return leaf * next((s for pattern, s in scale.items() if tree.matches(path, [pattern])), 1.0)

    return tree.map_with_path(shake, params)


def full_logits(cfg: Model, params: Tree, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of the whole forward pass."""
    return transformer.logits(cfg, params, {"input_ids": ids})


def random_ids(cfg: Model, *shape: int, seed: int = 0) -> Tensor:
    """Ids of the model's vocabulary."""
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
