"""A config as YAML and back: nested frozen dataclasses of numbers, texts and tuples. Imports no torch.

PyYAML reads the text, cattrs makes the dataclasses; here is what it is to refuse, and in which words.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from cattrs import ClassValidationError, Converter, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from olmo_fn.train.choices import Choices, base_of

C = TypeVar("C")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
LARGEST = 1_000_000  # characters; a config has about four thousand


def to_yaml(config: Any) -> str:
    """A dataclass as YAML, every field of it in its order; `from_yaml` gives back an equal one.

    >>> from olmo_fn.train.config import Lora
    >>> print(to_yaml(Lora(rank=8, patterns=("*.w_q",))), end="")
    rank: 8
    alpha: 16.0
    patterns: ['*.w_q']
    """
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, width=float("inf"), allow_unicode=True)


def from_yaml(text: str, cls: type[C], choices: Choices | None = None) -> C:
    """The ``cls`` that ``text`` describes; fields that it leaves out take their defaults.

    ``choices``: what a field annotated with a base class may hold, by ``name`` (`olmo_fn.train.choices`).

    ValueError, one line that names the field, for an unknown field, a wrong type, a missing field without a
    default; or that names the line of what is not YAML.

    >>> from olmo_fn.train.config import Lora
    >>> from_yaml("rank: 10", Lora).rank
    10
    >>> from_yaml("ranks: 10", Lora)
    Traceback (most recent call last):
    ValueError: ranks: there is no such field, did you mean rank? There are rank, alpha, patterns
    """
    return structure(parse(text), cls, choices)


def parse(text: str) -> Any:
    """The value that YAML describes; an empty text is no fields."""
    if len(text) > LARGEST:
        raise ValueError(f"not a config: it has {len(text):,} characters, more than {LARGEST:,}")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"not YAML, line {line}: {error.problem}") from None
    except RecursionError:
        raise ValueError("not a config: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-99-99
        raise ValueError(f"not YAML: {error}".splitlines()[0]) from None
    return {} if value is None else value


def structure(value: Any, cls: type[C], choices: Choices | None = None) -> C:
    """The ``cls`` that a value as `parse` gives it describes."""
    try:
        return _converter(choices or {}).structure(value, cls)
    except (ClassValidationError, Wrong, Inside) as error:
        raise ValueError(_message(error, "", cls)) from None


def files_of(value: Any) -> list[str]:
    """The user's files that a config names; what is wrong with them, `structure` says."""
    use = value.get("use") if isinstance(value, dict) else None
    return [name for name in use if isinstance(name, str)] if isinstance(use, list) else []


class Wrong(ValueError):
    """``value`` is not a ``kind``; ``where`` is it, inside of the field."""

    def __init__(self, value: Any, kind: Any, where: str = "") -> None:
        super().__init__(value, kind, where)
        self.value, self.kind, self.where = value, kind, where


class Inside(ValueError):
    """Item ``index`` of a list is wrong."""

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__(index, error)
        self.index, self.error = index, error


