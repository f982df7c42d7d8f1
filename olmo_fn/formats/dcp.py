"""Checkpoints of torch.distributed.checkpoint, as OLMo-core writes them: ``.metadata`` and ``*.distcp``, without unpickling.

``.metadata`` is a pickle: which boxes (shards) each tensor is cut into, and where in which file each lies. It is read by
`olmo_fn.formats.pickles`, which builds no object and calls nothing. A shard is what ``torch.save`` writes
(`olmo_fn.formats.torch_files`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_fn.checkpoint import Deferred
from olmo_fn.checkpoint.boxes import tiles
from olmo_fn.formats.pickles import Called, Global, loads
from olmo_fn.formats.torch_files import Place, TorchFile
from olmo_fn.spec import Box

CLASSES = "torch.distributed.checkpoint.metadata"
STORAGE_INFO = tuple(f"{module}.distributed.checkpoint.filesystem._StorageInfo" for module in ("olmo_core", "torch"))
NAMES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES: dict[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in NAMES}
IN_METADATA = frozenset(
    {
        *(f"{CLASSES}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        *(f"{CLASSES}.{name}" for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
        *(f"{CLASSES}.BytesStorageMetadata", "torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath"),
        *("pathlib._local.PosixPath", "collections.OrderedDict", *STORAGE_INFO, *DTYPES),
    }
)
"""What a ``.metadata`` may name; nothing of it is imported or called."""
LARGEST = 1 << 48  # of a size or an offset
MOST_BYTES = 2 << 30  # of the metadata: those of a 7B from 256 ranks have 38 million


def read_metadata(folder: Path) -> dict[str, Deferred]:
    """The tensors of the checkpoint in ``folder``, by name; objects that are none are left out.

    Reading one takes its own memory, and that of one shard where shards are no blocks of rows. ValueError, in one line, for
    metadata that are damaged, hostile, or say what cannot be: files that are missing or shorter, tensors that their shards do
    not fill, or fill twice.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(f"{path} is missing, so {folder} is no checkpoint of torch.distributed.checkpoint")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than the metadata of any checkpoint; it is not read")
    fields = _fields(loads(path.read_bytes(), IN_METADATA, str(path)), f"{CLASSES}.Metadata", path)
    described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(described) is not dict or type(stored) is not dict:
        raise ValueError(f"{path}: damaged, it does not say which tensors there are, and where")
    places = {_index(key, path): _place(value, folder, path) for key, value in stored.items()}
    _check_files(places.values(), path)
    tensors = (item for item in described.items() if getattr(item[1], "name", "") == f"{CLASSES}.TensorStorageMetadata")
    return {name: _tensor(name, _fields(value, value.name, path), places, path) for name, value in tensors}


def _tensor(name: Any, fields: Mapping[str, Any], places: Mapping[Any, Place], path: Path) -> Deferred:
    match getattr(fields.get("properties"), "state", None):
        case (Global(kind), *_) if kind in DTYPES and type(name) is str:
            dtype = DTYPES[kind]
        case _:
            raise ValueError(f"{path}: {str(name)[:100]} has no dtype that olmo_fn knows: {', '.join(NAMES)}")
    shape, chunks = _size(fields.get("size"), path), fields.get("chunks")
    shards = []
    for chunk in chunks if type(chunks) is list else ():
        part = _fields(chunk, f"{CLASSES}.ChunkStorageMetadata", path)
        box = Box(_size(part.get("offsets"), path), _size(part.get("sizes"), path))
        if 0 in box.shape and 0 not in shape:  # a rank without a part of it
            continue
        place = places.get((name, box.offset))
        if place is None or place.length < math.prod(box.shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} has a shard {list(box.shape)} that is in no file, or in too few bytes")
        shards.append((box, place))
    if not tiles([box for box, _ in shards], shape):
        raise ValueError(f"{path}: the shards of {name} do not fill its shape {list(shape)}, or fill a part of it twice")
    return Deferred(shape, dtype, partial(_assemble, name, dtype, shape, tuple(shards)))


def _assemble(name: str, dtype: torch.dtype, shape: tuple[int, ...], shards: Iterable[tuple[Box, Place]]) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    for box, place in shards:
        part = out[box.slices]
        with TorchFile(place, name) as file:
            layout = file.layout(file.pickle())
            if (layout.dtype, layout.shape) != (dtype, box.shape):
                stored = f"{str(layout.dtype).removeprefix('torch.')} {list(layout.shape)}"
                raise ValueError(f"{file.where} is {stored} there, and {list(box.shape)} by the metadata")
            if part.is_contiguous():
                file.read(layout, part)
            else:
                part.copy_(file.read(layout, torch.empty(box.shape, dtype=dtype)))
    return out


def _fields(value: Any, name: str, path: Path) -> dict[str, Any]:
    """The attributes of what would have been an object of the class ``name``."""
    if type(value) is not Called or value.name != name or value.args or type(value.state) is not dict:
        raise ValueError(f"{path}: damaged, or not the metadata of a checkpoint: no {name.rpartition('.')[2]} where one is due")
    return value.state


def _index(key: Any, path: Path) -> tuple[Any, tuple[int, ...] | None]:
    """Of which tensor, and where in it."""
    fields = _fields(key, f"{CLASSES}.MetadataIndex", path)
    name, offset = fields.get("fqn"), fields.get("offset")
    if type(name) is not str:
        raise ValueError(f"{path}: damaged, something without a name is stored")
    return name, None if offset is None else _size(offset, path)


def _size(value: Any, path: Path) -> tuple[int, ...]:
    """The numbers of a ``torch.Size``."""
    match value:
        case Called("torch.Size", (tuple() as numbers,)) if all(type(n) is int and 0 <= n < LARGEST for n in numbers):
            return numbers
    raise ValueError(f"{path}: damaged, a size or an offset is no list of whole numbers below 2^48")


def _place(value: Any, folder: Path, path: Path) -> Place:
    """A shard's; always a file beside the metadata."""
    fields = _fields(value, value.name if getattr(value, "name", "") in STORAGE_INFO else STORAGE_INFO[0], path)
    file, start, length = (fields.get(name) for name in ("relative_path", "offset", "length"))
    if type(file) is not str or not file.endswith(".distcp") or "/" in file or "\0" in file:
        raise ValueError(f"{path}: damaged, or hostile: a shard is said to lie in a file that is no *.distcp beside it")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{path}: the shards in {file} were compressed, or changed otherwise, which olmo_fn does not read")
    if type(start) is not int or type(length) is not int or not (0 <= start < LARGEST and 0 <= length < LARGEST):
        raise ValueError(f"{path}: damaged, a shard is at no place in {file}")
    return Place(folder / file, start, length)


def _check_files(places: Iterable[Place], path: Path) -> None:
    """ValueError unless the files are there, and as long as all that lies in them, with no byte that serves twice."""
    ends: Counter[Path] = Counter()
    total: Counter[Path] = Counter()
    for file, start, length in places:
        ends[file] = max(ends[file], start + length)
        total[file] += length
    for file, end in ends.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing, and {path} tells of tensors in it; copy all files of the checkpoint")
        if end > (size := file.stat().st_size):
            raise ValueError(f"{file} is truncated: it has {size:,} bytes, and {path} tells of {end:,}; copy it again")
        if total[file] > size:
            raise ValueError(f"{path}: damaged, or hostile: more lies in {file}, {total[file]:,} bytes, than it has")
