"""Pictures: ``olmo-fn plot schedule cosine wsd --lr 4e-4 --warmup 2000 --total 100000 -o lr.png``.

``schedule`` draws learning rates: of schedules by name, of presets, of runs. ``range-test`` draws the loss of a learning-rate
range test over the rate, and says where it falls fastest. ``runs`` draws several runs' losses (`olmo_fn.plot_runs`). A run
draws its own when it ends (`plot_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from olmo_fn.fields import DECAY, POSITIVE, Range
from olmo_fn.picture import figure
from olmo_fn.train.config import Config
from olmo_fn.train.observers.jsonl import read_evaluations, read_metrics

if TYPE_CHECKING:
    from olmo_fn.optim.schedules import Schedule

THOUSANDS = "{x:,.0f}"
Words = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class PlotSchedule:
    """Draw learning rates over the steps, all in one picture."""

    what: Words = ()
    """Schedules (cosine, wsd, …), presets (olmo2-1b), run folders or config.yaml files. The flags are for schedules only."""
    lr: Annotated[float, POSITIVE] = 4e-4
    """Peak learning rate."""
    total: Annotated[int, Range(1, 1 << 40)] = 100_000
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
    smooth: Annotated[float, DECAY] = 0.9
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
    read: list[tuple[Any, Any]] = [(line.get("lr"), line.get("ce", line.get("loss"))) for line in lines]
    points = [point for point in read if all(isinstance(x, (int, float)) and math.isfinite(x) for x in point)]
    rates, losses = [rate for rate, _ in points], [loss for _, loss in points]
    if len(rates) < 5 or any(b <= a for a, b in pairwise(rates)):
        raise ValueError("this is no range test, whose rate grows at every step: train with --schedule.name range-test")
    smoothed = moving_average(losses, smooth)
    bottom = min(range(1, len(rates)), key=smoothed.__getitem__)
    wide = max(1, len(rates) // 10)  # a slope over a fifth of the test, for one step's is noise

    def slope(i: int) -> float:
        a, b = max(0, i - wide), min(len(rates) - 1, i + wide)
        return (smoothed[b] - smoothed[a]) / math.log(rates[b] / rates[a])

    return RangeTest(rates, losses, smoothed, rates[min(range(bottom), key=slope)], rates[bottom])


def moving_average(values: Iterable[float], decay: float) -> list[float]:
    """The exponential moving average, without the bias towards 0; what is not finite is left out of it.

    >>> moving_average([1.0, 3.0, math.nan], 0.5)
    [1.0, 2.3333333333333335, 2.3333333333333335]
    """
    found, average, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + 1 - decay
        found.append(average / weight if weight else math.nan)
    return found


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
    """Draw schedules over their steps, 1 to their last; those of different lengths in per cent of their lengths and peaks."""
    import torch

    page, axes = canvas()
    relative = len({steps for _, steps in found.values()}) > 1
    for style, (name, (schedule, steps)) in zip(cycle(("-", "--", "-.", ":")), found.items(), strict=False):
        at = torch.linspace(1, steps, min(steps, 4000), dtype=torch.float64).round().long().unique()
        rates, label = torch.tensor([float(schedule(step)) for step in at]), name
        if relative:
            peak = float(rates.max())
            at, rates, label = 100 * at / steps, 100 * rates / peak, f"{name}\n{steps:,} steps, peak {peak:.2g}"
        axes.plot(at, rates, label=label, linewidth=1.8, linestyle=style)
    axes.set_xlim(0, 100 if relative else max(steps for _, steps in found.values()))
    axes.set_yscale("log" if log else "linear")
    if not log:
        axes.set_ylim(bottom=0)
    if not log and not relative:
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.set_xlabel("per cent of the run's steps" if relative else "step")
    axes.set_ylabel("per cent of the peak learning rate" if relative else "learning rate")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(page, output)


def plot_range_test(found: RangeTest, output: Path) -> None:
    """Draw loss over learning rate, and mark the two rates."""
    page, axes = canvas()
    axes.plot(found.rates, found.losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="loss of each step")
    axes.plot(found.rates, found.smoothed, color="tab:blue", linewidth=2, label="moving average")
    end = found.rates[-1]
    lowest = "still falling at the end" if found.lowest == end else "lowest"
    for rate, name, color in ((found.steepest, "falls fastest", "tab:green"), (found.lowest, lowest, "tab:red")):
        axes.axvline(rate, color=color, linewidth=1.2, linestyle="--", label=f"{name}, at {rate:.1e}")
    before = [loss for rate, loss in zip(found.rates, found.losses, strict=True) if rate <= found.lowest]
    low, high = min(*found.losses, *found.smoothed), max(*before, *found.smoothed[:1])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))  # what comes after the edge explodes
    axes.set_xlim(found.rates[0], end * (end / found.rates[0]) ** 0.02)  # so that no line lies on the frame
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("cross entropy (nats a token)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(page, output)


def plot_loss(folder: Path) -> Path | None:
    """Draw ``loss.png`` out of ``metrics.jsonl``; None without matplotlib (extra ``plot``) or without steps."""
    lines, output = read_metrics(folder / "metrics.jsonl", "tokens", "loss", "lr"), folder / "loss.png"
    try:
        page, (top, middle, bottom) = figure(8, 6.5, 3, sharex=True, height_ratios=(3, 1, 1))
    except ValueError:
        return None
    if not lines:
        return None
    from matplotlib.ticker import LogLocator

    steps, losses = [line["step"] for line in lines], [line.get("ce", line["loss"]) for line in lines]
    made = [math.nan if line.get("skipped") else loss for line, loss in zip(lines, losses, strict=True)]
    wide = max(2, len(lines) // 100)
    top.plot(steps, losses, linewidth=0.6, color="tab:blue", alpha=0.35, label="each step")
    top.plot(steps, centred_mean(made, wide), color="tab:blue", label=f"mean of {2 * wide + 1} steps")
    heldout: dict[str, dict[int, float]] = {}
    for line in read_evaluations(folder / "metrics.jsonl"):
        if "loss" in line:
            heldout.setdefault("held-out" if line["eval"] == "heldout" else line["eval"], {})[line["step"]] = line["loss"]
    for i, (name, found) in enumerate(heldout.items()):
        label = f"{name}, {list(found.values())[-1]:.3f}"
        top.plot(found.keys(), found.values(), "o-", color=f"C{(i + 1) % 10}", markersize=5, linewidth=1, label=label)
    skipped = [line["step"] for line in lines if line.get("skipped")]
    for i, step in enumerate(skipped):
        label = "" if i else f"skipped step{'s' if skipped[1:] else ''}, {len(skipped)}"
        top.axvline(step, color="tab:red", linewidth=0.8, linestyle=":", zorder=0, label=label)
    shown = sorted(filter(math.isfinite, [*losses, *(loss for found in heldout.values() for loss in found.values())]))
    if shown and shown[0] < shown[-1]:  # one spike does not flatten the rest
        low, high = shown[0], max(shown[int(0.995 * (len(shown) - 1))], *filter(math.isfinite, losses[:1]), shown[0])
        top.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    top.set_ylabel("cross entropy (nats a token)")
    top.set_title(folder.name)
    top.legend(frameon=False, fontsize=9)
    middle.plot(steps, [line.get("grad_norm", math.nan) for line in lines], linewidth=0.8, color="tab:orange")
    middle.set_ylabel("gradient norm")
    middle.set_yscale("log")
    middle.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=4))
    middle.yaxis.set_major_formatter("{x:g}")
    middle.yaxis.set_minor_formatter("")
    bottom.plot(steps, [line.get("lr", math.nan) for line in lines], linewidth=1.2, color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    bottom.locator_params(axis="y", nbins=4)
    bottom.set_xlim(0, 1.01 * steps[-1])
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_formatter(THOUSANDS)
    if len(lines) > 1:
        tokens = [line["tokens"] / 1e6 for line in lines]
        top.secondary_xaxis("top", functions=(between(steps, tokens), between(tokens, steps))).set_xlabel("million tokens")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    save(page, output)
    return output


def centred_mean(losses: Sequence[float], wide: int) -> Any:
    """For each loss the mean of it and of ``wide`` ones on either side, of those that are finite; NaN where none is.

    >>> centred_mean([1.0, 3.0, math.inf, 5.0], 1).tolist()
    [2.0, 2.0, 4.0, 5.0]
    """
    import numpy as np

    values = np.array(losses, dtype=float)
    finite = np.isfinite(values)
    sums, counts = (np.concatenate(([0.0], np.cumsum(x))) for x in (np.where(finite, values, 0.0), finite))
    at = np.arange(len(values))
    begin, end = np.maximum(at - wide, 0), np.minimum(at + wide + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[begin]) / (counts[end] - counts[begin])


def between(xs: Sequence[float], ys: Sequence[float]) -> Any:
    """The function through the points, and beyond them along the line through the first and the last."""
    import numpy as np

    slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0])

    def at(x: Any) -> Any:
        inside = np.clip(x, xs[0], xs[-1])
        return np.interp(inside, xs, ys) + (x - inside) * slope

    return at


def canvas() -> tuple[Any, Any]:
    """A figure and its axes; ValueError without matplotlib."""
    page, axes = figure(9, 4.5)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return page, axes


def save(page: Any, output: Path) -> None:
    """Write the picture; ValueError where there is no such folder or kind of picture."""
    try:
        page.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {str(output)!r}: {str(error).splitlines()[0]}") from None


def draw_schedules(args: Any, schedules: Mapping[str, Any], presets: Mapping[str, Config]) -> Path:
    """The command ``plot schedule``: the picture's path."""
    plot_schedules(curves(args, schedules, presets), args.output, args.log)
    return args.output


def draw_range_test(args: PlotRangeTest) -> str:
    """The command ``plot range-test``: what it found, and the picture's path."""
    from olmo_fn.train.folder import read_config

    steps, lines = read_config(args.run).run.steps, read_metrics(args.run / "metrics.jsonl", "loss", "lr")
    found = range_test(lines, args.smooth)
    output = args.output or args.run / "range-test.png"
    plot_range_test(found, output)
    fastest, done = f"the loss falls fastest at {found.steepest:.2e}", lines[-1]["step"]
    if found.lowest < found.rates[-1]:
        return f"{fastest} and is lowest at {found.lowest:.2e}: {output}"
    mend = "finish it" if done < steps else "raise --optim.lr"
    short = f"the test has done {done:,} of its {steps:,} steps" if done < steps else "the test is done"
    return f"{fastest}, but is still falling at the end, {found.lowest:.2e}, and {short}; {mend}: {output}"


if __name__ == "__main__":  # as version 0.1 called it
    raise SystemExit("the command is: olmo-fn plot")
