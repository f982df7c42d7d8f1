"""Trees of parameters: nested dicts with tensors (or anything else) as leaves.

A leaf's *path* is its keys joined by dots (``blocks.3.attention.w_q``). The path is the parameter's name everywhere: in
checkpoints, in error messages, in the patterns that choose parameters. Keys are strings without dots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

Tree: TypeAlias = dict[str, Any]
T = TypeVar("T")


def items(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` in the tree's own order; a lone leaf has the path ``prefix``.

    >>> list(items({"a": {"x": 1, "y": 2}, "b": 3}))
    [('a.x', 1), ('a.y', 2), ('b', 3)]
    """
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from items(value, f"{prefix}.{key}" if prefix else key)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree as one flat dict from path to leaf.

    >>> flatten({"a": {"x": 1}, "b": 3})
    {'a.x': 1, 'b': 3}
    """
    return dict(items(tree))


def unflatten(flat: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Tree:
    """The inverse of `flatten` for trees without empty branches.

    >>> unflatten({"a.x": 1, "b": 3})
    {'a': {'x': 1}, 'b': 3}
    """
    tree: Tree = {}
    for path, leaf in flat.items() if isinstance(flat, Mapping) else flat:
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``f`` to each leaf of ``tree`` and to the leaves at the same place in ``rest``.

    >>> map(lambda a, b: a + b, {"a": {"x": 1}}, {"a": {"x": 2}})
    {'a': {'x': 3}}
    """
    if not isinstance(tree, Mapping):
        return f(tree, *rest)
    return {key: map(f, value, *(r[key] for r in rest)) for key, value in tree.items()}


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any, prefix: str = "") -> Any:
    """Like `map`; ``f`` gets the leaf's path first, which begins with ``prefix``.

    >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"a": {"x": 1}})
    {'a': {'x': 'a.x=1'}}
    """
    if not isinstance(tree, Mapping):
        return f(prefix, tree, *rest)
    where = f"{prefix}." if prefix else ""
    return {key: map_with_path(f, value, *(r[key] for r in rest), prefix=where + key) for key, value in tree.items()}


def at(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at ``path``; ``""`` is the tree itself.

    >>> at({"a": {"x": 1}}, "a")
    {'x': 1}
    """
    node: Any = tree
    for key in path.split(".") if path else ():
        if not isinstance(node, Mapping) or key not in node:
            raise KeyError(f"no {path!r} in the tree; at {key!r} there is {_describe(node)}")
        node = node[key]
    return node


def ancestors(path: str) -> list[str]:
    """The paths of the subtrees that a leaf is in, and its own.

    >>> ancestors("a.b.c")
    ['a', 'a.b', 'a.b.c']
    """
    return list(accumulate(path.split("."), "{}.{}".format))


def replace(tree: Mapping[str, Any], path: str, value: Any) -> Tree:
    """A copy of ``tree`` with the leaf or subtree at ``path`` set to ``value``; everything else is shared.

    >>> replace({"a": {"x": 1, "y": 2}}, "a.x", 5)
    {'a': {'x': 5, 'y': 2}}
    """
    at(tree, path)
    key, _, rest = path.partition(".")
    return {**tree, key: replace(tree[key], rest, value) if rest else value}


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether ``path`` matches one of the shell-style ``patterns``.

    >>> matches("blocks.0.attention_norm", ["*norm*", "embed"])
    True
    """
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def partition(tree: Mapping[str, Any], patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """Two trees: the leaves whose path matches, and the others. `combine` puts them together again.

    >>> partition({"a": {"x": 1, "y": 2}, "b": 3}, ["*.x", "b"])
    ({'a': {'x': 1}, 'b': 3}, {'a': {'y': 2}})
    """
    patterns = list(patterns)
    paths = flatten(tree)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"pattern {pattern!r} matches no parameter; there are {_describe(paths)}")
    yes = unflatten((p, v) for p, v in paths.items() if matches(p, patterns))
    no = unflatten((p, v) for p, v in paths.items() if not matches(p, patterns))
    return yes, no


def present(tree: Mapping[str, Any], patterns: Iterable[str]) -> tuple[str, ...]:
    """The patterns that match something; ValueError if none does.

    >>> present({"a": {"x": 1}}, ["a.*", "b.*"])
    ('a.*',)
    """
    patterns, paths = tuple(patterns), flatten(tree)
    found = tuple(pattern for pattern in patterns if any(fnmatchcase(path, pattern) for path in paths))
    if not found:
        raise ValueError(f"none of the patterns {', '.join(patterns)} matches a parameter; there are {_describe(paths)}")
    return found


def split(tree: Mapping[str, Any], chooses: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Two trees: the leaves whose path ``chooses`` says yes to, and the others; like `partition`.

    >>> split({"a": {"x": 1, "y": 2}}, lambda path: path == "a.x")
    ({'a': {'x': 1}}, {'a': {'y': 2}})
    """
    chosen, others = ([(p, v) for p, v in items(tree) if chooses(p) == yes] for yes in (True, False))
    return unflatten(chosen), unflatten(others)


def combine(*trees: Mapping[str, Any]) -> Tree:
    """One tree out of trees that share no leaf.

    >>> combine({"a": {"x": 1}}, {"a": {"y": 2}})
    {'a': {'x': 1, 'y': 2}}
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in items(tree):
            if path in flat:
                raise ValueError(f"{path!r} is in more than one of the trees to combine")
            flat[path] = leaf
    return unflatten(flat)


def _describe(node: Any, most: int = 6) -> str:
    if not isinstance(node, Mapping):
        return "a leaf"
    names = list(node)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
