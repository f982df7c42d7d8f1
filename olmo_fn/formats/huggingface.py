"""A directory in the form of Hugging Face: its parameters, read from it a part at a time, and such a directory, written whole.

directory = open_directory("OLMo-2-0425-1B")
directory.model                                     # what its config.json describes
directory.parameter("blocks.0.attention.w_q")       # in our form, fp32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_fn.checkpoint.stored import some
from olmo_fn.formats.config_json import CONFIG, differences, family_of, json_of, model_of, read_json, write_json
from olmo_fn.formats.draft import drafting
from olmo_fn.formats.families import Family
from olmo_fn.formats.keys import Keys
from olmo_fn.formats.names import ENDS, Rows, Stored, assembled, in_files, stored
from olmo_fn.formats.tensors import SHARD_BYTES, Joined, StoredTensor, Target, divided, open_tensors, write_tensors
from olmo_fn.models.config import Model
from olmo_fn.spec import Box

READ = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The dtypes of weights, all of which fp32 holds exactly."""
DTYPES = {name: dtype for dtype, name in READ.items()}
BUFFER = "rotary_emb.inv_freq"
"""The end of the names of tensors that old files have, and that are computed from the config."""


@dataclass(frozen=True)
class Directory:
    """An open directory, whose tensors are those of its ``model``."""

    path: Path
    raw: Mapping[str, Any] = field(repr=False)
    """Its config.json."""
    model: Model
    names: Mapping[str, Stored] = field(repr=False)
    """Each parameter by its path, as the files have it."""
    tensors: Mapping[str, StoredTensor | Joined] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all of its weights; fp32 where they are not all of one."""
        dtypes = {self.tensors[tensor].dtype for name in self.names.values() for tensor in name.tensors}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def context(self) -> int | None:
        """The most tokens that it is made for, if the config.json says it."""
        found = self.raw.get("max_position_embeddings")
        return found if type(found) is int else None

    def parameter(self, path: str, box: Box | None = None) -> Tensor:
        """A parameter, or the ``box`` of it, in our form, fp32. Of the files only the rows are read that hold it."""
        name = self.names[path]
        offset, shape = box or Box.whole(name.here)
        out = torch.empty(shape, dtype=torch.float32)
        if not name.stacked:
            read(as_seen(self.tensors[name.name], name), name, 0, Box(offset, shape), out)
        for i in range(shape[0] if name.stacked else 0):  # a matrix after the other: of a tensor of its own, or below others
            number = offset[0] + i
            tensor, before = self.tensors[name.name.format(number)], 0 if name.split else number * name.seen[1]
            read(below_each_other(tensor), name, before, Box(offset[1:], shape[1:]), out[i])
        return out.add_(name.offset) if name.offset else out


def read(tensor: StoredTensor | Joined, name: Stored, before: int, box: Box, out: Tensor) -> None:
    """Fill ``out`` with the ``box`` of a parameter, or of one of its matrices, whose rows in the tensor have ``before`` before
    them.
    """
    (top, *left), (height, *width) = (box.offset[::-1], box.shape[::-1]) if name.transposed else box
    columns = tuple(slice(at, at + n) for at, n in zip(left, width, strict=True))
    top += before
    for there, here, n in name.rows.runs(top, height) if name.rows else [(top, top, height)]:
        for first, rows in tensor.rows(there, n):
            start = here - top + first - there
            part, at = rows[(slice(None), *columns)], slice(start, start + len(rows))
            if name.transposed:
                out[:, at] = part.T.contiguous()  # turned as it is, and cast then: three times as fast
            else:
                out[at] = part


def as_seen(tensor: StoredTensor | Joined, name: Stored) -> StoredTensor | Joined:
    """A tensor that is all of a parameter, in as many dims as that: a gate of one output is a matrix there."""
    if isinstance(tensor, Joined) or name.rows or len(tensor.shape) == len(name.seen):
        return tensor
    return tensor._replace(shape=name.seen)


def below_each_other(tensor: StoredTensor | Joined) -> StoredTensor | Joined:
    """The matrices of a tensor with three dims as one."""
    if isinstance(tensor, Joined) or len(tensor.shape) < 3:
        return tensor
    return tensor._replace(shape=(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:]))


def open_directory(path: str | Path, model: Model | None = None) -> Directory:
    """The directory at ``path``: its config.json is read, and the headers of its safetensors files.

    ``model``: what it is expected to hold. ValueError, one line, for a model that is not that one, with all that differs; for
    tensors that lack, that no parameter has, or of other shapes; and as `model_of` and `open_tensors`.
    """
    folder = Path(path)
    raw = read_json(folder)
    there = model_of(raw, str(folder / CONFIG))
    if model is not None and (differ := differences(there, model)):
        dense = bool(model.num_experts) and not there.num_experts
        hint = "; olmo-fn convert upcycle makes a model with experts of a dense one" if dense else ""
        raise ValueError(f"{folder} holds another model: {', '.join(differ)}{hint}")
    files = open_tensors(folder)
    names = names_in(raw, there, files)
    family = family_of(Keys(raw, str(folder / CONFIG)))
    files = {name: tensor for name, tensor in files.items() if not name.startswith(family.passed_over)}
    tensors = as_named(files, names, family)
    found = Directory(folder, raw, there, names, tensors)
    check_tensors(found)
    return found


def names_in(raw: Mapping[str, Any], model: Model, tensors: Container[str] = ()) -> dict[str, Stored]:
    """Where each parameter of a model is in the files of the architecture that its config.json, ``raw``, names.

    Experts are a tensor each for gate, up and down, as transformers saves them, or, where ``tensors`` has the names of that,
    all in two: ``gate_up_proj`` (E, 2 F, D) and ``down_proj`` (E, D, F), as transformers 5 has them in memory.
    """
    names, family = stored(model, "huggingface"), family_of(Keys(raw, CONFIG))
    names = {path: together(one, tensors) for path, one in names.items()}
    return family.tensors(model, names) if family.tensors else names


def together(one: Stored, tensors: Container[str]) -> Stored:
    """Experts as they are stacked in ``tensors``, if they are; else as they were."""
    start, matched, end = one.name.partition("experts.{}.")
    down = end.startswith("down")
    name = f"{start}experts.{'down_proj' if down else 'gate_up_proj'}"
    if not matched or name not in tensors:
        return one
    E, height, width = one.seen
    if down:
        return one._replace(name=name, shape=one.seen, split=False)
    rows = Rows(height if end.startswith("up") else 0, height, 2 * height)
    return one._replace(name=name, shape=(E, 2 * height, width), split=False, rows=rows)


def as_named(
    tensors: Mapping[str, StoredTensor], names: Mapping[str, Stored], family: Family
) -> dict[str, StoredTensor | Joined]:
    """The tensors under the names that are looked for, where they have an alias, and divided as the model's are."""
    found: dict[str, StoredTensor | Joined] = dict(tensors)
    wanted = {one.name: one.shape for one in names.values()}
    for name in wanted.keys() - tensors.keys():
        others = {name.replace(a, b) for pair in family.aliases for a, b in (pair, pair[::-1])}
        for other in (others & tensors.keys()) - {name}:
            found[name] = found.pop(other)
    for name in (name for name in wanted if family.joined and name.endswith(family.joined[0])):
        parts = [name.removesuffix(family.joined[0]) + end for end in family.joined]
        heights = [wanted[part][0] for part in parts]
        there = [tensors[part] for part in parts if part in tensors and len(tensors[part].shape) == len(wanted[part])]
        if len(there) == len(parts) and sum(tensor.shape[0] for tensor in there) == sum(heights):
            found |= zip(parts, divided(there, heights), strict=True)
    return found


