"""Checkpoints: safetensors plus JSON, committed by one rename, checksummed, saved in the background.

``save`` and ``load`` are the whole of it; ``Saver`` does it while training goes on, ``load_newest`` finds
where to go on.
"""

from olmo_fn.checkpoint.folder import step_path, steps, sweep
from olmo_fn.checkpoint.index import BrokenCheckpoint, Index
from olmo_fn.checkpoint.ranks import RankLost, Ranks
from olmo_fn.checkpoint.reading import load
from olmo_fn.checkpoint.resume import load_newest, newest_whole
from olmo_fn.checkpoint.retention import Retention, to_delete
from olmo_fn.checkpoint.saver import Saver, retire
from olmo_fn.checkpoint.shards import box_of
from olmo_fn.checkpoint.stored import read_index
from olmo_fn.checkpoint.verifying import verify
from olmo_fn.checkpoint.writing import SaveFailed, save

__all__ = [
    "BrokenCheckpoint",
    "Index",
    "RankLost",
    "Ranks",
    "Retention",
    "SaveFailed",
    "Saver",
    "box_of",
    "load",
    "load_newest",
    "newest_whole",
    "read_index",
    "retire",
    "save",
    "step_path",
    "steps",
    "sweep",
    "to_delete",
    "verify",
]
