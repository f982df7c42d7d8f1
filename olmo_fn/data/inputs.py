"""Which files are text to tokenize, and how each is read: by the ending of its name, in any case of letters."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Any, NamedTuple

from olmo_fn.data.tokens import looks_like_text, matches

LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc", ".arrows")
CSV = (".csv", ".tsv")
NOT_READ = (".orc", ".avro", ".xlsx", ".zip", ".tar", ".tgz", ".7z", ".lz4", ".npy")
HEAD = 8192  # bytes that tell whether a file is text
LONG = 1 << 20


class Inputs(NamedTuple):
    """The files to tokenize, sorted, each once; and what was left out of folders: reasons by path."""

    files: tuple[str, ...]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """In words, by ending."""
        counts = Counter((kind(path) == "text", "".join(endings(path)) or "without an ending") for path in self.files)
        parts = []
        for whole, what in ((False, "a document a line or row"), (True, "each one document")):
            if names := [f"{n:,} {name}" for (one, name), n in sorted(counts.items()) if one == whole]:
                parts.append(f"{', '.join(names)} ({what})")
        for reason in sorted({*self.left_out.values()}):
            names = [os.path.basename(path) for path, why in self.left_out.items() if why == reason]
            parts.append(f"left out: {', '.join(names[:3])}{f' and {len(names) - 3:,} more' * (len(names) > 3)} ({reason})")
        return "; ".join(parts)


def expand(inputs: Iterable[str]) -> Inputs:
    """The files that ``inputs`` name: files, globs, and folders with all text in them, also behind links.

    Left out of folders are hidden files, READMEs, and what is no text. ValueError when an input has no file, or is a file of
    a format that is not read.
    """
    files: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in inputs:
        place = os.path.expanduser(name)
        if os.path.isdir(place):
            reasons = _reasons(place)
            found = [path for path, reason in reasons.items() if not reason]
            left_out |= {path: reason for path, reason in sorted(reasons.items()) if reason}
            nothing = "the folder has no text in it"
        else:
            found = matches(name)
            nothing = "not a regular file" if os.path.exists(place) else "no such file, and no file matches it as a pattern"
            if unread := [path for path in found if endings(path)[0] in NOT_READ]:
                raise ValueError(
                    f"input {unread[0]!r}: {endings(unread[0])[0]} files are not read; write a JSON object a line as .jsonl"
                )
        if not found:
            raise ValueError(f"input {name!r}: {nothing}")
        files |= {os.path.realpath(path): path for path in found}
    return Inputs(tuple(sorted(files.values())), left_out)


def endings(path: str) -> tuple[str, str]:
    """The ending that says what a file is, and that of its compression, in small letters; empty where there is none.

    >>> endings("a/B.JSONL"), endings("b.v2.json.gz"), endings("README.zst")
    (('.jsonl', ''), ('.json', '.gz'), ('', '.zst'))
    """
    name, last = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(name)[1], last) if last in _READERS else (last, "")


def kind(path: str) -> str:
    """How a file holds documents: ``lines``, a JSON object each; ``rows`` of a table, or of ``csv``; ``text``, which is one."""
    ending = endings(path)[0]
    return "lines" if ending in LINES else "rows" if ending in PARQUET + ARROW else "csv" if ending in CSV else "text"


@contextmanager
def opened(path: str) -> Iterator[tuple[Any, BufferedReader]]:
    """The file, decompressed, and the file on disk, whose position says how far that is read."""
    with open(path, "rb") as raw:
        yield _READERS[endings(path)[1]](raw), raw


def _zstd(raw: BufferedReader) -> BufferedReader:
    try:
        import pyarrow
    except ImportError:
        raise ValueError("reading .zst needs pyarrow: pip install 'olmo-fn[parquet]'") from None
    return BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))


_READERS: dict[str, Callable[[BufferedReader], Any]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def _reasons(folder: str) -> dict[str, str]:
    """For each file under ``folder`` why it is left out, empty if it is not.

    Of a dataset that Hugging Face's ``datasets`` has saved there, its shards are read. ValueError for one with several splits.
    """
    found = list(_walk(folder))
    own: dict[str, str] = {}
    for path in found:
        parent, name = os.path.split(path)
        splits = _read_json(path).get("splits") if name == "dataset_dict.json" else None
        if splits and len(splits) > 1:
            hint = f"name one: {os.path.join(parent, str(splits[0]))}"
            raise ValueError(f"the folder {parent!r} has the splits {', '.join(splits)}; {hint}")
        if name == "state.json" and (shards := _read_json(path).get("_data_files")):
            beside = [other for other in found if os.path.dirname(other) == parent]
            named = [os.path.join(parent, shard["filename"]) for shard in shards]
            if missing := {*named} - {*beside}:
                raise ValueError(f"the dataset in {parent!r} has the shard {min(missing)!r}, which is not there")
            own |= {other: "" if other in named else "no shard of the dataset" for other in beside}
        elif name == "dataset_dict.json":
            own[path] = "no shard of the dataset"
    return {path: own[path] if path in own else _unfit(path) for path in found}


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _unfit(path: str) -> str:
    """Why a file of a folder is left out; empty if it is not."""
    name = os.path.basename(path).lower()
    if name.startswith("."):
        return "hidden"
    if name.startswith("readme"):
        return "README"
    if not os.path.isfile(path):
        return "not a regular file"
    ending = endings(path)[0]
    if ending in NOT_READ:
        return f"{ending} is not read"
    if ending != ".json" and kind(path) != "text":
        return ""
    try:
        with opened(path) as (file, _):
            head = file.readline(LONG) if ending == ".json" else file.read(HEAD)
    except Exception as e:  # each decompressor has errors of its own
        raise ValueError(f"cannot read {path!r}: {e}") from None
    if ending != ".json":
        return "" if looks_like_text(head) else "not UTF-8 text"
    try:
        return "" if len(head) == LONG or isinstance(json.loads(head), dict) else "not a JSON object a line"
    except (ValueError, RecursionError):
        return "not a JSON object a line"


def _walk(folder: str) -> Iterator[str]:
    """All files under ``folder``, links followed; and the hidden folders, into which it does not go."""
    seen = set()

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename!r}: {error.strerror}") from None

    for parent, folders, names in os.walk(os.path.normpath(folder), onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = () if real in seen else sorted({*folders} - {*hidden})
        if real not in seen:
            yield from (os.path.join(parent, name) for name in (*names, *hidden))
        seen.add(real)
