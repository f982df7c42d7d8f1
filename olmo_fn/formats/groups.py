"""The fields of somebody else's JSON: each is taken, or known to change no number, or refused by its dotted name."""

from __future__ import annotations

from math import isfinite
from typing import Any, TypeVar

T = TypeVar("T")


class Group:
    """A group of fields, from which one after the other is taken; ``path`` is its dotted name.

    A field that is null is as one that is not there. ``ignored`` are those that say how something is computed, not what.

    >>> group = Group({"n_heads": 4, "dropout": 0.1}, "model.block")
    >>> group.take("n_heads", int)
    4
    >>> group.end()
    Traceback (most recent call last):
    ValueError: model.block.dropout is 0.1, which is not read, and would be lost
    """

    def __init__(self, value: Any, path: str, ignored: tuple[str, ...] = ()) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{path} is {shown(value)}; it must be a group of fields")
        self.values = value
        self.left = {name: item for name, item in value.items() if item is not None and name not in ignored}
        self.path, self.ignored = path, ignored

    def take(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A field that must be a ``kind``, or ``default``; ValueError with its path for another, or for none at all."""
        value = self.left.pop(name, default)
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not isfinite(value)):
            raise ValueError(f"{self.path}.{name} is {shown(value)}; it must be a {WORDS.get(kind, kind.__name__)}")
        return value

    def maybe(self, name: str, kind: type[T]) -> T | None:
        """A field that must be a ``kind`` if it is there."""
        return self.take(name, kind) if name in self.left else None

    def group(self, *names: str) -> Group:
        """A field that is a group, by the first of its ``names`` that is there."""
        name = next((name for name in names if name in self.left), names[0])
        return Group(self.left.pop(name, None), f"{self.path}.{name}", self.ignored)

    def one_of(self, name: str, *allowed: Any) -> Any:
        """A field that may have just these values; the first stands for one that is not there."""
        value = self.left.pop(name, allowed[0])
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed):
            raise ValueError(f"{self.path}.{name} is {shown(value)}, and only {' or '.join(map(shown, allowed))} is read")
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change no number."""
        for name in names:
            self.left.pop(name, None)

    def end(self) -> None:
        """ValueError that names a field which is set, and was not taken."""
        for name, value in self.left.items():
            raise ValueError(f"{self.path}.{name} is {shown(value)}, which is not read, and would be lost")


WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def at(value: Any, *path: str) -> Any:
    """A nested value; None where there is none.

    >>> at({"a": {"b": 1}}, "a", "b"), at([], "a")
    (1, None)
    """
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def shown(value: Any) -> str:
    """A value in a message, short."""
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'group'} of {len(value)}"
    return "null" if value is None else repr(value)[:60]
