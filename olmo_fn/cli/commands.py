"""The sub-commands: each reads its words into a dataclass, and calls what lies beside what it does. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro

from olmo_fn.cli import training
from olmo_fn.presets import CONFIGS
from olmo_fn.train.choices import Choices, locate, with_files
from olmo_fn.train.config import CHOICES, Config

A = TypeVar("A")


def train(words: Sequence[str]) -> int:
    """Train a model."""
    return training.main(words, CONFIGS, "olmo-fn train", ("-m", "olmo_fn", "train"))


def generate(words: Sequence[str]) -> int:
    """Text from a trained model."""
    from olmo_fn.generate.command import Generate, run

    return run(parse(Generate, "generate", words, tyro.conf.UseAppendAction))


def evaluate(words: Sequence[str]) -> int:
    """The loss of a trained model on texts."""
    from olmo_fn.evaluate import Evaluate, run

    print(run(parse(Evaluate, "evaluate", words)))
    return 0


def plan(words: Sequence[str]) -> int:
    """The best layouts of a number of accelerators."""
    from olmo_fn.planner.plan_command import Plan, run

    presets, _, rest = with_use(words)
    print(run(parse(Plan, "plan", rest), presets))
    return 0


def pipeline(words: Sequence[str]) -> int:
    """A pipeline schedule."""
    from olmo_fn.planner.pipeline_command import Show, run

    print(run(parse(Show, "pipeline", words)))
    return 0


def replay(words: Sequence[str]) -> int:
    """A step of a run once more; 1 when it is not what the run recorded."""
    from olmo_fn.replay.command import Arguments, run

    return run(parse(Arguments, "replay", words))


def average(words: Sequence[str]) -> int:
    """The mean of checkpoints."""
    from olmo_fn.average import Soup, soup

    print(soup(parse(Soup, "average", words)))
    return 0


def plot(words: Sequence[str]) -> int:
    """Pictures of learning rates."""
    from olmo_fn import plot
    from olmo_fn.train.schedules import ScheduleSettings

    presets, choices, rest = with_use(words)
    schedules = choices[ScheduleSettings]
    of_schedules = plot.arguments_of(schedules)
    args = tyro.extras.subcommand_cli_from_dict(
        {"schedule": of_schedules, "range-test": plot.PlotRangeTest}, args=rest, prog="olmo-fn plot", description=plot.__doc__
    )
    if isinstance(args, plot.PlotRangeTest):
        print(plot.draw_range_test(args))
    else:
        print(plot.draw_schedules(args, schedules, presets))
    return 0


def checkpoint(words: Sequence[str]) -> int:
    """The checkpoints of a run; 1 if one is broken."""
    from olmo_fn.checkpoint.command import Arguments, run

    return run(parse(Arguments, "checkpoint", words))


def tokenize(words: Sequence[str]) -> int:
    """Text to token files."""
    from olmo_fn.data.tokenize import Tokenize, run

    return run(parse(Tokenize, "tokenize", words))


def parse(cls: type[A], name: str, words: Sequence[str], *config: Any) -> A:
    """The arguments of a sub-command."""
    return tyro.cli(cls, prog=f"olmo-fn {name}", args=list(words), config=config)


def with_use(words: Sequence[str]) -> tuple[Mapping[str, Config], Choices, list[str]]:
    """The presets and choices, with those of the files after each ``--use``, and the other words."""
    use, rest = training.take(words, "--use")
    choices, presets = with_files(CHOICES, locate(use))
    return {**CONFIGS, **presets}, choices, rest
