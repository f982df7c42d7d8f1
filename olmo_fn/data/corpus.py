"""The default corpus: real text that every machine has, the sources of Python's own standard library.

Tokenized on first use with a BPE learned from its training documents, then cached. A part of the documents is
held out, and their text is compressed with gzip and xz: what a language model has to beat.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from olmo_fn.data.tokenize import Tokenize, tokenize
from olmo_fn.fields import LARGEST

VERSION = 1  # raise it when the same sources would give other tokens
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELDOUT = 0.07
GENERATED = ("encodings/", "pydoc_data/")


class Corpus(NamedTuple):
    """The corpus in ``folder``: ``part-00000.npy`` to train on, ``heldout.npy``, ``tokenizer.json``, ``meta.json``.

    The held-out text, its documents joined without a separator, has ``gzip_bytes`` after ``gzip -9`` and ``xz_bytes`` after
    ``xz -9``.
    """

    folder: Path
    gzip_bytes: int
    xz_bytes: int


def stdlib_corpus(cache_dir: str | Path, vocab_size: int = 4096, show: bool = True) -> Corpus:
    """The standard library as a corpus under ``cache_dir``, made there with a progress bar if it is not yet.

    ValueError if ``vocab_size`` is below 257, or if this Python has no sources.
    """
    sources = read_sources(sysconfig.get_paths()["stdlib"])
    digest = sha256(f"{VERSION}".encode())
    for name, text in sources.items():
        digest.update(f"{name}\0{len(text)}\0".encode() + text.encode())
    name = f"stdlib-{platform.python_version()}-{vocab_size}-{digest.hexdigest()[:12]}"
    return tokenize_corpus(sources, Path(cache_dir) / name, vocab_size, show)


def read_sources(folder: str | Path) -> dict[str, str]:
    """The Python sources under ``folder`` by relative path, sorted, without tests and installed packages."""
    root = Path(folder)
    sources = {}
    for parent, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIP]
        for path in (Path(parent, name) for name in names):
            # _sysconfigdata is about the machine that Python was built on.
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
                with suppress(UnicodeDecodeError):
                    sources[path.relative_to(root).as_posix()] = path.read_bytes().decode("utf-8")
    if not sources:
        raise ValueError(f"this Python has no sources in {str(root)!r} to train on; give token files with --data.paths")
    return dict(sorted(sources.items()))


def is_heldout_source(name: str) -> bool:
    """Whether the document of this relative path is held out: the same in every version of Python.

    Generated files are always trained on: the tables of encodings/ are near-copies of each other and would be easy marks, and
    the manual in pydoc_data/ is one document as large as all others that are held out.
    """
    share = int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64
    return share < HELDOUT and not name.startswith(GENERATED)


def tokenize_corpus(sources: Mapping[str, str], folder: Path, vocab_size: int, show: bool = True) -> Corpus:
    """``sources`` tokenized in ``folder``, unless they are there already.

    The folder appears at once and whole: a killed process leaves nothing half-made, and of two at a time the second takes
    what the first made.
    """
    meta = folder / "meta.json"
    if not meta.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        except OSError as e:
            other = "name another folder with --data.cache-dir, or token files with --data.paths"
            raise ValueError(f"cannot keep the default corpus in {str(folder.parent)!r} ({e.strerror}); {other}") from None
        try:
            os.rename(_make(sources, work, vocab_size, show), folder)
        except OSError:
            if not meta.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    found = json.loads(meta.read_text(encoding="utf-8"))
    return Corpus(folder, found["gzip_bytes"], found["xz_bytes"])


def _make(sources: Mapping[str, str], work: Path, vocab_size: int, show: bool) -> Path:
    """A folder in ``work`` with the token files of ``sources``."""
    for name, text in sources.items():
        path = work / ("heldout" if is_heldout_source(name) else "train") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    heldout = (str(work / "heldout"),) if (work / "heldout").exists() else ()
    config = Tokenize((str(work / "train"),), str(work / "tokens"), "bpe", vocab_size, heldout=0.0, heldout_inputs=heldout)
    meta = tokenize(replace(config, workers=1, part_tokens=LARGEST, train_bytes=LARGEST), show)
    heldout_text = "".join(sources[name] for name in sorted(sources) if is_heldout_source(name)).encode()
    del meta["command"]  # of folders that go
    meta |= {"gzip_bytes": len(gzip.compress(heldout_text, 9)), "xz_bytes": len(lzma.compress(heldout_text, preset=9))}
    (work / "tokens" / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return work / "tokens"
