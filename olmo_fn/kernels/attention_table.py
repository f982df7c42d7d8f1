"""The backends of attention, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias

from torch import Tensor

from olmo_fn.kernels import Kernel, identity
from olmo_fn.kernels.attention_backend import HALF, AttentionBackend, Need, Pullback, need_of
from olmo_fn.kernels.attention_cpu import WHOLE
from olmo_fn.kernels.attention_cudnn import CUDNN
from olmo_fn.kernels.attention_flash import FLASH, FLASH_3
from olmo_fn.kernels.attention_flex import FLEX
from olmo_fn.kernels.attention_package import PACKAGE
from olmo_fn.kernels.packing import Packing
from olmo_fn.kernels.tiles import TILES

BACKENDS = (WHOLE, FLASH_3, CUDNN, FLASH, PACKAGE, FLEX, TILES)
"""The fastest first: on an H100, from 650 TFLOP/s forward (FlashAttention 3) to 370 (2), by their authors' figures. Two are
called flash-attn, as two versions of that package are. Tiles can do everything."""


Choose: TypeAlias = Callable[[Need], AttentionBackend]
"""Which backend does what is needed; ValueError if none of those allowed can."""


@lru_cache(256)
def choose(setting: str, need: Need) -> AttentionBackend:
    """The backend of that name, or for ``auto`` the fastest one that can do what is needed.

    ValueError if the one of that name cannot, with what it lacks and those that can.

    >>> import torch
    >>> choose("auto", Need("cpu", torch.bfloat16, 64)).name
    'tiles'
    >>> choose("auto", Need("cuda", torch.bfloat16, 128, window=True, capability=(9, 0))).name
    'flash'
    >>> choose("cudnn", Need("cuda", torch.bfloat16, 128, window=True, capability=(9, 0)))
    Traceback (most recent call last):
    ValueError: --recipe.attention cudnn has no windows; choose flash, flex, tiles, or auto
    """
    able = [backend for backend in BACKENDS if not backend.lacks(need)]
    if setting == "auto":
        # What computes in other dtypes on a GPU is compared with something: there tiles come before what is compiled.
        return TILES if need.dtype not in HALF and WHOLE not in able else able[0]
    named = [backend for backend in BACKENDS if backend.name == setting]
    for backend in named:
        if backend in able:
            return backend
    others = dict.fromkeys(backend.name for backend in able if backend is not WHOLE)
    raise ValueError(f"--recipe.attention {setting} {named[-1].lacks(need)}; choose {', '.join(others)}, or auto")


choose_auto: Choose = partial(choose, "auto")


def attend_vjp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    offset: int = 0,
    kernel: Kernel = identity,
    sinks: Tensor | None = None,
    cap: float | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Pullback]:
    """`olmo_fn.kernels.attention.attend` with its pullback, which takes the result and its cotangent to those of ``q``, ``k``,
    ``v``, and ``sinks`` if given: by the backend that `choose` takes. ``kernel`` compiles what tiles have between products;
    ``packing``: the documents once more, for kernels that take lengths.

    Only each row's log-sum-exp is kept beside these, and the weights are computed again (Dao et al. 2022, FlashAttention,
    algorithms 1 and 4). On a CPU the work follows the lengths of the documents, and of the window:
    `olmo_fn.kernels.attention_sight.Sight`.

    >>> import torch
    >>> v = torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
    >>> out, pullback = attend_vjp(torch.zeros_like(v), torch.zeros_like(v), v)
    >>> out.flatten(), pullback(out, torch.ones_like(v))[2].flatten()
    (tensor([2., 3.]), tensor([1.5000, 0.5000]))
    """
    seen: dict[str, Any] = {"window": window, "documents": documents, "offset": offset, "cap": cap}
    return choose_auto(need_of(q, k, **seen))(q, k, v, kernel=kernel, sinks=sinks, packing=packing, **seen)
