"""Random numbers for transforms: a function of (seed, step, parameter, entry) and of nothing else.

In operations of torch, where `olmo_fn.spec` draws initial weights with NumPy, so that they follow steps and seeds that are
tensors. So a run that goes on has the bits of one that never stopped, every layout has the numbers of one process, and steps
batched by ``vmap`` have each their own.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four words of 32 bits for every counter of four, all in int64.

    >>> zero = torch.tensor(0)
    >>> [f"{int(word):08x}" for word in philox((zero, zero, zero, zero), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    for i in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # modulo 2^64, of which the two halves are wanted
        k, m = ((word + i * step) & MASK for word, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        a, b, c, d = (second >> 32 & MASK) ^ b ^ k, second & MASK, (first >> 32 & MASK) ^ d ^ m, first & MASK
    return a, b, c, d


def of_entries(rows: Tensor, columns: Tensor, width: int, key: tuple[int, int]) -> Tensor:
    """A word of 32 bits, in int64, for each channel of tokens in ``columns`` (R,) of sequences ``rows`` (B,): (B, R, width).

    A function of the numbers of a token in the run, and so the same in every layout, and when a step is computed again.

    >>> of_entries(torch.tensor([7]), torch.tensor([0, 1]), 3, (0, 0)).shape
    torch.Size([1, 2, 3])
    """
    channels = torch.arange(-(-width // 4), device=rows.device)  # a counter gives four words
    high, low = (rows >> 32 & MASK)[:, None, None], (rows & MASK)[:, None, None]
    return torch.stack(philox((channels, columns[:, None], low, high), key), -1).flatten(-2)[..., :width]


def normal(seed: int | Tensor, step: Tensor, path: str, entries: Tensor) -> Tensor:
    """A standard normal number, fp32, for each of the ``entries``, by their numbers in the whole parameter at ``path``.

    In a transform of gradients ``step`` is ``execution.step``, and ``execution.layout.placement.entries(path, g)`` says which
    entries this rank has of it. ``seed`` is from 0 to 2^32; a tensor where ``vmap`` runs several seeds at once.
    """
    key = hashlib.blake2b(path.encode(), digest_size=8).digest()
    counter = (entries & MASK, entries >> 32, step + torch.zeros_like(entries), seed + torch.zeros_like(entries))
    a, b, *_ = philox(counter, (int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")))
    radius, angle = ((word.double() + 0.5) * 2.0**-32 for word in (a, b))  # inside (0, 1)
    return ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).float()  # rounded alike however it was vectorized
