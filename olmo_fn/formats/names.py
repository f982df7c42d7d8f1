"""Which parameter is which in other programs' files: its name there, its shape there, and how to turn one into the other.

Nothing is listed here but the ends of a model: what a sublayer's parameters and a part's norms are called is said where they
are declared (`olmo_fn.nn.sublayer.Names`).
"""

from __future__ import annotations

from collections.abc import Mapping
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


class Stored(NamedTuple):
    """A parameter as another program's file has it: one tensor, or one for each entry of the first dim if ``split``."""

    name: str
    """Its name there; with ``{}`` for a number where it is split."""
    shape: tuple[int, ...]
    """Its shape there; that of each where it is split."""
    here: tuple[int, ...]
    """Its shape here."""
    transposed: bool = False
    """Its matrices are (out, in) there, and (in, out) here."""
    offset: float = 0.0
    """What is added to it to get ours: 1 for a gain that is kept around 0 there."""
    split: bool = False
    """Matrices that are stacked here are tensors of their own there."""
    first: int = 0
    """It is the rows of each matrix there from this one on; there may be more than its own."""

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

    def ours(self, theirs: Tensor) -> Tensor:
        """The parameter out of the file's one tensor: a view of it without an ``offset``.

        >>> import torch
        >>> Stored("w", (2, 3), (3, 2), transposed=True).ours(torch.ones(2, 3)).shape
        torch.Size([3, 2])
        """
        viewed = theirs.reshape(self.seen)
        turned = viewed.mT if self.transposed else viewed
        return turned + self.offset if self.offset else turned

    def theirs(self, ours: Tensor) -> Tensor:
        """The file's tensor out of the parameter, or out of one entry of it where it is split; the inverse of `ours`."""
        turned = ours - self.offset if self.offset else ours
        return (turned.mT if self.transposed else turned).reshape(self.shape)


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
    transposed = bool(block) and len(here) > 1 and (program == "huggingface" or name.turned)
    split = program == "huggingface" and "{}" in name.huggingface
    shape = (*here[:-2], *here[:-3:-1]) if transposed else here
    shape = shape[1:] if split else name.shape if program == "olmo_core" and name.shape else shape
    offset = getattr(name, f"{program}_offset")
    return Stored(block + getattr(name, program), shape, here, transposed, offset, split)


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
