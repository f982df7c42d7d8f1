"""Tools to check a transform, a layout or a collective on a laptop: real processes that talk over gloo."""

from olmo_fn.testing.equivalence import Layout, assert_equivalent
from olmo_fn.testing.pool import Pool, RankFailed

__all__ = ["Layout", "Pool", "RankFailed", "assert_equivalent"]
