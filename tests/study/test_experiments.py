import json
import math
import os
import signal
import time

import numpy as np
import pytest
from helpers import ended, forked
from paths import ROOT

from luffy import METHODS, ConfigError, experiments, plots, presets, results, resume, train
from luffy.evaluation.stats import interval
from luffy.methods import ARENA_METHODS, PAPER_METHODS
from luffy.study.experiments import RunsFailedError, make_jobs
from luffy.study.presets import as_value, load_preset
from luffy.study.style import LOOKS, panels

NOTEBOOKS = ROOT / "notebooks"


def last(updates):
    *_, statuses = updates
    return statuses


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, short_run):
    """Three methods with two seeds: one run by a child process; the others only have to be there."""
    jobs = make_jobs(["on_policy", "luffy", "sft_rl"], [0, 1], tmp_path_factory.mktemp("runs"), **short_run)
    for job in jobs[1:]:
        train(job.config, job.run_dir)
    assert {status.state for status in last(experiments.run(jobs, parallel=2, poll_s=0.2))} == {"complete"}
    return jobs


def test_runs_are_child_processes_in_directories_of_their_own(jobs):
    assert len({job.run_dir for job in jobs}) == 6
    for job in jobs[:1]:
        assert job.run.is_complete and "training problems" in (job.run_dir / "log.txt").read_text()
        assert not job.run.is_running


def test_running_again_starts_nothing(jobs):
    before = {job.run_dir: (job.run_dir / "log.txt").stat().st_mtime for job in jobs[:1]}
    assert all(status.state == "complete" for status in next(iter(experiments.run(jobs))))
    assert before == {job.run_dir: (job.run_dir / "log.txt").stat().st_mtime for job in jobs[:1]}
    assert not any((job.run_dir / "log.txt").exists() for job in jobs[1:])


def test_curves_count_the_steps_of_both_stages(jobs):
    data = results.curves(jobs)
    assert set(data["method"]) == {"on_policy", "luffy", "sft_rl"}
    two_stage = data[(data["method"] == "sft_rl") & (data["seed"] == 0)]
    assert sorted(two_stage["step"].unique()) == list(range(9))
    assert jobs[2].total_steps == 8


def test_results_and_costs(jobs, short_run):
    table = results.per_run(jobs).set_index(["method", "seed"])
    assert len(table) == 6
    row = table.loc[("luffy", 0)]
    metrics = jobs[1].rows()
    validations = [r for r in metrics if "eval/id" in r]
    assert [r["step"] for r in validations] == [0, 2, 4]
    assert row["base id"] == validations[0]["eval/id"] and row["base words"] == validations[0]["eval/words/accuracy"]
    assert row["id"] == np.mean([r["eval/id"] for r in validations[1:]])  # no more than four after the start
    assert row["lines"] == np.mean([r["eval/lines/accuracy"] for r in validations[1:]])
    right = jobs[1].run.evaluation()["families"]["chain"]["right"]
    assert row["pass@2"] == np.mean([r > 0 for r in right])
    assert row["id problems"] == pytest.approx(np.std([r / 2 for r in right], ddof=1) / 2)  # of four problems
    assert row["entropy_answer"] == metrics[-1]["entropy/answer"] and row["boxed"] == metrics[-1]["boxed/on"]
    both = table.loc[("sft_rl", 0)]
    stages = [r for r in jobs[2].rows() if "eval/id" in r]
    assert both["base id"] == stages[0]["eval/id"] and both["id"] == np.mean([r["eval/id"] for r in stages[-2:]])
    assert row["prompts"] == short_run["steps"] * short_run["rollout_batch_size"]
    assert table.loc[("sft_rl", 0)]["prompts"] == 2 * row["prompts"]
    first = jobs[2].rows()
    trained = [r["total/trained_tokens"] for r in first if r["step"] in (4, 8) and "total/trained_tokens" in r]
    assert table.loc[("sft_rl", 0)]["trained_tokens"] == sum(trained)


def test_score_is_the_mean_of_the_last_four_validations(jobs):
    rows = [{"stage": 0, "step": 25 * i, "eval/id": i / 10, "eval/chain/accuracy": i / 20} for i in range(8)]
    rows = [rows[0], *({**row, "time/step": 1.0} for row in rows[1:])]
    assert results._score(rows, {}) == {"id": pytest.approx(0.55), "chain": pytest.approx(0.275)}
    assert results._score(rows[:3], {})["id"] == pytest.approx(0.15)  # not the one before the first step
    evaluation = {"averages": {"id": 0.3}, "families": {"chain": {"accuracy": 0.3}}}
    assert results._score([{"stage": 0, "step": 1}], evaluation) == {"id": 0.3, "chain": 0.3}


