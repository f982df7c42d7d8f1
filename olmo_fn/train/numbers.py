"""Numbers of a config that no field can mean: refused by name, before anything reads them. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

LARGEST = 2**53  # what a double, a JSON reader and a tensor's int64 all hold


def check_numbers(config: Any, signed: Collection[str] = ()) -> None:
    """ValueError for a number that is not finite, too large to count with, or negative in a field not in ``signed``.

    ``config`` is a tree of dataclasses, whose fields are named as on the command line, such as ``recipe.batch_size``.

    >>> from olmo_fn.train.config import Optim
    >>> check_numbers(Optim(eps=-1.0))
    Traceback (most recent call last):
    ValueError: --eps is -1.0; it must not be negative
    """
    for name, value in _numbers(config, ""):
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{flag} is {value}; more than {LARGEST:,} cannot be counted")
        if not isfinite(value):
            raise ValueError(f"{flag} is {value}; it must be a finite number")
        if value < 0 and name not in signed:
            raise ValueError(f"{flag} is {value}; it must not be negative")


def _numbers(x: Any, name: str) -> Iterator[tuple[str, int | float]]:
    if is_dataclass(x):
        for field in fields(x):
            yield from _numbers(getattr(x, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(x, tuple):
        for item in x:
            yield from _numbers(item, name)
    elif isinstance(x, (int, float)) and not isinstance(x, bool):
        yield name, x
