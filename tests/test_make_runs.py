"""Making the committed files: in parts, over several days, from real runs of a few steps."""

import math
from functools import partial

import pandas as pd
import pytest

from luffy import train
from luffy.evaluation import evaluate
from luffy.study import premise
from luffy.study.experiments import make_jobs
from paper_figures import make_runs, pilots, runs


@pytest.fixture(scope="module")
def work(tmp_path_factory, short_run):
    """Three methods of the main set with seed 0, another set with one."""
    folder = tmp_path_factory.mktemp("work")
    values = {**short_run, "final_eval_temperatures": (0.1,), "model": "tiny"}
    made = [job for method in make_runs.EVALUATED for job in make_jobs([method], [0], folder / "full", **values)]
    made += make_jobs(["luffy"], [0], folder / "hard", **values, difficulties=(6, 7))
    for job in made:
        train(job.config, job.run_dir)
    return folder, made


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(make_runs, "PROBLEMS", 5)
    monkeypatch.setattr(make_runs, "SAMPLES", 2)
    monkeypatch.setattr(make_runs, "TEMPERATURES", (0.1, 0.6))
    monkeypatch.setattr(premise, "measure", partial(premise.measure, problems=2, samples=8))


def test_files_are_added_to(work, small, tmp_path, monkeypatch):
    folder, made = work
    assert make_runs.missing(made, None) == made and make_runs.collect([], folder, tmp_path) is None
    first = make_runs.collect(made[:2], folder, tmp_path)  # LUFFY of seed 0 is not there yet: no case
    assert make_runs.missing(made, first) == made[2:] and "cases" not in first.extras
    found = make_runs.collect(made, folder, tmp_path)
    assert make_runs.missing(made, found) == []
    again = runs.load(tmp_path)
    assert len(again.runs) == 4 and set(again.runs["set"]) == {"full", "hard"}
    table = again.extra("temperatures")
    assert set(table["method"]) == {*make_runs.EVALUATED, "base"} and set(table["temperature"]) == {0.1, 0.6}
    assert set(again.extra("answers")["method"]) == {*make_runs.EVALUATED, "base"}
    assert len(again.extra("cases")) == 3 and set(again.extra("bases")["difficulty"]) == {
        "3",
        "4",
        "5",
        "6",
        "7",
        "all",
    }
    row = again.runs.iloc[0]
    assert row["base id"] == row["base id"] and row["id T=0.1"] == row["id T=0.1"]
    # another day: what the files have is not made again, and stays
    monkeypatch.setattr(evaluate, "make_sampler", lambda *_: pytest.fail("they have been evaluated"))
    monkeypatch.setattr(premise, "measure", lambda *_, **__: pytest.fail("it has been measured"))
    make_runs.collect(made, folder, tmp_path)
    later = runs.load(tmp_path)
    assert later.manifest == again.manifest
    for name in runs.EXTRAS:
        pd.testing.assert_frame_equal(later.extra(name), again.extra(name))
    pd.testing.assert_frame_equal(later.runs, again.runs)
    # on a machine without the run directories the files say what is missing, and stay as they are
    assert make_runs.missing(made, later) == []


def test_seeds_go_through_the_sets(tmp_path):
    wanted = make_runs.jobs(tmp_path)
    assert len(wanted) == 265 + 76 + 195  # the paper's, those added later, and the arena's
    assert len({job.run_dir for job in wanted}) == len(wanted)
    order = [(job.run_dir.parent.name, job.config.seed) for job in wanted]
    assert {name for name, seed in order if seed == 0} == set(make_runs.SETS)
    stages = [next(i for i, stage in enumerate(make_runs.STAGES) if name in stage) for name, _ in order]
    places = list(zip(stages, [seed for _, seed in order], strict=True))
    assert order[0] == ("full", 0) and places == sorted(places)


@pytest.mark.parametrize(("again", "likely"), [((0.0, 0.02), True), ((0.3, 0.3), False)])
def test_a_check_compares_distributions(again, likely, tmp_path, monkeypatch):
    """Two repeated runs, a fraction of the deviation over seeds away, and far away."""
    jobs = make_runs.jobs(tmp_path, ["full"])
    shown = [job for job in jobs if job.config.method.name in ("luffy", "sft")]
    scores = [0.5 + 0.03 * (-1) ** job.config.seed for job in shown]
    rows = [
        {**runs.settings_of(job.config), "run": i, "set": "full", "method": job.config.method.name, "id": score,
         "seed": job.config.seed}
        for i, (job, score) in enumerate(zip(shown, scores, strict=True))
    ]  # fmt: skip
    known = runs.Runs(pd.DataFrame(rows), pd.DataFrame(), "hand-made")
    monkeypatch.setattr(make_runs, "train", lambda jobs, parallel: None)
    repeated = {}

    def per_run(chosen):
        repeated.update({job.run_dir: gap for job, gap in zip(chosen, again, strict=True)})
        places = [[job.run_dir for job in shown].index(job.run_dir) for job in chosen]
        return pd.DataFrame({"id": [scores[i] + gap for i, gap in zip(places, again, strict=True)]})

    monkeypatch.setattr(make_runs.results, "per_run", per_run)
    found, p = make_runs.check(2, tmp_path, known, None)
    assert found[["method", "seed"]].to_numpy().tolist() == [["luffy", 0], ["sft", 1]]
    assert (p > 0.05) == likely and (p < 0.001) != likely
    deviation = 0.03 * math.sqrt(34 / 32)  # of two methods with 24 and ten seeds
    assert found["in deviations"].tolist() == pytest.approx([gap / (math.sqrt(2) * deviation) for gap in again])


def test_falls_by_hand():
    rewards = [*[0.5] * 30, *[0.2] * 10]
    rows = [{"stage": 1, "step": 160, "eval/id": 0.9}]  # before the first step of a second stage
    rows += [
        {"stage": 1, "step": 161 + i, "reward/on": r, "grad_norm": i, "entropy/on": 1.0, "time/step": 1.0}
        for i, r in enumerate(rewards)
    ]
    rows[10] |= {"eval/id": 0.6}
    rows[20] |= {"eval/id": 0.5}
    found = pilots.falls(rows)
    assert found["fall of reward"] == pytest.approx(30) and found["fall of validation"] == pytest.approx(10)
    assert found["grad_norm max"] == 39 and found["grad_norm median"] == 19.5 and found["entropy"] == 1


def test_trials_are_added_to_what_the_files_hold(tmp_path, monkeypatch):
    """All tables by the bare command, on a machine without the run directories."""
    monkeypatch.setattr(pilots, "FOLDER", tmp_path)
    known = pd.DataFrame({"changed": ["a", "b"], "method": "luffy", "seed": 101, "id": [40.5, 41.5]})
    known.to_csv(tmp_path / "tuning.csv", index=False)
    pilots.main(["--collect-only", "--work", str(tmp_path / "none")])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tuning.csv"), known)
    new = pd.DataFrame({"changed": ["b", "c"], "method": "luffy", "seed": 101, "id": [50.0, 51.0]})
    assert pilots.added(tmp_path / "tuning.csv", new)["id"].tolist() == [40.5, 50.0, 51.0]
