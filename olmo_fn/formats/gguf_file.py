"""A GGUF file, llama.cpp's: its parameters, read from it one at a time, and such a file, written whole.

file = open_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
file.model                                          # what its metadata describe
file.parameter("blocks.0.attention.w_q")            # in our form, fp32

It has the names of transformers' parameters by the table of the ``gguf`` package, and their shapes, with two differences: the
rows of a Llama's queries and keys are in another order, and gains that are around 0 elsewhere are around 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from olmo_fn.checkpoint.stored import some
from olmo_fn.formats.config_json import model_of
from olmo_fn.formats.draft import drafting
from olmo_fn.formats.gguf_keys import READ, architecture, read_config, shortest, write_metadata
from olmo_fn.formats.keys import Keys
from olmo_fn.formats.names import Stored, stored
from olmo_fn.formats.tensors import READ_BYTES
from olmo_fn.models.config import Model
from olmo_fn.models.settings.rope_scaling import Stepwise
from olmo_fn.nn.rope import stepwise

EMBED, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
DType = Literal["f32", "f16", "q8_0"]
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}
BLOCK = 32
"""Numbers of a row that q8_0 keeps together, with one scale."""
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""llama.cpp's numbers of what most of a file's tensors are."""


def load_gguf() -> Any:
    """The package ``gguf``; ValueError, with what to type, without it."""
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install 'olmo-fn[gguf]'") from None
    return gguf


class Place(NamedTuple):
    """A parameter as a file has it: its name and form there, and the heads whose rows are in llama.cpp's order, or 0."""

    stored: Stored
    heads: int = 0

    def order(self) -> Tensor:
        """For each row of the file's tensor the number of transformers' row.

        Pairs of a head's dims that are rotated together are dims i and i + head_dim/2 there, and neighbours here.

        >>> Place(Stored("", (8,), (8,)), heads=2).order()
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
        """
        rows = torch.arange(self.stored.shape[0])
        return rows.view(self.heads, 2, -1).transpose(1, 2).flatten() if self.heads else rows


def places(model: Model, arch: str) -> dict[str, Place]:
    """Each parameter of a model, by its path, as a file of this architecture has it; a tied head is left out."""
    gguf = load_gguf()
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), model.n_layers)
    mixer, found = model.layers[0].mixer, {}
    heads = {"attn_q": mixer.n_heads, "attn_k": mixer.kv_heads} if arch == "llama" else {}
    for path, one in stored(model, "huggingface").items():
        name = names.get_name(one.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"llama.cpp's {arch} has no place for {path}")
        centred = model.norm.zero_centred and len(one.shape) == 1
        found[path] = Place(one._replace(name=name, offset=one.offset - centred), heads.get(name.split(".")[-2], 0))
    return found


@dataclass(frozen=True)
class File:
    """An open file, whose tensors are those of its ``model``."""

    path: Path
    arch: str
    metadata: Mapping[str, Any] = field(repr=False)
    """Its keys."""
    model: Model
    places: Mapping[str, Place] = field(repr=False)
    """Each parameter by its path, as the file has it."""
    tensors: Mapping[str, Any] = field(repr=False)
    """The gguf package's views of the file."""

    @property
    def types(self) -> list[str]:
        """What its tensors are kept as, that of most numbers first."""
        sizes: dict[str, int] = {}
        for place in self.places.values():
            tensor = self.tensors[place.stored.name]
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
        return sorted(sizes, key=lambda name: -sizes[name])

    def parameter(self, path: str) -> Tensor:
        """A parameter in our form, fp32; `READ_BYTES` of it are turned at a time."""
        place = self.places[path]
        name, tensor = place.stored, self.tensors[place.stored.name]
        out = torch.empty(name.here)
        theirs, order = (out.T if name.transposed else out).numpy(), place.order().numpy()
        step = max(1, READ_BYTES // (4 * math.prod(name.shape[1:])))
        for first in range(0, name.shape[0], step):
            part = slice(first, first + step)
            theirs[order[part]] = dequantized(tensor.data[part], tensor.tensor_type)
        return out.add_(name.offset) if name.offset else out


def dequantized(data: np.ndarray, kind: Any) -> np.ndarray:
    """Rows in fp32; NotImplementedError for a kind that the gguf package does not read."""
    found: np.ndarray = load_gguf().quants.dequantize(data, kind)
    return found


def open_gguf(path: Path) -> File:
    """The file at ``path``: its metadata are read, and what its tensors are.

    ValueError, one line, for what is no GGUF file or not whole, for an architecture that is not read, for a key that is not
    understood, for tensors that lack, that no parameter has, of other shapes, or quantised in a way that is not read.
    """
    metadata, tensors, arch = read(path)
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape.tolist())) for name, tensor in tensors.items()}
    if len(shapes.get(EMBED, ())) != 2:
        raise ValueError(f"{path}: the tensors are not those of its metadata: missing: {EMBED}, a matrix")
    tied = HEAD not in tensors or same(tensors[HEAD], tensors[EMBED])
    keys = Keys(metadata, str(path))
    scaled = tensors.get(FREQUENCIES) if arch == "llama" else None
    stretch = stretch_of(path, scaled, keys.number("llama.rope.freq_base", 1e4)) if scaled is not None else 0.0
    config = read_config(arch, keys, shapes, tied, stretch)
    model = model_of(config, str(path))
    found = File(path, arch, metadata, model, places(model, arch), tensors)
    ignored = {HEAD if tied else "", FREQUENCIES if arch == "llama" else ""}
    check_tensors(path, found.places, {name: shape for name, shape in shapes.items() if name not in ignored}, tensors)
    return found


