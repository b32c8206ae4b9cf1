"""Runs the notebooks once and keeps them with their outputs, which the site shows and a test checks.

    python -m benchmarks.notebooks

They are kept in build/notebooks/KEY/, where KEY is a digest of the notebooks and of the code that they run. While nothing of
that changes, nothing is run again: a slow test of CI runs them, and the site that CI builds afterwards shows what it kept. After
an interruption the same command runs the notebooks that are left.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import time
from pathlib import Path

import nbformat
from filelock import FileLock

PROJECT = Path(__file__).resolve().parents[1]
NOTEBOOKS = tuple(sorted((PROJECT / "notebooks").glob("*.ipynb")))
"""In this order: later ones reuse runs of earlier ones."""
KEPT = PROJECT / "build" / "notebooks"
RUN_BY_THEM = ("dann_experiments", "sweeps")
KINDS = {".py", ".yaml", ".j2", ".css"}
MISSING = """!!! note "Without outputs"
    This site was built without running the notebooks, so tables and pictures are missing below.
    `make notebooks` runs them (minutes, no network); the next `make docs` shows what came out."""


def folder_of_outputs() -> Path:
    """Return the folder that holds, or would hold, the notebooks as this code runs them."""
    digest = hashlib.sha256()
    code = [file for name in RUN_BY_THEM for file in sorted((PROJECT / name).rglob("*")) if file.suffix in KINDS]
    for file in (*NOTEBOOKS, *code, PROJECT / "constraints.txt"):
        digest.update(f"{file.relative_to(PROJECT)}\0".encode() + file.read_bytes())
    return KEPT / digest.hexdigest()[:16]


def executed(name: str) -> nbformat.NotebookNode | None:
    """Return a notebook with its outputs, or None if `execute` has not run it with this code."""
    file = folder_of_outputs() / name
    return nbformat.reads(file.read_text(), as_version=4) if file.is_file() else None


def execute() -> Path:
    """Run all notebooks, unless this code ran them already; return the folder of notebooks with outputs."""
    folder = folder_of_outputs()
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / ".lock"):
        if folder.is_dir():
            return folder
        place = KEPT / f"{folder.name}.running"
        for older in set(KEPT.glob("[0-9a-f]*")) - {place}:
            shutil.rmtree(older)
        done = place / "done"
        done.mkdir(parents=True, exist_ok=True)
        for file in NOTEBOOKS:
            if not (done / file.name).exists():  # else it was run before something stopped this
                text = nbformat.writes(_run(file, place / "project"))
                (done / file.name).write_text(text)
        done.rename(folder)
        shutil.rmtree(place)
    return folder


def _run(file: Path, place: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder that has the recipes and a store of its own."""
    from nbclient import NotebookClient

    if not place.exists():
        place.mkdir()
        (place / "recipes").symlink_to(PROJECT / "recipes")
    notebook = nbformat.reads(file.read_text(), as_version=4)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    begun = time.monotonic()
    client = NotebookClient(notebook, kernel_name="python3", timeout=900, resources={"metadata": {"path": str(place)}})
    client.execute(env=environ)
    print(f"{file.name}: {time.monotonic() - begun:.0f} s", flush=True)
    return notebook


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures: name of the file -> content."""
    notebook = executed(path.name)
    cells = (notebook or nbformat.reads(path.read_text(), as_version=4)).cells
    parts, pictures = [], {}
    for cell in cells:
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        parts.append(fenced(cell.source, "python"))
        for output in cell.outputs:
            content = output.get("data", {})
            if "image/png" in content:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(content["image/png"])
                parts.append(f"![Picture made by the cell above]({name}){_width(output)}")
            elif "text/html" in content:
                parts.append(f'<div class="output">\n{_table(content["text/html"])}\n</div>')
            elif output.get("name") != "stderr":
                parts.append(fenced(output.get("text") or content.get("text/plain", ""), "{ .text .output }"))
    if notebook is None:
        parts.insert(1, MISSING)
    return "\n\n".join(parts), pictures


def _width(output: nbformat.NotebookNode) -> str:
    width = output.get("metadata", {}).get("image/png", {}).get("width")
    return f'{{ width="{width}" }}' if width else ""


def _table(html: str) -> str:
    """Return the table of a data frame without the looks that pandas gives it."""
    found = re.search(r"<table.*</table>", html, re.DOTALL)
    assert found is not None, "the site shows tables alone"
    return re.sub(r"<table[^>]*>", "<table>", found[0])


def fenced(text: str, language: str) -> str:
    """Return a block of code. Its fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


if __name__ == "__main__":
    print(execute())
