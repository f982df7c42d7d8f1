"""From the settings to the data of a run: what to train on, what to hold out, and how to count its bytes."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from pathlib import Path

from olmo_fn.data.corpus import stdlib_corpus
from olmo_fn.data.heldout import TokenSet, by_name, named
from olmo_fn.data.instances import TokenData
from olmo_fn.data.instances.variable import BucketLoader
from olmo_fn.data.loader import Loader
from olmo_fn.data.megatron import is_megatron, read_index
from olmo_fn.data.meta import Meta, check_vocabulary, folder_of, metas_beside
from olmo_fn.data.mix import find_mix, read_mix
from olmo_fn.data.settings import Data, cache_dir
from olmo_fn.data.sizes import Sizes
from olmo_fn.data.stores import each, is_remote
from olmo_fn.data.token_tables import converted, is_table
from olmo_fn.data.tokenizer import Tokenizer, load, located
from olmo_fn.data.tokens import (
    HELDOUT_FILE,
    TokenFile,
    check_type,
    check_vocab,
    expand,
    open_masks,
    open_tokens,
    read_tokens,
    smallest_dtype,
)
from olmo_fn.data.training import HELDOUT, mixed, training

CORPUS_VOCAB = 4096


@dataclass(frozen=True)
class Source:
    """The data of a run."""

    train: Loader | BucketLoader
    heldout: Mapping[str, TokenSet]
    """Tokens to evaluate on, by name: ``heldout``, and those that the settings name."""
    tokenizer: Tokenizer | None
    eos_id: int | None
    """The end-of-document token, if it is known."""
    heldout_compressed: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the held-out text after gzip and xz, for the default corpus."""
    sources: tuple[str, ...] = ()
    """Names of the sources of a mixture."""
    files: tuple[tuple[str, str], ...] = ()
    """Path and type of every file that all this comes from: tokens, held-out tokens, label masks, tokenizer."""


