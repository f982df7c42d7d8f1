"""Checkpoints: safetensors plus JSON, committed by one rename, checksummed, saved in the background.

``save`` and ``load`` are the whole of it; ``Saver`` does it while training goes on, ``load_newest`` finds the checkpoint to go
on from.
"""

from olmo_fn.checkpoint.background import Retention, Saver, retire, to_delete
from olmo_fn.checkpoint.commit import step_path, steps, sweep
from olmo_fn.checkpoint.format import Index
from olmo_fn.checkpoint.ranks import RankLost, Ranks
from olmo_fn.checkpoint.reading import load, load_newest, newest_whole, stream
from olmo_fn.checkpoint.schema import BrokenCheckpoint
from olmo_fn.checkpoint.shards import Deferred, local_box
from olmo_fn.checkpoint.stored import read_index, verify
from olmo_fn.checkpoint.writing import SaveFailed, save

__all__ = [
    "BrokenCheckpoint", "Deferred", "Index", "RankLost", "Ranks", "Retention", "SaveFailed", "Saver", "load", "load_newest",
    "local_box", "newest_whole", "read_index", "retire", "save", "step_path", "steps", "stream", "sweep", "to_delete", "verify",
]  # fmt: skip
