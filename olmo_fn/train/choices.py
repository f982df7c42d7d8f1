"""Which classes of settings a field of a config may hold: the package's own, and those of a user's files. Imports no torch.

``--optim.name muon`` puts `olmo_fn.train.optimizers.Muon` in the place of ``config.optim``, before the other flags are parsed;
so ``--optim.momentum`` is a flag, and in ``--help``. A user's file (``--use my_parts.py``) adds classes:

    @dataclass(frozen=True, kw_only=True)
    class AdaBelief(OptimizerSettings):
        name: Suppress[Literal["adabelief"]] = "adabelief"
        beta2: float = 0.999

        def build(self, lr, parameters, dtype):
            return adabelief(lr, self.beta2, weight_decay=self.decay)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from traceback import walk_tb
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

from olmo_fn.fields import get, put, values, walk

C = TypeVar("C")
Choices: TypeAlias = Mapping[type, Mapping[str, type]]
"""For each base class, its subclasses by name, the default first. A field that holds one of them may hold any of them."""

USED = "olmo_fn_use:"
"""What the name of a module begins with that is a user's file."""


def named(*classes: Any) -> dict[str, type]:
    """Classes of settings by the default of their field ``name``."""
    return {cls.name: cls for cls in classes}


def with_files(choices: Choices, use: Sequence[str]) -> tuple[Choices, dict[str, Any]]:
    """``choices`` and those of a user's files or modules, and the presets of these, which they call ``CONFIGS``.

    ValueError for a file that is not there, a name that is taken, and a setting without a default.
    """
    found = {base: dict(classes) for base, classes in choices.items()}
    presets: dict[str, Any] = {}
    for name in use:
        module = load(name)
        own: list[Any] = [cls for cls in vars(module).values() if isinstance(cls, type) and is_dataclass(cls)]
        for base, cls in ((base_of(cls, choices), cls) for cls in own if getattr(cls, "name", "")):
            if base is None:
                continue
            if found[base].setdefault(cls.name, cls) is not cls:
                taken = f"{cls.__name__} has the name {cls.name!r}, which is taken"
                raise ValueError(f"--use {name}: {taken}; choose another than {', '.join(choices[base])}")
            if missing := [field.name for field in fields(cls) if field.default is field.default_factory is MISSING]:
                raise ValueError(f"--use {name}: {missing[0]} of {cls.__name__} has no default; every setting has one")
        presets |= getattr(module, "CONFIGS", {})
    return found, presets


def load(name: str) -> ModuleType:
    """The module in the file ``name``, which ends in .py, or the one of that dotted name. A file is run once a process."""
    if not name.endswith(".py"):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"--use {name}: {error}; give a file that ends in .py, or a module that Python finds") from None
    (path,) = locate([name])
    key = USED + path.replace(".", "//")  # pickle would import what stands before a dot, and no path has two slashes in a row
    if key not in sys.modules:
        spec = spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[key] = module = module_from_spec(spec)  # dataclasses, and the help, look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[key]
            if not isinstance(error, Exception):
                raise
            lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
            line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
            raise ValueError(f"--use {name}, line {line or 1}: {type(error).__name__}: {error}") from error
    return sys.modules[key]


def load_module(module: str) -> None:
    """Run the user's file that a module of this name is, as pickle has it; nothing for any other module."""
    if module.startswith(USED):
        load(module.removeprefix(USED).replace("//", "."))


def locate(use: Sequence[str], folder: Path | None = None) -> tuple[str, ...]:
    """A user's files by their absolute paths, and modules by their names.

    A file that is not there is looked for in ``folder``, by its name: a run may have moved, with its files, to another machine.
    """
    found = []
    for name in use:
        paths = [Path(name).expanduser(), *([folder / Path(name).name] if folder else [])]
        path = next((path.resolve() for path in paths if path.is_file()), None)
        if name.endswith(".py") and path is None:
            raise ValueError(f"--use {name}: there is no such file" + (f", nor {paths[1]}" if folder else ""))
        found.append(str(path) if name.endswith(".py") else name)
    return tuple(found)


def choose(config: C, arguments: Sequence[str], choices: Choices) -> tuple[C, list[str]]:
    """Carry out every ``--field.name NAME`` of the arguments; the config, and the other arguments.

    What the config has that the default of its class has not is kept, where the chosen class has a field of that name.
    """
    words, rest = list(arguments), []
    while words:
        word = words.pop(0)
        flag, equals, name = word.partition("=")
        path = choosable(config, choices).get(flag.replace("_", "-"))
        if path is None:
            rest.append(word)
            continue
        known = classes_of(get(config, path), choices)
        if not equals:
            name = words.pop(0) if words else ""
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f", did you mean {close[0]}?" if close else ";"
            raise ValueError(f"{flag} {name!r} is unknown{hint} There are {', '.join(known)}")
        config = put(config, path, _as(known[name], get(config, path)))
    _check_flags(config)
    return config, rest


def _check_flags(config: Any) -> None:
    """ValueError for a flag of two fields: groups whose flags lack the group's name share one space of names."""
    seen: dict[str, tuple[str, ...]] = {}
    for field in values(config):
        first = seen.setdefault(field.flag, field.path)
        if first != field.path:
            classes = " and of ".join(type(get(config, path[:-1])).__name__ for path in (first, field.path))
            raise ValueError(f"{field.flag} is a field of {classes}; give it another name in one of them")


def choosable(config: Any, choices: Choices) -> dict[str, tuple[str, ...]]:
    """The flags that choose a class, each with the path of the field that holds it."""
    return {f"{field.flag}.name": field.path for field in walk(config) if classes_of(field.value, choices)}


def describe(config: Any, choices: Choices) -> str:
    """What may be chosen, and what is, as the end of a help text."""
    lines = [
        f"  {flag} {', '.join(classes_of(get(config, path), choices))} (now {get(config, path).name})"
        for flag, path in choosable(config, choices).items()
    ]
    first, width = "Each of these brings its own flags; here are those of what is chosen now:", get_terminal_size().columns
    return "\n".join(fill(line, width, subsequent_indent="    ", break_on_hyphens=False) for line in (first, *lines))


def base_of(cls: type, choices: Choices) -> type | None:
    """The base class that makes ``cls`` a choice, the nearest one; None if there is none."""
    return next((base for base in cls.__mro__ if base in choices), None)


def classes_of(value: Any, choices: Choices) -> Mapping[str, type]:
    """The classes by name that may stand in the place of ``value``; none where nothing is to choose."""
    base = base_of(type(value), choices)
    return choices[base] if base else {}


def _as(cls: type, old: Any) -> Any:
    """A ``cls`` with what ``old`` has that is not its default."""
    default = {field.name: field.default for field in fields(old) if field.default is not MISSING}
    kept = {field.name for field in fields(cls)} & default.keys() - {"name"}
    return cls(**{name: getattr(old, name) for name in kept if getattr(old, name) != default[name]})
