"""``olmo-fn data mix FILE``: what a mixture holds, how often each source repeats, and what a stretch of steps sees of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from olmo_fn.data.mixing import Mixture
from olmo_fn.data.sizes import Sizes, constant_sizes
from olmo_fn.fields import AT_LEAST_ONE
from olmo_fn.picture import figure


@dataclass(frozen=True)
class ShowMix:
    """A table of what a mixture holds, how often each source repeats, and how many tokens of each steps see."""

    mix: tyro.conf.Positional[str]
    """A mix file, or the name of a published mix."""
    steps: Annotated[int, AT_LEAST_ONE] = 1000
    """Steps of the run."""
    batch_size: Annotated[int, AT_LEAST_ONE] = 512
    """Sequences a step."""
    sequence_length: Annotated[int, AT_LEAST_ONE] = 4096
    """Tokens a sequence."""
    vocab_size: Annotated[int, AT_LEAST_ONE] = 100_352
    """Of the model; the type of the files follows from it, unless their meta.json says."""
    first: int = 0
    """Count what is seen from this step on."""
    last: int = 0
    """And before this one; 0: the end of the run."""
    output: str = ""
    """Draw the shares of the sources over the run into this picture."""


@dataclass(frozen=True)
class Row:
    """A source: its tokens in whole instances, tokens that the run sees of it, and those that some steps see."""

    name: str
    have: int
    run: int
    part: int

    @property
    def repeats(self) -> float:
        """How often each of its tokens is seen."""
        return self.run / self.have if self.have else 0.0


def rows_of(names: Sequence[str], mixture: Mixture, sizes: Sizes, steps: int, first: int, last: int) -> list[Row]:
    """A row for each source."""
    run, start, stop = (mixture.counts(sizes.first_window(n)) for n in (steps, first, last))
    window, held = sizes.window, zip(names, mixture.sizes, run.tolist(), (stop - start).tolist(), strict=True)
    return [Row(name, window * n, window * seen, window * part) for name, n, seen, part in held]


def table(rows: Sequence[Row], first: int, last: int) -> str:
    """The rows in words."""
    total, part = sum(row.run for row in rows), max(1, sum(row.part for row in rows))
    wide = max(6, *(len(row.name) for row in rows))
    steps_seen = f"steps {first:,} to {last:,}"
    lines = [f"{'source':<{wide}}  {'tokens':>18}  {'share':>7}  {'of the run':>18}  {'repeats':>7}  {steps_seen:>26}"]
    for row in rows:
        seen, share = f"{row.part:,} ({row.part / part:.1%})", row.run / total
        lines.append(f"{row.name:<{wide}}  {row.have:>18,}  {share:>7.2%}  {row.run:>18,}  {row.repeats:>7.2f}  {seen:>26}")
    lines.append(f"{'all':<{wide}}  {sum(row.have for row in rows):>18,}  {1:>7.2%}  {total:>18,}")
    return "\n".join(lines)


def draw(names: Sequence[str], mixture: Mixture, sizes: Sizes, steps: int, output: Path) -> None:
    """Two pictures in one: the share of each source over the run, and how often it has been seen by then."""
    edges = np.unique(np.linspace(0, steps, min(steps, 200) + 1).astype(int))
    counts = np.array([mixture.counts(sizes.first_window(int(step))) for step in edges])
    shares = np.diff(counts, axis=0) / np.diff(counts.sum(axis=1))[:, None]
    page, (top, bottom) = figure(8, 6, rows=2, sharex=True)
    top.stackplot(edges[:-1], shares.T, labels=names, step="post")
    top.set_ylabel("share of a step")
    top.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    for name, column, size in zip(names, counts.T, mixture.sizes, strict=True):
        bottom.plot(edges, column / size, label=name)
    bottom.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    bottom.set_ylabel("passes over the source")
    bottom.set_xlabel("step")
    page.savefig(output, dpi=120)


def run(args: ShowMix) -> int:
    """The command."""
    from olmo_fn.data.instances.operators import Concatenated
    from olmo_fn.data.loader import Loader
    from olmo_fn.data.settings import Data
    from olmo_fn.data.source import open_data

    last = args.last or args.steps
    if not 0 <= args.first < last <= args.steps:
        raise ValueError(f"--first {args.first} and --last {last} must be steps of the run, the first before the last")
    sizes = constant_sizes(args.batch_size, args.sequence_length)
    source = open_data(Data(mix=args.mix, heldout_fraction=0.0), args.vocab_size, sizes, steps=args.steps)
    loader, names = source.train, source.sources
    assert isinstance(loader, Loader)
    assert isinstance(loader.instances, Concatenated)
    if (mixture := loader.mixture) is None:
        parts = tuple(len(part) for part in loader.instances.parts)
        total = sum(parts)
        print("\n".join(f"{name}  {n * sizes.window:,} tokens, {n / total:.2%}" for name, n in zip(names, parts, strict=True)))
        print(f"all  {total * sizes.window:,} tokens, {total / args.batch_size:,.0f} steps a pass; the file gives no ratios")
        return 0
    print(table(rows_of(names, mixture, sizes, args.steps, args.first, last), args.first, last))
    if args.output:
        draw(names, mixture, sizes, args.steps, Path(args.output))
        print(args.output)
    return 0