def open_data(data: Data, model_vocab_size: int, sizes: Sizes, show: bool = True, steps: int = 0) -> Source:
    """Open and check the data for batches of ``sizes``, in a run of so many ``steps``.

    Without ``data.paths`` this makes or finds the default corpus, with a progress bar if ``show``. ValueError, one line, for
    whatever cannot be trained on.
    """
    _check(data)
    compressed, by_source = {}, []
    mix = read_mix(data.mix, data.mix_base, data.mix_tokenizer) if data.mix else None
    if mix:
        by_source = [expand(source.paths) for source in mix.sources]
        data = replace(
            data, paths=tuple(path if is_remote(path) else glob.escape(path) for found in by_source for path in found)
        )
    if not data.paths:
        corpus = stdlib_corpus(cache_dir(data), min(CORPUS_VOCAB, model_vocab_size), show)
        if not data.heldout_paths:
            data = replace(data, heldout_paths=(str(corpus.folder / "heldout.npy"),))
            compressed = {"gzip -9": corpus.gzip_bytes, "xz -9": corpus.xz_bytes}
        path, tokenizer_path = (str(corpus.folder / name) for name in ("part-00000.npy", "tokenizer.json"))
        data = replace(data, paths=(path,), tokenizer=tokenizer_path)
    tokenizer = load(data.tokenizer, data.eos) if data.tokenizer else None
    if tokenizer and tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer!r} has {tokenizer.vocab_size:,} ids, the model a vocabulary of "
            f"{model_vocab_size:,}; give --model.vocab-size {tokenizer.vocab_size}"
        )
    vocab_size = tokenizer.vocab_size if tokenizer else model_vocab_size
    paths, apart = expand(data.paths), [named(path, HELDOUT) for path in data.heldout_paths]
    heldout = [(name, path) for name, pattern in apart for path in expand((pattern,), HELDOUT_FILE)]
    heldout_paths = tuple(path for _, path in heldout)
    metas = metas_beside((*paths, *heldout_paths))
    _check_apart(paths, heldout_paths, metas)
    check_vocabulary(metas, tokenizer, data.tokenizer)
    pages = cache_dir(data) / "pages", int(data.page_cache_gb * 1e9)
    files, heldout_files = (open_files(p, data.dtype, vocab_size, metas, *pages) for p in (paths, heldout_paths))
    eos_id = eos_id_of(data, tokenizer, next(iter(metas.items()), None), vocab_size)
    masks = open_masks(expand(data.label_mask_paths), files, *pages)
    check_vocab(files + heldout_files, vocab_size)
    pad_id = data.pad_id if data.pad_id is not None else eos_id or 0
    for flag, token in (("bos", data.bos_id), ("pad", pad_id)):
        if token is not None and token >= vocab_size:
            raise ValueError(f"--data.{flag}-id is {token}; it must be below {vocab_size:,}, the vocabulary")
    bounds = cache_dir(data) / "documents"
    tokens = TokenData(files, sizes.window, vocab_size, masks, eos_id, data.bos_id, pad_id, data.boundaries, bounds)
    hold_out = bool(data.heldout_fraction) and not heldout_files
    if mix:
        made = mixed(data, tokens, mix, [len(found) for found in by_source], sizes, steps, hold_out)
    else:
        made = training(data, tokens, sizes, hold_out)
    train = made.loader
    _check_size(train, files)
    sets = by_name(zip((name for name, _ in heldout), masked(heldout_files, data.heldout_mask_paths, metas), strict=True))
    sets = dict(made.heldout) or sets
    if eos_id is None and any(len(found) == 1 for found in sets.values()):
        raise ValueError("the held-out text is 1 token, and nothing predicts it; give --data.eos-id, or more text")
    read = [(f.path, f.dtype) for f in (*files, *heldout_files, *masks)]
    read += [(path, "bool") for path in expand(data.heldout_mask_paths)]
    read += [(str(located(data.tokenizer)), "json")] if tokenizer else []
    read += [(str(find_mix(data.mix)), "mix")] if mix else []
    names = tuple(source.name for source in mix.sources) if mix else ()
    return Source(train, sets, tokenizer, eos_id, compressed, names, tuple(read))


def _check(data: Data) -> None:
    if data.order_seed < 0:
        raise ValueError(f"--data.order-seed must not be negative, it is {data.order_seed}")
    if not 0 <= data.heldout_fraction < 1:
        raise ValueError(f"--data.heldout-fraction must be from 0 to below 1, it is {data.heldout_fraction}")
    if data.mix and (data.paths or data.label_mask_paths):
        raise ValueError("--data.mix names the token files of its sources; leave out --data.paths and --data.label-mask-paths")
    if not data.paths and not data.mix and (data.tokenizer or data.label_mask_paths):
        name = "tokenizer" if data.tokenizer else "label-mask-paths"
        raise ValueError(f"--data.{name} needs --data.paths; the default corpus has a tokenizer of its own")


def _check_apart(paths: tuple[str, ...], heldout_paths: tuple[str, ...], metas: Mapping[str, Meta]) -> None:
    """ValueError if what is to be held out would be trained on."""
    held_out = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, filterfalse(is_remote, heldout_paths))}
    if both := {*paths} & {*heldout_paths}:
        raise ValueError(f"{min(both)!r} is in --data.paths and in --data.heldout-paths; take it out of one")
    for path in paths:
        if held_out and not is_remote(path) and ((stat := os.stat(path)).st_dev, stat.st_ino) in held_out:
            raise ValueError(f"{path!r} is in --data.paths and in --data.heldout-paths; take it out of one")
        if Path(path).name == HELDOUT_FILE and (folder := folder_of(path)) in metas:
            raise ValueError(
                f"{path!r} in --data.paths is what the tokenizing command held out; train on {f'{folder}/part-*.npy'!r}, "
                "or give the file another name"
            )


