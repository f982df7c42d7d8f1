"""What computes a layer's attention on a GPU, and how many FLOPs that is for a rank."""

from __future__ import annotations

from olmo_fn import tree
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models.transformer import layers
from olmo_fn.train.config import Config


def backend(cfg: Config, mesh: Mesh, block: int) -> str:
    """``cudnn`` where every position sees all before it; ``flash2`` for windows, documents and parts of the keys; ``flex`` for
    sinks and capped scores.
    """
    mixer, length = cfg.model.layers[block].mixer, cfg.recipe.sequence_length
    window = min(sub.remembers or length for sub in layers(cfg.model)[block].sublayers)
    if getattr(mixer, "sinks", False) or getattr(mixer, "score_cap", None) is not None:
        return "flex"
    whole = window >= length and not cfg.data.mask_documents and (mesh.cp == 1 or cfg.mesh.cp_method == "ulysses")
    return "cudnn" if whole else "flash2"


def flops(cfg: Config, mesh: Mesh, block: int, rows: int) -> int:
    """FLOPs of a rank for the scores and the values of ``rows`` sequences, forward: pairs that see each other.

    That is what `Sublayer.flops` counts beyond the matrices.
    """
    length, found = cfg.recipe.sequence_length, 0
    for sub in layers(cfg.model)[block].sublayers:
        matrices = sum(spec.size for _, spec in tree.items(sub.specs) if len(spec.shape) == 2)
        found += sub.flops(length) - 2 * length * matrices
    return rows * found // (mesh.cp * mesh.tp)


BACKWARD = 2.5
"""Five products to forward's two: the scores are computed again (Dao et al. 2022, algorithm 4)."""
