"""The settings of the data. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from olmo_fn.data.bounds import Boundaries
from olmo_fn.data.instances.filtered import RepetitionFilter
from olmo_fn.data.instances.fixed import FixedLength
from olmo_fn.data.shuffle import Order
from olmo_fn.data.tokens import Dtype
from olmo_fn.fields import INVISIBLE, PATH


@dataclass(frozen=True)
class Data:
    """What to train on and what to hold out."""

    paths: Annotated[tuple[str, ...], PATH] = ()
    """Token files or globs, in this order. Empty: the sources of this Python's standard library, tokenized on first use."""
    heldout_paths: Annotated[tuple[str, ...], PATH] = ()
    """Token files or globs that are only evaluated on. NAME=FILE evaluates it by itself, as the set NAME."""
    heldout_mask_paths: Annotated[tuple[str, ...], PATH] = ()
    """For each held-out token file a label mask; where heldout_fraction holds out, label_mask_paths are of all."""
    heldout_fraction: float = 0.01
    """Without heldout_paths: hold out the last instances of the data, this part of all and at most 4 Mi tokens.
    0 holds out nothing; the order of the same files is then OLMo-core's."""
    dtype: Dtype = "auto"
    """Integer type of the token files. auto: as the tokenizing command wrote beside them, or else the smallest that holds the
    vocabulary."""
    label_mask_paths: Annotated[tuple[str, ...], PATH] = ()
    """For each token file a file of booleans, one byte a token; the prediction of a false one is not in the loss."""
    instances: Annotated[Any, tyro.conf.arg(name="")] = field(default_factory=FixedLength)
    """How token files become training instances."""
    mask_documents: bool = False
    """Attend only to tokens of the same document, with positions that restart in each. The end of a document still
    predicts the first token of the next. Needs the id of the end-of-document token."""
    eos_id: int | None = None
    """Id of the end-of-document token. None: the tokenizer's, or as the tokenizing command wrote beside the files."""
    bos_id: int | None = None
    """Id of the token that begins documents; an end is then one only where it follows. None: there is no such token."""
    pad_id: int | None = None
    """Id that instances are filled up with, outside of the loss. None: the end-of-document token."""
    boundaries: Boundaries = "eos"
    """Documents end with their last token, or as the .csv.gz beside a token file says, which dolma writes (metadata)."""
    filter: RepetitionFilter = field(default_factory=RepetitionFilter)
    """Which instances are kept out of the loss."""
    tokenizer: Annotated[str, PATH] = ""
    """Path of a tokenizer.json, that of the token files, or dolma2; for samples, and for bits per byte where no meta.json of
    the tokenizing command beside held-out files says how many bytes their text has."""
    eos: str = ""
    """Name of the end-of-document token in it. Empty: the usual names are tried."""
    order: Order = "keyed"
    """How training instances are shuffled. keyed: any number of them, at once. olmo-core: as OLMo-core does, bit for bit.
    sequential: not at all."""
    order_seed: int = 34521
    """Seed of the order of the training instances, OLMo-core's data loader seed."""
    mix: Annotated[str, PATH] = ""
    """A file that says of which sources the data is mixed, in which ratios; or one of OLMo's published mixes, by its name."""
    mix_base: str = "http://olmo-data.org"
    """Where the paths of a published mix begin."""
    mix_tokenizer: str = "allenai/dolma2-tokenizer"
    """Whose tokens its files are to be."""
    page_cache_gb: Annotated[float, INVISIBLE] = 20.0
    """Most disk space, in GB, for pages of token files that are elsewhere; the ones used last are kept."""
    cache_dir: Annotated[str, PATH] = ""
    """Where the default corpus and compiled code are kept. Empty: $OLMO_FN_CACHE, or olmo_fn in $XDG_CACHE_HOME or ~/.cache."""


def cache_dir(data: Data) -> Path:
    """The folder that ``data`` caches in, not necessarily there yet.

    >>> cache_dir(Data(cache_dir="/tmp/cache"))
    PosixPath('/tmp/cache')
    """
    if given := data.cache_dir or os.environ.get("OLMO_FN_CACHE"):
        return Path(os.path.expanduser(given))
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(base, "olmo_fn") if os.path.isabs(base) else Path(tempfile.gettempdir(), f"olmo_fn-{os.getuid()}")  # no home
