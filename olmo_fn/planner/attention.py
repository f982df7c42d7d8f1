"""A layer's attention on a GPU: what computes it, and how many FLOPs that is for a rank."""

from __future__ import annotations

from olmo_fn import tree
from olmo_fn.kernels.attention_backend import AttentionBackend
from olmo_fn.kernels.attention_flash import FLASH, FLASH_3
from olmo_fn.kernels.attention_table import CUDNN
from olmo_fn.kernels.tiles import TILES
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models.transformer import layers
from olmo_fn.train.config import Config

BACKWARD = 2.5
"""Five products to forward's two: the scores are computed again (Dao et al. 2022, algorithm 4)."""


def rate_of(backend: AttentionBackend) -> str:
    """Whose rates in `olmo_fn.planner.accelerators.ATTENTION` it has."""
    return "flash3" if backend is FLASH_3 else "flash" if backend.name == "flash-attn" else backend.name


def on_meta(backend: AttentionBackend) -> AttentionBackend:
    """What stands for it on meta tensors: of operations that torch knows the shapes of."""
    return backend if backend in (CUDNN, FLASH) else FLASH if "flash" in backend.name else TILES


def flops(cfg: Config, mesh: Mesh, block: int, rows: int) -> int:
    """FLOPs of a rank for the scores and the values of ``rows`` sequences, forward: pairs that see each other.

    That is what `Sublayer.flops` counts beyond the matrices.
    """
    length, found = cfg.recipe.sequence_length, 0
    for sub in layers(cfg.model)[block].sublayers:
        if sub.flops(length) == length * sub.flops(1):
            continue  # it looks at each position by itself: what it multiplies are matrices
        matrices = sum(spec.size for _, spec in tree.items(sub.specs) if len(spec.shape) == 2)
        found += sub.flops(length) - 2 * length * matrices
    return rows * found // (mesh.cp * mesh.tp)
