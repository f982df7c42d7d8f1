"""One command with sub-commands, each imported when it is called, so that ``--help`` is quick. Imports no torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from olmo_fn import __version__
from olmo_fn.cli import commands
from olmo_fn.launch.exit_rank import exit_rank
from olmo_fn.train.environment import prepare_environment

COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (commands.train, "train a model, a preset or the config.yaml of a run"),
    "generate": (commands.generate, "text from a trained model"),
    "evaluate": (commands.evaluate, "the loss of a trained model on texts, in perplexity and bits per byte"),
    "plan": (commands.plan, "the best layouts of a number of accelerators"),
    "pipeline": (commands.pipeline, "a pipeline schedule, drawn and counted"),
    "replay": (commands.replay, "a step of a run once more, bit for bit, with the text that it saw"),
    "average": (commands.average, "the mean of checkpoints"),
    "plot": (commands.plot, "pictures of learning rates, and of a range test"),
    "checkpoint": (commands.checkpoint, "list the checkpoints of a run, and say which are whole"),
    "tokenize": (commands.tokenize, "text to token files"),
}


def program() -> None:
    """The program ``olmo-fn``: run what ``sys.argv`` says, and end the process with its exit code."""
    run_process(lambda: main(sys.argv[1:]))


def run_process(command: Callable[[], int]) -> None:
    """End the process with a command's exit code, once what libraries read from the environment is set."""
    prepare_environment()
    with exit_rank():
        sys.exit(command())


def main(words: Sequence[str]) -> int:
    """Run a sub-command; returns its exit code."""
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"olmo-fn {__version__}")
        return 0
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        hint = f", did you mean {close[0]}?" if close else ";"
        return exit_code(lambda: _refuse(f"{name!r} is no command{hint} There are {', '.join(COMMANDS)}"))
    return exit_code(lambda: COMMANDS[name][0](rest))


def exit_code(command: Callable[[], int]) -> int:
    """The exit code of a command: 2, after one line, for what cannot be done; 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets a ? instead of no text at all
    try:
        return command()
    except BrokenPipeError:  # whoever read the text has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def overview() -> str:
    """The sub-commands, in words."""
    rows = "\n".join(f"  {name:<12} {words}" for name, (_, words) in COMMANDS.items())
    return f"usage: olmo-fn COMMAND …\n\n{rows}\n\nolmo-fn COMMAND --help says more; olmo-fn --version"


def _refuse(message: str) -> int:
    raise ValueError(message)
