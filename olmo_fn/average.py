"""Averages of checkpoints: ``olmo-fn average runs/a --last 5 -o runs/a-mean``, ``… runs/a runs/b -o runs/soup``.

The result is the folder of a run with one checkpoint, of parameters only: sample from it, or start from it with
``--run.start-from DIR --run.start-with params``. With one checkpoint it takes weights out of a run: its moving average,
or the model with LoRA's adapters merged into it, or the adapters alone.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from olmo_fn.fields import SIGNED
from olmo_fn.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor

    from olmo_fn.train.session import Session


@dataclass(frozen=True)
class Soup:
    """Average checkpoints of one run, or of several."""

    what: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of runs, or single checkpoints in them."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the result; it must not be there."""
    last: int = 1
    """Take this many of the newest checkpoints of each run."""
    shares: Annotated[tuple[float, ...], SIGNED] = ()
    """Share of each checkpoint, in the order they are listed, oldest first; alike if not given. They need not sum to 1."""
    weights: Literal["params", "ema", "merge"] = "params"
    """Which weights: the parameters, their moving averages, or the means of the last steps."""
    lora: Literal["keep", "merge", "alone"] = "keep"
    """Adapters of LoRA: keep them beside the model, merge them into it, or take them alone."""


def average(checkpoints: Sequence[Path], shares: Sequence[float] = (), weights: str = "params") -> Tree:
    """Σ share · weights / Σ share over checkpoints, leaf by leaf, in fp64; one leaf of one checkpoint is read at a time.

    ``weights`` is ``params`` or a slot with the paths of the parameters, such as ``ema``; for parameters that the slot does not
    have, because they are frozen, it is the parameters themselves. Dtypes stay. ValueError for checkpoints of
    different models, and for shares that do not fit.

    >>> import tempfile, torch
    >>> from olmo_fn.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [save({"params": {"w": torch.tensor([x])}}, folder, step=int(x)) for x in (1.0, 4.0)]
    ...     average(paths, shares=(2, 1))
    {'w': tensor([2.])}
    """
    from olmo_fn import tree
    from olmo_fn.checkpoint import load, read_index
    from olmo_fn.train.session import weight_places

    shares = tuple(shares) or (1.0,) * len(checkpoints)
    if len(shares) != len(checkpoints) or not isfinite(sum(shares)) or sum(shares) == 0:
        raise ValueError(
            f"{len(shares)} shares for {len(checkpoints)} checkpoints, {sum(shares):g} in sum; "
            "give one for each, with a finite sum that is not 0"
        )
    stored = [{name: (t.dtype, t.shape) for name, t in read_index(path).tensors.items()} for path in checkpoints]
    paths = [name.removeprefix("params.") for name in stored[0] if name.startswith("params.")]
    places = weight_places(weights, paths, stored[0], checkpoints[0])
    for checkpoint, there in zip(checkpoints, stored, strict=True):
        differ = [place for place in places.values() if there.get(place) != stored[0][place]]
        differ += [name for name in there if name.startswith("params.") and name not in stored[0]]
        if differ:
            raise ValueError(
                f"{checkpoint} is of another model than {checkpoints[0]}: {differ[0]} differs, so there is no mean"
            )

    def mean(place: str) -> Tensor:
        parts = (tree.at(load(checkpoint, select=[place])[0], place) for checkpoint in checkpoints)
        first = next(parts)
        total = first.double() * (shares[0] / sum(shares))
        for part, share in zip(parts, shares[1:], strict=True):
            total += part.double() * (share / sum(shares))
        return total.to(first.dtype)

    return tree.unflatten((path, mean(place)) for path, place in places.items())


def chosen(what: Sequence[Path], last: int) -> list[Path]:
    """The checkpoints meant: the ``last`` newest of each run, or those named; ValueError for what is none."""
    from olmo_fn.checkpoints import checkpoints

    if last < 1:
        raise ValueError(f"--last {last} takes no checkpoint; it must be at least 1")
    found = []
    for path in what:
        there = checkpoints(path)
        if len(there) < last and there != [path]:
            raise ValueError(f"{path} holds {len(there)} checkpoints, not {last}; use --last {len(there)}")
        found += there[-last:]
    return found


def soup(args: Soup) -> str:
    """Make the folder of the result, whole or not at all; what it is, and what to type next."""
    import torch

    from olmo_fn.checkpoint import read_index, save
    from olmo_fn.formats.text_files import KEPT
    from olmo_fn.train.folder import write_config
    from olmo_fn.train.process import ProcessContext
    from olmo_fn.train.session import find_run, open_run

    output = args.output
    if output.exists():
        raise ValueError(f"{output} is there already; choose another folder with -o")
    if not args.what:
        raise ValueError("name the runs or checkpoints to average")
    paths = chosen(args.what, args.last)
    step = max(read_index(path).step for path in paths)
    folders = dict.fromkeys(find_run(path)[0] for path in paths)
    session, *others = (open_run(folder, ProcessContext(torch.device("cpu"))) for folder in folders)
    cfg, tokenizer = session.cfg, same_kind([session, *others])
    params = average(paths, args.shares, args.weights)
    if args.lora != "keep" and "lora" not in params:
        raise ValueError(f"{paths[0]} has no adapters; leave out --lora {args.lora}")
    if args.lora == "merge":
        params, cfg = session.merged(params), replace(cfg, lora=replace(cfg.lora, rank=0))
    elif args.lora == "alone":
        params = {"lora": params["lora"]}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".average-", dir=output.parent) as beside:
        draft = Path(beside) / "run"
        write_config(replace(cfg, run=replace(cfg.run, folder=str(output))), draft)
        if tokenizer:
            shutil.copy(tokenizer, draft)
            if (kept := tokenizer.parent / KEPT).is_dir():
                shutil.copytree(kept, draft / KEPT)
        saved = save({"params": params}, draft / "checkpoints", step=step, meta={"averaged": [str(path) for path in paths]})
        draft.rename(output)
    name, other = shlex.quote(str(output)), shlex.quote(f"{output}-2")
    text = f"{output / saved.relative_to(draft)}\n"
    if tokenizer and args.lora != "alone":
        text += f"sample:        olmo-fn generate {name} 'def '\n"
    if args.lora != "alone":
        text += f"train on:      olmo-fn train {name} --run.start-from {name} --run.start-with params --run.folder {other}\n"
    return text.strip()


def same_kind(runs: Sequence[Session]) -> Path | None:
    """The tokenizer.json of runs whose weights may be averaged, None if none has one.

    ValueError if their configs describe different models, or their tokenizers give an id different texts.
    """
    from olmo_fn.train.folder import differences, numbers

    first, *others = runs
    for run in others:
        for flag, one, other in differences(numbers(first.cfg), numbers(run.cfg)):
            if flag.startswith("--model.") or flag == "--lora.alpha":
                raise ValueError(
                    f"{run.folder} is of another model than {first.folder}: {flag} is {other}, not {one}, so there is no mean"
                )
    known = [run for run in runs if (run.folder / "tokenizer.json").is_file()]
    for run in known[1:]:
        if known[0].tokenizer.backend.get_vocab() != run.tokenizer.backend.get_vocab():
            raise ValueError(
                f"{run.folder} has another tokenizer.json than {known[0].folder}: an id means another text, so there is no mean"
            )
    return known[0].folder / "tokenizer.json" if known else None


if __name__ == "__main__":  # as version 0.1 called it
    raise SystemExit("the command is: olmo-fn average")
