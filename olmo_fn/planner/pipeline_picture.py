"""A schedule as a picture: for the terminal, and as a PNG with matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path

from olmo_fn.parallel.pipeline.schedule import Action
from olmo_fn.picture import figure
from olmo_fn.planner.pipeline_simulate import Slot, Timeline

IDLE = "·"
NAMES = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
COLORS = {"F": "#4C78A8", "B": "#F58518", "I": "#E0A030", "W": "#54A24B"}


def text(timeline: Timeline, width: int = 120) -> str:
    """One line a rank, in bands of at most ``width`` columns.

    A cell is a tick: ``F3`` is the forward of micro-batch 3, with ``a``, ``b``, … for its chunk if there are several.
    Where that is too wide, a cell is one letter.

    >>> from olmo_fn.parallel.pipeline.schedule import schedule
    >>> from olmo_fn.planner.pipeline_simulate import simulate
    >>> print(text(simulate(schedule("1f1b", ranks=2, microbatches=2))))
    rank 0  F0 F1 ·  ·  B0─── ·  B1───
    rank 1  ·  F0 B0─── F1 B1─── ·  ·
    """
    every = [slot for slots in timeline.slots for slot in slots]
    unit = min(slot.end - slot.start for slot in every) or 1
    label = max(len(_label(slot.action, timeline.chunks)) for slot in every) + 1
    columns, name = round(timeline.ticks / unit), len(f"rank {len(timeline.slots) - 1}  ")
    cell = label if columns * label <= 3 * (width - name) else 1
    lines = [_line(slots, unit, columns, cell, timeline.chunks) for slots in timeline.slots]
    band = max(1, (width - name) // cell) * cell
    bands = (range(len(lines)) for _ in range(0, columns * cell, band))
    return "\n\n".join(
        "\n".join(f"{f'rank {rank}':<{name}}{lines[rank][i * band : (i + 1) * band]}".rstrip() for rank in ranks)
        for i, ranks in enumerate(bands)
    )


def _label(action: Action, chunks: int) -> str:
    return f"{action.op}{action.microbatch}{chr(ord('a') + action.chunk % 26) if chunks > 1 else ''}"


def _line(slots: tuple[Slot, ...], unit: float, columns: int, cell: int, chunks: int) -> str:
    line = IDLE.ljust(cell) * columns
    for slot in slots:
        start, stop = round(slot.start / unit) * cell, round(slot.end / unit) * cell
        if stop > start:
            long = f"{_label(slot.action, chunks).ljust(stop - start - 1, '─')} "
            line = line[:start] + (slot.action.op * (stop - start) if cell == 1 else long) + line[stop:]
    return line


def summary(timeline: Timeline) -> str:
    """The bubble and the peak of kept activations of every rank.

    >>> from olmo_fn.parallel.pipeline.schedule import schedule
    >>> from olmo_fn.planner.pipeline_simulate import simulate
    >>> print(summary(simulate(schedule("1f1b", ranks=2, microbatches=2))))
    ticks 9, bubble 33.3 %
    rank         0      1
    waits   33.3 % 33.3 %
    keeps        2      1  (micro-batches times chunks, at the most)
    """
    bubbles = [f"{100 * bubble:.1f} %" for bubble in timeline.bubbles]
    rows = {"rank": range(len(timeline.slots)), "waits": bubbles, "keeps": timeline.peak_live}
    lines = [f"{name:<7}" + "".join(f"{value:>7}" for value in values) for name, values in rows.items()]
    first = f"ticks {timeline.ticks:g}, bubble {100 * timeline.bubble:.1f} %"
    return "\n".join((first, *lines)) + "  (micro-batches times chunks, at the most)"


def draw(timeline: Timeline, path: Path, title: str = "") -> None:
    """Write a PNG: a row a rank, darker for later chunks. ValueError without matplotlib."""
    ranks, ticks, chunks = range(len(timeline.slots)), timeline.ticks, timeline.chunks
    width = min(28.0, max(8.0, 0.28 * ticks))
    page, axes = figure(width, 0.45 * len(ranks) + 1.7)
    used = {}
    for rank, slots in enumerate(timeline.slots):
        axes.barh(rank, ticks, height=0.92, color="#EEEEEE")
        for op, chunk in sorted({slot.action[:2] for slot in slots}):
            alike = [slot for slot in slots if slot.action[:2] == (op, chunk)]
            lengths, starts = [slot.end - slot.start for slot in alike], [slot.start for slot in alike]
            color = _shade(COLORS[op], chunk, chunks)
            bars = axes.barh(
                [rank] * len(alike), lengths, left=starts, height=0.92, color=color, edgecolor="white", linewidth=0.6
            )
            used[f"{NAMES[op]}{f', chunk {chunk}' if chunks > 1 else ''}"] = bars
            size = min(9.0, 108 * (width - 3) / ticks * min(lengths) / len(str(max(slot.action.microbatch for slot in alike))))
            if size >= 4:
                axes.bar_label(
                    bars, [slot.action.microbatch for slot in alike], label_type="center", color="white", fontsize=size
                )
        note = f"waits {100 * timeline.bubbles[rank]:.1f} %, keeps {timeline.peak_live[rank]}"
        axes.annotate(note, (1.005, rank), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_xlim(0, ticks)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ticks")
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}{', ' if title else ''}bubble {100 * timeline.bubble:.1f} %", loc="left")
    page.legend(used.values(), used.keys(), loc="outside lower left", ncols=8, frameon=False)
    page.savefig(path, dpi=150)


def _shade(color: str, chunk: int, chunks: int) -> tuple[float, ...]:
    """The colour itself for one chunk; from lighter to darker over several."""
    by = 0.3 - 0.75 * chunk / (chunks - 1) if chunks > 1 else 0.0  # towards white above 0, black below
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(c + by * (1 - c) if by > 0 else c * (1 + by) for c in parts)
