"""What is shown while a run goes, in a width of so many columns; and how a trained model is asked for its loss.

The names of the cases are those of the list of what a first use ran into: use-4 (a line of one batch), use-17 (80 columns), …
"""

import io
import json
import re

import pytest
import rich.console
from rich.text import Text

from olmo_fn import plot
from olmo_fn.cli import main as cli
from olmo_fn.train.events import Evaluated, Said, Started, Stepped, Stopped
from olmo_fn.train.observers import Console
from olmo_fn.train.observers.console import Line, describe

METRICS = {
    **{"loss": 4.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 5000.0, "mfu": 0.81, "peak_mb": 900.0, "skipped": 0.0},
    "seconds": 0.2,
}
LATE = {**METRICS, "loss": 12345.678, "lr": 1.234e-5, "grad_norm": 123.4, "tokens_per_s": 1_518_146.0, "left": 100_000}
HELDOUT = Evaluated(100, "heldout", {"loss": 4.6777, "bits_per_byte": 1.7321, "tokens": 137_216})


def screen(events, width=80, every=10, **options):
    """What a console of so many columns gets, with all its codes."""
    out = io.StringIO()
    console = Console(every, rich.console.Console(file=out, width=width, **options))
    console(Started(0, 100))
    for event in events:
        console(event)
        if console.live:
            console.live.refresh()
    console.close()
    return out.getvalue()


def of_steps(*losses, **more):
    return [Stepped(n, {**METRICS, "loss": loss, **more}) for n, loss in enumerate(losses, 1)]


# --- what a line says -----------------------------------------------------------------------------------------------------


def test_plain_lines_are_means_since_the_last():
    """use-4: one batch is noise, and a single slow step is no speed."""
    slow = {**METRICS, "tokens_per_s": 1000.0, "mfu": 0.01, "seconds": 0.6}
    steps = [
        Stepped(1, {**METRICS, "loss": 9.0}),
        *(Stepped(n, {**METRICS, "loss": float(n)}) for n in range(2, 5)),
        Stepped(5, slow),
    ]
    lines = screen(steps, every=5).splitlines()
    assert lines[0] == "step 1/100  loss 9.000  lr 1.0e-3  |g| 0.5  5k tok/s  MFU 81%  0.9 GB"
    assert lines[1].startswith("step 5/100  loss 3.375  lr 1.0e-3  |g| 0.5  3k tok/s  MFU 41%")  # 3,600 in 1.2 s
    assert len(lines) == 2


def test_a_live_line_is_a_mean_of_the_last_steps():
    text = screen(of_steps(9.0, *[1.0, 3.0] * 10), every=4, width=120, force_terminal=True)
    assert "loss 9.000" in text
    assert text.count("loss 2.000") >= 16


def test_the_last_held_out_loss_stays_in_the_line():
    lines = screen([*of_steps(4.0), HELDOUT, Said("x"), Evaluated(1, "web", {"loss": 1.0}), Stepped(10, METRICS)]).splitlines()
    assert "held-out" not in lines[0]
    assert "held-out 4.678" in lines[-1]


def test_a_skipped_step_is_named_and_explained_once():
    """use-4: a line of its own, and not in the mean of the others."""
    steps = of_steps(4.0, 2.0, 4.0)
    bad = [Stepped(n, {**METRICS, "loss": 900.0, "grad_norm": 77.0, "skipped": 1.0}) for n in (4, 5)]
    lines = screen([*steps, *bad, Stepped(10, {**METRICS, "loss": 3.0})], every=10).splitlines()
    assert lines[1] == "step 4/100  loss 900.000  |g| 77  SKIPPED"
    assert lines[2].startswith("SKIPPED: no update")
    assert "--recipe.skip-sigma" in lines[3]
    assert lines[4] == "step 5/100  loss 900.000  |g| 77  SKIPPED"
    assert "loss 3.000" in lines[5]
    assert len(lines) == 6
    assert all(len(line) <= 80 for line in lines)


# --- how wide it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [METRICS, {**METRICS, "left": 41, "heldout": 4.6777}, {**LATE, "heldout": 10.6777}], ids=len)
@pytest.mark.parametrize("width", [40, 60, 80, 100, 150])
def test_a_line_is_one_line(width, values):
    """use-17: nothing wraps, live or plain, and what matters is kept."""
    for text in (describe(values, 99_999, 100_000, width), rendered(Line(values, 99_999, 100_000), width)):
        assert "\n" not in text.rstrip("\n")
        assert len(text.rstrip("\n")) <= width
        assert "step 99999/100000" in text
        assert re.search(r"loss \d", text)


def rendered(line, width, **options):
    out = io.StringIO()
    rich.console.Console(file=out, width=width, **options).print(line)
    return out.getvalue()


def test_80_columns_hold_what_one_wants_to_know():
    values = {**METRICS, "loss": 4.3637, "tokens_per_s": 19_751.0, "left": 41, "heldout": 4.6777}
    assert describe(values, 250, 1000, 80) == "step 250/1000  loss 4.364  held-out 4.678  lr 1.0e-3  19.8k tok/s  0:41 left"
    assert "held-out 4.678  19.8k tok/s  0:41 left" in rendered(Line(values, 250, 1000), 80)


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_live_line_is_wiped_out(width):
    """What a terminal would show in the end: the lines that were printed, and nothing of the live one, ^C behind it or not."""
    text = screen([*of_steps(4.0, 3.0), Said("in between"), *of_steps(4.0)], width=width, force_terminal=True)
    assert drawn(text, width) == ["in between"]
    assert drawn(text.replace("left", "left^C", 3), width) == ["in between"]


