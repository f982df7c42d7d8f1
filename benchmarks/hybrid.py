"""Time a step over sequences of growing length at constant tokens: of attention, of Gated DeltaNet, and of a hybrid of both.

    python benchmarks/hybrid.py --tokens 8192 --lengths 512 1024 2048 4096 8192

Prints a table of tokens a second: processor seconds of one thread, so that other programs do not count; the best of a few
rounds, in which all models take turns. The models have the sizes of olmo2-tiny, and keys and values are as wide in all of them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from olmo_fn.train.environment import prepare_environment


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="in a step, whatever the length")
    for name, default in {"d-model": 192, "n-layers": 4, "n-heads": 3, "hidden-size": 512, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="do not compile, which takes half a minute for each length")
    return parser.parse_args()


def main() -> None:
    """Build the steps, and time them in turn at each length."""
    args = parse()
    prepare_environment()
    import torch

    from olmo_fn.core.compile import compile
    from olmo_fn.core.pipe import clip, donate, grad, pipe
    from olmo_fn.models import transformer
    from olmo_fn.models.config import Attention, Block, GatedDelta, Model, PreNorm, SwiGLU
    from olmo_fn.optim import adamw
    from olmo_fn.spec import init
    from olmo_fn.train import machine

    torch.set_num_threads(1)
    machine.keep_freed_memory()
    feed_forward, width = SwiGLU(hidden_size=args.hidden_size), args.d_model // args.n_heads
    attention = Block(mixer=Attention(n_heads=args.n_heads), feed_forward=feed_forward)
    recurrent = PreNorm(mixer=GatedDelta(n_heads=args.n_heads, value_head_dim=width), feed_forward=feed_forward)
    base = Model(args.d_model, args.n_layers, 4096, attention)
    models = {
        "attention": base,
        "hybrid 3 : 1": replace(base, pattern=(recurrent, recurrent, recurrent, attention)),
        "Gated DeltaNet": replace(base, pattern=(recurrent,)),
    }
    dtype, more = getattr(torch, args.dtype), (donate(),) if args.eager else (donate(), compile())
    steps = {name: pipe(transformer.loss(m), grad(dtype=dtype), clip(1.0), adamw(1e-3), *more) for name, m in models.items()}
    states = {name: step.init(init(transformer.specs(models[name]), 0)) for name, step in steps.items()}

    print("".join(f"{word:>16}" for word in ("length", *models)))
    for length in args.lengths:
        ids = torch.randint(4096, (max(1, args.tokens // length), length), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids.roll(-1, dims=1)}
        best = dict.fromkeys(models, float("inf"))
        for _ in range(args.rounds + 1):  # the first compiles
            for name, step in steps.items():
                start = time.process_time()
                states[name], _ = step(states[name], batch)
                best[name] = min(best[name], time.process_time() - start)
        row = (f"{length:,}", *(f"{ids.numel() / seconds:,.0f}" for seconds in best.values()))
        print("".join(f"{word:>16}" for word in row), flush=True)


if __name__ == "__main__":
    main()
