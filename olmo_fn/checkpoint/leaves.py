"""Trees taken apart for a checkpoint and put together again, branches without leaves included."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from olmo_fn.tree import Tree, unflatten


@dataclass(frozen=True)
class Leaves:
    """A tree taken apart: leaves by path in the tree's order, and paths of its branches without leaves."""

    by_path: dict[str, Any]
    empty: tuple[str, ...]


def take_apart(tree: Mapping[str, Any]) -> Leaves:
    """The leaves of ``tree`` by path; ValueError for a key that would make two paths look alike.

    >>> take_apart({"a": {"x": 1}, "b": {}})
    Leaves(by_path={'a.x': 1}, empty=('b',))
    """
    by_path: dict[str, Any] = {}
    empty: list[str] = []

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            path = f"{prefix}{name}"
            if not isinstance(name, str) or not name or "." in name or path == "__metadata__":
                where = f"in {prefix[:-1]}" if prefix else "at the root"
                raise ValueError(f"key {name!r} {where} of the tree: must be a str, not empty, without dots")
            if not isinstance(value, Mapping):
                by_path[path] = value
            elif value:
                walk(value, f"{path}.")
            else:
                empty.append(path)

    walk(tree, "")
    return Leaves(by_path, tuple(empty))


def put_together(by_path: Mapping[str, Any], empty: Iterable[str]) -> Tree:
    """The inverse of `take_apart`.

    >>> put_together({"a.x": 1}, ["b"])
    {'a': {'x': 1}, 'b': {}}
    """
    return unflatten([*by_path.items(), *((path, {}) for path in empty)])


def check_meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of ``meta``; ValueError if JSON would not give it back as it is.

    >>> check_meta({"tokens": 80})
    {'tokens': 80}
    """
    meta = dict(meta or {})
    try:
        copy: dict[str, Any] = json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta is not JSON: {error}; use str, int, finite float, bool, None, list, dict") from None
    for name, value in meta.items():
        if name not in copy or copy[name] != value:
            raise ValueError(
                f"meta[{name!r}] is {value!r}, JSON gives back {copy.get(str(name))!r}; use lists for tuples and str for keys"
            )
    return copy
