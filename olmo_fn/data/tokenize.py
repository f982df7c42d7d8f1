"""``olmo-fn tokenize INPUT... --output DIR``: text to token files.

Writes ``part-00000.npy``, ... and ``heldout.npy`` (headerless token files), ``tokenizer.json`` and, last, ``meta.json``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import tyro

from olmo_fn.data.documents import chunks, documents, expand
from olmo_fn.data.encode import Encoder, encode_all, is_heldout
from olmo_fn.data.tokenizer import Tokenizer, byte_level, load, train_bpe
from olmo_fn.data.tokens import SIZES, Dtype, smallest_dtype
from olmo_fn.progress import progress


@dataclass(frozen=True)
class Tokenize:
    """Tokenize text, jsonl, jsonl.gz and parquet files for training."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files, globs and folders. A .jsonl, .jsonl.gz, .json.gz or .parquet has a document a line or row, any other file is one
    document of text."""
    output: str
    """Folder for the token files."""
    tokenizer: str = "bpe"
    """Path of a tokenizer.json; or byte: each byte a token; or bpe: learn a byte-pair encoding from the inputs."""
    vocab_size: int = 4096
    """Size of the vocabulary that bpe learns."""
    eos: str = ""
    """Name of the end-of-document token in a given tokenizer.json. Empty: the usual names are tried."""
    text_field: str = "text"
    """Field or column of the text in jsonl and parquet files."""
    workers: int = 0
    """Processes; 0: one a processor. The output is the same for any number."""
    heldout: float = 0.01
    """Part of the documents that goes to heldout.npy, chosen by their content."""
    heldout_inputs: tuple[str, ...] = ()
    """Files, globs and folders of which all goes to heldout.npy."""
    dtype: Dtype = "auto"
    """Integer type of the token files; auto: the smallest that holds the vocabulary."""
    part_tokens: int = 1 << 28
    """Begin a new part after this many tokens."""
    train_bytes: int = 100_000_000
    """Bytes of training text that bpe learns from, evenly out of all files."""
    overwrite: bool = False
    """Replace the token files in the output folder."""


def tokenize(config: Tokenize, show: bool = True) -> dict[str, Any]:
    """Write the token files of ``config``; what ``meta.json`` holds. ValueError for what cannot be done.

    The files move to the output folder when all is done, meta.json last: a folder without it is not complete.
    ``show`` shows the progress on a terminal.
    """
    command = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    config = replace(config, inputs=expand(config.inputs), heldout_inputs=expand(config.heldout_inputs))
    output = Path(config.output).expanduser()
    _check(config, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=output))
    except OSError as e:
        raise ValueError(f"cannot write to --output {config.output!r}: {e.strerror}") from None
    try:
        tokenizer = _tokenizer(config, show)
        tokenizer.save(work / "tokenizer.json")
        meta = {**_write(config, tokenizer, work, show), "command": command}
        (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for old in (output / "meta.json", *output.glob("part-*.npy"), output / "heldout.npy"):
            old.unlink(missing_ok=True)
        for new in sorted(work.iterdir(), key=lambda path: path.name == "meta.json"):
            new.replace(output / new.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return meta


def _check(config: Tokenize, output: Path) -> None:
    if not config.inputs:
        raise ValueError("no input; name the files, globs or folders to tokenize")
    if both := {*config.inputs} & {*config.heldout_inputs}:
        raise ValueError(f"{min(both)!r} is in the inputs and in --heldout-inputs; take it out of one")
    if not 0 <= config.heldout < 1:
        raise ValueError(f"--heldout is a part of the documents, from 0 to below 1, not {config.heldout}")
    for name in ("part_tokens", "train_bytes"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if config.workers < 0:
        raise ValueError(f"--workers must be at least 1, or 0 for one a processor, not {config.workers}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {config.output!r} is a file; give a folder")
    if output.exists() and not config.overwrite and any(not p.name.startswith(".tmp-") for p in output.iterdir()):
        raise ValueError(f"--output {config.output!r} is not empty; give another folder, or --overwrite its token files")


def _tokenizer(config: Tokenize, show: bool) -> Tokenizer:
    if config.tokenizer == "byte":
        tokenizer = byte_level()
    elif config.tokenizer == "bpe":
        with progress(f"learning a BPE of {config.vocab_size}", 1, show) as advance:
            tokenizer = train_bpe(_sample(config), config.vocab_size)
            advance(1, f"{tokenizer.vocab_size} tokens")
    else:
        tokenizer = load(config.tokenizer, config.eos)
    if config.dtype != "auto" and tokenizer.vocab_size > 256 ** SIZES[config.dtype]:
        fits = smallest_dtype(tokenizer.vocab_size)
        raise ValueError(f"--dtype {config.dtype} does not hold a vocabulary of {tokenizer.vocab_size:,}; {fits} does")
    return tokenizer


def _sample(config: Tokenize) -> Iterator[str]:
    """Training documents of about ``train_bytes``: the start of every file, or files spread evenly over very many."""
    left = config.train_bytes
    share = -(-left // len(config.inputs))
    spread = sorted(range(len(config.inputs)), key=lambda i: i * 2654435761 % 2**32)
    for file in (config.inputs[i] for i in spread):
        taken = 0
        for text in (t for chunk in chunks([file]) for t in documents(chunk, config.text_field)):
            if not is_heldout(text, config.heldout):
                yield text
                taken += len(text.encode())
            if taken >= min(share, left):
                break
        left -= taken
        if left <= 0:
            return


def _write(config: Tokenize, tokenizer: Tokenizer, work: Path, show: bool) -> dict[str, Any]:
    """Write the token files to ``work``; what meta.json says of them."""
    dtype = smallest_dtype(tokenizer.vocab_size) if config.dtype == "auto" else config.dtype
    encoder = Encoder(str(work / "tokenizer.json"), config.eos, config.text_field, config.heldout, dtype)
    training = ((encoder, chunk) for chunk in chunks(config.inputs))
    held_out = ((replace(encoder, heldout=1.0), chunk) for chunk in chunks(config.heldout_inputs))
    nothing = Counter(documents=0, tokens=0, bytes=0)
    counts: dict[str, Counter[str]] = {}
    part = 0
    with progress("tokenizing", sum(Path(f).stat().st_size for f in config.inputs + config.heldout_inputs), show) as advance:
        for chunk, sides in encode_all(chain(training, held_out), config.workers or os.cpu_count() or 1):
            for name, side in zip((f"part-{part:05}.npy", "heldout.npy"), sides, strict=True):
                if side.documents:
                    with open(work / name, "ab") as file:
                        side.ids.astype(side.ids.dtype.newbyteorder("<")).tofile(file)
                    count = counts.setdefault(name, Counter())
                    count.update(documents=side.documents, tokens=len(side.ids), bytes=side.num_bytes)
            part += counts.get(f"part-{part:05}.npy", nothing)["tokens"] >= config.part_tokens
            advance(chunk.size, f"{sum(count['tokens'] for count in counts.values()):,} tokens")
    parts = [count for name, count in counts.items() if name.startswith("part-")]
    if not parts:
        raise ValueError(f"no training documents in the {len(config.inputs)} input files; add text, or lower --heldout")
    return {
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "train": {key: sum(count[key] for count in parts) for key in nothing},
        "heldout": counts.get("heldout.npy", nothing),
        "files": dict(sorted(counts.items())),
    }


def train_command(config: Tokenize, meta: dict[str, Any]) -> str:
    """The command that trains on the token files."""
    flags = {"--data.paths": f"{config.output}/part-*.npy", "--data.tokenizer": f"{config.output}/tokenizer.json"}
    if config.eos:
        flags["--data.eos"] = config.eos
    if meta["heldout"]["tokens"]:
        flags["--data.heldout-paths"] = f"{config.output}/heldout.npy"
    return "python train.py olmo2-tiny " + " ".join(f"{flag} {shlex.quote(value)}" for flag, value in flags.items())


def run(config: Tokenize) -> int:
    """The command: write the token files, and say what they hold and how to train on them."""
    meta = tokenize(config)
    for side in ("train", "heldout"):
        n = meta[side]
        print(f"{side}: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens")
    print(train_command(config, meta))
    return 0
