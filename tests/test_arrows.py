"""Arrows go down only: which folder of the package may import which, read from the sources (imports in functions too)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import olmo_fn

PACKAGE = Path(olmo_fn.__file__).parent

GROUND = {"tree", "spec"}
CORE = GROUND | {"mesh", "kernels", "core"}
MODEL = CORE | {"nn", "models"}
RUN = MODEL | {"optim", "transforms", "parallel", "data", "checkpoint", "formats", "launch", "fields", "files", "train"}
KNOWS: dict[str, set[str]] = {
    "tree": set(),
    "spec": {"tree"},
    "fields": set(),
    "files": set(),
    "progress": set(),
    "picture": set(),
    "mesh": GROUND | {"fields"},
    "kernels": {"mesh"},
    "core": GROUND | {"mesh", "kernels"},
    "nn": CORE,
    "models": CORE | {"nn", "fields"},
    "optim": CORE,
    "transforms": CORE,
    "parallel": CORE,
    "research": CORE,
    "testing": CORE | {"parallel"},
    "data": CORE | {"progress", "fields", "files", "picture"},
    "checkpoint": GROUND | {"mesh", "files"},
    "launch": set(),
    "formats": MODEL | {"data", "checkpoint", "fields", "files", "progress"},
    "train": RUN - {"train"},
    "presets": RUN,
    "planner": RUN | {"picture", "presets"},
    "replay": RUN | {"research"},
    "generate": RUN,
    "average": RUN | {"checkpoints"},
    "convert": RUN | {"progress"},
    "checkpoints": RUN,
    "evaluate": RUN | {"progress"},
    "show": RUN,
    "plot": RUN | {"picture"},
    "plot_loads": {"picture", "train"},
    "plot_runs": {"picture", "train", "models", "plot"},
    "cli": RUN
    | {
        "presets",
        "planner",
        "replay",
        "generate",
        "average",
        "checkpoints",
        "evaluate",
        "plot",
        "plot_loads",
        "plot_runs",
        "convert",
        "show",
    },
    "__main__": {"cli"},
}
"""A folder, or a file at the top, and what it may import besides itself and the version in ``olmo_fn``."""

EXCEPTIONS = {
    ("transforms/lora.py", "nn"): "an adapted matrix is a kind of weight of `olmo_fn.nn.linear`, which multiplies by it",
    ("testing/pool.py", "train"): "ranks load the files of parts that the caller has used, by `olmo_fn.train.choices.load`",
}
"""Files that may import more, each with the reason."""


def imported(source: str) -> set[str]:
    """The folders of the package that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they go"
            found |= {node.module} if node.module != "olmo_fn" else {f"olmo_fn.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("olmo_fn.")} - {"__version__"}


def wrong_arrows(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Files, by their path in the package, and folders that they import and must not."""
    for path, source in files.items():
        folder = Path(path).parts[0].removesuffix(".py")
        for other in sorted(imported(source) - {folder} - KNOWS[folder]):
            if (path, other) not in EXCEPTIONS:
                yield path, other


def sources() -> dict[str, str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {
        str(path.relative_to(PACKAGE)): path.read_text() for path in paths if path.parent != PACKAGE or path.stem != "__init__"
    }


def test_arrows_go_down_only() -> None:
    wrong = [f"{path} imports olmo_fn.{folder}" for path, folder in wrong_arrows(sources())]
    assert not wrong, "\n".join(["against the table in test_arrows.py:", *wrong])


def test_the_table_is_of_the_package_and_has_no_circle() -> None:
    there = {Path(path).parts[0].removesuffix(".py") for path in sources()}
    assert KNOWS.keys() == there
    assert all(KNOWS[folder] <= there for folder in there)
    order = list(TopologicalSorter(KNOWS).static_order())
    assert order[-1] == "__main__"


def test_no_exception_is_left_over() -> None:
    files = sources()
    for path, folder in EXCEPTIONS:
        assert folder in imported(files[path]), f"{path} imports {folder} no more: take it out of EXCEPTIONS"
        assert folder not in KNOWS[Path(path).parts[0]]


@pytest.mark.parametrize(
    ("path", "source", "arrow"),
    [
        ("core/tape.py", "from olmo_fn.models.config import Model\n", "models"),
        ("train/loop.py", "def f():\n    from olmo_fn import generate\n", "generate"),
        ("parallel/new.py", "if True:\n    import olmo_fn.nn.linear as linear\n", "nn"),
        ("tree.py", "from olmo_fn.spec import Spec\n", "spec"),
    ],
)
def test_an_arrow_that_goes_up_is_caught(path: str, source: str, arrow: str) -> None:
    assert list(wrong_arrows({path: source})) == [(path, arrow)]
