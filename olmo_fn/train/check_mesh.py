"""Can this model be trained on this mesh? Answered before anything runs, in the words of the command line. Imports no torch."""

from __future__ import annotations

from typing import Protocol

from olmo_fn.mesh.mesh import Mesh, flag
from olmo_fn.models.config import Model


class Method(Protocol):
    """Rules, or the command line's mesh: what says how sequences are shared."""

    @property
    def cp_method(self) -> str:
        """gather, ulysses or ring."""


def check_layout(model: Model, mesh: Mesh, rules: Method, batch_size: int, sequence_length: int, accumulate: int = 1) -> None:
    """ValueError, with the flags, the arithmetic and a way out, if the ranks of ``mesh`` cannot share the work evenly.

    ``batch_size`` sequences a step, in ``accumulate`` parts, each of ``sequence_length`` tokens. What may be uneven is not
    refused: widths, vocabulary and feed-forward size need not be divisible by anything.

    >>> from olmo_fn.mesh.placement import DEFAULT
    >>> from olmo_fn.models.config import dense
    >>> check_layout(dense(64, 2, 4, 96, n_kv_heads=2), Mesh(tp=4), DEFAULT, batch_size=8, sequence_length=64)
    Traceback (most recent call last):
    ValueError: --mesh.tp 4 does not divide --model.n-kv-heads 2, and a head stays on one rank; choose --mesh.tp 1, 2
    """
    model.check_mesh(mesh.tp, mesh.cp, rules.cp_method, mesh.ep)
    _check_vocabulary(model, mesh)
    _check_tokens(mesh, batch_size, sequence_length, accumulate)


def _check_vocabulary(model: Model, mesh: Mesh) -> None:
    width = -(-model.vocab_size // mesh.tp)
    if width * (mesh.tp - 1) >= model.vocab_size:
        used = -(-model.vocab_size // width)
        raise ValueError(
            f"--model.vocab-size {model.vocab_size} over --mesh.tp {mesh.tp} is {width} rows a rank, which leaves none for the "
            f"last {mesh.tp - used}; choose --mesh.tp {used} or less, or a larger vocabulary"
        )


def _check_tokens(mesh: Mesh, batch_size: int, sequence_length: int, accumulate: int) -> None:
    data = mesh.dp_replicate * mesh.dp_shard
    if batch_size % (accumulate * data):
        factors = {"--recipe.accumulate": accumulate, flag("dp_replicate"): mesh.dp_replicate, flag("dp_shard"): mesh.dp_shard}
        raise ValueError(
            f"--recipe.batch-size {batch_size} is not a multiple of {_product(factors)}; "
            f"choose {_multiples(batch_size, accumulate * data)}"
        )
    length, fits = f"--recipe.sequence-length {sequence_length}", _multiples(sequence_length, _pieces(mesh))
    if sequence_length % (2 * mesh.cp if mesh.cp > 1 else 1):
        raise ValueError(
            f"{length} is not a multiple of 2 x {flag('cp')} {mesh.cp} = {2 * mesh.cp}, the pieces that are dealt to the "
            f"ranks; choose {fits}"
        )
    if sequence_length // mesh.cp % mesh.tp:
        product = _product({flag("cp"): mesh.cp, flag("tp"): mesh.tp})
        raise ValueError(
            f"{length} is not a multiple of {product}, the ranks that share a sequence between the blocks; choose {fits}"
        )


def _pieces(mesh: Mesh) -> int:
    """What a sequence's length has to be a multiple of: 2 cp and cp tp."""
    return mesh.cp * (mesh.tp if mesh.cp == 1 or mesh.tp % 2 == 0 else 2 * mesh.tp)


def _product(factors: dict[str, int]) -> str:
    """The factors above 1 and their product, in words."""
    large = {name: factor for name, factor in factors.items() if factor > 1}
    total = 1
    for factor in large.values():
        total *= factor
    words = " x ".join(f"{name} {factor}" for name, factor in large.items())
    return f"{words} = {total}" if len(large) > 1 else words


def _multiples(near: int, of: int) -> str:
    """The multiples of ``of`` around ``near``, in words."""
    below = near // of * of
    return f"{below} or {below + of}" if below else str(of)
