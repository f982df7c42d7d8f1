"""Which training instances make up the batch of a step: a pure function of the step, in OLMo-core's order.

Epoch e = 1, 2, ... visits the instances in the order of ``PCG64(seed + e)``, cut to whole batches. There is
nothing to save and nothing to restore: a resumed run asks for its next step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def batches_per_epoch(num_instances: int, batch_size: int) -> int:
    """Whole batches in one pass over the data.

    >>> batches_per_epoch(89, 4)
    22
    """
    return num_instances // batch_size


@lru_cache(maxsize=2)
def permutation(num_instances: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``epoch`` (from 1): (num_instances,) uint32, read-only. Four bytes of memory an instance.

    >>> permutation(1000, seed=0, epoch=1)[:4].tolist()
    [705, 649, 543, 927]
    """
    order = np.arange(num_instances, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
    order.flags.writeable = False
    return order


def indices(step: int, batch_size: int, num_instances: int, seed: int) -> np.ndarray:
    """The instances of the global batch of ``step`` (from 0): (batch_size,) uint32.

    >>> indices(0, 4, 89, seed=0).tolist(), indices(22, 4, 89, seed=0).tolist()
    ([63, 60, 34, 14], [14, 25, 61, 10])
    """
    epoch, batch = divmod(step, batches_per_epoch(num_instances, batch_size))
    start = batch * batch_size
    return permutation(num_instances, seed, epoch + 1)[start : start + batch_size]
