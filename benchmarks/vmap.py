"""Time K small runs at once (`olmo_fn.research.many`) against K one after the other; prints one JSON line.

    python benchmarks/vmap.py --runs 4 --d-model 32 --compile

The runs one after the other are the library's best for one run (engine tape, donation; with ``--compile`` compiled stages);
those at once are one vmapped step (engine func, donation; with ``--compile`` one compiled program). Every round times
each of them once, in turn, so that all see the same machine; times are medians over the rounds, in ms for a step of all K runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from olmo_fn.train.environment import prepare_environment


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d-model": 32, "n-layers": 2, "n-heads": 2, "hidden-size": 64, "vocab-size": 256}
    for name, default in (sizes | {"sequence-length": 32, "batch-size": 8, "runs": 4, "rounds": 30, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="time the compiled forms, too; compiling takes minutes")
    return parser.parse_args()


def main() -> None:
    """Build the steps, warm each up, and time them in turn."""
    args = parse()
    prepare_environment()
    import torch

    from olmo_fn.core import compile as compilation
    from olmo_fn.core.pipe import Transform, clip, donate, grad, pipe, skip_spikes
    from olmo_fn.core.step import State, Step
    from olmo_fn.models import transformer
    from olmo_fn.models.config import dense
    from olmo_fn.optim import adamw
    from olmo_fn.optim.schedules import warmup_cosine
    from olmo_fn.research import compiled, many, stack
    from olmo_fn.spec import init
    from olmo_fn.train import machine

    torch.set_num_threads(args.threads)
    machine.keep_freed_memory()
    if args.compile:
        compilation.prepare_cache(Path(tempfile.mkdtemp()))
    model = dense(args.d_model, args.n_layers, args.n_heads, args.hidden_size, vocab_size=args.vocab_size)
    ids = torch.randint(args.vocab_size, (args.batch_size, args.sequence_length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.roll(-1, dims=1)}

    def step_of(gradient: Transform, *more: Transform) -> Step:
        lr = warmup_cosine(3e-3, 10, 1000)
        return pipe(transformer.loss(model, z_loss=1e-5), gradient, clip(1.0), adamw(lr), skip_spikes(), *more)

    def starts(step: Step) -> list[State]:
        return [step.init(init(transformer.specs(model), seed)) for seed in range(args.runs)]

    def in_turn(step: Step) -> Callable[[], None]:
        states = starts(step)

        def run() -> None:
            for i, state in enumerate(states):
                states[i], _ = step(state, batch)

        return run

    def at_once(step: Step, whole: bool) -> Callable[[], None]:
        state, run_all = stack(starts(step)), many(step)
        if whole:
            run_all = compiled(run_all, state, batch)

        def run() -> None:
            nonlocal state
            state, _ = run_all(state, batch)

        return run

    ways = {"in_turn": in_turn(step_of(grad(), donate())), "at_once": at_once(step_of(grad("func"), donate()), whole=False)}
    if args.compile:
        ways["in_turn_compiled"] = in_turn(step_of(grad(), donate(), compilation.compile()))
        ways["at_once_compiled"] = at_once(step_of(grad("func")), whole=True)
    warmup, times = {}, {name: [] for name in ways}
    for name, run in ways.items():
        begin = time.perf_counter()
        run()
        run()
        warmup[name] = round(time.perf_counter() - begin, 1)
    for _ in range(args.rounds):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - begin))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {"speedup": median["in_turn"] / median["at_once"]}
    if args.compile:
        ratios["speedup_compiled"] = median["in_turn_compiled"] / median["at_once_compiled"]
    rounded = {f"{name}_ms": round(value, 2) for name, value in median.items()}
    print(json.dumps(rounded | {k: round(v, 2) for k, v in ratios.items()} | {"warmup_s": warmup} | vars(args)))


if __name__ == "__main__":
    main()
