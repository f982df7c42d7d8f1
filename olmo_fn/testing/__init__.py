"""Tools to check a transform, a layout or a collective on a laptop: real processes that talk over gloo, and a GPU that is not
there, on which a step is traced.
"""

from olmo_fn.testing.equivalence import Layout, assert_equivalent
from olmo_fn.testing.fake_cuda import FakeCuda, FakeCudaFailed
from olmo_fn.testing.pool import Pool, RankFailed
from olmo_fn.testing.trace import DeviceMismatch, Seen, Trace
from olmo_fn.testing.traffic import Live, Moved, Traffic, Wait, Waits

__all__ = [
    "DeviceMismatch",
    "FakeCuda",
    "FakeCudaFailed",
    "Layout",
    "Live",
    "Moved",
    "Pool",
    "RankFailed",
    "Seen",
    "Trace",
    "Traffic",
    "Wait",
    "Waits",
    "assert_equivalent",
]
