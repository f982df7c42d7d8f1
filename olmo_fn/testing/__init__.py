"""Tools to check a transform, a layout or a collective on a laptop: real processes that talk over gloo."""

from olmo_fn.testing.equivalence import Layout, assert_equivalent
from olmo_fn.testing.pool import Pool, RankFailed
from olmo_fn.testing.traffic import Live, Moved, Traffic, Wait, Waits

__all__ = ["Layout", "Live", "Moved", "Pool", "RankFailed", "Traffic", "Wait", "Waits", "assert_equivalent"]
