"""Time a training step on packed documents with and without document masking; prints one JSON line.

    python benchmarks/documents.py --d-model 256 --n-layers 4 --sequence-length 4096 --mean-length 512

The tokens are the same both ways, and the step is the library's own recipe, compiled. Lengths of documents are drawn anew for
every step (geometric, of that mean), and cut where a sequence ends. Steps with and without take turns, so that both see the
same machine; times are medians, and ``cpu_speedup`` is the ratio of processor time, which with one thread is right beside
other work too. ``pairs`` is the share of the pairs of a query and a key that masking leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from olmo_fn.train.environment import prepare_environment


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d-model": 256, "n-layers": 4, "n-heads": 8, "n-kv-heads": 8, "hidden-size": 768, "vocab-size": 4096}
    more = {"sequence-length": 4096, "mean-length": 512, "window": 0, "batch-size": 2, "rounds": 7, "threads": os.cpu_count()}
    for name, default in (sizes | more).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Warm both up, and time them in turn."""
    args = parse()
    prepare_environment()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    from olmo_fn.core.compile import prepare_cache
    from olmo_fn.kernels.attention import document_starts
    from olmo_fn.models import transformer
    from olmo_fn.models.config import dense
    from olmo_fn.spec import init
    from olmo_fn.train import machine
    from olmo_fn.train.config import Config, Recipe, Run
    from olmo_fn.train.optimizers import AdamW
    from olmo_fn.train.recipe import recipe
    from olmo_fn.train.schedules import Constant

    torch.set_num_threads(args.threads)
    prepare_cache(Path(tempfile.mkdtemp()))
    model = dense(
        args.d_model,
        args.n_layers,
        args.n_heads,
        args.hidden_size,
        vocab_size=args.vocab_size,
        n_kv_heads=args.n_kv_heads,
        window_pattern=(args.window,) if args.window else (),
        last_layer_full=False,
    )
    cfg = Config(
        model,
        optim=AdamW(lr=1e-3),
        schedule=Constant(warmup=0),
        recipe=Recipe(args.batch_size, args.sequence_length, compile=args.compile),
        run=Run(steps=2 * args.rounds + 4),
    )
    cfg.check()
    step = recipe(cfg, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype])
    generator, T = torch.Generator().manual_seed(0), args.sequence_length
    state = step.init(init(transformer.specs(model), 0))
    times: dict[str, list[tuple[float, float]]] = {"unmasked": [], "masked": []}  # on the wall's clock and the processor's
    left = []
    with machine.warm_up() as warm:  # as the trainer does
        for i in range(args.rounds + 2):
            ids = torch.randint(args.vocab_size, (args.batch_size, T + 1), generator=generator)
            documents = (torch.rand(args.batch_size, T, generator=generator) < 1 / args.mean_length).cumsum(1)
            seen = torch.arange(1, T + 1) - document_starts(documents)  # by each query
            left.append(2 * float(seen.double().mean()) / (T + 1))
            plain = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
            for name, batch in (("unmasked", plain), ("masked", plain | {"documents": documents})):
                start = time.perf_counter(), time.process_time()
                state, metrics = step(state, batch)
                float(metrics["loss"])
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            if i == 0:
                warm()
    wall, cpu = ({name: [pair[i] for pair in found[2:]] for name, found in times.items()} for i in (0, 1))
    line: dict[str, object] = {f"{name}_ms": round(1000 * statistics.median(seconds), 1) for name, seconds in wall.items()}
    for name, clock in (("speedup", wall), ("cpu_speedup", cpu)):
        line[name] = round(statistics.median(clock["unmasked"]) / statistics.median(clock["masked"]), 3)
        line[f"{name}_by_round"] = [round(a / b, 2) for a, b in zip(clock["unmasked"], clock["masked"], strict=True)]
    print(json.dumps(line | {"pairs": round(statistics.median(left[2:]), 3), **vars(args)}))


if __name__ == "__main__":
    main()
