"""From words to a command's settings: what is wrong with them is told in one line, with one suggestion. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import tyro
from tyro import _errors as events

from olmo_fn.fields import check_values, expanded

A = TypeVar("A")


def parse(cls: type[A], prog: str, words: Sequence[str], others: Mapping[str, str] | None = None, **options: Any) -> A:
    """The settings that ``words`` describe; ``options`` are tyro's. Prints help, and ends the process, where they ask for it.

    ``others``: what to say of flags that exist elsewhere. ValueError for an unknown flag, and a value that does not fit.
    """

    def refuse(event: events.ParseErrorEvent) -> None:
        flags = [flag for action in tyro.extras.get_parser(cls, **options)._actions for flag in action.option_strings]
        raise ValueError(complaint(event, flags, others or {}))

    with events.on_parse_error(refuse):
        found = tyro.cli(cls, prog=prog, args=list(words), **options)
    found = expanded(found)
    check_values(found)
    return found


def complaint(event: events.ParseErrorEvent, flags: Collection[str], others: Mapping[str, str]) -> str:
    """What is wrong, in one line. tyro knows it by an event of its own."""
    more = f"see {event.prog} --help"
    unknown = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", [])
    if unknown:
        first = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        if first in others:
            return f"{first}: {others[first]}"
        close = closest(first, flags) if first.startswith("-") else ""
        return f"{first}: did you mean {close}?" if close else f"{first!r} is not understood; {more}"
    match event:
        case events.MissingArgs(missing_arguments=missing):
            return f"{' and '.join(_name(one.arg) for one in missing)} must be given; {more}"
        case events.BadValue(argument=argument):
            return f"{_name(argument)} needs a value after it; {more}"
        case events.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{_name(argument)} {value!r} is unknown{did_you_mean(value, choices)} There are {', '.join(choices)}"
        case events.InstantiationFailure(message=message, argument=argument):
            return f"{_name(argument)}: {_plain(message)}; {more}" if argument else f"{_plain(message)}; {more}"
    return f"{type(event).__name__}: {more}"


def closest(word: str, flags: Collection[str]) -> str:
    """The flag that was meant, if one is close: of the same last part, or of nearly the same letters.

    >>> closest("--lr", ["--growth.sqrt-lr", "--optim.lr", "--run.steps"]), closest("--run.step", ["--run.steps"])
    ('--optim.lr', '--run.steps')
    """
    word = word.replace("_", "-")
    last = word.lstrip("-").rpartition(".")[-1]
    same = [flag for flag in flags if flag.lstrip("-").rpartition(".")[-1] == last]
    if same:
        return (get_close_matches(word, same, 1) or same)[0]
    parts = {flag.lstrip("-").rpartition(".")[-1]: flag for flag in flags}
    close = get_close_matches(word, flags, 1, 0.7) or [parts[part] for part in get_close_matches(last, parts, 1, 0.7)]
    return close[0] if close else ""


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``, did you mean X?`` or just a stop, before what there is.

    >>> did_you_mean("trian", ["train"]), did_you_mean("x", ["train"])
    (', did you mean train?', ';')
    """
    close = get_close_matches(word, known, 1)
    return f", did you mean {close[0]}?" if close else ";"


def command(prog: str, *words: str) -> str:
    """A command to type, with its words quoted where a shell needs it.

    >>> command("olmo-fn checkpoint", "my run")
    "olmo-fn checkpoint 'my run'"
    """
    return f"{prog} {shlex.join(words)}"


def _name(argument: Any) -> str:
    """The flag of an argument, or what stands for it in the help."""
    return str(argument.lowered.metavar) if argument.is_positional() else argument.lowered.name_or_flags[0]


def _plain(message: object) -> str:
    return " ".join(str(message).split()).rstrip(".")
