"""One token from logits: a pure function of the logits and of a uniform number for each row."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, rows: Iterable[int], positions: Iterable[int]) -> Tensor:
    """A number in (0, 1) for each row, fp64 on the CPU, that depends on ``(seed, row, position)`` alone.

    So a text depends neither on the other rows of its batch nor on where its generation was interrupted.

    >>> uniforms(0, [0, 1], [5, 5])
    tensor([0.9753, 0.8836], dtype=torch.float64)
    """
    numbers = []
    for row, position in zip(rows, positions, strict=True):
        digest = blake2b(f"{seed}/{row}/{position}".encode(), digest_size=8).digest()
        numbers.append(((int.from_bytes(digest, "little") >> 12) + 0.5) * 2.0**-52)
    return torch.tensor(numbers, dtype=torch.float64)


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits`` (B, V), those of tokens that were ``seen`` (B, V) made smaller: x / penalty where x > 0, else x · penalty.

    (Keskar et al. 2019, CTRL, section 4.1, where all are divided; transformers' form multiplies the negative ones.)

    >>> penalized(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]]), 2.0)
    tensor([[ 1., -4.,  2.]])
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The distribution (B, V), fp64, that a token is drawn from: softmax(logits / temperature), and of that `keep_top_k`,
    then `keep_top_p`, then `keep_min_p`. Temperature 0 is the likeliest token alone.

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> probabilities(logits, top_p=0.6)
    tensor([[0.6250, 0.3750, 0.0000]], dtype=torch.float64)
    """
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    scaled = logits.double()
    p = ((scaled - scaled.amax(1, keepdim=True)) / temperature).softmax(1)
    if 0 < top_k < p.shape[1]:
        p = keep_top_k(p, top_k)
    if top_p < 1:
        p = keep_top_p(p, top_p)
    return keep_min_p(p, min_p) if min_p else p


def keep_top_k(p: Tensor, k: int) -> Tensor:
    """The ``k`` likeliest tokens of ``p`` (B, V), renormalised; of equally likely ones those with lower ids come first.

    >>> keep_top_k(torch.tensor([[0.2, 0.4, 0.2, 0.2]]), 2)
    tensor([[0.3333, 0.6667, 0.0000, 0.0000]])
    """
    return _likeliest(p, p.topk(k, 1).values)


def keep_top_p(p: Tensor, mass: float) -> Tensor:
    """The fewest likeliest tokens of ``p`` (B, V) whose probabilities reach ``mass``, at least one, renormalised (nucleus
    sampling, Holtzman et al. 2019); of equally likely ones those with lower ids come first.
    """
    ranked = _descending(p)
    total = ranked.cumsum(1)
    ranked[:, 1:].masked_fill_(total[:, :-1] >= mass * total[:, -1:], 0.0)
    return _likeliest(p, ranked)


def keep_min_p(p: Tensor, ratio: float) -> Tensor:
    """The tokens of ``p`` (B, V) with p ≥ ratio · max p, renormalised (Nguyen et al. 2024, min-p).

    >>> keep_min_p(torch.tensor([[0.6, 0.3, 0.1]]), 0.5)
    tensor([[0.6667, 0.3333, 0.0000]])
    """
    p = p.where(p >= ratio * p.amax(1, keepdim=True), 0.0)
    return p / p.sum(1, keepdim=True)


def _likeliest(p: Tensor, ranked: Tensor) -> Tensor:
    """The tokens with the probabilities ``ranked`` (B, R), largest first, of which zeros do not count; renormalised."""
    count = (ranked > 0).sum(1, keepdim=True)
    least = ranked.gather(1, count - 1)
    above, tied = p > least, p == least
    tied &= tied.cumsum(1) <= count - above.sum(1, keepdim=True)
    p = p.where(above | tied, 0.0)
    return p / p.sum(1, keepdim=True)


def _descending(p: Tensor) -> Tensor:
    """Each row's values, largest first. NumPy sorts values alone: 10 to 20 times as fast as torch with indices."""
    if p.device.type == "cpu":
        return torch.from_numpy(np.sort(p.numpy(), axis=1)).flip(1)
    return p.sort(dim=1, descending=True).values


def choose(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Ids (B,) int64 from logits (B, V): where the cumulative probability first exceeds ``uniform`` (B,).

    Probabilities accumulate in the order of the ids, not of likelihood, so that a rounding error that swaps
    two nearly equal logits hardly ever changes a choice.

    >>> choose(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0.7]))
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(1)
    cumulative = probabilities(logits, temperature, top_k, top_p, min_p).cumsum(1)
    # A number below 1 times the total is below the total, so no token of probability 0 is ever chosen.
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
