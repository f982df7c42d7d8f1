"""``olmo-fn generate RUN "def "``: what a trained model makes of a prompt."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from olmo_fn import tree
from olmo_fn.fields import PATH, Range
from olmo_fn.generate.config import Sampling
from olmo_fn.train.environment import check_device
from olmo_fn.tree import Tree


@dataclass(frozen=True)
class Generate:
    """Print a prompt and what a trained model makes of it."""

    run: Annotated[tyro.conf.Positional[str], PATH, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or one of its checkpoints."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """Text to go on from; without one, a new document."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """How to sample."""
    weights: Literal["params", "ema", "merge"] = "params"
    """The weights; or their moving average, or the mean of the last steps, if the run kept one."""
    step: int | None = None
    """Take the checkpoint of this step instead of the newest whole one."""
    stream: bool = True
    """Print the text as it comes, not at the end."""
    healing: bool = True
    """Let the first token replace the prompt's last by one that begins with it: "def " ends in a lone space,
    but " name" is one token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; bfloat16 is for accelerators, a CPU is mostly slower with it, a token at a time."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads; 0 is one for a small model, which more do not make faster, and all cores for others."""
    device: str = "auto"
    """Device to run on: auto takes cuda when there is one."""


def run(args: Generate) -> int:
    """Print the text on stdout, and its speed on stderr."""
    args.sampling.check()
    check_device("--device", args.device)
    import torch

    from olmo_fn.generate.load import load_model
    from olmo_fn.generate.text import prepare, stream_text
    from olmo_fn.train.machine import pick_device

    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    model, path = load_model(args.run, step=args.step, weights=args.weights, dtype=dtype, device=pick_device(args.device))
    torch.set_num_threads(args.threads or _threads(model.params))
    prompt = prepare(model, args.prompt, args.healing)
    times = [time.perf_counter()]
    pieces = stream_text(model, prompt, args.sampling, lambda token: times.append(time.perf_counter()))
    try:
        print(args.prompt, end="", flush=True)
        for text in pieces if args.stream else ["".join(pieces)]:
            print(text, end="", flush=True)
    finally:
        print(flush=True)
    count, first = len(times) - 1, times[1] - times[0]
    rate = (count - 1) / (times[-1] - times[1]) if count > 1 else 1 / first
    full = model.context is not None and len(prompt.ids) + count >= model.context
    note = f"; stopped at the model's context of {model.context:,} tokens" if full else ""
    print(f"{path}: {count:,} tokens, the first after {first:.2f} s, {rate:.0f} tokens/s{note}", file=sys.stderr)
    return 0


def _threads(params: Tree) -> int:
    """One where the weights fit the processor's cache: there threads save nothing, and wait long on a busy machine."""
    import torch

    weights = sum(leaf.numel() for path, leaf in tree.items(params) if path != "embed")
    return 1 if weights < 1 << 23 else torch.get_num_threads()
