"""Save and load rates of checkpoints in one process, beside plain safetensors and torch.distributed.checkpoint; one JSON line.

python benchmarks/checkpoint.py --folder /tmp --gb 1.2 --rounds 7

All save the same fp32 state, in turn, round by round, and end with the data on the disk (fsync; DCP does so by itself).
A load ends with tensors in memory of their own, as training needs them: safetensors' maps the file, so its tensors are
copied out of the map. Loads come right after the save, from the page cache; with --cold the cache is dropped before
(needs root), so they come from the disk. Rates are medians in GB/s; ratios are medians of the rounds' ratios, as the
machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from olmo_fn import tree as trees
from olmo_fn.checkpoint import load, save
from olmo_fn.tree import Tree


def state(gb: float) -> Tree:
    """Parameters and two moments of a model with layers of d 1024, and its embedding: matrices and small vectors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w_q": (1024, 1024), "w_o": (1024, 1024), "w_gate": (4096, 1024), "w_down": (1024, 4096), "norm": (1024,)}
    layer = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    layers = max(1, round((gb * 1e9 / 3 - 4 * 16384 * 1024) / layer))

    def params() -> Tree:
        blocks = {
            str(i): {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for i in range(layers)
        }
        return {"embed": torch.randn(16384, 1024, generator=generator), "blocks": blocks}

    return {"params": params(), "slots": {"m": params(), "v": params()}, "step": torch.tensor(1)}


def plain_save(flat: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors and fsync."""
    save_file(flat, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def drop_cache() -> None:
    """Forget what the page cache holds of clean files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def measure(tree: Tree, folder: Path, cold: bool) -> dict[str, float]:
    """Seconds of each save and load, once."""
    flat, seconds = trees.flatten(tree), {}

    def timed(name: str, job: Callable[[], object]) -> None:
        if cold and name.endswith("load"):
            drop_cache()
        start = time.perf_counter()
        job()
        seconds[name] = time.perf_counter() - start

    def dcp_load() -> None:
        dcp.load({name: torch.empty_like(leaf) for name, leaf in flat.items()}, checkpoint_id=folder / "dcp", no_dist=True)

    jobs = {
        "plain": (
            lambda: plain_save(flat, folder / "plain"),
            lambda: {name: leaf.clone() for name, leaf in load_file(folder / "plain").items()},
        ),
        "ours": (lambda: save(tree, folder, step=1), lambda: load(folder / "step1")),
        "dcp": (lambda: dcp.save(flat, checkpoint_id=folder / "dcp", no_dist=True), dcp_load),
    }
    for name, (save_job, load_job) in jobs.items():
        timed(f"{name}_save", save_job)
        timed(f"{name}_load", load_job)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()
    return seconds


def main() -> None:
    """Measure, round by round, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to write; a filesystem with room for the state")
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each load")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    tree = state(args.gb)
    nbytes = sum(leaf.nbytes for _, leaf in trees.items(tree))
    rounds = []
    for _ in range(args.rounds + 1):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rounds.append(measure(tree, Path(folder), args.cold))
    rounds = rounds[1:]  # the first warms up
    line: dict[str, object] = {"gb": round(nbytes / 1e9, 2), "folder": args.folder, "cold": args.cold, "rounds": args.rounds}
    line |= {f"{name}_gb_s": round(median(nbytes / 1e9 / r[name] for r in rounds), 2) for name in rounds[0]}
    for what, other in (("save", "plain"), ("load", "plain"), ("save", "dcp"), ("load", "dcp")):
        ratios = sorted(r[f"{other}_{what}"] / r[f"ours_{what}"] for r in rounds)
        line[f"{what}_ratio_to_{other}"] = round(median(ratios), 2)
        line[f"{what}_ratio_to_{other}_range"] = [round(ratios[0], 2), round(ratios[-1], 2)]
    print(json.dumps(line))


if __name__ == "__main__":
    main()
