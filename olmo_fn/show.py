"""``olmo-fn data show RUN --step N``: what a step of a run trains on, read from the data and nothing else."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Show:
    """Print what a step trains on: of each sequence its files, documents, how many tokens are in the loss, and its text."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    step: int = 1
    """The step, from 1; also one that is not done yet."""
    texts: int = 3
    """Sequences whose text is printed."""
    chars: int = 400
    """Characters of each text; 0 prints all."""


def run(args: Show) -> int:
    """The command."""
    import torch

    from olmo_fn.core.chain import IGNORE
    from olmo_fn.train.process import ProcessContext
    from olmo_fn.train.session import open_run

    session = open_run(Path(args.run), ProcessContext(torch.device("cpu")))
    steps = session.cfg.run.steps
    if not 1 <= args.step <= steps:
        raise ValueError(f"--step {args.step}: the steps of this run are 1 to {steps}")
    read, step = session.source.train, args.step - 1
    batch = read(step)
    ids, labels, documents = batch["input_ids"], batch["labels"], batch.get("documents")
    mixture = getattr(read, "mixture", None)
    print(f"step {args.step}: {len(ids):,} sequences of {ids.shape[1]:,} tokens, {int((labels != IGNORE).sum()):,} in the loss")
    if mixture is not None:
        first, many = read.sizes.first_window(step), read.sizes.at(step).batch_size
        counts = mixture.counts(first + many) - mixture.counts(first)
        print("sources: " + ", ".join(f"{name} {n}" for name, n in zip(session.source.sources, counts.tolist(), strict=True)))
    print("row  in the loss  documents  from")
    for row in range(len(ids)):
        count = "-" if documents is None else str(len(documents[row].unique()))
        print(f"{row:>3}  {int((labels[row] != IGNORE).sum()):>11,}  {count:>9}  {read.origin(step, row)}")
    tokenizer = session.source.tokenizer
    for row in range(min(args.texts, len(ids))):
        text = tokenizer.decode(ids[row].tolist()) if tokenizer else " ".join(map(str, ids[row].tolist()))
        cut = text if not args.chars or len(text) <= args.chars else text[: args.chars] + " …"
        print(f"\nrow {row}:\n{textwrap.indent(cut, '  | ', lambda line: True)}")
    return 0
