"""One command with sub-commands, each imported when it is called, so that ``--help`` is quick. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from olmo_fn import __version__
from olmo_fn.cli.process import exit_code, run_process

COMMANDS = {
    "train": "train a model, a preset or the config.yaml of a run",
    "generate": "text from a trained model",
    "chat": "talk with a trained model",
    "evaluate": "the loss of a trained model on texts, in perplexity and bits per byte",
    "plan": "the best layouts of a number of accelerators",
    "pipeline": "a pipeline schedule, drawn and counted",
    "replay": "a step of a run once more, bit for bit, with the text that it saw",
    "average": "the mean of checkpoints",
    "plot": "pictures of learning rates, of a range test, and of runs",
    "checkpoint": "list the checkpoints of a run, and say which are whole",
    "tokenize": "text to token files",
    "data": "what token files, mixtures and steps hold",
    "convert": "runs from Hugging Face, OLMo-core and GGUF, and back",
}


def program() -> None:
    """The program ``olmo-fn``: run what ``sys.argv`` says, and end the process with its exit code."""
    run_process(lambda: main(sys.argv[1:]))


def main(words: Sequence[str]) -> int:
    """Run a sub-command; returns its exit code."""
    return exit_code(lambda: _run(*words or ["--help"]))


def overview() -> str:
    """The sub-commands, in words."""
    rows = "\n".join(f"  {name:<12} {words}" for name, words in COMMANDS.items())
    return f"usage: olmo-fn COMMAND …\n\n{rows}\n\nolmo-fn COMMAND --help says more; olmo-fn --version"


def _run(name: str, *words: str) -> int:
    if name in ("-h", "--help", "--version"):
        print(f"olmo-fn {__version__}" if name == "--version" else overview())
        return 0
    from olmo_fn.cli import commands
    from olmo_fn.cli.parsing import did_you_mean

    if name not in COMMANDS:
        raise ValueError(f"{name!r} is no command{did_you_mean(name, COMMANDS)} There are {', '.join(COMMANDS)}")
    return getattr(commands, name)(list(words))
