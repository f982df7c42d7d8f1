"""``olmo-fn data inspect FILE…``: what a token file is. Its type, tokens and documents are found in the file itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from olmo_fn.data.meta import folder_of, read_meta
from olmo_fn.data.stores import head, is_remote
from olmo_fn.data.tokenizer import Tokenizer, byte_level, load
from olmo_fn.data.tokens import SIZES, Dtype, TokenFile, expand, open_tokens, read_tokens

LOOK = 1 << 20  # tokens that a guess rests on
LARGEST_VOCAB = 1 << 20
BARS = " ▏▎▍▌▋▊▉█"


class Known(NamedTuple):
    """A tokenizer that token files are often of."""

    name: str
    vocab_size: int
    eos_id: int


KNOWN = (
    Known("byte, of olmo-fn tokenize", 257, 256),
    Known("gpt2", 50_257, 50_256),
    Known("allenai/gpt-neox-olmo-dolma-v1_5", 50_280, 50_279),
    Known("allenai/dolma2-tokenizer", 100_278, 100_257),
    Known("Llama 2, Mistral", 32_000, 2),
    Known("Llama 3", 128_256, 128_001),
    Known("Qwen 2, Qwen 3", 151_936, 151_643),
    Known("Gemma", 262_144, 1),
)


@dataclass(frozen=True)
class Inspect:
    """Say what token files are: their type, tokens, documents and lengths, which tokenizer fits, and how they begin."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Token files or globs."""
    dtype: Dtype = "auto"
    """Integer type. auto: what meta.json beside them says, or else what the numbers look like."""
    eos_id: int | None = None
    """Id of the end-of-document token. None: that of the tokenizer, or else of the known one that fits best."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="PATH")] = ""
    """A tokenizer.json. Empty: the one beside the files, if there is one."""
    documents: int = 3
    """Documents whose beginning is printed."""
    chars: int = 200
    """Characters of each."""


class Found(NamedTuple):
    """What a file is."""

    file: TokenFile
    why: str
    """Where its type is known from."""
    largest: int
    """The largest id in the part that was looked at."""
    fits: tuple[Known, ...]
    """Known tokenizers that it may be of, the likeliest first."""
    eos_id: int | None
    lengths: np.ndarray
    """Tokens of each document; those behind the last end are none."""
    rest: int
    """Tokens behind the last end."""


def inspect(path: str, dtype: str = "auto", eos_id: int | None = None) -> Found:
    """What the token file at ``path`` is. ValueError for what is none."""
    meta = read_meta(folder_of(path))
    if dtype != "auto":
        why = "as asked"
    elif meta:
        dtype, why = meta.dtype, "as meta.json says"
    else:
        dtype, why = guess_dtype(path), "as its numbers look"
    file = open_tokens(path, dtype)
    head = read_tokens(file, 0, min(file.num_tokens, LOOK))
    fits = fitting_tokenizers(head)
    if eos_id is None:
        eos_id = meta.vocabulary.eos_id if meta else fits[0].eos_id if fits else None
    if eos_id is None:
        return Found(file, why, int(head.max()), fits, None, np.zeros(0, np.int64), file.num_tokens)
    ends = np.concatenate([start + np.flatnonzero(part == eos_id) + 1 for start, part in _parts(file)])
    lengths = np.diff(ends, prepend=0)
    return Found(file, why, int(head.max()), fits, eos_id, lengths, file.num_tokens - int(ends[-1] if len(ends) else 0))


def guess_dtype(path: str) -> str:
    """The integer type that the numbers of a file look like: the largest whose ids are all of a possible vocabulary.

    A file of bytes is told from one of uint16 by its high bytes, which in text are as any others.
    """
    remote = head(path) if is_remote(path) else None
    size = remote.size if remote else os.path.getsize(path)
    raw = np.frombuffer(remote.read(0, 8 * LOOK), np.uint8) if remote else np.fromfile(path, np.uint8, 8 * LOOK)
    for name in ("uint64", "uint32"):
        if size % SIZES[name] == 0 and len(ids := raw[: len(raw) // 8 * 8].view(name)) and ids.max() < LARGEST_VOCAB:
            return name
    pairs = raw[: len(raw) // 2 * 2].reshape(-1, 2)
    if size % 2 or len(pairs) < 16:
        return "uint8"
    low, high = (np.bincount(pairs[:, i], minlength=256) / len(pairs) for i in (0, 1))
    return "uint8" if np.abs(low - high).sum() / 2 < 0.2 else "uint16"


def fitting_tokenizers(ids: np.ndarray) -> tuple[Known, ...]:
    """The known tokenizers that ``ids`` may be of: none is beyond the vocabulary, and the end of a document comes up.

    The likeliest first: the smallest vocabulary.
    """
    largest, count = int(ids.max()), len(ids)
    possible = [known for known in KNOWN if largest < known.vocab_size <= 64 * largest]
    ended = [known for known in possible if 0 < (ids == known.eos_id).sum() <= count / 4]
    return tuple(sorted(ended, key=lambda known: known.vocab_size))


def histogram(lengths: np.ndarray, width: int = 40) -> str:
    """How many documents have lengths up to each power of two, as bars.

    >>> print(histogram(np.array([1, 2, 2, 7])))
      1 to 1                1  ████████████████████
      2 to 3                2  ████████████████████████████████████████
      4 to 7                1  ████████████████████
    """
    bins = np.bincount(np.floor(np.log2(np.maximum(lengths, 1))).astype(int))
    rows = []
    for i in range(int(np.flatnonzero(bins)[0]), len(bins)):
        eighths = round(8 * width * bins[i] / bins.max())
        bar = BARS[8] * (eighths // 8) + BARS[eighths % 8].strip()
        rows.append(f"  {f'{1 << i:,} to {(2 << i) - 1:,}':<18}{bins[i]:>5,}  {bar}".rstrip())
    return "\n".join(rows)


def describe(found: Found, tokenizer: Tokenizer | None, documents: int, chars: int) -> str:
    """What was found, in words."""
    file, lengths = found.file, found.lengths
    lines = [file.path, f"  type       {file.dtype}, {found.why}"]
    lines.append(f"  tokens     {file.num_tokens:,}, ids up to {found.largest:,}")
    fits = ", ".join(f"{known.name} ({known.vocab_size:,})" for known in found.fits) or "none that is known; give --tokenizer"
    lines.append(f"  tokenizer  may be {fits}")
    if found.eos_id is None or not len(lengths):
        what = "nothing known of their ends; give --eos-id" if found.eos_id is None else f"none ends with {found.eos_id}"
        lines.append(f"  documents  {what}")
    else:
        middle, longest = int(np.median(lengths)), int(lengths.max())
        rest = f", and {found.rest:,} tokens behind the last" if found.rest else ""
        lines.append(f"  documents  {len(lengths):,} that end with {found.eos_id}{rest}")
        lines.append(f"  lengths    median {middle:,}, mean {lengths.mean():,.1f}, longest {longest:,}")
        lines.append(histogram(lengths))
    ends = np.cumsum(lengths)
    for n in range(min(documents, len(lengths))):
        start, end = int(ends[n] - lengths[n]), int(ends[n])
        ids = read_tokens(file, start, min(end, start + 4 * chars + 16))
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids[: chars // 6 + 1]))
        cut = text[:chars] + (" …" if len(text) > chars or end - start > len(ids) else "")
        lines += [f"  document {n + 1} ({end - start:,} tokens)", *(f"    | {line}" for line in cut.splitlines())]
    return "\n".join(lines)


def run(args: Inspect) -> int:
    """The command."""
    for path in expand(args.files):
        tokenizer = tokenizer_of(path, args.tokenizer)
        found = inspect(path, args.dtype, args.eos_id if args.eos_id is not None or not tokenizer else tokenizer.eos_id)
        if tokenizer is None and found.fits and found.fits[0].vocab_size == 257:
            tokenizer = byte_level()
        if tokenizer and found.largest >= tokenizer.vocab_size:
            raise ValueError(
                f"{path!r}, read as {found.file.dtype}, has the id {found.largest:,}, and the tokenizer "
                f"{tokenizer.vocab_size:,} ids; it is of another one (--tokenizer), or of another type (--dtype)"
            )
        print(describe(found, tokenizer, args.documents, args.chars))
    return 0


def tokenizer_of(path: str, given: str) -> Tokenizer | None:
    """The tokenizer that is given, or the one beside the file."""
    beside = Path(path).parent / "tokenizer.json"
    if given:
        return load(given, "")
    return load(str(beside), "") if beside.is_file() else None


def _parts(file: TokenFile, size: int = 1 << 22) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, file.num_tokens, size):
        yield start, read_tokens(file, start, min(start + size, file.num_tokens))
