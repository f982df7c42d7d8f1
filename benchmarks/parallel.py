"""Two processes with one core each against one process with one core: tokens/s and memory; prints a JSON line.

    python benchmarks/parallel.py --d-model 512 --n-layers 8 --n-heads 8 --hidden-size 2048 --vocab-size 8192 --batch-size 4

Every process has the same number of tokens. The modes run in turn, ``--rounds`` times; the figures are medians. ``memory`` is
what a rank has beyond a process that has only loaded the library, and its ratio is to that of the one process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from olmo_fn.launch.exit_rank import exit_rank
from olmo_fn.launch.local import launch
from olmo_fn.train.environment import prepare_environment

MODES = {"one": {}, "ddp": {"dp_replicate": 2}, "fsdp": {"dp_shard": 2}, "zero2": {"dp_shard": 2}, "rows": {"dp_shard": 2}}
SIZES = {"d-model": 512, "n-layers": 8, "n-heads": 8, "hidden-size": 2048, "vocab-size": 8192, "batch-size": 4}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (SIZES | {"sequence-length": 512, "steps": 5, "rounds": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument(
        "--optim", choices=("adamw", "muon"), default="adamw", help="muon's steps are shared out among fsdp's ranks"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--rank-of", choices=MODES, default="", help="be a rank of a mode and write what it measures to --out")
    parser.add_argument("--out", default="")
    parser.add_argument("--cache", default="")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """One rank: warm up, time the steps, write the figures."""
    prepare_environment()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from olmo_fn.core.compile import compile, prepare_cache
    from olmo_fn.core.pipe import clip, donate, grad, pipe
    from olmo_fn.launch.process import init_process_group, rendezvous
    from olmo_fn.mesh.connect import connect
    from olmo_fn.mesh.mesh import Mesh
    from olmo_fn.mesh.placement import Rules
    from olmo_fn.models import transformer
    from olmo_fn.models.config import dense
    from olmo_fn.optim import adamw, muon, partition
    from olmo_fn.parallel.shard import shard
    from olmo_fn.spec import init
    from olmo_fn.train.machine import warm_up

    torch.set_num_threads(1)
    process = rendezvous()
    if process.size > 1:
        init_process_group(process)
    prepare_cache(Path(args.cache) / f"rank{process.rank}")
    model = dense(args.d_model, args.n_layers, args.n_heads, args.hidden_size, vocab_size=args.vocab_size)
    specs, dtype = transformer.specs(model), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    layout = []
    if process.size > 1:
        rules = {"zero2": Rules(keep_gathered=True), "rows": Rules(exchanged=("embed",))}
        layout = [shard(connect(Mesh(**MODES[args.rank_of])), specs, rules.get(args.rank_of, Rules()))]
    engine, optim = grad("tape", args.remat, dtype), adamw(1e-3)
    if args.optim == "muon":
        optim = partition({"matrix": muon(1e-3, dtype=dtype), "default": adamw(1e-3)}, specs)
    step = pipe(transformer.loss(model), engine, clip(1.0), optim, *layout, donate(), compile())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = step.init(step.execution.layout.placement.init(0) if layout else init(specs, 0))
    generator, times = torch.Generator().manual_seed(0), []
    rows = args.batch_size * process.size
    with warm_up() as warm:  # as the trainer does
        for _ in range(args.steps + 2):
            ids = torch.randint(model.vocab_size, (rows, args.sequence_length + 1), generator=generator)
            batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
            start = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics["loss"])
            times.append(time.perf_counter() - start)
            if len(times) == 1:
                warm()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = {"step": statistics.median(times[2:]), "rows": rows, "memory": (peak - before) * 1024, "loss": loss}
    Path(args.out, f"rank{process.rank}.json").write_text(json.dumps(line))


def run(args: argparse.Namespace, mode: str, cache: str) -> dict[str, float]:
    """The figures of one mode: tokens/s of all its ranks, and the memory of the largest."""
    with tempfile.TemporaryDirectory() as out:
        command = [__file__, *sys.argv[1:], "--rank-of", mode, "--out", out, "--cache", cache]
        if mode == "one":
            subprocess.run([sys.executable, *command], check=True)
        elif launch(command, 2):
            raise SystemExit(f"mode {mode} failed")
        ranks = [json.loads(path.read_text()) for path in Path(out).glob("rank*.json")]
    seconds = max(rank["step"] for rank in ranks)
    tokens = ranks[0]["rows"] * args.sequence_length
    return {"tokens_per_s": tokens / seconds, "memory": max(rank["memory"] for rank in ranks), "loss": ranks[0]["loss"]}


def main() -> None:
    """Run all modes in turn and print one line."""
    args = parse()
    if args.rank_of:
        with exit_rank():
            measure(args)
        return
    with tempfile.TemporaryDirectory() as cache:
        for mode in args.modes:  # compile first
            run(args, mode, cache)
        rounds = [{mode: run(args, mode, cache) for mode in args.modes} for _ in range(args.rounds)]
    line: dict[str, object] = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in SIZES}
    for mode in args.modes:
        ratios = [found[mode]["tokens_per_s"] / found["one"]["tokens_per_s"] for found in rounds]
        memory = [found[mode]["memory"] / found["one"]["memory"] for found in rounds]
        line[mode] = {
            "tokens_per_s": round(statistics.median(found[mode]["tokens_per_s"] for found in rounds), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_per_round": [round(ratio, 3) for ratio in ratios],
            "memory_mb": round(statistics.median(found[mode]["memory"] for found in rounds) / 1e6, 1),
            "memory_ratio": round(statistics.median(memory), 3),
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