def open_files(
    paths: Sequence[str], dtype: str, vocab_size: int, metas: Mapping[str, Meta], cache: Path | None = None, limit: int = 0
) -> tuple[TokenFile, ...]:
    """The token files; ``auto`` is what meta.json beside them says, or else OLMo-core's choice, if the file may be of it."""

    def opened(path: str) -> TokenFile:
        meta = metas.get(folder_of(path))
        auto = meta.dtype if meta else smallest_dtype(vocab_size)
        if is_megatron(path):
            auto = read_index(path).dtype
        elif is_table(path) and cache:
            auto = auto if dtype == "auto" else dtype
            path = converted(path, auto, cache.with_name("tables"))
        file = open_tokens(path, auto if dtype == "auto" else dtype, cache, limit)
        if dtype == "auto" and not meta and not is_megatron(path):
            check_type(file)
        return file

    return tuple(each(opened, paths))


def eos_id_of(data: Data, tokenizer: Tokenizer | None, beside: tuple[str, Meta] | None, vocab_size: int) -> int | None:
    """The end-of-document token: of the settings, the tokenizer, or as written beside the files; None if nobody knows."""
    known = tokenizer.eos_id if tokenizer else beside[1].vocabulary.eos_id if beside else None
    whose = f"of the tokenizer {data.tokenizer!r}" if tokenizer else f"in {f'{beside[0]}/meta.json'!r}" if beside else ""
    if known is not None and not 0 <= known < vocab_size:
        raise ValueError(
            f"the end-of-document token {whose} is {known}; it must be from 0 to below {vocab_size:,}, the vocabulary"
        )
    if data.eos_id is None:
        if known is None and data.mask_documents:
            raise ValueError(
                "--data.mask-documents needs the id of the end-of-document token, and no meta.json of the tokenizing command "
                f"is beside {data.paths[0]!r}; give --data.eos-id or --data.tokenizer"
            )
        return known
    if not 0 <= data.eos_id < vocab_size:
        raise ValueError(f"--data.eos-id is {data.eos_id}; it must be from 0 to below {vocab_size:,}, the vocabulary")
    if known not in (None, data.eos_id):
        raise ValueError(f"--data.eos-id is {data.eos_id}, and the end-of-document token {whose} is {known}; leave the id out")
    return data.eos_id


def _check_size(train: Loader | BucketLoader, files: tuple[TokenFile, ...]) -> None:
    length = train.sizes.window
    if len(train.instances) == 0:
        longest = max(files, key=lambda f: f.num_tokens)
        raise ValueError(
            f"the sequence length {length:,} is longer than every token file (the longest, {longest.path!r}, "
            f"has {longest.num_tokens:,} tokens); use at most {longest.num_tokens} (--recipe.sequence-length), or more data"
        )
    if train.num_instances >= 2**32 and isinstance(train, Loader) and train.order == "olmo-core":
        raise ValueError(
            f"{train.num_instances:,} windows are more than the 2^32 that OLMo-core's order can hold; use --data.order keyed"
        )
    if train.steps_per_epoch == 0:
        raise ValueError(
            f"a batch of {train.sizes.largest:,} windows is more than the {train.num_instances:,} of {length:,} "
            f"tokens in the training data; use a smaller --recipe.batch-size, a shorter --recipe.sequence-length, or more data"
        )


def masked(files: Sequence[TokenFile], mask_paths: Sequence[str], metas: Mapping[str, Meta]) -> list[TokenSet]:
    """The tokens of each file with its label mask, if there are any, and the bytes that the tokenizing command has counted."""
    masks = [read_tokens(mask) for mask in open_masks(expand(mask_paths), files)]
    found = []
    for i, file in enumerate(files):
        meta, tokens = metas.get(folder_of(file.path)), read_tokens(file)
        written = meta.num_bytes.get((os.path.basename(file.path), file.num_tokens)) if meta else None
        found.append(TokenSet(tokens, masks[i] if masks else None, written))
    return found
