"""Tools to check a transform, a layout or a collective on a laptop: real processes that talk over gloo."""

from olmo_fn.testing.pool import Pool, RankFailed

__all__ = ["Pool", "RankFailed"]
