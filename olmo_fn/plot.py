"""Pictures: ``olmo-fn plot schedule cosine wsd --lr 4e-4 --warmup 2000 --total 100000 -o lr.png``.

``schedule`` draws learning rates: of schedules by name, of presets, of runs. ``range-test`` draws the loss of a learning-rate
range test over the rate, and says where it falls fastest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from olmo_fn.train.config import Config

if TYPE_CHECKING:
    from olmo_fn.optim.schedules import Schedule

Words = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class PlotSchedule:
    """Draw learning rates over the steps, all in one picture."""

    what: Words = ()
    """Schedules (cosine, wsd, …), presets (olmo2-1b), run folders or config.yaml files. The flags are for schedules only."""
    lr: float = 4e-4
    """Peak learning rate."""
    total: int = 100_000
    """Length of the whole."""
    log: bool = False
    """Logarithmic scale of the rate."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("lr.png")
    """Where the picture goes."""


@dataclass(frozen=True)
class PlotRangeTest:
    """Draw the loss of a run with --schedule.name range-test over its learning rate."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    smooth: float = 0.9
    """Decay of the moving average that is read; 0 reads the losses as they are."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where the picture goes; range-test.png in the run's folder if not given."""


class RangeTest(NamedTuple):
    """What a range test found: rates, losses, smoothed losses; and the rates of the fastest fall and of the lowest loss."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float
    lowest: float


def range_test(lines: list[dict[str, Any]], smooth: float = 0.9) -> RangeTest:
    """Read a range test out of the lines of ``metrics.jsonl``.

    The losses are averaged with decay ``smooth``, without the bias towards 0. Where the average falls fastest per factor
    of the rate, before its lowest point, is a rate to train with; the lowest point is the edge (Smith 2017). ValueError if
    the rates do not grow.

    >>> lines = [{"lr": 10.0 ** (i / 4 - 4), "loss": (5, 5, 4.9, 4.5, 3, 2.8, 2.9, 4, 9)[i]} for i in range(9)]
    >>> found = range_test(lines, smooth=0.0)
    >>> round(found.steepest, 6), round(found.lowest, 6)
    (0.000562, 0.001778)
    """
    lines = [line for line in lines if math.isfinite(line.get("ce", line["loss"]))]
    rates, losses = [line["lr"] for line in lines], [line.get("ce", line["loss"]) for line in lines]
    if len(rates) < 5 or any(b <= a for a, b in pairwise(rates)):
        raise ValueError("this is no range test, whose rate grows at every step: train with --schedule.name range-test")
    smoothed, average = [], 0.0
    for i, loss in enumerate(losses):
        average = smooth * average + (1 - smooth) * loss
        smoothed.append(average / (1 - smooth ** (i + 1)))
    bottom = min(range(1, len(rates)), key=smoothed.__getitem__)
    wide = max(1, len(rates) // 10)  # a slope over a fifth of the test, for one step's is noise

    def slope(i: int) -> float:
        a, b = max(0, i - wide), min(len(rates) - 1, i + wide)
        return (smoothed[b] - smoothed[a]) / math.log(rates[b] / rates[a])

    return RangeTest(rates, losses, smoothed, rates[min(range(bottom), key=slope)], rates[bottom])


def arguments_of(schedules: Mapping[str, type]) -> Any:
    """`PlotSchedule` with the fields of all schedules, which are flags of the command."""
    return make_dataclass("PlotSchedules", (), bases=(PlotSchedule, *schedules.values()), frozen=True)


def curves(args: Any, schedules: Mapping[str, Any], presets: Mapping[str, Config]) -> dict[str, tuple[Schedule, int]]:
    """For each thing to draw its schedule and its number of steps. ValueError for what is none.

    ``args`` is an instance of `arguments_of` (schedules).
    """
    from olmo_fn.train.folder import read_config
    from olmo_fn.train.schedule import schedule

    found: dict[str, tuple[Schedule, int]] = {}
    for what in args.what:
        if what in schedules:
            names = [field.name for field in fields(schedules[what]) if field.name != "name"]
            settings = schedules[what](**{name: getattr(args, name) for name in names})
            found[what] = settings.build(args.lr, args.total), args.total
        elif what in presets or Path(what).exists():
            cfg = presets[what] if what in presets else read_config(Path(what))
            found[what] = schedule(cfg), cfg.run.steps
        else:
            known = f"schedules are {', '.join(schedules)}; presets: olmo-fn train --help"
            raise ValueError(f"{what!r} is no schedule, preset or run; {known}")
    if not found:
        raise ValueError(f"name what to draw: one or more of {', '.join(schedules)}, a preset, or a run folder")
    return found


def plot_schedules(found: Mapping[str, tuple[Schedule, int]], output: Path, log: bool = False) -> None:
    """Draw schedules over their steps, 1 to their last."""
    import torch

    figure, axes = canvas()
    for style, (name, (schedule, steps)) in zip(cycle(("-", "--", "-.", ":")), found.items(), strict=False):
        at = torch.linspace(1, steps, min(steps, 4000), dtype=torch.float64).round().long().unique()
        axes.plot(at, [float(schedule(step)) for step in at], label=name, linewidth=1.8, linestyle=style)
    axes.set_xlim(0, max(steps for _, steps in found.values()))
    axes.set_yscale("log" if log else "linear")
    if not log:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, output)


def plot_range_test(found: RangeTest, output: Path) -> None:
    """Draw loss over learning rate, and mark the two rates."""
    figure, axes = canvas()
    axes.plot(found.rates, found.losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="loss of each step")
    axes.plot(found.rates, found.smoothed, color="tab:blue", linewidth=2, label="moving average")
    for rate, name, color in ((found.steepest, "falls fastest", "tab:green"), (found.lowest, "lowest", "tab:red")):
        axes.axvline(rate, color=color, linewidth=1.2, linestyle="--", label=f"{name}, at {rate:.1e}")
    low, first = min(found.smoothed), found.smoothed[0]
    axes.set_ylim(low - 0.15 * (first - low), first + 0.4 * (first - low))  # what comes after the edge explodes
    axes.set_xlim(found.rates[0], found.rates[-1])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("cross entropy (nats a token)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, output)


def canvas() -> tuple[Any, Any]:
    """A figure and its axes; ValueError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib, which is not installed: pip install 'olmo-fn[plot]'") from None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, output: Path) -> None:
    """Write the picture; ValueError where there is no such folder or kind of picture."""
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {str(output)!r}: {str(error).splitlines()[0]}") from None


def draw_schedules(args: Any, schedules: Mapping[str, Any], presets: Mapping[str, Config]) -> Path:
    """The command ``plot schedule``: the picture's path."""
    plot_schedules(curves(args, schedules, presets), args.output, args.log)
    return args.output


def draw_range_test(args: PlotRangeTest) -> str:
    """The command ``plot range-test``: what it found, and the picture's path."""
    from olmo_fn.train.observers.jsonl import read_metrics

    found = range_test(read_metrics(args.run / "metrics.jsonl", "loss", "lr"), args.smooth)
    output = args.output or args.run / "range-test.png"
    plot_range_test(found, output)
    return f"the loss falls fastest at {found.steepest:.2e} and is lowest at {found.lowest:.2e}: {output}"
