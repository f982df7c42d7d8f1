"""Which parameter is which in other programs' files: its name there, its shape there, and how to turn one into the other.

Nothing is listed here but the ends of a model: what a sublayer's parameters and a part's norms are called is said where they
are declared (`olmo_fn.nn.sublayer.Names`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from olmo_fn import tree
from olmo_fn.models.config import Model
from olmo_fn.models.transformer import layers, specs
from olmo_fn.nn.norm import Norm
from olmo_fn.nn.sublayer import Names

Program: TypeAlias = Literal["huggingface", "olmo_core"]

BLOCK = {"huggingface": "model.layers", "olmo_core": "blocks"}
ENDS = {
    "embed": Names("model.embed_tokens.weight", "embeddings.weight"),
    "head.w_out": Names("lm_head.weight", "lm_head.w_out.weight"),
    "head.bias": Names("lm_head.bias", "lm_head.w_out.bias"),
    "head.scales": Names("lm_head.sz", "lm_head.sz"),
}
"""What is no part of a block. Its matrices are (vocabulary, width) everywhere."""
NORMS = {
    "embed_norm": Names("model.embed_norm.weight", "embedding_norm.weight"),
    "head.norm": Names("model.norm.weight", "lm_head.norm.weight"),
}
"""Norms that are no part of a block, by their gains."""


class Rows(NamedTuple):
    """Which rows of a tensor are a parameter: ``height`` of them from ``first`` on, and again in each further ``stride`` rows.

    >>> list(Rows(2, 2, 6).runs(1, 3))
    [(3, 1, 1), (8, 2, 2)]
    """

    first: int
    height: int
    stride: int

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Where ``length`` of its rows from ``start`` on are: the row there, the row here, and how many follow each other."""
        at, stop = start, start + length
        while at < stop:
            turn, offset = divmod(at, self.height)
            n = min(self.height - offset, stop - at)
            yield turn * self.stride + self.first + offset, at, n
            at += n

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor (turns, height, …), a view of it."""
        return tensor.unflatten(0, (-1, self.stride))[:, self.first : self.first + self.height]


class Stored(NamedTuple):
    """A parameter as another program's file has it: one tensor, or one for each entry of the first dim if ``split``."""

    name: str
    """The name of its tensor there; with ``{}`` for a number where it is split."""
    shape: tuple[int, ...]
    """The shape of that tensor; of each where it is split."""
    here: tuple[int, ...]
    """Its shape here."""
    transposed: bool = False
    """Its matrices are (out, in) there, and (in, out) here."""
    offset: float = 0.0
    """What is added to it to get ours: 1 for a gain that is kept around 0 there."""
    split: bool = False
    """Matrices that are stacked here are tensors of their own there."""
    rows: Rows | None = None
    """Which rows of the tensor it is, if it is not all of it; of one with more dims, of its matrices below each other."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that it is made of.

        >>> Stored("experts.{}.w", (4, 2), (3, 2, 4), transposed=True, split=True).tensors
        ('experts.0.w', 'experts.1.w', 'experts.2.w')
        """
        return tuple(self.name.format(i) for i in range(self.here[0])) if self.split else (self.name,)

    @property
    def seen(self) -> tuple[int, ...]:
        """Its shape here with its matrices as they are there."""
        return (*self.here[:-2], *self.here[:-3:-1]) if self.transposed else self.here

    @property
    def stacked(self) -> bool:
        """It is several matrices here."""
        return self.transposed and len(self.here) == 3

    def ours(self, theirs: Tensor) -> Tensor:
        """The parameter out of the file's one tensor: a view of it without an ``offset``.

        >>> import torch
        >>> Stored("w", (2, 3), (3, 2), transposed=True).ours(torch.ones(2, 3)).shape
        torch.Size([3, 2])
        """
        if self.rows is not None:
            theirs = self.rows.of(theirs.flatten(0, 1) if self.stacked else theirs)
        viewed = theirs.reshape(self.seen)
        turned = viewed.mT if self.transposed else viewed
        return turned + self.offset if self.offset else turned

    def theirs(self, ours: Tensor) -> Tensor:
        """The file's tensor, or its rows of it, out of the parameter, or out of one entry of it where it is split; the inverse
        of `ours`.
        """
        turned = ours - self.offset if self.offset else ours
        turned = turned.mT if self.transposed else turned
        return turned if self.rows else turned.reshape(self.shape)


