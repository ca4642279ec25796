import re

import pandas as pd
import pytest

from luffy import benchmarks, tables
from luffy.data.benchmarks import BENCHMARKS, LoadedBenchmark
from luffy.evaluation.evaluate import evaluate_models
from luffy.evaluation.paper_numbers import read_published


@pytest.fixture(scope="module")
def loaded():
    return benchmarks.load(["tinyworld"], limit=8)


@pytest.fixture(scope="module")
def evaluations(loaded, tmp_path_factory):
    """The base model at two temperatures."""
    models = {"cold": {"temperature": 0.0}, "warm": {"temperature": 1.0}}
    return evaluate_models(models, loaded, tmp_path_factory.mktemp("tables"), samples=3)


@pytest.fixture(scope="module")
def measured(evaluations, loaded):
    return tables.summary(evaluations, loaded)


def test_summary(measured, evaluations):
    assert list(measured["model"].unique()) == ["cold", "warm"]
    assert list(measured[measured["model"] == "cold"]["benchmark"]) == [
        "chain",
        "words",
        "flip",
        "prefix",
        "lines",
        "ood",
    ]
    results = evaluations["warm"].results()
    warm = measured[measured["model"] == "warm"].set_index("benchmark")
    for name, result in results.items():
        assert warm.loc[name, "accuracy"] == pytest.approx(100 * result.accuracy)
        assert warm.loc[name, "low"] <= warm.loc[name, "accuracy"] <= warm.loc[name, "high"]
        assert (warm.loc[name, "problems"], warm.loc[name, "metric"]) == (8, "avg@3")
    assert warm.loc["ood", "accuracy"] == pytest.approx(
        warm.loc[["words", "flip", "prefix", "lines"], "accuracy"].mean()
    )
    assert warm.loc["ood", "strict"] == pytest.approx(warm.loc[["words", "flip", "prefix", "lines"], "strict"].mean())


def test_main_table(measured, loaded):
    frame = tables.main_table(measured, loaded)
    assert list(frame.columns) == ["chain", "words", "flip", "prefix", "lines", "Avg OOD"]  # no average of one
    row = measured.iloc[0]
    assert frame.loc["cold", "chain"] == f"{row['accuracy']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def fake_summary(names):
    values = {"model": "ours", "accuracy": 50.0, "low": 40.0, "high": 60.0}
    sizes = {n: {"problems": BENCHMARKS[n].size, "samples": BENCHMARKS[n].samples} for n in names if n in BENCHMARKS}
    rows = [{**values, "benchmark": name, **sizes.get(name, {})} for name in names]
    return pd.DataFrame(rows), [LoadedBenchmark(BENCHMARKS[n], (), {}) for n in names if n in BENCHMARKS]


def test_published_numbers_stand_beside_ours():
    paper = ["aime24", "aime25", "amc", "math500", "minerva", "olympiad"]
    frame = tables.main_table(*fake_summary([*paper, "id"]), read_published("table1"))
    assert list(frame.columns) == ["AIME 24", "AIME 25", "AMC", "MATH-500", "Minerva", "OlympiadBench", "Avg"]
    assert frame.index[0] == "ours" and frame.loc["LUFFY (published)", "Avg"] == "50.1"
    # without one of the six, the published average is not that of our columns
    frame = tables.main_table(*fake_summary([*paper[1:], "id"]), read_published("table1"))
    assert frame.loc["LUFFY (published)", "Avg"] == "–" and frame.loc["LUFFY (published)", "AMC"] == "65.6"
    # numbers of less than the paper measured say so
    frame, some = fake_summary(paper)
    frame.loc[frame["benchmark"] == "aime24", ["problems", "samples"]] = [8, 2]
    assert next(iter(tables.main_table(frame, some).columns)) == "AIME 24 (8 of 30, avg@2)"
    # models of one name in several groups are told apart
    frame = tables.main_table(*fake_summary(paper), read_published("table3"))
    assert len(frame) == 1 + 13 and frame.loc["Qwen2.5-Math-1.5B, LUFFY (published)", "AIME 24"] == "16.0"
    # and none of them where no benchmark is the paper's
    assert list(tables.main_table(*fake_summary(["chain"]), read_published("table1")).index) == ["ours"]


