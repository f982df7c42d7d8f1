"""From words to a command's settings: what is wrong with them is told in one line, with one suggestion. Imports no torch."""

from __future__ import annotations

import re
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
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        unknown = [word for word in given if word.replace("_", "-") not in flags] or getattr(event, "tokens", [])
        raise ValueError(_unknown(unknown[0], flags, others or {}, event.prog) if unknown else complaint(event))

    with events.on_parse_error(refuse):
        found = tyro.cli(cls, prog=prog, args=list(words), **options)
    found = expanded(found)
    check_values(found)
    return found


def complaint(event: events.ParseErrorEvent) -> str:
    """What is wrong with the values of known flags, in one line."""
    more = f"see {event.prog} --help"
    match event:
        case events.MissingArgs(missing_arguments=missing):
            return f"{' and '.join(_name(one.arg) for one in missing)} must be given; {more}"
        case events.BadValue(argument=argument):
            return f"{_name(argument)} needs a value after it; {more}"
        case events.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{_name(argument)} {value!r} is unknown{did_you_mean(value, choices)} There are {', '.join(choices)}"
        case events.InstantiationFailure(message=message, argument=argument):
            return f"{f'{_name(argument)}: ' if argument else ''}{_plain(message)}; {more}"
    return f"these words do not go together; {more}"


def _unknown(word: str, flags: Collection[str], others: Mapping[str, str], prog: str) -> str:
    if word in others:
        return f"{word}: {others[word]}"
    close = closest(word, flags) if word.startswith("-") else ""
    return f"{word}: did you mean {close}?" if close else f"{word!r} is not understood; see {prog} --help"


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


def _name(argument: Any) -> str:
    """The flag of an argument, or what stands for it in the help."""
    return str(argument.lowered.metavar) if argument.is_positional() else max(argument.lowered.name_or_flags, key=len)


def _plain(message: object) -> str:
    """What Python says of a number, in plain words.

    >>> _plain("invalid literal for int() with base 10: '1e3'")
    "'1e3' is no whole number; write 1000"
    """
    found = re.search(r"(float|int)\(?\)?(?: with base 10)?: ('.*')$", text := " ".join(str(message).split()).rstrip("."))
    if not found:
        return text
    kind, value = found.groups()
    try:
        number = float(value.strip("'"))
        return f"{value} is no whole number" + (f"; write {number:.0f}" if number.is_integer() and abs(number) < 1e15 else "")
    except ValueError:
        return f"{value} is no {'whole ' if kind == 'int' else ''}number"
