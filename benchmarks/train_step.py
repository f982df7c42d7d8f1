"""Time the training step at one size; prints one JSON line.

    python benchmarks/train_step.py --d-model 256 --n-layers 4 --n-heads 8 --hidden-size 768 --vocab-size 4096

The step is the library's own recipe (loss, gradient, clip, AdamW, spike guard, donation, compilation) on random tokens, a
new batch every step. ``warmup_s`` is from the first step's start to the second's end, cold with an empty compilation cache
and warm with the full one, each in a process of its own. ``mfu``
is against ``gemm_peak_gflops``, the rate of a 1024³ product in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from olmo_fn.train.environment import prepare_environment


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d-model": 256, "n-layers": 4, "n-heads": 8, "n-kv-heads": 0, "hidden-size": 768, "vocab-size": 4096}
    more = {"sequence-length": 512, "batch-size": 8, "steps": 8, "threads": os.cpu_count()}
    for name, default in (sizes | more).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--profile", action="store_true", help="print where the time of one step goes")
    parser.add_argument("--cache", default="", help="compilation cache; a temporary one, cold and then warm, when not given")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run the steps in this process."""
    prepare_environment()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    from olmo_fn.core.compile import prepare_cache
    from olmo_fn.models import transformer
    from olmo_fn.models.config import dense
    from olmo_fn.models.count import flops_per_token, num_params
    from olmo_fn.spec import init
    from olmo_fn.train import machine
    from olmo_fn.train.config import Config, Recipe, Run
    from olmo_fn.train.loss import CrossEntropy
    from olmo_fn.train.neighbours import Neighbours
    from olmo_fn.train.optimizers import AdamW
    from olmo_fn.train.recipe import recipe
    from olmo_fn.train.schedules import Constant

    torch.set_num_threads(args.threads)
    model = dense(
        args.d_model,
        args.n_layers,
        args.n_heads,
        args.hidden_size,
        vocab_size=args.vocab_size,
        n_kv_heads=args.n_kv_heads or args.n_heads,
    )
    cfg = Config(
        model,
        loss=CrossEntropy(z_loss=0.0),
        optim=AdamW(lr=1e-3),
        schedule=Constant(warmup=0),
        recipe=Recipe(args.batch_size, args.sequence_length, remat=args.remat, compile=args.compile),
        run=Run(steps=args.steps + 2),
    )
    cfg.check()
    if args.cache:
        prepare_cache(Path(args.cache))
    device, dtype = torch.device("cpu"), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    step = recipe(cfg, dtype)
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(model.vocab_size, (args.batch_size, args.sequence_length + 1), generator=generator)
        return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    state = step.init(init(transformer.specs(model), 0))
    start, times, losses, peaks = time.perf_counter(), [], [], []
    neighbours = Neighbours()
    with machine.warm_up() as warm:  # as the trainer does
        for i in range(args.steps + 2):
            data = batch()
            begin = time.perf_counter()
            state, metrics = step(state, data)
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter() - begin)
            neighbours()
            if i == 0:
                warm()
            if i == 1:
                warmup = time.perf_counter() - start
            if i > 0:  # between the steps, so that both see the same machine
                peaks.append(machine.gemm_rate(device, dtype, seconds=0.1))
    tokens_per_s = args.batch_size * args.sequence_length / statistics.median(times[2:])
    peak = statistics.median(peaks)
    if args.profile:
        data = batch()
        with torch.profiler.profile() as profile:
            step(state, data)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20), file=sys.stderr)
    return {
        "impl": "olmo_fn",
        "tokens_per_s": round(tokens_per_s, 1),
        "step_ms": round(1000 * statistics.median(times[2:]), 1),
        "step_ms_min": round(1000 * min(times[2:]), 1),
        "warmup_s": round(warmup, 2),
        "peak_rss_mb": round(machine.peak_memory(device) / 1e6, 1),
        "gemm_peak_gflops": round(peak / 1e9, 1),
        "mfu": round(tokens_per_s * flops_per_token(model, args.sequence_length) / peak, 4),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "params": num_params(model),
        **{k: v for k, v in vars(args).items() if k not in ("cache", "profile")},
    }


def main() -> None:
    """One run with the given cache, or a cold and a warm one of which the warm one is timed."""
    args = parse()
    if args.cache or not args.compile:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, *sys.argv[1:], "--cache", cache]
        cold, warm = (json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(2))
    warm["warmup_s"] = {"cold": cold["warmup_s"], "warm": warm["warmup_s"]}
    print(json.dumps(warm))


if __name__ == "__main__":
    main()
