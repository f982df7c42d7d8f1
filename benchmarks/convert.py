"""Memory and time of converting a made-up Hugging Face directory to a run and back, each in a process of its own; JSON lines.

python benchmarks/convert.py --folder /tmp --gb 3 --dtype bfloat16

The model is an OLMo 2 of OLMo-2-32B's widths (d 5,120, feed-forward 27,648), of as many layers as fit into so many GB of bf16,
and a vocabulary of ``--vocab``; 100,352 is that of the release. ``peak`` is the most memory that was resident in the process
(ru_maxrss), ``base`` that after its imports, ``largest`` the largest tensor in fp32. A file that is read is not counted, as
none is mapped.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.cli import main as cli
from olmo_fn.formats.huggingface import DTYPES, write_directory
from olmo_fn.models import transformer
from olmo_fn.models.config import Model, dense


def made_up(gb: float, vocab: int) -> Model:
    """A model of about so many GB in bf16."""
    block = 2 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648)
    layers = max(1, round((gb * 1e9 - 2 * 2 * vocab * 5120) / block))
    return dense(5120, layers, 40, 27648, n_kv_heads=8, vocab_size=vocab)


def weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Numbers of no meaning, a parameter at a time."""
    for path, spec in tree.items(transformer.specs(model)):
        rows = torch.arange(spec.shape[0], dtype=torch.float32) / spec.shape[0]
        yield path, rows.view(-1, *[1] * (len(spec.shape) - 1)).expand(spec.shape)


def measured(words: list[str]) -> None:
    """Run a command in this process, and print what it took."""
    base, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    code = cli.main(words)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"base_gb": base / 1e6, "peak_gb": peak / 1e6, "seconds": round(seconds, 1), "exit": code}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default=None, help="where the files go; they are deleted")
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--vocab", type=int, default=100_352)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--measure", nargs="*")
    args = parser.parse_args()
    if args.measure:
        measured(args.measure)
        return
    model = made_up(args.gb, args.vocab)
    largest = max(spec.size for _, spec in tree.items(transformer.specs(model)))
    beside = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
    try:
        write_directory(beside / "hf", model, weights(model), DTYPES[args.dtype])
        size = sum(file.stat().st_size for file in (beside / "hf").iterdir())
        for way, source, target in (("from-hf", "hf", "run"), ("to-hf", "run", "out")):
            words = ["--measure", "convert", way, str(beside / source), str(beside / target)]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({"way": way, "dtype": args.dtype, "gb": size / 1e9, "largest_gb": 4 * largest / 1e9, **found}))
            if way == "from-hf":
                shutil.rmtree(beside / "hf")
    finally:
        shutil.rmtree(beside)


if __name__ == "__main__":
    main()
