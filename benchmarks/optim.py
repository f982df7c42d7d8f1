"""Time the update of every optimizer; prints one JSON line each, AdamW's beside torch's fused one and a copy of as many bytes.

    python benchmarks/optim.py                 # AdamW on 100 M parameters
    python benchmarks/optim.py --all --params 20000000

AdamW reads parameter, gradient and two moments, and writes all but the gradient: 28 bytes a parameter in fp32. The copy
moves the same number of bytes, half of them read and half written. Programs take turns, so that all see the same
machine, and ratios are medians of those of the rounds. What is timed is ``Step.update``: the learning rate, the guard
against spikes, and every leaf.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from olmo_fn.train.environment import prepare_environment

SIDE = 2048


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"params": 100_000_000, "rounds": 9, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--all", action="store_true", help="every other optimizer as well, without a comparison")
    parser.add_argument("--cache", default="", help="compilation cache; a temporary one when not given")
    return parser.parse_args()


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print."""
    args = parse()
    prepare_environment()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(args.cache or folder))


def measure(args: argparse.Namespace, cache: Path) -> None:
    """All optimizers in this process."""
    import torch

    from olmo_fn import tree
    from olmo_fn.core.compile import compile, prepare_cache
    from olmo_fn.core.pipe import Transform, donate, grad, pipe
    from olmo_fn.optim import adafactor, adamw, dion, lion, muon, normuon, sgd
    from olmo_fn.optim.schedule_free import schedule_free_adamw
    from olmo_fn.train import machine

    torch.set_num_threads(args.threads)
    machine.keep_freed_memory()
    prepare_cache(cache)
    n = max(1, round(args.params / SIDE**2))
    generator = torch.Generator().manual_seed(0)
    grads = {str(i): torch.randn(SIDE, SIDE, generator=generator) for i in range(n)}
    metrics = {"loss": torch.ones(()), "grad_norm": torch.ones(())}
    count = n * SIDE**2

    def updater(transform: Transform) -> Callable[[], object]:
        step = pipe(lambda params, batch: None, grad(engine="func"), transform, donate(), compile())
        state = step.init(tree.map(torch.clone, grads))

        def run() -> None:
            nonlocal state
            state, _ = step.update(state, dict(grads), dict(metrics))

        return run

    fused_params = [torch.nn.Parameter(g.clone()) for g in grads.values()]
    for p, g in zip(fused_params, grads.values(), strict=True):
        p.grad = g
    fused = torch.optim.AdamW(fused_params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    source = torch.ones(28 * count // 8)
    target = torch.empty_like(source)
    runs = {"ours": updater(adamw(1e-3)), "fused": fused.step, "copy": lambda: target.copy_(source)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds + 2):
        for name in sorted(runs, key=lambda name, i=i: (list(runs).index(name) + i) % len(runs)):  # type: ignore[misc]
            took = seconds(runs[name])
            if i >= 2:  # compilation, first touch
                times[name].append(took)
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = lambda name: statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True))  # noqa: E731
    line = {
        "optimizer": "adamw",
        "params": count,
        "threads": args.threads,
        "rounds": args.rounds,
        **{f"{name}_ms": round(1000 * value, 1) for name, value in middle.items()},
        **{f"{name}_gb_per_s": round(28 * count / value / 1e9, 2) for name, value in middle.items()},
        "of_copy_bandwidth": round(ratio("copy"), 3),
        "fused_over_ours": round(ratio("fused"), 3),
    }
    print(json.dumps(line), flush=True)
    if not args.all:
        return
    runs.clear()
    fused_params.clear()
    others = {
        "lion": lion(1e-3),
        "sgd": sgd(1e-3, momentum=0.9),
        "adafactor": adafactor(1e-2),
        "schedule_free": schedule_free_adamw(1e-3),
        "muon": muon(1e-3, dtype=machine.compute_dtype("auto", torch.device("cpu"))),
        "normuon": normuon(1e-3, dtype=machine.compute_dtype("auto", torch.device("cpu"))),
        "dion": dion(1e-3, rank=0.25),
    }
    for name, transform in others.items():
        run = updater(transform)
        took = [seconds(run) for _ in range(5)][2:]
        print(json.dumps({"optimizer": name, "params": count, "ms": round(1000 * statistics.median(took), 1)}), flush=True)


if __name__ == "__main__":
    main()
