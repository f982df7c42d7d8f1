"""The arrows of docs/design.md are those of the code; the files that the docs name are there."""

import ast
import re
from collections.abc import Iterator

import pytest
from programs import ROOT

PACKAGE = ROOT / "olmo_fn"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = re.findall(r"^\| `(\w+)` \| .* \| ([\w ]*) ?\|$", (ROOT / "docs" / "design.md").read_text(), re.M)
ABOVE = {
    "presets",
    "planner",
    "generate",
    "replay",
    "average",
    "evaluate",
    "plot",
    "convert",
    "show",
    "cli",
    "research",
    "testing",
}


def imported(folder: str) -> Iterator[str]:
    """The folders, or modules beside them, that the modules of a folder import."""
    for path in [PACKAGE / f"{folder}.py", *(PACKAGE / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())) if path.exists() else ():
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            else:
                continue
            yield from (name.split(".")[1] for name in names if name.startswith("olmo_fn."))


@pytest.mark.parametrize(("folder", "allowed"), ROWS)
def test_a_folder_imports_what_the_table_says(folder, allowed):
    assert {*imported(folder)} - {folder, "__version__"} <= {*allowed.split()}


def test_the_table_goes_down_only_and_has_every_folder():
    seen = {"tree", "fields", "files", "progress", "picture"}
    for folder, allowed in ROWS:
        assert {*allowed.split()} <= seen
        seen.add(folder)
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= seen | ABOVE
    assert not ABOVE & seen


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(path):
    """``core/tape.py``, ``tests/laws/``; a name alone is of the folder that the text speaks of."""
    named = re.findall(r"`([\w.]+(?:/[\w.]+)+\.py|[\w.]+(?:/[\w.]+)*/)`", path.read_text())
    missing = [name for name in named if not (ROOT / name).exists() and not (PACKAGE / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()) if not link.startswith("http")]
    assert not [link for link in links if not (path.parent / link).exists()]
