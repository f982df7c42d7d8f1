"""What lies in the folder of an OLMo-core checkpoint: tensors, config.json, and the state of the trainer.

found = open_checkpoint(Path("runs/olmo2/step1000"))
found.tensors["model.embeddings.weight"].make()     # a tensor, read now
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn.checkpoint import Deferred
from olmo_fn.formats.dcp import read_metadata
from olmo_fn.formats.pickles import Refused
from olmo_fn.formats.tensors import StoredTensor, read_header
from olmo_fn.formats.torch_files import IN_TENSORS, Place, TorchFile, read_tensors

LARGEST_CONFIG = 16 << 20  # bytes
IN_TRAIN_STATE = frozenset(
    {
        *("numpy.ndarray", "numpy.dtype", "_codecs.encode", "builtins.set", "torch.Size", "pathlib.PosixPath"),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer", "pathlib._local.PosixPath"),
    }
)
"""What the trainer's state may name besides tensors; none of it is read."""


class TrainState(NamedTuple):
    """What is read of a trainer's state."""

    step: int
    max_steps: int | None
    tokens: int | None
    """Tokens that it has seen."""
    data: Mapping[str, Any]
    """What its data loader kept: seed, epoch, batches and tokens processed, and other numbers and texts."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of OLMo-core. Its tensors are called ``model.<name>`` and ``optim.state.<name>.<slot>``."""

    folder: Path
    tensors: Mapping[str, Deferred] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    state: TrainState | None = None
    paths: tuple[str, ...] = ()
    """The files of its data."""


def open_checkpoint(folder: Path, config: Path | None = None, with_state: bool = True) -> Checkpoint:
    """What there is in a folder, or in the newest ``step…`` in it; no tensor is read yet.

    ``config``: a config.json elsewhere. ValueError, in one line, for what is no checkpoint, or damaged, or hostile.
    """
    folder = _folder_of(folder)
    tensors = _tensors(folder)
    path = config or next((p for p in (folder / "config.json", folder.parent / "config.json") if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"there is no config.json in {folder} or above it, and only that says what the model is: OLMo-core's "
            "ConfigSaverCallback writes it, name one with --config"
        )
    state, listed = folder / "train" / "rank0.pt", folder / "data_paths.txt"
    found = read_train_state(state) if with_state and state.is_file() else None
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else []
    return Checkpoint(folder, tensors, read_config(path), found, tuple(filter(None, lines)))


def _folder_of(folder: Path) -> Path:
    """That of one step."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "is not there"
        raise ValueError(f"{folder} {what}; give the folder of a checkpoint of OLMo-core")
    if folder.name == "model_and_optim":
        return folder.parent
    inside = [path for path in folder.glob("step*") if path.name[4:].isdecimal() and (path / "model_and_optim").is_dir()]
    return max(inside, key=lambda path: int(path.name[4:]), default=folder)


def _tensors(folder: Path) -> dict[str, Deferred]:
    """The tensors of a checkpoint, sharded or not."""
    for inside in (folder / "model_and_optim", folder):
        if (inside / ".metadata").is_file():
            return read_metadata(inside)
    for suffix, read in ((".safetensors", _safetensors), (".pt", read_tensors)):
        files = sorted((folder / "model").glob(f"*{suffix}")) or [folder / f"model{suffix}"]
        if files[0].is_file():
            found = {f"model.{name}": tensor for path in files for name, tensor in read(path).items()}
            optim = read_tensors(folder / "optim.pt") if (folder / "optim.pt").is_file() else {}
            return found | {f"optim.{name}": tensor for name, tensor in optim.items()}
    raise ValueError(
        f"{folder} is no checkpoint of OLMo-core: it has no model_and_optim/.metadata, no .metadata, no model.safetensors and "
        "no model.pt, nor folders step… with one"
    )


def _safetensors(path: Path) -> dict[str, Deferred]:
    """The tensors of a safetensors file."""

    def read(tensor: StoredTensor) -> Tensor:
        return torch.cat([rows for _, rows in tensor.rows()]).reshape(tensor.shape)

    return {name: Deferred(tensor.shape, tensor.dtype, partial(read, tensor)) for name, tensor in read_header(path).items()}


def read_config(path: Path) -> dict[str, Any]:
    """OLMo-core's config.json; ValueError for what is no JSON object."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.read(LARGEST_CONFIG))
    except (ValueError, RecursionError) as error:
        what = f"no JSON ({type(error).__name__})"
        raise ValueError(f"{path} is {what}; it must be the config.json that OLMo-core writes") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; it must be the config.json that OLMo-core writes")
    return found


def read_train_state(path: Path) -> TrainState:
    """What is read of ``train/rank0.pt``, by the reader of pickles that builds nothing."""
    with TorchFile(Place(path, 0, path.stat().st_size)) as file:
        try:
            state = file.pickle(IN_TENSORS | IN_TRAIN_STATE)
        except Refused as error:
            raise ValueError(f"{error}; --params-only does without it") from None
    state = state if type(state) is dict else {}
    step, most, tokens = (state.get(name) for name in ("global_step", "max_steps", "global_train_tokens_seen"))
    if type(step) is not int or not all(n is None or (type(n) is int and 0 <= n < 1 << 53) for n in (step, most, tokens)):
        raise ValueError(f"{path}: damaged, or of no trainer: its global_step, max_steps and tokens are no such numbers")
    data = state.get("data_loader", state.get("dataset"))
    kept = {str(key): value for key, value in data.items() if type(value) in (int, str)} if type(data) is dict else {}
    return TrainState(step, most, tokens, kept)