def test_summary_and_differences(jobs):
    table = results.summary(jobs)
    assert list(table.index) == ["Base", *(METHODS[m].label for m in ("on_policy", "luffy", "sft_rl"))]
    assert (
        table.loc["Base", "seeds"] == 1 and table.loc["Base", "entropy"] == "–" and "±" not in table.loc["Base", "id"]
    )
    assert "±" in table.loc["LUFFY", "id"] and table.loc["LUFFY", "seeds"] == 2
    one_seed = results.summary(jobs[:3])
    assert "[" in one_seed.loc["LUFFY", "id"] and "±" not in one_seed.loc["LUFFY", "id"]
    scores = results.per_run(jobs).set_index(["method", "seed"])["id"]
    expected = 100 * np.mean([scores["luffy", s] - scores["on_policy", s] for s in (0, 1)])
    row = results.differences(jobs).loc["On-Policy RL"]
    assert row["id"] == pytest.approx(expected) and row["id low"] <= row["id"] <= row["id high"]


def test_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))  # t(0.975, 2) = 4.302653, s = 1
    assert math.isnan(interval([1.0])[1]) and interval([1.0])[0] == 1.0
    assert math.isnan(interval([])[0])


def test_figures_show_every_method(jobs):
    figure = plots.plot_curves(results.curves(jobs), ["reward/on", "eval/id"])
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert labels == {METHODS[m].label for m in ("on_policy", "luffy", "sft_rl")}
    assert len(plots.plot_accuracies(jobs).axes) == 2
    assert set(LOOKS) == {*PAPER_METHODS, *ARENA_METHODS}


def test_a_notebook_keeps_no_figure():
    """A cell that shows hundreds of pictures of a long training holds one of them."""
    from matplotlib import pyplot
    from matplotlib_inline import backend_inline

    former = pyplot.get_backend()
    pyplot.switch_backend("module://matplotlib_inline.backend_inline")
    try:
        with pyplot.ion():
            panels(2)
            assert not backend_inline.show._to_draw and not pyplot.get_fignums()
    finally:
        pyplot.switch_backend(former)


def test_abandoned_iteration_leaves_the_run_alone_and_another_watches_it(tmp_path, short_run):
    [job] = make_jobs(["luffy"], [0], tmp_path, **{**short_run, "steps": 12})
    updates = experiments.run([job], poll_s=0.1)
    for statuses in updates:
        if statuses[0].step >= 1:
            break
    updates.close()
    assert job.run.is_running or job.run.is_complete
    assert last(experiments.run([job], poll_s=0.2))[0].state == "complete"
    assert (job.run_dir / "log.txt").read_text().count("training problems") == 1  # started once


def test_killed_run_is_resumed(tmp_path, short_run):
    [job] = make_jobs(["luffy"], [0], tmp_path, **{**short_run, "steps": 12})
    job.run.start(job.config, {})
    pid = forked(lambda: resume(job.run_dir))
    while len(job.run.metrics()) < 4:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    assert not job.run.is_complete
    assert last(experiments.run([job], poll_s=0.2))[0].state == "complete"
    assert [row["step"] for row in job.rows()] == list(range(13))


def test_stopped_run_goes_on_later(tmp_path, short_run):
    [job] = make_jobs(["luffy"], [0], tmp_path, **{**short_run, "steps": 12})
    updates = experiments.run([job], poll_s=0.1)
    while next(updates)[0].step < 2:
        pass
    assert experiments.stop([job]) == 1
    with pytest.raises(RunsFailedError):
        last(updates)
    assert not job.run.is_complete and experiments.stop([job]) == 0
    assert last(experiments.run([job], poll_s=0.2))[0].state == "complete"


def test_failed_run_is_reported_and_the_others_are_completed(tmp_path, short_run):
    bad, good = make_jobs(["luffy", "on_policy"], [0], tmp_path, **{**short_run, "steps": 2})
    bad.run.start(bad.config, {})
    (bad.run_dir / "config.json").write_text("{")
    states = []
    with pytest.raises(RunsFailedError, match="is damaged"):
        for statuses in experiments.run([bad, good], poll_s=0.2):
            states = [status.state for status in statuses]
    assert states == ["failed", "complete"]


def test_presets_and_parameters(tmp_path):
    assert load_preset("full")["seeds"] == list(range(10))
    for name in ("smoke", "default", "full"):
        assert len(experiments.preset_jobs({**load_preset(name), "seeds": [0]}, tmp_path)) == 9
    (tmp_path / "mine.yaml").write_text("seeds: [5]\nsteps: 2\n")
    assert load_preset(tmp_path / "mine.yaml") == {"seeds": [5], "steps": 2}
    assert as_value("[0, 1, 2]") == [0, 1, 2] == as_value([0, 1, 2])
    assert as_value("{gamma: 0.3}") == {"gamma": 0.3}


