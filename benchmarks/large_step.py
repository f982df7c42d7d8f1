"""One real optimizer step of a large preset on this machine; prints one JSON line with its peak memory and time.

python benchmarks/large_step.py olmo2-1b --sequence-length 256
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for configs.py, which is not part of the package

from configs import CONFIGS
from olmo_fn.train.environment import prepare_environment


def main() -> None:
    """Initialise, take one step, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(CONFIGS), nargs="?", default="olmo2-1b")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--moments", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    prepare_environment()
    import torch

    from olmo_fn.models import transformer
    from olmo_fn.spec import count, init
    from olmo_fn.train import machine
    from olmo_fn.train.recipe import recipe

    cfg = CONFIGS[args.preset]
    cfg = replace(
        cfg,
        optim=replace(cfg.optim, moments=args.moments),
        recipe=replace(cfg.recipe, batch_size=1, sequence_length=args.sequence_length, remat="full"),
    )
    cfg.check()
    start = time.perf_counter()
    step = recipe(cfg)
    specs = transformer.specs(cfg.model)
    state = step.init(init(specs, 0))
    before, began = float(state.params["head"]["w_out"][0, 0]), time.perf_counter()
    ids = torch.randint(cfg.model.vocab_size, (1, args.sequence_length + 1))
    state, metrics = step(state, {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
    line = {
        "preset": args.preset,
        "params": count(specs),
        "init_s": round(began - start, 1),
        "step_s": round(time.perf_counter() - began, 1),
        "peak_rss_gb": round(machine.peak_memory(torch.device("cpu")) / 1e9, 2),
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "moved": float(state.params["head"]["w_out"][0, 0]) != before,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
