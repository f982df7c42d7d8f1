"""What a parameter is before it exists: shape, logical axes, initialisation; and how a tree of such specs becomes tensors.

Initial values are counter-based: leaf = f(seed, path). They depend on nothing else, so any rank, mesh or order of
creation gives the same model, and a slice of a leaf can be made without the rest of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.tree import Tree

TRUNCATION = 3.0  # OLMo-core cuts its normals at three standard deviations
BLOCK = 1 << 22  # numbers that are drawn at once


class Box(NamedTuple):
    """A part of a tensor: where it begins in each dim, and its shape.

    >>> Box((1, 0), (2, 3)).slices
    (slice(1, 3, None), slice(0, 3, None))
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box of all of a tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that takes this part out of the tensor."""
        return tuple(slice(start, start + length) for start, length in zip(*self, strict=True))

    def entries(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The number of each of its entries in a tensor of ``shape``, row after row.

        >>> Box((1, 0), (1, 3)).entries((2, 3))
        tensor([[3, 4, 5]])
        """
        found = torch.zeros((), dtype=torch.int64, device=device)
        for start, length, size in zip(*self, shape, strict=True):
            found = found[..., None] * size + torch.arange(start, start + length, device=device)
        return found


class Init(NamedTuple):
    """How to fill a parameter: ``trunc_normal`` is cut at ±3 std (not rescaled, as in OLMo-core), ``constant`` is ``value``.

    ``log_uniform``: logarithms of numbers that are uniform between ``low`` and ``high``. ``step_size``: numbers whose softplus
    lies between these, its logarithm uniform (Gu & Dao 2023, arXiv 2312.00752, section 3.6).
    """

    kind: Literal["trunc_normal", "normal", "ones", "zeros", "constant", "log_uniform", "step_size"]
    std: float = 0.0
    value: float = 0.0
    low: float = 0.0
    high: float = 1.0


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
    if not isinstance(specs, dict) or not all(isinstance(spec, Spec) for _, spec in tree.items(specs)):
        raise ValueError("init makes parameters of a tree of Spec, such as init(transformer.specs(model), seed=0)")
    return tree.map_with_path(lambda path, spec: init_leaf(spec, seed, path).to(device=device, dtype=dtype), specs)


def init_leaf(spec: Spec, seed: int, path: str, box: Box | None = None) -> Tensor:
    """One fp32 leaf, or only the part of it in ``box``, which equals the same part of the whole leaf; memory beyond the
    result is bounded.
    """
    box = box or Box.whole(spec.shape)
    offset, shape = box
    constants = {"ones": 1.0, "zeros": 0.0, "constant": spec.init.value}
    if spec.init.kind in constants:
        return torch.full(shape, constants[spec.init.kind])
    row = math.prod(spec.shape[1:])
    columns = box.slices[1:]
    out, many = torch.empty(shape), max(1, BLOCK // row)
    tail = 0.5 * math.erfc(TRUNCATION / math.sqrt(2)) if spec.init.kind == "trunc_normal" else 0.0
    for first in range(0, shape[0] if out.numel() else 0, many):
        rows = min(many, shape[0] - first)
        start = (offset[0] + first) * row
        p = _uniform(seed, path, start, start + rows * row)
        drawn = _of_uniform(spec.init, p.mul_(1 - 2 * tail).add_(tail))
        out[first : first + rows] = drawn.view(rows, *spec.shape[1:])[(slice(None), *columns)]
    return out


def _of_uniform(init: Init, p: Tensor) -> Tensor:
    """Numbers of that kind, out of uniform ones in the open interval (0, 1)."""
    if init.kind == "log_uniform":
        return p.mul_(init.high - init.low).add_(init.low).log_()
    if init.kind == "step_size":
        low, high = math.log(init.low), math.log(init.high)
        return p.mul_(high - low).add_(low).exp_().expm1_().log_()  # the inverse of softplus is log(exp(x) - 1)
    return torch.erfinv(p.mul_(2).sub_(1)).mul_(init.std * math.sqrt(2))


def _uniform(seed: int, path: str, start: int, stop: int) -> Tensor:
    """Numbers ``start..stop`` of the stream of ``(seed, path)``, in the open interval (0, 1), 23 bits each.

    Philox makes four 64-bit words a counter, which are eight numbers here, so any place is reached without drawing
    what is before it. 23 bits and a half are exact in fp32: no number rounds to 0 or 1.
    """
    digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, np.uint64))
    generator.advance(start // 8)
    skip = start % 8
    words = generator.random_raw((skip + stop - start + 7) // 8 * 4).view(np.uint32)[skip : skip + stop - start]
    return torch.from_numpy((words >> 9).astype(np.int32)).float().add_(0.5).mul_(2.0**-23)
