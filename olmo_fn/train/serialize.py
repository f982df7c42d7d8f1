"""A config as YAML and back: nested frozen dataclasses of numbers, texts and tuples. Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

C = TypeVar("C")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}


def to_yaml(config: Any) -> str:
    """A dataclass as YAML, every field of it in its order; `from_yaml` gives back an equal one.

    >>> from olmo_fn.train.config import Lora
    >>> print(to_yaml(Lora(rank=8, patterns=("*.w_q",))), end="")
    rank: 8
    alpha: 16.0
    patterns: ['*.w_q']
    """
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, width=float("inf"), allow_unicode=True)


def from_yaml(text: str, cls: type[C]) -> C:
    """The ``cls`` that ``text`` describes; fields that it leaves out take their defaults.

    ValueError, one line that names the field, for an unknown field, a wrong type, a missing field without a
    default; or that names the line of what is not YAML.

    >>> from olmo_fn.train.config import Lora
    >>> from_yaml("rank: 10", Lora).rank
    10
    >>> from_yaml("ranks: 10", Lora)
    Traceback (most recent call last):
    ValueError: ranks: there is no such field, did you mean rank? There are rank, alpha, patterns
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"not YAML, line {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-99-99
        raise ValueError(f"not YAML: {error}".splitlines()[0]) from None
    return _build(cls, {} if value is None else value, "")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return tuple(_plain(item) for item in value) if isinstance(value, tuple) else value


def _build(kind: Any, value: Any, name: str) -> Any:
    """``value``, as YAML gives it, as a ``kind``; ``name`` is the dotted name of the field."""
    if is_dataclass(kind):
        return _build_dataclass(kind, value, name)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_build(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin in (Union, UnionType):
        for member in args:
            try:
                return _build(member, value, name)
            except ValueError:
                continue
    elif origin is Literal:
        for choice in args:
            if type(choice) is type(value) and choice == value:
                return choice
    elif kind is float and type(value) in (int, float, str):
        try:
            return float(value)  # of a text too: YAML 1.1 takes 4e-4, without a point, for one
        except (ValueError, OverflowError):
            pass
    elif kind in WORDS and type(value) is kind:
        return value
    elif kind not in WORDS and origin is not tuple:
        raise TypeError(f"{name}: a config cannot hold a {kind}")
    raise ValueError(f"{name} is {_shown(value)}; it must be {_describe(kind)}")


def _build_dataclass(cls: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'the whole'} is {_shown(value)}; it must be {_describe(cls)}")
    hints, prefix = get_type_hints(cls), f"{name}." if name else ""
    names = [field.name for field in fields(cls)]
    for key in value:
        if key not in names:
            close = get_close_matches(str(key), names, 1)
            hint = f", did you mean {prefix}{close[0]}?" if close else "."
            raise ValueError(f"{prefix}{key}: there is no such field{hint} There are {', '.join(names)}")
    for field in fields(cls):
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING:
            kind = _describe(hints[field.name])
            raise ValueError(f"{prefix}{field.name} is missing, and has no default; it must be {kind}")
    hints |= {field.name: field.default_factory for field in fields(cls) if hints[field.name] is Any}
    return cls(**{key: _build(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def _describe(kind: Any) -> str:
    """What is allowed, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return f"the fields of {getattr(kind, '__name__', '')}, each as name: value"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, args))
    if origin is tuple:
        each = [_describe(arg) for arg in args if arg is not Ellipsis]
        return f"a list [...] of {each[0]} each" if args[-1] is Ellipsis else f"a list [{', '.join(each)}]"
    return WORDS[kind]


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"a list of {len(value)}" if isinstance(value, list) else "a group of fields"
    known = WORDS.get(type(value), f"a {type(value).__name__}")
    return "null" if value is None else f"{str(value)[:60]!r}, {known}"


class _Dumper(yaml.SafeDumper):
    """Tuples on one line, exact texts, and no anchors: a value that occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# In quotes, line breaks are escaped; plain, PyYAML would fold some of them into spaces.
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'),
)
_Dumper.add_representer(tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True))


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{name} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
