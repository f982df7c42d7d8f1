"""Which training instances make up a batch: a pure function of how many came before it, in OLMo-core's order.

Epoch e = 1, 2, ... visits the instances in the order of ``PCG64(seed + e)``, cut to whole batches. There is
nothing to save and nothing to restore: a resumed run asks for its next step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


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


def shuffled(first: int, count: int, num_instances: int, batch_size: int, seed: int) -> np.ndarray:
    """The ``count`` instances that come after ``first`` others, over all epochs: (count,) uint32.

    An epoch is cut to whole batches of ``batch_size``.

    >>> shuffled(0, 4, 89, 4, seed=0).tolist(), shuffled(86, 4, 89, 4, seed=0).tolist()
    ([63, 60, 34, 14], [82, 77, 14, 25])
    """
    epoch_size = num_instances // batch_size * batch_size
    parts, last = [np.zeros(0, np.uint32)], first + count
    while first < last:
        epoch, start = divmod(first, epoch_size)
        stop = min(epoch_size, start + last - first)
        parts.append(permutation(num_instances, seed, epoch + 1)[start:stop])
        first += stop - start
    return np.concatenate(parts)