def assembled(names: Mapping[str, Stored], parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors of a file out of the parameters, each once all of its rows are there; ``names`` and ``parameters`` are in the
    same order.
    """
    missing = Counter(one.name for one in names.values())
    begun: dict[str, Tensor] = {}
    for (path, one), (given, tensor) in zip(names.items(), parameters, strict=True):
        assert path == given, (path, given)
        theirs = tensor if one.split else one.theirs(tensor)
        if one.rows is not None:
            whole = begun.setdefault(one.name, theirs.new_empty(one.shape))
            rows = one.rows.of(whole)
            rows.copy_(theirs.view(rows.shape) if theirs.is_contiguous() else theirs.unflatten(0, rows.shape[:2]))
            theirs = whole
        missing[one.name] -= 1
        if not missing[one.name]:
            begun.pop(one.name, None)
            yield from ((one, one.theirs(matrix)) for matrix in tensor) if one.split else [(one, theirs)]


def in_files(names: Mapping[str, Stored]) -> list[Stored]:
    """One parameter of each tensor, in the order in which `assembled` gives them: that of their last rows."""
    last = {one.name: one for one in names.values()}
    order = {one.name: i for i, one in enumerate(names.values())}
    return sorted(last.values(), key=lambda one: order[one.name])


def stored(cfg: Model, program: Program) -> dict[str, Stored]:
    """Each parameter of a model, by its path, as ``program``'s files have it; a tied head is left out, as it is the embedding.

    ValueError, with the path, for a parameter that has no name there.

    >>> from olmo_fn.models.config import dense
    >>> found = stored(dense(8, 1, 2, 16), "huggingface")["blocks.0.feed_forward.w_up"]
    >>> found.name, found.shape, found.here
    ('model.layers.0.mlp.up_proj.weight', (16, 8), (8, 16))
    >>> stored(dense(8, 1, 2, 16), "olmo_core")["blocks.0.feed_forward.w_up"].name
    'blocks.0.feed_forward.w3.weight'
    """
    norm = cfg.norm.build(cfg.norm_eps)
    names = {path: ("", name) for path, name in {**ENDS, **_norms(norm, NORMS)}.items()}
    for i, layer in enumerate(layers(cfg)):
        named = {f"{sub.name}.{path}": name for sub in layer.sublayers for path, name in sub.names.items()}
        for part in layer.parts:
            named |= _norms(norm, {path: name for path, name in part.norms.items() if name})
            named |= {path: name for path, (_, name) in part.others.items() if name}
        names |= {f"blocks.{i}.{path}": (f"{BLOCK[program]}.{i}.", name) for path, name in named.items()}
    found = {}
    for path, spec in tree.items(specs(cfg)):
        if path not in names:
            raise ValueError(f"{path} has no name in the files of {program}")
        block, name = names[path]
        found[path] = _stored(block, name, spec.shape, program)
    return found


def _stored(block: str, name: Names, here: tuple[int, ...], program: Program) -> Stored:
    """A parameter of the shape ``here``; matrices of a ``block`` are (out, in) there."""
    stack, there = "{}" in name.huggingface, program == "huggingface"
    transposed = bool(block) and (len(here) == 2 or stack) and (there or name.turned)
    shape = (*here[:-2], *here[:-3:-1]) if transposed else here
    shape = shape[1:] if stack and there else (name.huggingface_shape if there else name.shape) or shape
    offset = getattr(name, f"{program}_offset")
    return Stored(block + getattr(name, program), shape, here, transposed, offset, stack and there)


def _norms(norm: Norm, gains: Mapping[str, Names]) -> dict[str, Names]:
    """The parameters of norms whose gains are called so; one kept around 0 here is kept around 1 by OLMo-core."""
    if norm.zero_centred:
        gains = {path: name._replace(olmo_core_offset=-1.0) for path, name in gains.items()}
    if not norm.bias:
        return dict(gains)
    biases = {path: Names(_bias(name.huggingface), _bias(name.olmo_core)) for path, name in gains.items()}
    return {f"{path}.norm": name for path, name in gains.items()} | {f"{path}.bias": name for path, name in biases.items()}


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