def check_tensors(directory: Directory) -> None:
    """ValueError unless the tensors are those of the model, with their shapes and dtypes that are read."""
    wanted = {tensor: name.shape for name in directory.names.values() for tensor in name.tensors}
    tensors = directory.tensors
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted and not name.endswith(BUFFER)]
    head, embed = ENDS["head.w_out"].huggingface, ENDS["embed"].huggingface
    if directory.model.tie_embeddings and head in extra and embed in tensors:
        extra.remove(head)
        if not _same(tensors[head], tensors[embed]):
            extra.append(f"{head} (another than {embed}, though tie_word_embeddings is true)")
    wrong = [
        f"{name} is {list(tensors[name].shape)}, and {list(shape)} by {CONFIG}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [f"missing: {some(missing, 3)}"] if missing else []
    problems += [f"not of this model: {some(extra, 3)}"] if extra else []
    problems += [some(wrong, 3)] if wrong else []
    if problems:
        raise ValueError(f"the tensors in {directory.path} are not those of its {CONFIG}: {'; '.join(problems)}")
    for name in wanted:
        if tensors[name].dtype not in READ:
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise ValueError(f"{tensors[name].file}: {name} is {dtype}; weights are read in {', '.join(DTYPES)}")


def write_directory(
    target: Path,
    model: Model,
    parameters: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    more: Callable[[Path], Any] = lambda draft: None,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], Any] = lambda nbytes: None,
) -> None:
    """Write a directory that transformers loads: whole, or not at all.

    ``parameters``: paths and tensors in our form, in the order of `olmo_fn.formats.names.stored`; each is let go when it is
    written. ``config``: the config.json but for its dtype, `json_of` the model when not given. ``more`` adds files.
    ValueError for a target that is there already, and for a model that no architecture computes.
    """
    config = dict(config or json_of(model))
    config.pop("torch_dtype", None)
    config |= {"dtype": READ[dtype], "torch_dtype": READ[dtype]}  # of transformers 5, and of 4
    names = names_in(config, model)
    targets = [Target(tensor, dtype, name.shape) for name in in_files(names) for tensor in name.tensors]

    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    with drafting(target, sum(one.nbytes for one in targets)) as draft:
        draft.mkdir()
        write_tensors(draft, targets, (tensor for _, tensor in assembled(names, parameters)), shard_bytes, advance)
        write_json(draft / CONFIG, config)
        more(draft)


def _same(a: StoredTensor | Joined, b: StoredTensor | Joined) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    integers = torch.uint8
    pairs = zip(a.rows(), b.rows(), strict=True)
    return all(torch.equal(x.view(integers), y.view(integers)) for (_, x), (_, y) in pairs) if math.prod(a.shape) else True
