"""Your presets, for ``python train.py NAME``: those of the package, and below them your own.

CONFIGS["mine"] = replace(CONFIGS["olmo2-1b"], optim=Muon(lr=2e-3))
"""

from __future__ import annotations

from olmo_fn.presets import CONFIGS as PRESETS
from olmo_fn.train.config import Config

CONFIGS: dict[str, Config] = {**PRESETS}
