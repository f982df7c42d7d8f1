"""What a parameter is before it exists: shape, logical axes, initialisation; and how a tree of such specs becomes tensors.

Initial values are counter-based: leaf = f(seed, path). They depend on nothing else, so any rank, mesh or order of
creation gives the same model, and a slice of a leaf can be made without the rest of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.tree import Tree

TRUNCATION = 3.0  # OLMo-core cuts its normals at three standard deviations


class Init(NamedTuple):
    """How to fill a parameter: ``trunc_normal`` is cut at ±3 std (and not rescaled, as in OLMo-core)."""

    kind: Literal["trunc_normal", "normal", "ones", "zeros"]
    std: float = 0.0


class Spec(NamedTuple):
    """One parameter, declared beside the function that uses it.

    ``axes`` names each dim (``("embed", "heads")``). Sharding rules, weight-decay masks and the matrix dims of an
    optimizer all read this one declaration.

    >>> Spec((4, 8), ("embed", "mlp"), Init("trunc_normal", 0.02)).size
    32
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def count(specs: Tree) -> int:
    """Number of entries of all parameters; allocates nothing.

    >>> count({"a": Spec((4, 8), ("embed", "mlp"), Init("ones"))})
    32
    """
    return sum(spec.size for _, spec in tree.items(specs))


def abstract(specs: Tree, dtype: torch.dtype = torch.float32) -> Tree:
    """The tree as meta tensors: shapes and dtypes without memory."""
    return tree.map(lambda spec: torch.empty(spec.shape, dtype=dtype, device="meta"), specs)


def init(specs: Tree, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tree:
    """Parameters for ``specs``; each leaf depends on ``(seed, path)`` alone.

    >>> specs = {"w": Spec((2, 3), ("embed", "mlp"), Init("normal", 1.0))}
    >>> torch.equal(init(specs, 0)["w"], init(specs, 0)["w"])
    True
    """
    return tree.map_with_path(lambda path, spec: init_leaf(spec, seed, path).to(device=device, dtype=dtype), specs)


def init_leaf(spec: Spec, seed: int, path: str, rows: tuple[int, int] | None = None) -> Tensor:
    """One fp32 leaf, or only its rows ``[start, stop)`` of dim 0, which equal the same rows of the whole leaf."""
    start, stop = rows if rows is not None else (0, spec.shape[0])
    shape = (stop - start, *spec.shape[1:])
    if spec.init.kind in ("ones", "zeros"):
        return torch.full(shape, 1.0 if spec.init.kind == "ones" else 0.0)
    per_row = math.prod(spec.shape[1:])
    out = torch.empty(math.prod(shape))
    tail = 0.5 * math.erfc(TRUNCATION / math.sqrt(2)) if spec.init.kind == "trunc_normal" else 0.0
    done = 0
    for block in _uniform(seed, path, start * per_row, stop * per_row):
        p = block.mul_(1 - 2 * tail).add_(tail)
        torch.erfinv(p.mul_(2).sub_(1), out=out[done : done + len(p)])
        done += len(p)
    return out.mul_(spec.init.std * math.sqrt(2)).reshape(shape)


def _uniform(seed: int, path: str, start: int, stop: int, block: int = 1 << 22) -> Iterator[Tensor]:
    """Blocks of numbers ``start..stop`` of the stream of ``(seed, path)``, in the open interval (0, 1), 23 bits each.

    Philox makes four 64-bit words a counter, which are eight numbers here, so any place is reached without drawing
    what is before it. 23 bits and a half are exact in fp32: no number rounds to 0 or 1.
    """
    digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, np.uint64))
    generator.advance(start // 8)
    skip = start % 8  # only the first block begins inside a counter
    while start < stop:
        n = min(block - skip, stop - start)
        words = generator.random_raw((skip + n + 7) // 8 * 4).view(np.uint32)[skip : skip + n]
        yield torch.from_numpy((words >> 9).astype(np.int32)).float().add_(0.5).mul_(2.0**-23)
        start, skip = start + n, 0