def read(path: Path) -> tuple[Mapping[str, Any], dict[str, Any], str]:
    """The metadata and tensors of a file, and its architecture, which is one that is read."""
    gguf = load_gguf()

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a GGUF file") from None
    if magic != b"GGUF":
        raise ValueError(f"{path}: it is no GGUF file; one begins with the letters GGUF")
    base: Any = gguf.GGUFReader

    class Reader(base):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise EOFError
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(path)
        metadata = {name: one.contents() for name, one in reader.fields.items()}
        arch = metadata["general.architecture"]
    except EOFError:
        raise ValueError(f"{path}: cut off, {path.stat().st_size:,} bytes do not hold all of it; copy it again") from None
    except Exception as error:  # of many kinds, as the package checks little
        raise ValueError(f"{path}: damaged, or of a newer form of GGUF ({error}); copy it again") from None
    if reader.byte_order != "I":
        raise ValueError(f"{path}: it has the other byte order; convert it by the gguf package's gguf-convert-endian")
    if arch not in READ:
        raise ValueError(f"{path}: the architecture {arch} is not read here; there are {', '.join(READ)}")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}, arch


def check_tensors(
    path: Path, wanted: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]
) -> None:
    """ValueError unless the tensors are those ``wanted``, with their shapes and of kinds that are read."""
    names = {place.stored.name: tuple(place.stored.shape) for place in wanted.values()}
    missing, extra = [name for name in names if name not in shapes], [name for name in shapes if name not in names]
    wrong = [
        f"{name} is {list(shapes[name])}, and {list(shape)} by the metadata"
        for name, shape in names.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [f"missing: {some(missing, 3)}"] if missing else []
    problems += [f"not of this model: {some(extra, 3)}"] if extra else []
    problems += [some(wrong, 3)] if wrong else []
    if problems:
        raise ValueError(f"{path}: the tensors are not those of its metadata: {'; '.join(problems)}")
    for name, kind in {tensors[name].tensor_type: name for name in names}.items():
        try:
            dequantized(tensors[kind].data[:1] if len(names[kind]) > 1 else tensors[kind].data, name)
        except NotImplementedError:
            raise ValueError(f"{path}: {kind} is quantised as {name.name}, which the package gguf does not read") from None


def same(a: Any, b: Any) -> bool:
    """Whether two tensors of a file hold the same bytes."""
    return a.tensor_type == b.tensor_type and a.data.shape == b.data.shape and np.array_equal(a.data, b.data)


def stretch_of(path: Path, tensor: Any, theta: float) -> float:
    """The factor of Llama 3's scaling, of the tensor that says by what each frequency is divided."""
    there = torch.from_numpy(np.array(dequantized(tensor.data, tensor.tensor_type)).flatten())
    factor = shortest(max(1.0, round(float(there.max()), 4)))
    made = divisors(2 * len(there), theta, Stepwise(factor=factor))  # its other numbers are Llama 3's
    if not torch.allclose(made, there, rtol=1e-4, atol=0):
        raise ValueError(f"{path}: {FREQUENCIES} is not that of a Llama 3; no model here computes that")
    return factor


def divisors(head_dim: int, theta: float, scaling: Stepwise) -> Tensor:
    """By what each frequency of rotary positions is divided, (head_dim/2,)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    made = stepwise(frequency, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.old_context)
    return frequency / made


def write_gguf(
    target: Path,
    model: Model,
    parameters: Iterable[tuple[str, Tensor]],
    dtype: DType,
    context: int,
    more: Mapping[str, Any],
    advance: Callable[[int], Any] = lambda entries: None,
) -> None:
    """Write a file that llama.cpp loads: whole, or not at all.

    ``parameters``: paths and tensors in our form, in the order of `places`; each is let go when it is written. ``dtype`` is
    that of matrices: vectors are fp32. A matrix whose rows q8_0 cannot cut into parts of `BLOCK` is fp16. ``more``: the keys of
    the tokenizer. ValueError for a target that is there already, for a model that llama.cpp does not compute, and, with its
    name, where a number is too large for its dtype.
    """
    gguf = load_gguf()
    arch = architecture(model)
    wanted, extra = places(model, arch), other_tensors(model, arch)
    metadata = write_metadata(model, context, [place.stored.name for place in wanted.values()])
    repeated = "embed" if arch == "olmo2" and model.tie_embeddings else ""  # llama.cpp wants a head there
    kinds = {path: kind_of(place.stored.shape, dtype) for path, place in wanted.items()}
    with drafting(target, sum(nbytes(gguf, place.stored.shape, kinds[path]) for path, place in wanted.items())) as draft:
        writer = gguf.GGUFWriter(draft, arch)
        general = {"general.type": "model", "general.name": target.stem, "general.file_type": FILE_TYPES[dtype]}
        for key, value in (general | {"general.quantization_version": gguf.GGML_QUANT_VERSION} | metadata | dict(more)).items():
            writer.add_key_value(key, value, *value_type(gguf, value))

        def declare(name: str, shape: tuple[int, ...], kind: str) -> None:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes(gguf, shape, kind), number)

        for name, tensor in extra.items():
            declare(name, tuple(tensor.shape), "F32")
        for path, place in wanted.items():
            declare(place.stored.name, place.stored.shape, kinds[path])
            if path == repeated:
                declare(HEAD, place.stored.shape, kinds[path])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in extra.values():
                writer.write_tensor_data(tensor.numpy())
            for (path, place), (given, tensor) in zip(wanted.items(), parameters, strict=True):
                assert path == given, (path, given)
                data = quantized(place, tensor, kinds[path])
                for _ in range(1 + (path == repeated)):
                    writer.write_tensor_data(data)
                advance(math.prod(place.stored.shape))
            writer.flush()
        finally:
            writer.close()


def other_tensors(model: Model, arch: str) -> dict[str, Tensor]:
    """Tensors that are no parameters: by what a Llama 3 divides the frequencies of its rotary positions."""
    mixer = model.layers[0].mixer
    if arch != "llama" or not isinstance(mixer.rope_scaling, Stepwise):
        return {}
    return {FREQUENCIES: divisors(mixer.width(model.d_model), mixer.rope_theta, mixer.rope_scaling)}


def kind_of(shape: tuple[int, ...], dtype: DType) -> str:
    """What a tensor is kept as."""
    if len(shape) == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % BLOCK else dtype.upper()


def nbytes(gguf: Any, shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(math.prod(shape) // numbers * size)


def quantized(place: Place, tensor: Tensor, kind: str) -> np.ndarray:
    """The file's tensor out of a parameter; `READ_BYTES` of it are turned at a time."""
    gguf = load_gguf()
    theirs, order = place.stored.theirs(tensor.float()), place.order()
    step = max(1, READ_BYTES // (4 * math.prod(theirs.shape[1:])))
    parts = []
    for first in range(0, theirs.shape[0], step):
        rows = theirs[order[first : first + step]]
        if kind in LARGEST and not (largest := float(rows.abs().max())) <= LARGEST[kind]:
            raise ValueError(
                f"{place.stored.name} holds {largest:.3g}, and {kind.lower()} ends at {LARGEST[kind]:,.0f}; take --dtype f32"
            )
        parts.append(gguf.quants.quantize(rows.contiguous().numpy(), gguf.GGMLQuantizationType[kind]))
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def value_type(gguf: Any, value: Any) -> tuple[Any, ...]:
    """The type of a key's value: llama.cpp wants sizes unsigned."""
    kind = gguf.GGUFValueType
    if isinstance(value, list):
        return (kind.ARRAY,)
    return ({bool: kind.BOOL, int: kind.UINT32, float: kind.FLOAT32, str: kind.STRING}[type(value)],)
