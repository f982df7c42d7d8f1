"""From the settings to the data of a run: what to train on, what to hold out, and how to count its bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from olmo_fn.data.corpus import stdlib_corpus
from olmo_fn.data.instances import Instances
from olmo_fn.data.instances.documents import MaskedDocuments
from olmo_fn.data.loader import Loader
from olmo_fn.data.meta import Meta, check_vocabulary, read_meta
from olmo_fn.data.settings import Data, cache_dir
from olmo_fn.data.sizes import Sizes
from olmo_fn.data.tokenizer import Tokenizer, load
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

CORPUS_VOCAB = 4096
HELDOUT_TOKENS = 1 << 22  # the most that a fraction of the data holds out


@dataclass(frozen=True)
class Source:
    """The data of a run."""

    train: Loader
    heldout: np.ndarray
    """Tokens to evaluate on, (N,) of an unsigned type; N is 0 when nothing is held out."""
    tokenizer: Tokenizer | None
    eos_id: int | None
    """The end-of-document token, if it is known."""
    heldout_bytes: int | None
    """UTF-8 bytes of the text behind ``heldout``, without the end-of-document tokens, which a model pays for all the same.
    None if neither the tokenizing command wrote them down nor ids of the tokenizer tell them."""
    heldout_compressed: Mapping[str, int] = field(default_factory=dict)
    """Bytes of that text after gzip and xz, for the default corpus."""
    files: tuple[tuple[str, str], ...] = ()
    """Path and type of every file that all this comes from: tokens, held-out tokens, label masks, tokenizer."""

    def bytes_of(self, num_tokens: int) -> int | None:
        """UTF-8 bytes of the text behind the first ``num_tokens`` of ``heldout``; None if they are not known."""
        if num_tokens >= len(self.heldout):
            return self.heldout_bytes
        return self.tokenizer.count_bytes(self.heldout[:num_tokens]) if self.tokenizer else None


def open_data(data: Data, model_vocab_size: int, sizes: Sizes, show: bool = True) -> Source:
    """Open and check the data for batches of ``sizes``.

    Without ``data.paths`` this makes or finds the default corpus, with a progress bar if ``show``. ValueError, one line, for
    whatever cannot be trained on.
    """
    _check(data)
    compressed = {}
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
    paths, heldout_paths = expand(data.paths), expand(data.heldout_paths, HELDOUT_FILE)
    folders = {Path(path).parent: None for path in (*paths, *heldout_paths)}
    metas = {folder: meta for folder in folders if (meta := read_meta(folder))}
    _check_apart(paths, heldout_paths, metas)
    check_vocabulary(metas, tokenizer, data.tokenizer)
    files, heldout_files = (_open(p, data.dtype, vocab_size, metas) for p in (paths, heldout_paths))
    eos_id = _eos_id(data, tokenizer, next(iter(metas.items()), None), vocab_size)
    masks = open_masks(expand(data.label_mask_paths), files)
    check_vocab(files + heldout_files, vocab_size)
    instances = data.instances.build(files, masks, sizes.window, vocab_size, eos_id)
    if data.mask_documents and eos_id is not None:
        instances = MaskedDocuments(instances, eos_id)
    count = 0
    if data.heldout_fraction and not heldout_files:  # at least one
        most = max(1, HELDOUT_TOKENS // sizes.window)
        count = min(max(1, int(len(instances) * data.heldout_fraction)), most)
    train = Loader(instances, sizes, data.order_seed, len(instances) - count)
    _check_size(train, files)
    if heldout_files:
        heldout = np.concatenate([read_tokens(file) for file in heldout_files])
    else:
        heldout = _last(instances, count, smallest_dtype(vocab_size))
    if len(heldout) == 1 and eos_id is None:
        raise ValueError("the held-out text is 1 token, and nothing predicts it; give --data.eos-id, or more text")
    num_bytes = _written_bytes(heldout_files, metas)
    if num_bytes is None and tokenizer:
        num_bytes = tokenizer.count_bytes(heldout)
    read = [*((f.path, f.dtype) for f in (*files, *heldout_files, *masks)), *([(data.tokenizer, "json")] if tokenizer else [])]
    return Source(train, heldout, tokenizer, eos_id, num_bytes, compressed, tuple(read))


def _check(data: Data) -> None:
    if data.order_seed < 0:
        raise ValueError(f"--data.order-seed must not be negative, it is {data.order_seed}")
    if not 0 <= data.heldout_fraction < 1:
        raise ValueError(f"--data.heldout-fraction must be from 0 to below 1, it is {data.heldout_fraction}")
    if not data.paths and (data.tokenizer or data.label_mask_paths):
        name = "tokenizer" if data.tokenizer else "label-mask-paths"
        raise ValueError(f"--data.{name} needs --data.paths; the default corpus has a tokenizer of its own")


def _check_apart(paths: tuple[str, ...], heldout_paths: tuple[str, ...], metas: Mapping[Path, Meta]) -> None:
    """ValueError if what is to be held out would be trained on."""
    held_out = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, heldout_paths)}
    for path in paths:
        if held_out and ((stat := os.stat(path)).st_dev, stat.st_ino) in held_out:
            raise ValueError(f"{path!r} is in --data.paths and in --data.heldout-paths; take it out of one")
        if Path(path).name == HELDOUT_FILE and (folder := Path(path).parent) in metas:
            raise ValueError(
                f"{path!r} in --data.paths is what the tokenizing command held out; train on {str(folder / 'part-*.npy')!r}, "
                "or give the file another name"
            )


def _open(paths: tuple[str, ...], dtype: str, vocab_size: int, metas: Mapping[Path, Meta]) -> tuple[TokenFile, ...]:
    """The token files; ``auto`` is what meta.json beside them says, or else OLMo-core's choice, if the file may be of it."""
    files = []
    for path in paths:
        meta = metas.get(Path(path).parent)
        auto = meta.dtype if meta else smallest_dtype(vocab_size)
        files.append(open_tokens(path, auto if dtype == "auto" else dtype))
        if dtype == "auto" and not meta:
            check_type(files[-1])
    return tuple(files)


