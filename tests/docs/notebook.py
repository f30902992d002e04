"""Run a notebook of the docs and store its output in it.

PYTHONPATH=. .venv/bin/python tests/docs/notebook.py docs/tutorials/your_own_photos.ipynb
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


def execute(notebook: Path, folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    """Run a notebook in a folder and return it with its output.

    Args:
        notebook: Path of the notebook. Its first code cell assigns the parameters.
        folder: Working folder of the notebook.
        parameters: New values of variables that the first code cell assigns.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    content = nbformat.read(notebook, as_version=4)
    first = next(cell for cell in content.cells if cell.cell_type == "code")
    for name, value in parameters.items():
        line = re.compile(rf"^{name} = \S+", re.MULTILINE)
        assert line.search(first.source), f"{notebook.name}: the first code cell has no {name}"
        first.source = line.sub(f"{name} = {value!r}", first.source)
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment["PYTHONWARNINGS"] = "ignore"  # tqdm warns that ipywidgets is missing
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(content, timeout=600, resources=resources, coalesce_streams=True)
    client.execute(env=environment)
    return content


def main(path: str) -> None:
    """Run a notebook as it is, in an empty folder, and write it back."""
    with tempfile.TemporaryDirectory() as folder:
        content = execute(Path(path), Path(folder))
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # times differ between two runs
    nbformat.write(content, path)


if __name__ == "__main__":
    main(sys.argv[1])