def drawn(text, width):
    """The lines of a terminal of so many columns: carriage returns, line feeds, erased lines and cursor moves."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?0-9;]*[a-zA-Z]|.|\n|\r", text):
        if part.startswith("\x1b"):
            number = int(part[2:-1]) if part[2:-1].isdigit() else 1
            if part[-1] == "A":
                row = max(0, row - number)
            elif part == "\x1b[2K":
                rows[row] = ""
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        else:
            if column == width:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return [line.rstrip() for line in rows if line.strip()]


def test_without_colour_the_bar_can_be_seen():
    """use.md, section 3: NO_COLOR left blanks."""
    text = rendered(Line(METRICS, 50, 100), 120, force_terminal=True, no_color=True)
    assert "━" * 10 + "─" * 10 + " step 50/100" in Text.from_ansi(text).plain


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    """use-17: with TERM=dumb there was no line until the end."""
    monkeypatch.setenv("TERM", "dumb")
    text = screen(of_steps(*[4.0] * 20), force_terminal=True)
    assert [line.split("  ")[0] for line in text.splitlines()] == ["step 1/100", "step 10/100", "step 20/100"]
    assert "\x1b" not in text


def test_other_lines_are_as_they_were():
    events = [Said("[b]hello[/b]"), HELDOUT, Evaluated(12, "heldout", {"loss": 2.5, "tokens": 4096})]
    events += [Evaluated(12, "arc-easy", {"accuracy": 0.5}), Stopped(12), Stopped(12, "too hot")]
    assert screen(events).splitlines() == [
        "[b]hello[/b]",
        "held-out after step 100: loss 4.6777, 1.7321 bits per byte (137,216 tokens)",
        "held-out after step 12: loss 2.5000 (4,096 tokens)",
        "arc-easy after step 12: accuracy 0.5000",
        "stopped after step 12: too hot",
    ]


# --- pictures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn_page(monkeypatch):
    """The figure that was drawn last; nothing is written."""
    pages = []
    monkeypatch.setattr(plot, "save", lambda page, output: pages.append(page))
    return pages


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_picture_of_the_loss(drawn_page, tmp_path):
    """use.md, loss.png: steps and tokens, a smoothed curve, held-out points, skipped steps in the legend, ticks of the rate."""
    lines = [
        {"step": n, "loss": 5 - n / 100, "lr": 3e-2, "grad_norm": 0.5, "tokens": 1000 * n, "skipped": 0.0}
        for n in range(1, 301)
    ]
    lines[99] |= {"loss": 500.0, "skipped": 1.0}
    evaluations = [{"step": n, "eval": name, "loss": 4.0} for n in (150, 300) for name in ("heldout", "web")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + evaluations))
    assert plot.plot_loss(tmp_path) == tmp_path / "loss.png"
    top, middle, bottom = drawn_page[0].axes[:3]
    assert legend(top) == ["each step", "mean of 7 steps", "held-out, 4.000", "web, 4.000", "skipped step, 1"]
    raw, smooth = (line.get_ydata() for line in top.get_lines()[:2])
    assert raw[99] == 500
    assert smooth[99] == pytest.approx(4.0)
    assert top.get_ylim()[1] < 6
    assert bottom.get_xlabel() == "step"
    assert [axis.get_xlabel() for axis in top.child_axes] == ["million tokens"]
    drawn_page[0].canvas.draw()
    assert len({tick.get_text() for tick in bottom.get_yticklabels()}) >= 3
    assert all(re.fullmatch(r"[\d.]*", tick.get_text()) for tick in middle.get_yticklabels(which="both"))


def test_schedules_of_different_lengths_are_in_per_cent(drawn_page, tmp_path, capsys):
    """use.md, lr.png: a run of 1,000 steps beside schedules of 100,000 was a line at 0."""
    words = ["plot", "schedule", "cosine", "wsd"]
    assert cli.main([*words, "olmo2-tiny", "-o", "x.png"]) == cli.main([*words, "-o", "x.png"]) == 0
    mixed, plain = (page.axes[0] for page in drawn_page)
    assert mixed.get_xlabel() == "per cent of the run's steps"
    assert all(line.get_ydata().max() == 100 and line.get_xdata()[-1] == 100 for line in mixed.get_lines())
    assert "olmo2-tiny\n1,000 steps, peak 0.04" in legend(mixed)
    assert (plain.get_xlabel(), plain.get_ylabel()) == ("step", "learning rate")


@pytest.mark.parametrize("edge", [60, 79])
def test_the_picture_of_a_range_test(drawn_page, tmp_path, edge):
    """use.md, range-test.png: raw losses stay inside, no line lies on the frame, an end that still falls is said."""
    losses = [9 - 0.05 * min(n, edge) + 0.2 * max(0, n - edge) - (n % 2) * 0.5 for n in range(80)]
    lines = [{"step": n + 1, "loss": loss, "lr": 1e-5 * 1.2**n} for n, loss in enumerate(losses)]
    found = plot.range_test(lines, smooth=0.0 if edge == 79 else 0.9)
    plot.plot_range_test(found, tmp_path / "x.png")
    axes = drawn_page[0].axes[0]
    low, high = axes.get_ylim()
    assert low < min(losses)
    assert high > max(losses[:edge])
    assert axes.get_xlim()[1] > found.rates[-1]
    assert ("still falling at the end" in legend(axes)[-1]) == (edge == 79)
