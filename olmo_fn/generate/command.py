"""``olmo-fn generate RUN "def "``: what a trained model makes of a prompt, or of many."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from olmo_fn import tree
from olmo_fn.fields import AT_LEAST_ONE, PATH, Range
from olmo_fn.generate.config import Sampling
from olmo_fn.train.environment import check_device
from olmo_fn.tree import Tree

if TYPE_CHECKING:
    from olmo_fn.generate.text import LanguageModel, Prompt


@dataclass(frozen=True)
class Trained:
    """Which model, and how to compute."""

    run: Annotated[tyro.conf.Positional[str], PATH, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or one of its checkpoints."""
    weights: Literal["params", "ema", "merge"] = "params"
    """The weights; or their moving average, or the mean of the last steps, if the run kept one."""
    step: int | None = None
    """Take the checkpoint of this step instead of the newest whole one."""
    truncate_prompt: Literal["no", "left"] = "no"
    """What to do with a prompt that leaves no room for --max-tokens in the model's context: no refuses one that leaves none;
    left leaves out its beginning, in a chat the oldest messages, and says so."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; bfloat16 is for accelerators, a CPU is mostly slower with it, a token at a time."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads; 0 is one for a small model, which more do not make faster, and all cores for others."""
    device: str = "auto"
    """Device to run on: auto takes cuda when there is one."""

    def load(self) -> tuple[LanguageModel, Path]:
        """The model, and the checkpoint that it is from."""
        check_device("--device", self.device)
        import torch

        from olmo_fn.generate.load import load_model
        from olmo_fn.train.machine import pick_device

        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        model, path = load_model(self.run, step=self.step, weights=self.weights, dtype=dtype, device=pick_device(self.device))
        torch.set_num_threads(self.threads or _threads(model.params))
        return model, path


@dataclass(frozen=True)
class Generate(Trained):
    """Print a prompt and what a trained model makes of it."""

    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT")] = ()
    """Text to go on from; without one, a new document. Several are computed together."""
    prompts_file: Annotated[str, PATH] = ""
    """A file of prompts, one a line; of a .jsonl file the field prompt."""
    batch_size: Annotated[int, AT_LEAST_ONE] = 8
    """Prompts that are computed together; the texts do not depend on it."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """How to sample."""
    stream: bool = True
    """Print the text of a single prompt as it comes, not at the end."""
    json: bool = False
    """Print a line of JSON for each prompt: prompt, text, and its number of tokens."""
    healing: bool = True
    """Let the first token replace the prompt's last by one that begins with it: "def " ends in a lone space,
    but " name" is one token."""


def run(args: Generate) -> int:
    """Print the texts on stdout, and their speed on stderr."""
    args.sampling.check()
    texts = read_prompts(args)
    model, path = args.load()
    from olmo_fn.generate.text import prepare

    room = model.room(args.sampling.max_tokens) if args.truncate_prompt == "left" else None
    prompts = [prepare(model, text, args.healing, room) for text in texts]
    for i, prompt in enumerate(prompts, 1):
        if prompt.cut:
            print(f"prompt {i}: its first {prompt.cut:,} tokens were left out (--truncate-prompt left)", file=sys.stderr)
    if len(prompts) == 1 and not args.json:
        return _stream(args, model, path, texts[0], prompts[0])
    start, total = time.perf_counter(), 0
    for i, (text, found, count) in enumerate(zip(texts, *zip(*_batches(args, model, prompts), strict=True), strict=True), 1):
        total += count
        if args.json:
            print(json.dumps({"prompt": text, "text": found, "tokens": count}, ensure_ascii=False), flush=True)
        else:
            print(f"=== {i} of {len(texts)}\n{text}{found}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{path}: {len(texts):,} texts, {total:,} tokens in {seconds:.2f} s, {total / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def read_prompts(args: Generate) -> tuple[str, ...]:
    """The prompts of the command line and of the file; a lone empty one if there are none at all."""
    if not args.prompts_file:
        return args.prompts or ("",)
    file = Path(args.prompts_file)
    lines = file.read_text(encoding="utf-8").splitlines()
    if file.suffix == ".jsonl":
        try:
            lines = [str(json.loads(line)["prompt"]) for line in lines if line.strip()]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'--prompts-file {file}: its lines must be like {{"prompt": "Once"}}') from None
    if not lines:
        raise ValueError(f"--prompts-file {file} is empty; write a prompt into each line")
    return (*args.prompts, *lines)


def _batches(args: Generate, model: LanguageModel, prompts: list[Prompt]) -> Iterator[tuple[str, int]]:
    """Of each prompt its text and the number of tokens."""
    from olmo_fn.generate.text import stream_texts

    for first in range(0, len(prompts), args.batch_size):
        some = prompts[first : first + args.batch_size]
        counts = [0] * len(some)

        def count(row: int, _: int, counts: list[int] = counts) -> None:
            counts[row] += 1

        for row, pieces in enumerate(stream_texts(model, some, args.sampling, count, first_row=first)):
            yield "".join(pieces), counts[row]


def _stream(args: Generate, model: LanguageModel, path: Path, text: str, prompt: Prompt) -> int:
    from olmo_fn.generate.text import stream_text

    times = [time.perf_counter()]
    pieces = stream_text(model, prompt, args.sampling, lambda token: times.append(time.perf_counter()))
    try:
        print(text, end="", flush=True)
        for piece in pieces if args.stream else ["".join(pieces)]:
            print(piece, end="", flush=True)
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
