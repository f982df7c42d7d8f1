"""Which documents are worth training on: small plain functions of a text. A user's own come from a file.

    def keep(text: str) -> bool:
        return "lorem ipsum" not in text

in ``mine.py`` is ``--filter mine.py:keep``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TypeAlias

Filter: TypeAlias = Callable[[str], bool]
"""Whether to keep a text."""


def min_chars(text: str, limit: float) -> bool:
    """At least ``limit`` characters."""
    return len(text) >= limit


def max_chars(text: str, limit: float) -> bool:
    """At most ``limit`` characters."""
    return len(text) <= limit


def min_words(text: str, limit: float) -> bool:
    """At least ``limit`` words, with spaces between them."""
    return len(text.split(None, int(limit))) >= limit


def letters(text: str, limit: float) -> bool:
    """At least this part of what is no space is letters, of any script.

    >>> letters("Straße 日本", 1.0), letters("a1", 0.6)
    (True, False)
    """
    dense = "".join(text.split())
    return sum(map(str.isalpha, dense)) >= limit * len(dense)


def latin(text: str, limit: float) -> bool:
    """At least this part of the letters is Latin: English, say, and not Chinese.

    >>> latin("Straße", 1.0), latin("naïve 日本", 0.8)
    (True, False)
    """
    found = [char for char in text if char.isalpha()]
    return sum(char < "\u0250" or "\u1e00" <= char < "\u1f00" for char in found) >= limit * len(found)


def repeated_lines(text: str, limit: float) -> bool:
    """At most this part of the lines that are not empty is a copy of one before.

    >>> repeated_lines("a\\nb\\na\\na", 0.5), repeated_lines("a\\na\\na", 0.5)
    (True, False)
    """
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return len(lines) - len({*lines}) <= limit * len(lines)


NAMED: dict[str, Callable[[str, float], bool]] = {
    "min-chars": min_chars,
    "max-chars": max_chars,
    "min-words": min_words,
    "letters": letters,
    "latin": latin,
    "repeated-lines": repeated_lines,
}


def open_filter(word: str) -> Filter:
    """The filter ``NAME=LIMIT``, or ``FILE.py:FUNCTION``. ValueError if there is no such.

    >>> open_filter("min-chars=3")("ab")
    False
    """
    path, colon, name = word.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"--filter {word}: there is no file {path!r}")
        return _own(word, path, name, version(path))
    name, _, value = word.partition("=")
    try:
        test, limit = NAMED[name], float(value)
    except (KeyError, ValueError):
        known = ", ".join(f"{name}=NUMBER" for name in NAMED)
        raise ValueError(f"--filter {word} is none; there is {known}, and FILE.py:FUNCTION") from None
    return lambda text: test(text, limit)


def files(words: tuple[str, ...]) -> list[str]:
    """The files that filters come from."""
    return [path for path, _, _ in (word.rpartition(":") for word in words) if path.endswith(".py")]


def version(path: str) -> tuple[int, int]:
    """What differs when there is another file at ``path``."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns


@lru_cache
def _own(word: str, path: str, name: str, version: tuple[int, int]) -> Filter:
    spec = spec_from_file_location(f"olmo_fn_filter_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--filter {word}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        own = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"--filter {word}: {path} has no function {name!r}; it has: {own or 'none'}")
    function: Filter = found
    return function