def _eos_id(data: Data, tokenizer: Tokenizer | None, beside: tuple[Path, Meta] | None, vocab_size: int) -> int | None:
    """The end-of-document token: of the settings, the tokenizer, or as written beside the files; None if nobody knows."""
    known = tokenizer.eos_id if tokenizer else beside[1].vocabulary.eos_id if beside else None
    whose = f"of the tokenizer {data.tokenizer!r}" if tokenizer else f"in {str(beside[0] / 'meta.json')!r}" if beside else ""
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


def _written_bytes(files: tuple[TokenFile, ...], metas: Mapping[Path, Meta]) -> int | None:
    """The bytes of the text of ``files`` that the tokenizing command counted, if it wrote all of them."""
    paths = [(Path(file.path), file.num_tokens) for file in files]
    found = [metas[path.parent].num_bytes.get((path.name, n)) if path.parent in metas else None for path, n in paths]
    return sum(n for n in found if n is not None) if found and None not in found else None


def _check_size(train: Loader, files: tuple[TokenFile, ...]) -> None:
    length = train.sizes.window
    if len(train.instances) == 0:
        longest = max(files, key=lambda f: f.num_tokens)
        raise ValueError(
            f"the sequence length {length:,} is longer than every token file (the longest, {longest.path!r}, "
            f"has {longest.num_tokens:,} tokens); use at most {longest.num_tokens} (--recipe.sequence-length), or more data"
        )
    if train.num_instances >= 2**32:
        raise ValueError(f"{train.num_instances:,} windows are more than the 2^32 that the order can hold")
    if train.steps_per_epoch == 0:
        raise ValueError(
            f"a batch of {train.sizes.largest:,} windows is more than the {train.num_instances:,} of {length:,} "
            f"tokens in the training data; use a smaller --recipe.batch-size, a shorter --recipe.sequence-length, or more data"
        )


def _last(instances: Instances, count: int, dtype: str) -> np.ndarray:
    """The tokens of the last ``count`` instances, a few instances at a time in memory as int64."""
    numbers = np.arange(len(instances) - count, len(instances))
    pieces = (instances.read(numbers[i : i + 64])["input_ids"].reshape(-1).astype(dtype) for i in range(0, count, 64))
    return np.concatenate([np.zeros(0, dtype), *pieces])
