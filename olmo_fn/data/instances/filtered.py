"""Instances that repeat themselves are kept out of the loss: OLMo-core's instance filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from olmo_fn.data.instances import Instances, Origin
from olmo_fn.fields import AT_LEAST_ONE, Range


@dataclass(frozen=True)
class RepetitionFilter:
    """Which instances repeat themselves too often. OLMo trains with a count of 32."""

    max_count: Annotated[int, Range()] = 0
    """An instance in which a few tokens come so often in a row is not in the loss. 0: no filter."""
    max_period: Annotated[int, AT_LEAST_ONE] = 13
    """The most tokens that are looked at as one that repeats."""
    min_period: Annotated[int, AT_LEAST_ONE] = 1
    """The fewest."""

    def repeats(self, input_ids: np.ndarray) -> np.ndarray:
        """Whether each row of ids (B, T) has tokens that come ``max_count`` times in a row: (B,) bool.

        >>> RepetitionFilter(max_count=3).repeats(np.array([[1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1, 3]])).tolist()
        [True, False]
        """
        found = np.zeros(len(input_ids), np.bool_)
        for period in range(self.min_period, min(self.max_period, input_ids.shape[1] // 3) + 1):
            again = np.cumsum(input_ids[:, period:] == input_ids[:, :-period], axis=1, dtype=np.int32)
            run = (self.max_count - 1) * period  # tokens in a row that each are what came a period before
            if run < again.shape[1] + 1:
                before = np.pad(again, ((0, 0), (1, 0)))
                found |= (before[:, run:] - before[:, : before.shape[1] - run] == run).any(axis=1)
        return found


@dataclass(frozen=True)
class Filtered:
    """``instances`` of which those that repeat themselves have a label mask that is false throughout."""

    instances: Instances
    filter: RepetitionFilter

    def __len__(self) -> int:
        return len(self.instances)

    def origin(self, number: int) -> Origin:
        """Where instance ``number`` comes from."""
        return self.instances.origin(number)

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the instances ``numbers`` (B,), always with ``label_mask`` (B, T) bool."""
        arrays = self.instances.read(numbers)
        mask = arrays.get("label_mask", np.ones_like(arrays["input_ids"], np.bool_))
        return arrays | {"label_mask": mask & ~self.filter.repeats(arrays["input_ids"])[:, None]}