def test_pass_curves(evaluations, loaded):
    curves = tables.pass_curves(evaluations, loaded)
    assert len(curves) == 2 * 5 * 3
    result = evaluations["warm"].results()["words"]
    words = curves[(curves["model"] == "warm") & (curves["benchmark"] == "words")]
    assert words["value"].tolist() == pytest.approx([100 * result.pass_at(k) for k in (1, 2, 3)])
    cold = curves[(curves["model"] == "cold") & (curves["benchmark"] == "words")]
    assert cold["value"].nunique() == 1  # greedy samples are all the same


def test_differences(evaluations, loaded, measured):
    gaps = tables.differences(evaluations, loaded, against="cold").set_index("benchmark")
    assert set(gaps["model"]) == {"warm"} and set(gaps.index) == {"chain", "words", "flip", "prefix", "lines", "ood"}
    accuracy = measured.pivot(index="benchmark", columns="model", values="accuracy")
    for name in gaps.index:
        assert gaps.loc[name, "difference"] == pytest.approx(accuracy.loc[name, "warm"] - accuracy.loc[name, "cold"])
        assert gaps.loc[name, "low"] <= gaps.loc[name, "difference"] <= gaps.loc[name, "high"]
        assert 0 < gaps.loc[name, "p"] <= 1
    with pytest.raises(ValueError, match="no model 'hot'"):
        tables.differences(evaluations, loaded, against="hot")


def test_disagreements_are_listed(evaluations, monkeypatch):
    assert tables.disagreements(evaluations).empty
    warm = evaluations["warm"]
    rows = list(warm.rows())
    rows[5] = {**rows[5], "strict": not rows[5]["strict"]}
    monkeypatch.setattr(warm, "rows", lambda: iter(rows))
    listed = tables.disagreements(evaluations)
    assert len(listed) == 1 and listed.loc[0, "model"] == "warm"
    assert "\\boxed{" in listed.loc[0, "ending"] and listed.loc[0, "answer"] == rows[5]["answer"]


def test_written_in_three_formats(measured, loaded, tmp_path):
    frame = tables.main_table(measured, loaded)
    paths = tables.write({"table": frame, "summary": measured}, tmp_path / "new")
    assert [path.name for path in paths] == [f"{n}.{s}" for n in ("table", "summary") for s in ("md", "tex", "csv")]
    markdown = (tmp_path / "new" / "table.md").read_text().splitlines()
    assert re.split(r"\s*\|\s*", markdown[0])[1:-1] == ["model", "chain", "words", "flip", "prefix", "lines", "Avg OOD"]
    assert "\\toprule" in (tmp_path / "new" / "table.tex").read_text()
    latex = (tmp_path / "new" / "summary.tex").read_text()
    assert "\\bottomrule" in latex and "nan" not in latex.lower()
    again = pd.read_csv(tmp_path / "new" / "summary.csv")
    assert again["accuracy"].tolist() == pytest.approx(measured["accuracy"].tolist(), abs=1e-3)


def test_untrusted_text_stays_in_its_cell(tmp_path):
    frame = pd.DataFrame([{"given": "|x|", "ending": "one\n\ntwo", "answer": "0.50", "problem": 3}])
    tables.write({"odd": frame}, tmp_path)
    markdown = (tmp_path / "odd.md").read_text().splitlines()
    assert len(markdown) == 3 and "\\|x\\|" in markdown[2] and "one two" in markdown[2] and "0.50" in markdown[2]
    assert "one two" in (tmp_path / "odd.tex").read_text()
    assert pd.read_csv(tmp_path / "odd.csv", dtype=str).loc[0, "ending"] == "one\n\ntwo"


@pytest.mark.parametrize(("table", "averages"), [("table1", 2), ("table3", 1)])
@pytest.mark.parametrize("version", ["v5", "v1"])
def test_published_averages_are_those_of_their_cells(table, averages, version):
    frame = read_published(table, version)
    assert frame["accuracy"].between(0, 100).all() and frame["source"].notna().all()
    for key, rows in frame.groupby(["group", "model"]):
        cells = rows.set_index("benchmark")["accuracy"]
        for average in ("id", "ood")[:averages]:
            members = [
                name for name in cells.index if name in BENCHMARKS and BENCHMARKS[name].ood == (average == "ood")
            ]
            if members:
                # cells and averages are rounded to a tenth
                assert cells[average] == pytest.approx(cells[members].mean(), abs=0.1), (key, average)


def test_no_such_published_table():
    with pytest.raises(ValueError, match="no published table 'table9'"):
        read_published("table9")
    with pytest.raises(ValueError, match="no version 'v2'"):
        read_published("table1", "v2")