def _converter(choices: Choices) -> Converter:
    """cattrs, which takes no value for one of another type."""
    converter = Converter()

    def group(cls: Any) -> Callable[[Any, Any], Any]:
        hints, hooks = get_type_hints(cls), {}
        for field in fields(cls):  # one that is annotated Any may hold what its default is one of
            if hints[field.name] is Any and (base := base_of(_kind(field), choices)):
                hooks[field.name] = override(struct_hook=partial(chosen, base=base))
        make: Any = partial(make_dict_structure_fn, cls, converter, _cattrs_forbid_extra_keys=True)
        structure = make(**hooks)
        return lambda value, _: structure(value, cls) if isinstance(value, dict) else _refuse(value, cls)

    def chosen(value: Any, annotated: Any, base: Any = None) -> Any:
        base = base or annotated
        names = tuple(choices[base])
        name = value.get("name", names[0]) if isinstance(value, dict) else _refuse(value, base)
        return group(choices[base][literal(name, Literal[names], ".name")])(value, base)

    def items(value: Any, kind: Any) -> Any:
        args = get_args(kind)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, list) else args
        if not isinstance(value, list) or len(kinds) != len(value):
            _refuse(value, kind)
        made = []
        for i, (item, item_kind) in enumerate(zip(value, kinds, strict=True)):
            try:
                made.append(converter.structure(item, item_kind))
            except (Wrong, Inside, ClassValidationError) as error:
                raise Inside(i, error) from None
        return tuple(made)

    def union(value: Any, kind: Any) -> Any:
        for member in get_args(kind):
            try:
                return converter.structure(value, member)
            except (Wrong, Inside):
                continue
        return _refuse(value, kind)

    def literal(value: Any, kind: Any, where: str = "") -> Any:
        return value if type(value) is str and value in get_args(kind) else _refuse(value, kind, where)

    def number(value: Any, _: Any) -> float:
        try:
            return float(value) if type(value) in (int, float, str) else _refuse(value, float)
        except (ValueError, OverflowError):  # it takes a text too: YAML 1.1 takes 4e-4, without a point, for one
            return _refuse(value, float)

    for kind in (bool, int, str, NoneType):
        converter.register_structure_hook(kind, lambda value, kind: value if type(value) is kind else _refuse(value, kind))
    converter.register_structure_hook(float, number)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, items)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, literal)
    converter.register_structure_hook_func(lambda kind: get_origin(kind) in (Union, UnionType), union)
    converter.register_structure_hook_factory(is_dataclass, group)
    converter.register_structure_hook_func(lambda kind: kind in choices, chosen)
    return converter


def _kind(field: Field[Any]) -> Any:
    """The class of a field's default."""
    return type(field.default_factory() if field.default_factory is not MISSING else field.default)


def _refuse(value: Any, kind: Any, where: str = "") -> Any:
    raise Wrong(value, kind, where)


def _message(error: BaseException, path: str, kind: Any) -> str:
    """The first thing that is wrong, in one line; ``path`` is the dotted name of what ``error`` is about, ``kind`` its type."""
    if isinstance(error, Wrong):
        return f"{(path + error.where) or 'the whole'} is {_shown(error.value)}; it must be {_describe(error.kind)}"
    if isinstance(error, Inside):
        return _message(error.error, f"{path}[{error.index}]", kind)
    if isinstance(error, KeyError):
        return f"{path} is missing, and has no default; it must be {_describe(kind)}"
    assert isinstance(error, ClassValidationError), error
    noted, others = error.group_exceptions()
    for extra in others:
        if isinstance(extra, ForbiddenExtraKeysError):
            key, names = sorted(map(str, extra.extra_fields))[0], [field.name for field in fields(extra.cl)]
            prefix = f"{path}." if path else ""
            close = _inside(extra.cl, key) or get_close_matches(key, names, 1)
            hint = f", did you mean {prefix}{close[0]}?" if close else "."
            return f"{prefix}{key}: there is no such field{hint} There are {', '.join(names)}"
    inner, note = noted[0]
    return _message(inner, f"{path}.{note.name}".lstrip("."), note.type)


def _inside(cls: Any, name: str) -> list[str]:
    """The dotted paths of the fields ``name`` in the groups of a ``cls``, as its defaults have them.

    >>> from olmo_fn.train.config import Model
    >>> _inside(Model, "n_heads")
    ['block.mixer.n_heads']
    """
    groups = {field.name: kind for field in fields(cls) if is_dataclass(kind := _kind(field))}
    return [
        f"{group}.{path}"
        for group, kind in groups.items()
        for path in ([name] if name in {field.name for field in fields(kind)} else _inside(kind, name))
    ]


def _describe(kind: Any) -> str:
    """What is allowed, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe(args[0])
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


def plain(value: Any) -> Any:
    """Nested dataclasses as nested dicts."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return tuple(plain(item) for item in value) if isinstance(value, tuple) else value


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
    """Refuses a name given twice, of which YAML would take the last, and aliases, with which a small text may be vast."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} is an alias; write the value instead"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(problem=f"{name} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
