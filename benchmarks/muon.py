"""Muon against AdamW on the default corpus, the learning rates of both swept; prints JSON lines and draws a picture.

    python benchmarks/muon.py --output docs/muon.png

A small OLMo 2 is trained from the same weights on the same batches with AdamW, and with Muon for matrices and AdamW for
the rest, at every rate of the sweep, all with one schedule (linear warm-up, linear decay to 0). The best rate of each is the
one with the lowest last held-out loss; the answer is the first step at which Muon's is as low as AdamW's last.
Muon is also run with a schedule of ``--short`` of the steps, which its decay ends at: fewer steps in earnest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from olmo_fn.train.environment import prepare_environment

RATES = (2.4e-2, 4.8e-2, 9.6e-2, 0.192, 0.384)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d-model": 96, "n-layers": 2, "n-heads": 2, "hidden-size": 256, "vocab-size": 4096}
    course = {"sequence-length": 128, "batch-size": 8, "steps": 300, "warmup": 20, "every": 25, "heldout": 8192}
    for name, default in (sizes | course | {"seed": 0, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak learning rates")
    parser.add_argument("--short", type=float, default=0.875, help="part of the steps that Muon is run with as well; 0: is not")
    parser.add_argument("--output", type=Path, default=Path("muon.png"), help="where the picture goes")
    return parser.parse_args()


def main() -> None:
    """Sweep, print, draw."""
    args = parse()
    prepare_environment()
    lines = []
    train = trainer(args)
    for name in ("adamw", "muon"):
        for lr in args.rates:
            lines.append(train(name, lr, args.steps))
            print(json.dumps(lines[-1]), flush=True)
    last = lambda line: line["heldout"][-1]  # noqa: E731
    best = {name: min((x for x in lines if x["optimizer"] == name), key=last) for name in ("adamw", "muon")}
    target = best["adamw"]["heldout"][-1]
    reached = next((i for i, loss in zip(best["muon"]["at"], best["muon"]["heldout"], strict=True) if loss <= target), None)
    if args.short:
        lines.append(train("muon", best["muon"]["lr"], round(args.short * args.steps)))
        print(json.dumps(lines[-1]), flush=True)
    ends = {name: {"lr": x["lr"], "heldout": x["heldout"][-1]} for name, x in best.items()}
    print(json.dumps({"best": ends, "steps": args.steps, "muon_reaches_adamw_after": reached}), flush=True)
    draw(lines, best, args.output)


def trainer(args: argparse.Namespace) -> Callable[[str, float, int], dict[str, Any]]:
    """A function that trains with an optimizer, at a rate, for so many steps, and returns what came out."""
    import torch

    from olmo_fn.core.compile import compile, prepare_cache
    from olmo_fn.core.pipe import clip, donate, grad, pipe
    from olmo_fn.core.step import Step
    from olmo_fn.data.heldout import heldout_batches
    from olmo_fn.data.settings import Data, cache_dir
    from olmo_fn.data.sizes import constant_sizes
    from olmo_fn.data.source import open_data
    from olmo_fn.models import transformer
    from olmo_fn.models.config import dense
    from olmo_fn.optim import adamw, muon, partition
    from olmo_fn.optim.schedules import warmup_linear
    from olmo_fn.research import lr_scale, with_lr_scale
    from olmo_fn.spec import init
    from olmo_fn.train import machine
    from olmo_fn.train.evals import evaluate

    torch.set_num_threads(args.threads)
    machine.keep_freed_memory()
    prepare_cache(cache_dir(Data()) / "compiled")
    dtype = machine.compute_dtype("auto", torch.device("cpu"))
    model = dense(args.d_model, args.n_layers, args.n_heads, args.hidden_size, vocab_size=args.vocab_size, init_method="llama")
    specs, loss = transformer.specs(model), transformer.loss(model, z_loss=1e-5)
    source = open_data(Data(), model.vocab_size, constant_sizes(args.batch_size, args.sequence_length))
    heldout = source.heldout["heldout"].first(args.heldout)
    made: dict[tuple[str, int], Step] = {}

    def step_of(name: str, steps: int) -> Step:
        """One step for all rates, so that it is compiled once: the rate is in the state."""
        lr = warmup_linear(1.0, args.warmup, steps, 0.0)
        optimizer = {
            "adamw": lambda: adamw(lr),
            "muon": lambda: partition({"matrix": muon(lr, dtype=dtype), "default": adamw(lr)}, specs),
        }[name]()
        return pipe(loss, grad(dtype=dtype), clip(1.0), optimizer, lr_scale(), donate(), compile())

    def train(name: str, lr: float, steps: int) -> dict[str, Any]:
        step = made.setdefault((name, steps), step_of(name, steps))
        state = with_lr_scale(step.init(init(specs, args.seed)), lr)
        losses, found, at, seconds = [], [], [], 0.0
        for i in range(steps):
            begin = time.perf_counter()
            state, metrics = step(state, source.train(i))
            losses.append(float(metrics["ce"]))
            seconds += time.perf_counter() - begin
            if (i + 1) % args.every == 0 or i + 1 == steps:
                batches = heldout_batches(heldout, args.sequence_length, args.sequence_length, args.batch_size, source.eos_id)
                found.append(round(evaluate(loss, state.params, batches, None, dtype=dtype, execution=step.execution).loss, 4))
                at.append(i + 1)
        smooth = round(sum(losses[-args.every :]) / args.every, 4)
        return {
            **{"optimizer": name, "lr": lr, "steps": steps, "heldout": found, "at": at, "train": smooth},
            **{"ms": round(1000 * seconds / steps, 1), "dtype": str(dtype).removeprefix("torch.")},
        }

    return train


def draw(lines: list[dict[str, Any]], best: dict[str, dict[str, Any]], output: Path) -> None:
    """Held-out loss over steps, and the last one over the rate."""
    from olmo_fn.plot import canvas, save

    figure, axes = canvas()
    figure.clear()
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colors, names = {"adamw": "tab:blue", "muon": "tab:red"}, {"adamw": "AdamW", "muon": "Muon"}
    steps = best["adamw"]["steps"]
    for line in lines:
        name, own = line["optimizer"], line is best[line["optimizer"]]
        short = line["steps"] != steps
        label = f"{names[name]}, {line['lr']:g}" + (f", {line['steps']} steps" if short else "") if own or short else None
        style = {"linewidth": 2.2 if own else 1.6 if short else 0.9, "alpha": 1.0 if own or short else 0.35}
        left.plot(line["at"], line["heldout"], color=colors[name], label=label, linestyle=":" if short else "-", **style)
    target = best["adamw"]["heldout"][-1]
    left.axhline(target, color="grey", linewidth=1, linestyle="--", label="AdamW's last loss")
    lowest = min(x["heldout"][-1] for x in lines)
    left.set_ylim(lowest - 0.15, lowest + 2.5)
    left.set_xlabel("step")
    left.set_ylabel("held-out cross entropy (nats a token)")
    left.legend(frameon=False)
    for name in names:
        own = [x for x in lines if x["optimizer"] == name and x["steps"] == steps]
        right.plot([x["lr"] for x in own], [x["heldout"][-1] for x in own], "o-", color=colors[name], label=names[name])
    right.set_xscale("log")
    rates = sorted({x["lr"] for x in lines})
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.set_xticks([], minor=True)
    right.set_xlabel("peak learning rate")
    right.set_ylabel(f"held-out cross entropy after {steps} steps")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, output)


if __name__ == "__main__":
    main()
