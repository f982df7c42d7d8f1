"""Execute the notebooks of this folder in place, all of them or the ones named: ``python notebooks/execute.py many_runs``."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def main(names: list[str]) -> None:
    """An error in a cell ends it, and leaves that notebook as it was."""
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        book = nbformat.read(path, 4)
        where = {"metadata": {"path": str(FOLDER.parent)}}
        NotebookClient(book, timeout=1200, kernel_name="python3", resources=where, record_timing=False).execute()
        nbformat.write(book, path)
        print(path.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
