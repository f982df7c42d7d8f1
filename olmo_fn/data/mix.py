"""Files that say what a mixture is made of: sources with ratios, or OLMo's published lists of paths with labels."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from olmo_fn.data.mixing import check_ratios

BASE = "http://olmo-data.org"
TOKENIZER = "allenai/dolma2-tokenizer"
LARGEST = 64 << 20  # bytes of a mix file


@dataclass(frozen=True)
class MixSource:
    """A source of a mixture."""

    name: str
    paths: tuple[str, ...]
    """Token files or globs."""
    ratio: float | None = None
    """Its share of the tokens; None: as much as it has."""
    max_repetition: float = 1.0
    """How often its tokens are used at most."""
    max_fraction: float = 1.0
    """The part of it, from its beginning, that is used."""


@dataclass(frozen=True)
class Mix:
    """The sources of a mixture, and ratios that begin later in the run."""

    sources: tuple[MixSource, ...]
    schedule: tuple[tuple[float, tuple[float, ...]], ...] = ()
    """From which step on which ratios hold; below 1, from which part of the run on."""

    @property
    def ratios(self) -> tuple[float, ...] | None:
        """Those of the beginning; None where each source gives what it has."""
        found = [source.ratio for source in self.sources]
        return None if None in found else tuple(ratio for ratio in found if ratio is not None)


def read_mix(name: str, base: str = BASE, tokenizer: str = TOKENIZER) -> Mix:
    """The mixture of a file, or of that published under a ``name``; ValueError, one line, for what is none.

    A YAML file has ``sources``, each with ``name``, ``paths``, ``ratio``, ``max_repetition`` and ``max_fraction`` (or as
    OLMo-core calls them: source_name, target_ratio, max_repetition_ratio, max_source_fraction), and perhaps ``schedule``,
    a list of ``from`` and ``ratios``. A text file has a line ``label,path`` for each token file, below ``base``;
    ``{TOKENIZER}`` in it is ``tokenizer``.
    """
    path = find_mix(name)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(
                f"the mix file {str(path)!r} has {path.stat().st_size:,} bytes, more than a list of paths can have"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the mix file {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix in (".yaml", ".yml"):
        return _of_yaml(text, path)
    return _of_lines(text, path, base, tokenizer)


def find_mix(name: str) -> Path:
    """The file of that name, or the published mix: of this package, or of an installed ai2-olmo-core, which has all of them."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    folders, core = [Path(__file__).parent / "mixes"], importlib.util.find_spec("olmo_core")
    folders += [Path(place) / "data" / "mixes" for place in (core.submodule_search_locations or ())] if core else []
    for folder in folders:
        if (found := folder / f"{name}.txt").is_file():
            return found
    known = sorted({file.stem for folder in folders for file in folder.glob("*.txt")})
    raise ValueError(
        f"--data.mix {name!r} is no file, and no published mix that is here ({', '.join(known)}); the larger ones come with "
        "pip install ai2-olmo-core, or as a file of lines label,path"
    )


def _of_lines(text: str, path: Path, base: str, tokenizer: str) -> Mix:
    paths: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        label, comma, name = line.partition(",")
        if not comma or not label or not name:
            raise ValueError(f"{str(path)!r} line {number} is {line[:60]!r}, and not label,path")
        name = name.replace("{TOKENIZER}", tokenizer)
        paths.setdefault(label, []).append(name if "://" in name or name.startswith("/") else f"{base.rstrip('/')}/{name}")
    if not paths:
        raise ValueError(f"{str(path)!r} has no line label,path")
    return Mix(tuple(MixSource(label, tuple(found)) for label, found in paths.items()))


ALIASES = {
    "source_name": "name",
    "target_ratio": "ratio",
    "max_repetition_ratio": "max_repetition",
    "max_source_fraction": "max_fraction",
}


def _of_yaml(text: str, path: Path) -> Mix:
    where = f"the mix file {str(path)!r}"
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, Mapping) or not isinstance(found.get("sources"), list) or not found["sources"]:
        raise ValueError(f"{where} has no list of sources; it is: sources: [{{name: web, paths: [web/*.npy], ratio: 0.7}}, …]")
    if unknown := found.keys() - {"sources", "schedule"}:
        raise ValueError(f"{where} has {min(map(str, unknown))!r}; there are sources and schedule")
    sources = tuple(_source(entry, where, path.parent) for entry in found["sources"])
    names = [source.name for source in sources]
    if len({*names}) < len(names):
        raise ValueError(f"{where} has two sources {next(name for name in names if names.count(name) > 1)!r}")
    given = [source.ratio is not None for source in sources]
    if any(given) and not all(given):
        raise ValueError(f"{where} has no ratio for {names[given.index(False)]!r}; give one for every source, or for none")
    if all(given):
        _check(where, names, [source.ratio or 0.0 for source in sources])
    return Mix(sources, tuple(_phases(found.get("schedule") or [], names, where)))


def _source(entry: Any, where: str, folder: Path) -> MixSource:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: a source is {entry!r}, and not name, paths and ratio")
    named = {ALIASES.get(str(key), str(key)): value for key, value in entry.items()}
    kinds: dict[str, tuple[type, ...]] = {"name": (str,), "paths": (list, str), "ratio": (int, float)}
    kinds |= {"max_repetition": (int, float), "max_fraction": (int, float)}
    for key, value in named.items():
        if key not in kinds:
            raise ValueError(f"{where}: {key!r} is nothing that a source has; there are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} of a source is {value!r}")
    if "name" not in named or not named.get("paths"):
        raise ValueError(f"{where}: the source {dict(entry)!r} has no {'name' if 'name' not in named else 'paths'}")
    paths = [named["paths"]] if isinstance(named["paths"], str) else named["paths"]
    if not all(isinstance(p, str) for p in paths):
        raise ValueError(f"{where}: paths of {named['name']!r} are {paths!r}")
    full = (p if "://" in p else str(folder / os.path.expanduser(p)) for p in paths)
    source = MixSource(**{**named, "paths": tuple(full)})
    if source.max_repetition < 1 or not 0 < source.max_fraction <= 1:
        raise ValueError(
            f"{where}: of {source.name!r} max_repetition must be at least 1, and max_fraction above 0 and at most 1"
        )
    return source


def _phases(entries: Any, names: Sequence[str], where: str) -> list[tuple[float, tuple[float, ...]]]:
    phases: list[tuple[float, tuple[float, ...]]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, Mapping) or entry.keys() != {"from", "ratios"} or not isinstance(entry["ratios"], Mapping):
            raise ValueError(f"{where}: schedule has {entry!r}; it is a list of {{from: 0.9, ratios: {{web: 0.5, code: 0.5}}}}")
        start, ratios = entry["from"], entry["ratios"]
        if not isinstance(start, (int, float)) or start <= 0 or (phases and start <= phases[-1][0]):
            raise ValueError(f"{where}: schedule has from: {start!r}; it is a step, or below 1 a part of the run, and grows")
        if unknown := ratios.keys() - {*names}:
            raise ValueError(f"{where}: schedule has a ratio of {min(unknown)!r}, which is no source")
        values = tuple(float(ratios.get(name, 0.0)) for name in names)
        _check(where, names, values)
        phases.append((float(start), values))
    return phases


def _check(where: str, names: Sequence[str], ratios: Sequence[float]) -> None:
    try:
        check_ratios(names, ratios)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
