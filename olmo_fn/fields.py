"""What a field of settings says about itself, in its annotation, and the one walk that reads it. Imports no torch.

lr: Annotated[float, POSITIVE] = 4e-4
threads: Annotated[int, INVISIBLE] = 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

S = TypeVar("S")

LARGEST = 2**53  # what a double, a JSON reader and a tensor's int64 all hold


class Effect(Enum):
    """Whether a field, or a group of fields, can change the numbers of a run; what is marked inside a group wins."""

    INVISIBLE = "cannot change the numbers of a run: it may differ when a run goes on"
    VISIBLE = "can change them, in a group that cannot"


INVISIBLE, VISIBLE = Effect.INVISIBLE, Effect.VISIBLE
PATH = "path"
"""Marks a text, or each of several, that is the path of a file or a folder."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold; of a tuple, each of them. A field without one takes any that is not negative.

    >>> Range(0, 1, below=True).says
    'it must be at least 0 and below 1'
    """

    low: float = 0
    high: float = inf
    above: bool = False
    """``low`` itself is not allowed."""
    below: bool = False
    """``high`` itself is not allowed."""

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in the range."""
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    @property
    def says(self) -> str:
        """The range in words."""
        if self.high == inf and self.low == 0:
            return "it must be positive" if self.above else "it must not be negative"
        low = f"{'above' if self.above else 'at least'} {self.low:,g}"
        return f"it must be {low}" + (f" and {'below' if self.below else 'at most'} {self.high:,}" if self.high < inf else "")


NOT_NEGATIVE = Range()
POSITIVE = Range(above=True)
AT_LEAST_ONE = Range(1)
DECAY = Range(0, 1, below=True)
"""Decay of a moving average."""
SIGNED = Range(-inf)


class Field(NamedTuple):
    """A field of nested settings, a group (whose value is a dataclass) or a single value."""

    flag: str
    """As on the command line, such as ``--recipe.batch-size``."""
    path: tuple[str, ...]
    """Names of the attributes that lead to it."""
    value: Any
    marks: tuple[Any, ...]
    """What its annotation, and those of the groups around it, say; the innermost last."""

    @property
    def visible(self) -> bool:
        """Whether it can change the numbers of a run."""
        return next((mark for mark in reversed(self.marks) if isinstance(mark, Effect)), VISIBLE) is VISIBLE


def walk(settings: Any) -> Iterator[Field]:
    """Every field of a tree of dataclasses, a group before what is in it.

    >>> from olmo_fn.mesh.settings import MeshConfig
    >>> next(walk(MeshConfig(tp=2, pp=3)))[:3]
    ('--pp', ('pp',), 3)
    """
    return _walk(settings, "--", "--", (), ())


def values(settings: Any) -> Iterator[Field]:
    """The fields that are no groups."""
    return (field for field in walk(settings) if not is_dataclass(field.value))


def check_values(settings: Any) -> None:
    """ValueError for what a field cannot mean: a number that is not finite, too large to count with, or out of its range; and
    a text that is no text, as a word of the command line may be that is not in the terminal's encoding.

    >>> from olmo_fn.generate.config import Sampling
    >>> check_values(Sampling(top_k=-1))
    Traceback (most recent call last):
    ValueError: --top-k is -1; it must not be negative
    """
    for field in values(settings):
        allowed = next((mark for mark in reversed(field.marks) if isinstance(mark, Range)), NOT_NEGATIVE)
        for item in _items(field.value):
            if is_dataclass(item):
                check_values(item)
            elif isinstance(item, (str, Path)) and not _is_text(str(item)):
                raise ValueError(f"{field.flag} is {str(item)!r}, which is not UTF-8; write it in UTF-8, without NUL")
            elif isinstance(item, int) and abs(item) > LARGEST:
                raise ValueError(f"{field.flag} is {item}; more than {LARGEST:,} cannot be counted")
            elif isinstance(item, float) and not isfinite(item):
                raise ValueError(f"{field.flag} is {item}; it must be a finite number")
            elif isinstance(item, (int, float)) and not isinstance(item, bool) and not allowed.holds(item):
                negative = item < 0 == allowed.low and not allowed.above
                raise ValueError(f"{field.flag} is {item}; {NOT_NEGATIVE.says if negative else allowed.says}")


def expanded(settings: S) -> S:
    """The settings with the home folder for each ``~`` at the beginning of a path.

    ValueError, with the flag, for the home folder of nobody.
    """
    for field in values(settings):
        if PATH in field.marks or isinstance(field.value, Path):
            settings = put(settings, field.path, _expanded(field.value, field.flag))
    return settings


def get(settings: Any, path: Sequence[str]) -> Any:
    """The value of a nested field."""
    for name in path:
        settings = getattr(settings, name)
    return settings


def put(settings: Any, path: Sequence[str], value: Any) -> Any:
    """``settings`` with another value of a nested field."""
    first, *rest = path
    return replace(settings, **{first: put(getattr(settings, first), rest, value) if rest else value})


def _walk(settings: Any, prefix: str, group: str, path: tuple[str, ...], marks: tuple[Any, ...]) -> Iterator[Field]:
    """Flags begin with ``prefix``; that of the name of a class that was chosen with ``group``, as it is chosen by that."""
    cls: Any = type(settings)
    for name, (shown, own) in _annotations(cls).items():
        value = getattr(settings, name)
        flag = f"{group if name == 'name' else prefix}{name.replace('_', '-')}"
        yield Field(flag, (*path, name), value, (*marks, *own))
        if is_dataclass(value):
            inside = f"{flag}."
            yield from _walk(value, inside if shown else prefix, inside, (*path, name), (*marks, *own))


@cache
def _annotations(cls: type) -> dict[str, tuple[bool, tuple[Any, ...]]]:
    """Of each field its marks, and whether flags inside it have its name, which ``tyro.conf.arg(name="")`` leaves out."""
    hints = get_type_hints(cls, include_extras=True)
    marks = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields(cls)}
    return {name: (all(getattr(mark, "name", None) != "" for mark in own), own) for name, own in marks.items()}


def _expanded(value: Any, flag: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_expanded(item, flag) for item in value)
    try:
        return type(value)(Path(value).expanduser()) if str(value).startswith("~") else value
    except RuntimeError as error:  # there is no such user, or no $HOME
        raise ValueError(f"{flag} {str(value)!r}: {error} Write the whole path") from None


def _items(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple):
        for item in x:
            yield from _items(item)
    else:
        yield x


def _is_text(x: str) -> bool:
    return "\0" not in x and not any("\ud800" <= c <= "\udfff" for c in x)
