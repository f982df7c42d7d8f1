"""The sub-commands: each reads its words into a dataclass, and calls what lies beside what it does. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from olmo_fn.cli import training
from olmo_fn.cli.parsing import did_you_mean, parse
from olmo_fn.presets import CONFIGS
from olmo_fn.train.choices import Choices, locate, with_files
from olmo_fn.train.config import CHOICES, Config


def train(words: Sequence[str]) -> int:
    """Train a model."""
    return training.main(words, CONFIGS, "olmo-fn train", ("-m", "olmo_fn", "train"))


def generate(words: Sequence[str]) -> int:
    """Text from a trained model."""
    from olmo_fn.generate.command import Generate, run

    return run(parse(Generate, "olmo-fn generate", words, config=(tyro.conf.UseAppendAction,)))


def chat(words: Sequence[str]) -> int:
    """A conversation with a trained model."""
    from olmo_fn.generate.chat_command import Chat, run

    return run(parse(Chat, "olmo-fn chat", words, config=(tyro.conf.UseAppendAction,)))


def evaluate(words: Sequence[str]) -> int:
    """The loss of a trained model on texts."""
    from olmo_fn.evaluate import Evaluate, run

    print(run(parse(Evaluate, "olmo-fn evaluate", words)))
    return 0


def plan(words: Sequence[str]) -> int:
    """The best layouts of a number of accelerators."""
    from olmo_fn.planner.plan_command import Plan, run

    presets, _, rest = with_use(words)
    print(run(parse(Plan, "olmo-fn plan", rest), presets))
    return 0


def pipeline(words: Sequence[str]) -> int:
    """A pipeline schedule."""
    from olmo_fn.planner.pipeline_command import Show, run

    print(run(parse(Show, "olmo-fn pipeline", words)))
    return 0


def replay(words: Sequence[str]) -> int:
    """A step of a run once more; 1 when it is not what the run recorded."""
    from olmo_fn.replay.command import Arguments, run

    return run(parse(Arguments, "olmo-fn replay", words))


def average(words: Sequence[str]) -> int:
    """The mean of checkpoints."""
    from olmo_fn.average import Soup, soup

    print(soup(parse(Soup, "olmo-fn average", words)))
    return 0


def plot(words: Sequence[str]) -> int:
    """Pictures of learning rates, and of runs."""
    from olmo_fn import plot, plot_runs
    from olmo_fn.train.schedules import ScheduleSettings

    presets, choices, rest = with_use(words)
    schedules = choices[ScheduleSettings]
    commands = {"schedule": plot.arguments_of(schedules), "range-test": plot.PlotRangeTest, "runs": plot_runs.PlotRuns}
    name, *rest = rest or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: olmo-fn plot {{{','.join(commands)}}} …\n\n{plot.__doc__}\nolmo-fn plot COMMAND --help says more")
        return 0
    if name not in commands:
        hint = did_you_mean(name, commands)
        raise ValueError(f"olmo-fn plot {name}: there is no such picture{hint} There are {', '.join(commands)}")
    args = parse(commands[name], f"olmo-fn plot {name}", rest)
    if name == "range-test":
        print(plot.draw_range_test(args))
    elif name == "runs":
        print(plot_runs.draw_runs(args))
    else:
        print(plot.draw_schedules(args, schedules, presets))
    return 0


def checkpoint(words: Sequence[str]) -> int:
    """The checkpoints of a run; 1 if one is broken."""
    from olmo_fn.checkpoints import Arguments, run

    return run(parse(Arguments, "olmo-fn checkpoint", words))


def tokenize(words: Sequence[str]) -> int:
    """Text to token files."""
    from olmo_fn.data.tokenize import Tokenize
    from olmo_fn.data.tokenize_command import run

    return run(parse(Tokenize, "olmo-fn tokenize", words))


def data(words: Sequence[str]) -> int:
    """What token files, mixtures and steps hold; and text to token files."""
    from olmo_fn import show
    from olmo_fn.data import inspect, mix_command, tokenize_command
    from olmo_fn.data.tokenize import Tokenize

    ways: dict[str, tuple[type, Callable[[Any], int]]] = {
        "inspect": (inspect.Inspect, inspect.run),
        "show": (show.Show, show.run),
        "mix": (mix_command.ShowMix, mix_command.run),
        "tokenize": (Tokenize, tokenize_command.run),
    }
    return one_of("data", ways, words)


def convert(words: Sequence[str]) -> int:
    """Runs from the files of other programs, and back."""
    from olmo_fn.convert.command import DIRECTIONS

    return one_of("convert", DIRECTIONS, words)


def one_of(command: str, ways: Mapping[str, tuple[type, Callable[[Any], int]]], words: Sequence[str]) -> int:
    """Run one of the ``ways`` of a command, each its settings and what runs them, or say which there are."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        rows = "\n".join(
            f"  {way:<15} {(settings.__doc__ or '').partition('. ')[0].partition(':')[0]}"
            for way, (settings, _) in ways.items()
        )
        print(f"usage: olmo-fn {command} {{{','.join(ways)}}} …\n\n{rows}\n\nolmo-fn {command} WAY --help says more")
        return 0
    if name not in ways:
        raise ValueError(
            f"olmo-fn {command} {name}: there is no such way{did_you_mean(name, ways)} There are {', '.join(ways)}"
        )
    settings, run = ways[name]
    return run(parse(settings, f"olmo-fn {command} {name}", rest))


def with_use(words: Sequence[str]) -> tuple[Mapping[str, Config], Choices, list[str]]:
    """The presets and choices, with those of the files after each ``--use``, and the other words."""
    use, rest = training.take(words, "--use")
    choices, presets = with_files(CHOICES, locate(use))
    return {**CONFIGS, **presets}, choices, rest
