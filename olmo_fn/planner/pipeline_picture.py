"""A schedule as a picture: for the terminal, and as a PNG with matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path

from olmo_fn.parallel.pipeline.schedule import Action
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
    unit = min(slot.end - slot.start for slots in timeline.slots for slot in slots) or 1
    label = max(len(_label(slot.action, timeline.chunks)) for slots in timeline.slots for slot in slots) + 1
    columns = round(timeline.ticks / unit)
    name = len(f"rank {len(timeline.slots) - 1}  ")
    cell = label if columns * label <= 3 * (width - name) else 1
    lines = ["".join(_cells(slots, unit, columns, cell, timeline.chunks)) for slots in timeline.slots]
    band = max(1, (width - name) // cell) * cell
    bands = [
        "\n".join(f"{f'rank {rank}':<{name}}{line[start : start + band]}".rstrip() for rank, line in enumerate(lines))
        for start in range(0, columns * cell, band)
    ]
    return "\n\n".join(bands)


def _label(action: Action, chunks: int) -> str:
    return f"{action.op}{action.microbatch}{chr(ord('a') + action.chunk % 26) if chunks > 1 else ''}"


def _cells(slots: tuple[Slot, ...], unit: float, columns: int, cell: int, chunks: int) -> list[str]:
    line = [IDLE.ljust(cell)] * columns
    for slot in slots:
        start, stop = round(slot.start / unit), round(slot.end / unit)
        if cell == 1:
            line[start:stop] = slot.action.op * (stop - start)
        elif stop > start:
            drawn = _label(slot.action, chunks).ljust((stop - start) * cell - 1, "─") + " "
            line[start:stop] = [drawn[i : i + cell] for i in range(0, len(drawn), cell)]
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
    ranks = range(len(timeline.slots))
    rows = {
        "rank": [str(rank) for rank in ranks],
        "waits": [f"{100 * bubble:.1f} %" for bubble in timeline.bubbles],
        "keeps": [str(live) for live in timeline.peak_live],
    }
    lines = [f"{name:<7}" + "".join(f"{value:>7}" for value in values).rstrip() for name, values in rows.items()]
    lines[2] += "  (micro-batches times chunks, at the most)"
    return "\n".join((f"ticks {timeline.ticks:g}, bubble {100 * timeline.bubble:.1f} %", *lines))


def draw(timeline: Timeline, path: Path, title: str = "") -> None:
    """Write a PNG: a row a rank, darker for later chunks. ValueError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError:
        raise ValueError('a picture needs matplotlib; install it with: pip install "olmo-fn[plot]"') from None
    ranks, ticks = len(timeline.slots), timeline.ticks
    width, row = min(28.0, max(8.0, 0.28 * ticks)), 0.45
    figure = Figure(figsize=(width, row * ranks + 1.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    per_tick = 72 * (width - 3) / ticks  # points
    for rank, slots in enumerate(timeline.slots):
        axes.add_patch(Rectangle((0, rank + 0.04), ticks, 0.92, facecolor="#EEEEEE", linewidth=0))
        for slot in slots:
            op, chunk, microbatch = slot.action
            length = slot.end - slot.start
            color = _shade(COLORS[op], chunk, timeline.chunks)
            axes.add_patch(
                Rectangle((slot.start, rank + 0.04), length, 0.92, facecolor=color, edgecolor="white", linewidth=0.6)
            )
            size = min(9.0, 1.5 * per_tick * length / len(str(microbatch)))
            if size >= 4:
                at = (slot.start + length / 2, rank + 0.5)
                axes.annotate(str(microbatch), at, ha="center", va="center_baseline", color="white", fontsize=size)
        note = f"waits {100 * timeline.bubbles[rank]:.1f} %, keeps {timeline.peak_live[rank]}"
        axes.annotate(note, (1.005, rank + 0.5), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_xlim(0, ticks)
    axes.set_ylim(ranks, 0)
    axes.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ticks")
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}{', ' if title else ''}bubble {100 * timeline.bubble:.1f} %", loc="left")
    used = [op for op in NAMES if any(slot.action.op == op for slots in timeline.slots for slot in slots)]
    legend = [Patch(color=_shade(COLORS[op], 0, timeline.chunks), label=NAMES[op]) for op in used]
    if timeline.chunks > 1:
        last = timeline.chunks - 1
        legend.append(Patch(color=_shade("#777777", 0, timeline.chunks), label="chunk 0"))
        legend.append(Patch(color=_shade("#777777", last, timeline.chunks), label=f"chunk {last}"))
    figure.legend(handles=[*legend, Patch(color="#EEEEEE", label="waits")], loc="outside lower left", ncols=8, frameon=False)
    figure.savefig(path, dpi=150)


def _shade(color: str, chunk: int, chunks: int) -> tuple[float, float, float]:
    """The colour itself for one chunk; from lighter to darker over several."""
    by = 0.3 - 0.75 * chunk / (chunks - 1) if chunks > 1 else 0.0  # towards white above 0, black below
    r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(c + by * (1 - c) if by > 0 else c * (1 + by) for c in (r, g, b))  # type: ignore[return-value]
