"""The notebooks as a reader finds them: a question, a picture that answers it, outputs that are true; and the tool that
keeps the outputs. (CI executes all of them.)"""

import importlib.util
import json
import re

import matplotlib
import nbformat
import pytest
from paths import ROOT

spec = importlib.util.spec_from_file_location("outputs", ROOT / ".ci" / "outputs.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

CI = (ROOT / ".ci" / "noxfile.py").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def notebook(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


def text(name):
    return "\n".join(cell.source for cell in notebook(name).cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("name", NAMES)
def test_it_asks_and_shows(name):
    """Headings are questions, but for those of the walkthrough's last parts; the opening has a picture, or outputs that
    begin with one."""
    headings = re.findall(r"^#+ (.*)$", text(name), re.M)
    asked = [heading.split("? (Eq.")[0].rstrip("?") for heading in headings if "?" in heading]
    assert headings[0].endswith("?") and len(asked) >= 0.75 * len(headings), headings
    first = notebook(name).cells[0].source
    for path in re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", first):
        assert (ROOT / "notebooks" / path).is_file(), path
    assert "](pictures/" in first or name in tool.KEPT


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_one_clean_run(name):
    cells = tool.code_cells(notebook(name))
    if name not in tool.KEPT:
        assert not any(cell.outputs or cell.execution_count for cell in cells)
        return
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 1
    assert not any(output.output_type == "error" for output in shown)
    assert not tool.places(notebook(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_calls_that_it_names_can_be_made(name):
    """`papermill ... -p NAME value` sets parameters that the notebook has, and the notebook is one."""
    for called, flags in re.findall(r"papermill notebooks/(\w+)\.ipynb((?:[^\n]|\\\n)*)", text(name)):
        parameters = next(c.source for c in notebook(called).cells if "parameters" in c.metadata.get("tags", []))
        for parameter in re.findall(r" -p (\w+)", flags):
            assert re.search(rf"^{parameter} = ", parameters, re.M), parameter


def test_the_walkthrough_and_its_solutions(tmp_path, monkeypatch):
    """Every cell, and every solution where it stands, in one session."""
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    space, solutions = {"__name__": "walkthrough"}, 0
    *cells, last = notebook("walkthrough").cells
    assert last.source == "trainer.close()"
    for cell in cells:
        folded = re.findall(r"<details>.*?```python\n(.*?)```\n</details>", cell.source, re.S)
        solutions += len(folded)
        for code in [cell.source] if cell.cell_type == "code" else folded:
            exec(compile(code, "walkthrough", "exec"), space)
    space["trainer"].close()
    assert solutions == 10 and text("walkthrough").count("<details>") == 10
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert {f"(Eq. {n})" for n in range(1, 9)} <= set(re.findall(r"\(Eq\. \d\)", text("walkthrough")))
    assert code.count("assert allclose") >= 12


def test_ci_knows_which_have_outputs():
    assert f"WITH_OUTPUTS = {tool.KEPT!r}".replace("'", '"') in CI[0] and "|".join(tool.KEPT) in CI[1]
    assert all(f'submit(execute, "{name}"' in CI[0] for name in NAMES)


def made(*cells):
    """A notebook of (source, tags, printed text, HTML) with outputs."""
    book = nbformat.v4.new_notebook()
    for source, tags, printed, html in cells:
        outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
        if html:
            outputs.append(nbformat.v4.new_output("display_data", {"text/html": html, "text/plain": "in short"}))
        book.cells.append(nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": tags}))
    return book


def test_what_counts_as_different():
    first, live = (
        ("a", [], "loss 0.5012 after 20 steps in /some/where/run", "<td>1.00</td>"),
        ("b", ["live"], "5 s", None),
    )
    old = made(first, live)
    near = ("a", [], "loss 0.5013 after 20 steps in /else/run", "<td>1.01</td>")
    assert tool.differences(old, made(near, ("b", ["live"], "70 s", None))) == []
    code, tags, printed, html = first
    for other, second, said in [
        ((code, tags, printed.replace("0.5012", "0.6"), html), live, "stdout"),
        ((code, tags, printed.upper(), html), live, "stdout"),
        ((code, tags, printed, "<td>2.00</td>"), live, "text/html"),
        ((code, tags, printed, None), live, "put out"),
        (("a + 1", tags, printed, html), live, "other code"),
        (first, ("b", ["live"], "", None), "cell 2: put out"),
    ]:
        (line,) = tool.differences(old, made(other, second))
        assert said in line


def test_what_is_kept_of_an_output():
    book = made(("a", [], "text", "<b>x</b>"))
    book.cells[0].outputs += [
        nbformat.v4.new_output("stream", name="stderr", text="Loading 100%"),
        nbformat.v4.new_output(
            "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Slider"}
        ),
        nbformat.v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"}),
    ]
    book.metadata["papermill"] = {"start_time": "now"}
    book.cells[0].metadata["execution"] = {"iopub.execute_input": "now"}
    kept = json.loads(nbformat.writes(tool.cleaned(book)))
    assert [list(output.get("data", {"stdout": 0})) for output in kept["cells"][0]["outputs"]] == [
        ["stdout"], ["text/html"], ["image/png"],
    ]  # fmt: skip
    assert "papermill" not in kept["metadata"] and "execution" not in kept["cells"][0]["metadata"]
