"""A command as a process: its exit code, its last words, and signals at any moment. Imports no torch and little else."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from olmo_fn.launch.exit_rank import exit_rank
from olmo_fn.train.environment import prepare_environment


def run_process(command: Callable[[], int]) -> None:
    """End the process with a command's exit code, once what libraries read from the environment is set."""
    prepare_environment()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's background jobs have it
            signal.signal(number, stop)
    with exit_rank():
        sys.exit(exit_code(command))


def exit_code(command: Callable[[], int]) -> int:
    """The exit code of a command: 2, after one line, for what cannot be done; 128 + n after signal n."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets a ? instead of no text at all
    try:
        code = command()
        if sys.stdout:
            sys.stdout.flush()
        return code
    except SystemExit as end:  # of tyro, which has printed help
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # whoever read the text has enough of it
        from olmo_fn.train.observers.console import mute

        mute()
        return 0
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        print(words(number), file=sys.stderr)
        return 128 + number
    except Exception as error:
        from olmo_fn.cli.errors import describe

        line = describe(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # the error was about stdout, and would come once more when Python ends
            from olmo_fn.train.observers.console import mute

            mute()
        return 2


def stop(number: int, frame: FrameType | None) -> None:
    """Signal handler: interrupts the command. A second signal of the kind ends the process at once.

    So does one in an import, which may hold an exception back, or print it and go on.
    """
    signal.signal(number, signal.SIG_DFL)
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(OSError):
                os.write(2, f"{words(number)}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt(number)


def words(number: int) -> str:
    """What to say when signal ``number`` has ended a command.

    >>> words(15)
    'stopped by SIGTERM'
    """
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