def test_values_reach_only_the_methods_that_leave_them_open(tmp_path):
    jobs = make_jobs(PAPER_METHODS, [0], tmp_path, num_off_policy=2, num_traces=2)
    demonstrations = {job.config.method.name: job.config.method.traces_wanted() for job in jobs}
    assert demonstrations["on_policy"] == 0 and demonstrations["luffy"] == 2


@pytest.mark.parametrize("name", [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
def test_every_parameter_of_a_notebook_has_a_comment(name):
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    parameters = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(parameters) == 1
    lines = "".join(parameters[0]["source"]).splitlines()
    assert all(" = " in line and "  # " in line for line in lines)


def test_train_notebook_runs_and_shows_a_finished_run_again(tmp_path, short_run):
    """Executed by papermill as a user would; a second execution trains nothing."""
    import papermill

    values = {k: v for k, v in short_run.items() if k != "steps"}
    parameters = dict(method="mixed", steps=4, values=json.dumps(values), runs_dir=str(tmp_path / "runs"))
    for output in ("first", "second"):
        papermill.execute_notebook(
            NOTEBOOKS / "train.ipynb", tmp_path / f"{output}.ipynb", parameters=parameters, progress_bar=False
        )
    [run_dir] = (tmp_path / "runs").iterdir()
    assert (run_dir / "log.txt").read_text().count("training problems") == 1
    text = (tmp_path / "second.ipynb").read_text()
    assert text.count("image/png") >= 2 and "1 complete" in text


def test_presets_with_a_base_and_variants(tmp_path):
    full = presets.load_preset("full")
    gamma = presets.load_preset("gamma")
    assert {name: full[name] for name in full if name != "seeds"} == {
        name: gamma[name] for name in full if name != "seeds"
    }
    jobs = experiments.preset_jobs(gamma, tmp_path)
    assert [(j.variant, j.config.seed) for j in jobs[:13]] == [
        *(("gamma=0.05", s) for s in range(12)),
        ("gamma=0.2", 0),
    ]
    assert {(j.config.method.gamma, j.config.max_steps, j.config.evaluation.final_eval_samples) for j in jobs} == {
        (gamma, full["max_steps"], 8) for gamma in (0.05, 0.2, 0.3, 0.5)
    }
    assert len({job.run_dir for job in jobs}) == 48
    assert [len(part) for part in experiments.by_variant(jobs).values()] == [12] * 4
    for name in (
        "hard",
        "easy",
        "map",
        "more_seeds",
        "plus",
        "sensitivity",
        "smoke",
        "default",
        "tuning",
        "pilot_stability",
    ):
        assert experiments.preset_jobs(presets.load_preset(name), tmp_path)
    with pytest.raises(ConfigError, match="no field 'gama'"):
        experiments.preset_jobs({"variants": [{"gama": 1}]}, tmp_path)


def test_presets_with_models_and_tuned_values(tmp_path):
    """A seed takes its model from the list; tuned values go over the preset's and under a variant's; a model that is
    given goes over the list."""
    preset = {
        "methods": ["luffy", "sft"], "seeds": [0, 1, 2], "models": ["tiny:own_share=0.1", "tiny"],
        "learning_rate": 1e-3, "tuned": {"luffy": {"learning_rate": 2e-3}}, "variants": [{}, {"learning_rate": 5e-3}],
    }  # fmt: skip
    jobs = experiments.preset_jobs(preset, tmp_path)
    assert [job.config.model for job in jobs[::2]] == ["tiny:own_share=0.1", "tiny", "tiny:own_share=0.1"] * 2
    assert [job.config.update.learning_rate for job in jobs[:2]] == [2e-3, 1e-3]
    assert {job.config.update.learning_rate for job in jobs[6:]} == {5e-3} and jobs[6].variant == "learning_rate=0.005"
    own = presets.over(preset, {"model": "tiny"})
    assert {job.config.model for job in experiments.preset_jobs(own, tmp_path)} == {"tiny"}
    points = {"methods": ["luffy"], "variants": [{"models": ["tiny", "tiny:own_share=0.1"]}, {"models": ["tiny"]}]}
    assert [job.variant for job in experiments.preset_jobs(points, tmp_path)] == ["models=tiny"] * 2
    (tmp_path / "mine.yaml").write_text("tuned: {luffy: {steps: 9}}\n")
    with pytest.raises(ConfigError, match="a preset of many runs"):
        presets.read_values(tmp_path / "mine.yaml", "luffy")
