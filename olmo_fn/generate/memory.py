"""The cache of one text that grows, as a conversation does: what its next prompt shares with it is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from operator import eq

from olmo_fn.generate.decode import Cache, empty_cache, enlarged, rewound
from olmo_fn.models.config import Model
from olmo_fn.tree import Tree


class Memory:
    """What a model has read last: ``ids``, and the cache that holds their columns.

    `olmo_fn.generate.sample.sample` takes the cache, and puts it back when there is a token; what is interrupted between the
    two leaves nothing, and the next text is read from its beginning.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache: Cache | None = None

    def take(self, cfg: Model, params: Tree, prompt: Sequence[int], capacity: int) -> Cache:
        """A cache for ``capacity`` columns that holds as much of the beginning of ``prompt`` as is known, but its last id."""
        known = sum(1 for _ in takewhile(bool, map(eq, self.ids, prompt[:-1])))
        cache, self.cache = self.cache, None
        found = cache and rewound(cfg, cache, known)
        if found is None:
            return empty_cache(cfg, 1, capacity, dtype=params["embed"].dtype, device=params["embed"].device)
        return found if capacity <= found.capacity else enlarged(cfg, found, max(capacity, 2 * found.capacity))

    def put(self, ids: list[int], cache: Cache) -> None:
        """Remember ``ids``, which are the columns of ``cache``."""
        self.ids, self.cache = ids, cache
