"""Tokens a second of a data loader, in turn: ours, OLMo-core's, torch's over ``datasets``, and a bare gather from a memory map.

    python benchmarks/data.py --peer-python ENVIRONMENT/bin/python

The rows, their length and their order are alike: windows of token files, shuffled; the files are in the page cache. Also
what a step of training waits for its batch, from a disk and from a server with 50 ms of latency, while the loader reads
ahead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from olmo_fn.data.loader import labels_of
from olmo_fn.data.stores import PAGE
from olmo_fn.testing.object_server import serving

VOCAB = 50_000
PEER = """
import json, os, sys, time
folder, length, batch, batches, count = sys.argv[1], *map(int, sys.argv[2:])
import torch
from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDataset, TokenizerConfig
dataset = NumpyFSLDataset(*[f"{folder}/{i}.npy" for i in range(count)], sequence_length=length, pad_token_id=1, eos_token_id=0,
                          vocab_size=50000)
dataset.prepare()
loader = NumpyDataLoaderConfig(global_batch_size=batch * length, seed=0, work_dir=folder + "/work").build(dataset)
loader.reshuffle(epoch=1)
it = iter(loader)
next(it)
start = time.perf_counter()
for _ in range(batches):
    next(it)
print(json.dumps(batches * batch * length / (time.perf_counter() - start)), flush=True)
os._exit(0)  # its threads may still read, and end the process with an error
"""


def ours(folder: Path, length: int, batch: int, batches: int) -> float:
    """Tokens a second of the loader, read ahead in a thread as a run does."""
    from olmo_fn.data.prefetch import prefetch
    from olmo_fn.data.settings import Data
    from olmo_fn.data.sizes import constant_sizes
    from olmo_fn.data.source import open_data
    from olmo_fn.train.machine import keep_freed_memory

    data = Data((f"{folder}/*.npy",), dtype="uint16", eos_id=0, heldout_fraction=0.0, cache_dir=str(folder / "cache"))
    source = open_data(data, VOCAB, constant_sizes(batch, length))
    keep_freed_memory()  # as a run does after its first step
    steps = prefetch(source.train, 0, batches + 1)
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return batches * batch * length / (time.perf_counter() - start)


def gather(folder: Path, length: int, batch: int, batches: int, labels: bool = False) -> float:
    """Tokens a second of the same rows out of memory maps, into int64, with nothing else; or also ``labels`` of them."""
    maps = [np.memmap(path, np.uint16, "r") for path in sorted(folder.glob("*.npy"))]
    per = len(maps[0]) // length
    order = np.random.default_rng(0).permutation(per * len(maps))
    rows = [m[: per * length].reshape(per, length) for m in maps]
    start = time.perf_counter()
    for b in range(batches):
        numbers = order[b * batch : (b + 1) * batch]
        out = np.empty((batch, length), np.int64)
        for f, m in enumerate(rows):
            here = numbers // per == f
            out[here] = m[numbers[here] % per]
        if labels:
            labels_of(out)
    return batches * batch * length / (time.perf_counter() - start)


def torch_loader(folder: Path, length: int, batch: int, batches: int) -> float | None:
    """Tokens a second of torch's DataLoader over a table of ``datasets``; None where that is not installed."""
    try:
        import datasets
    except ImportError:
        return None
    import torch

    rows = np.concatenate([np.fromfile(path, np.uint16) for path in sorted(folder.glob("*.npy"))[:1]])
    columns = {"input_ids": list(rows[: len(rows) // length * length].reshape(-1, length))}
    table = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns), fingerprint="tokens")
    loader = iter(torch.utils.data.DataLoader(table.with_format("torch"), batch_size=batch, shuffle=True))
    next(loader)
    start, done = time.perf_counter(), 0
    for _ in range(batches):
        if next(loader, None) is None:
            break
        done += 1
    return done * batch * length / (time.perf_counter() - start)


def waits(folder: Path, url: str, step_seconds: float, steps: int, length: int, batch: int) -> float:
    """The part of the time that steps of ``step_seconds`` wait for their batches."""
    from olmo_fn.data.prefetch import prefetch
    from olmo_fn.data.settings import Data
    from olmo_fn.data.sizes import constant_sizes
    from olmo_fn.data.source import open_data

    names = sorted(path.name for path in folder.glob("*.npy"))
    paths = tuple(f"{url}/{name}" for name in names) if url else (f"{folder}/*.npy",)
    cache = tempfile.mkdtemp(dir=folder)
    data = Data(paths, dtype="uint16", eos_id=0, heldout_fraction=0.0, cache_dir=cache)
    source = open_data(data, VOCAB, constant_sizes(batch, length))
    assert source.train.num_instances * length * 2 > steps * batch * PAGE, "pages of one step would serve the next"
    waited = []
    batches = prefetch(source.train, 0, steps)
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        waited.append(time.perf_counter() - asked)
        time.sleep(step_seconds)
    later = waited[2:]  # nothing was read ahead of the first two
    return sum(later) / (sum(later) + step_seconds * len(later))


def main() -> None:
    """Measure, in turn; prints a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a step that a batch is needed for")
    parser.add_argument("--steps", type=int, default=20, help="such steps")
    parser.add_argument("--peer-python", default="", help="a Python with ai2-olmo-core 3.0.0")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(args.files):
            rng = np.random.default_rng(i)
            rng.integers(1, VOCAB, args.length * args.batch * args.batches // args.files * 5 // 4, dtype=np.uint16).tofile(
                folder / f"{i}.npy"
            )
        large = folder / "large"
        large.mkdir()
        for i in range(args.files):
            rng.integers(1, VOCAB, args.steps * args.batch * PAGE // args.files, dtype=np.uint16).tofile(large / f"{i}.npy")
        sizes = (args.length, args.batch, args.batches)
        for _ in range(args.rounds):
            for label, figure in {
                "gather": gather,
                "gather, labels": partial(gather, labels=True),
                "ours": ours,
                "datasets": torch_loader,
            }.items():
                if (value := figure(folder, *sizes)) is not None:
                    found.setdefault(label, []).append(value)
            if args.peer_python:
                command = [args.peer_python, "-c", PEER, name, *map(str, sizes), str(args.files)]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
                found.setdefault("olmo-core", []).append(json.loads(done.stdout.splitlines()[-1]))
        middle = {label: statistics.median(values) for label, values in found.items()}
        ratios = {f"ours / {label}": middle["ours"] / value for label, value in middle.items() if label != "ours"}
        waited = {"disk": waits(large, "", args.step, args.steps, args.length, args.batch)}
        with serving() as (objects, address):
            objects.delay = 0.05
            objects.update({path.name: path.read_bytes() for path in large.glob("*.npy")})
            waited["server"] = waits(large, address, args.step, args.steps, args.length, args.batch)
        print(json.dumps({"tokens_per_second": middle, "ratios": ratios, "waiting": waited}))
    sys.exit(0)


if __name__ == "__main__":
    main()
