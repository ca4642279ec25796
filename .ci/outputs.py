"""The outputs of notebooks that are committed with them. `python .ci/outputs.py` executes these notebooks and writes
their outputs down; `--check FOLDER` compares copies that were executed elsewhere with what is committed. The other
notebooks have one picture each, in their opening, which `--pictures FOLDER` takes from copies that were executed.

Texts must be the same and numbers nearly so. Outputs of cells tagged `live`, and pictures, must only be of the same
kinds. What changes from run to run is left out: progress bars, widgets, times, and the folders of the machine.
"""

from __future__ import annotations

import argparse
import base64
import math
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
KEPT = ("walkthrough", "explore", "figures", "map")  # the others take long, and are committed without outputs
LIVE = "live"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
PLACE = re.compile(r"(?<![\w<.])/(?:[\w.+-]+/)+[\w.+-]*")  # an absolute path
TOLERANCE = dict(rel_tol=0.02, abs_tol=0.002)


def outputs(cell: NotebookNode) -> list[NotebookNode]:
    """What a cell has put out, without what changes from run to run."""
    kept = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if any("widget" in kind for kind in output.get("data", {})):
            continue
        output = nbformat.from_dict(output)
        output.pop("transient", None)
        for richest in ("image/png", "text/html"):
            if richest in output.get("data", {}):
                output.data = nbformat.from_dict({richest: output.data[richest]})
                output.metadata = nbformat.from_dict({})
        kept.append(output)
    return kept


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook with the outputs that are committed."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata["language_info"] = nbformat.from_dict({"name": "python"})
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.outputs, cell.execution_count = outputs(cell), number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells with code, but for the one in which papermill sets parameters."""
    return [
        c for c in notebook.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])
    ]


def texts(output: NotebookNode) -> dict[str, str]:
    """The texts of an output by their kind; of a picture its kind alone."""
    if output.output_type == "stream":
        return {output.name: output.text}
    return {kind: "" if kind.startswith("image/") else value for kind, value in output.get("data", {}).items()}


def places(notebook: NotebookNode) -> set[str]:
    """The absolute paths in what a notebook has put out."""
    shown = [text for cell in code_cells(notebook) for output in cell.outputs for text in texts(output).values()]
    return {place for text in shown for place in PLACE.findall(text)}


def same(a: str, b: str) -> bool:
    """Whether two texts are the same but for numbers that are nearly so, and for absolute paths."""
    a, b = (re.sub(r"\s+", " ", PLACE.sub("PATH", re.sub(r'id="T_\w+"|T_[0-9a-f]{5}', "", text))) for text in (a, b))
    if NUMBER.sub("N", a) != NUMBER.sub("N", b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return all(math.isclose(float(x), float(y), **TOLERANCE) for x, y in pairs)


def differences(committed: NotebookNode, executed: NotebookNode) -> list[str]:
    """What differs, a line each."""
    found = []
    for number, (old, new) in enumerate(zip(code_cells(committed), code_cells(executed), strict=True), 1):
        before, after = ([texts(output) for output in outputs(cell)] for cell in (old, new))
        kinds = [list(part) for part in before], [list(part) for part in after]
        if old.source != new.source:
            found.append(f"cell {number}: other code")
        elif kinds[0] != kinds[1]:
            found.append(f"cell {number}: put out {kinds[1]}, committed are {kinds[0]}")
        elif LIVE not in old.metadata.get("tags", []):
            for one, other in zip(before, after, strict=True):
                found += [
                    f"cell {number}, {kind}: {other[kind][:1000]!r}, committed is {one[kind][:1000]!r}"
                    for kind in one
                    if not same(one[kind], other[kind])
                ]
    return found


def check(folder: Path) -> list[str]:
    """What differs between the executed notebooks of a folder and those committed."""
    pairs = [(name, *(nbformat.read(place / f"{name}.ipynb", 4) for place in (FOLDER, folder))) for name in KEPT]
    return [f"{name}.ipynb, {line}" for name, old, new in pairs for line in differences(old, new)]


def write(names: list[str]) -> None:
    """Executes notebooks and writes them down with their outputs."""
    for name in names:
        path = FOLDER / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as aside:
            papermill.execute_notebook(path, f"{aside}/{name}.ipynb", cwd=FOLDER, progress_bar=False)
            made = cleaned(nbformat.read(f"{aside}/{name}.ipynb", 4))
        if found := places(made):
            raise SystemExit(f"{name}.ipynb puts out folders of this machine: {', '.join(sorted(found))}")
        nbformat.write(made, path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def take_pictures(folder: Path) -> None:
    """Writes down the picture that each executed notebook of a folder opens with: that of its cell tagged `picture`."""
    for path in sorted(folder.glob("*.ipynb")):
        for cell in code_cells(nbformat.read(path, 4)):
            found = [o.data["image/png"] for o in outputs(cell) if "image/png" in o.get("data", {})]
            if "picture" in cell.metadata.get("tags", []) and found:
                target = FOLDER / "pictures" / f"{path.stem}.png"
                target.write_bytes(base64.b64decode(found[0]))
                print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which; default: {', '.join(KEPT)}")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="compare the executed notebooks in a folder")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="take pictures from the notebooks in a folder")
    arguments = parser.parse_args()
    if arguments.pictures:
        take_pictures(arguments.pictures)
        sys.exit()
    if arguments.check:
        found = check(arguments.check)
        sys.exit("\n".join(found) if found else 0)
    write(arguments.names or list(KEPT))
