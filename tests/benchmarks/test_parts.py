"""The benchmarks measure what they say: every candidate does its work, on a model that needs no training."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import bench
import growth
import parts
from measure import Line, compared, in_turns


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    values = dict(model="tiny", rollout_batch_size=2, mini_batch_size=2, num_generations=2, num_problems=20)
    with parts.make_trainer(tmp_path_factory.mktemp("bench"), **values) as trainer:
        yield trainer


def test_sampler_and_update(trainer):
    lines = [*parts.sampler(trainer, 1), *parts.update(trainer, 1)]
    names = [line.name.partition(",")[0] for line in lines]
    assert names[:3] == ["model.generate", "TransformersSampler", "products alone"]
    assert {"Trainer.update", "padded full-logits update"} <= set(names)
    assert all(line.value > 0 and line.unit == "tokens/s" for line in lines)
    assert [line.ratio is None for line in lines if line.part == "update"] == [True, False, False, False]


def test_growth_covers_every_axis(trainer, monkeypatch):
    monkeypatch.setattr(growth, "AXES", {axis: values[:1] for axis, values in growth.AXES.items()})
    found = list(growth.growth(trainer, rounds=1, threads=(1,)))
    assert {row["axis"] for row in found} == {"groups", "answer", "prompt", "size", "threads"}
    assert all(row["seconds"] > 0 for row in found) and len(found) == 10


def test_ratios_are_medians_of_rounds():
    lines = compared("p", {"a": [1.0, 2.0, 4.0], "b": [3.0, 2.0, 4.0]}, "tokens/s", "a")
    assert lines == [Line("p", "a", 2.0, "tokens/s"), Line("p", "b", 3.0, "tokens/s", 1.0, "a")]
    calls = []
    rates = in_turns({name: lambda name=name: calls.append(name) or 1.0 for name in "ab"}, 2)
    assert calls == ["a", "b", "a", "b", "b", "a"] and len(rates["a"]) == 2


def test_lines_of_another_version_are_found(tmp_path):
    for version, rate, took in (("old", 1000.0, 30.0), ("new", 3000.0, 20.0)):
        folder = tmp_path / version / "tests" / "benchmarks"
        folder.mkdir(parents=True)
        lines = [Line("u", "Trainer.update, 128 rows", rate, "tokens/s", 2.0, "x"), Line("s", "a step", took, "ms")]
        lines += [Line("s", f"only {version}", 1.0, "ms")]
        (folder / "bench.py").write_text("\n".join(f"print({str(line)!r})" for line in ["one thread", *lines]))
    update, step = bench.before_and_after(tmp_path / "old", [], turns=2, here=tmp_path / "new")
    assert (update.name, update.value, update.ratio) == ("Trainer.update, 128 rows", 3000.0, 3.0)
    assert (step.value, step.ratio) == (20.0, 1.5)
    (tmp_path / "old" / "tests" / "benchmarks" / "bench.py").write_text("raise SystemExit('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        list(bench.before_and_after(tmp_path / "old", [], turns=1, here=tmp_path / "new"))
