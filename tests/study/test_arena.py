"""The arena: a table under equal budgets from real runs, ranks with their uncertainty, what a token counts for, and a
method of one's own that is added to what is trained."""

import numpy as np
import pandas as pd
import pytest
import torch

from luffy import METHODS, arena, experiments, presets, train
from luffy.cli import main
from luffy.methods import ARENA_METHODS

SMALL = dict(
    max_steps=4, rollout_batch_size=4, mini_batch_size=2, num_generations=4, num_problems=40, eval_steps=1,
    eval_problems=4, final_eval_problems=4, final_eval_samples=2, max_completion_length=64,
)  # fmt: skip
OWN = """
from luffy.methods import Luffy, register

@register("mine", "Mine")
class Mine(Luffy):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods and two seeds in the default world, and SFT then RL with one."""
    folder = tmp_path_factory.mktemp("arena")
    for methods, seeds in ((["on_policy", "hpt"], [0, 1]), (["sft_rl"], [0])):
        for job in arena.jobs(["paper"], folder, methods, seeds, **SMALL)["paper"]:
            train(job.config, job.run_dir)
    arena.compare(["paper"], folder, ["sft_rl"], [0], **SMALL)
    return folder


def jobs_in(folder):
    asked = arena.jobs(["paper"], folder, ["on_policy"], [0], **SMALL)
    return arena.trained(folder / "paper", asked["paper"])


def test_a_table_of_all_that_is_trained(folder):
    table = pd.read_csv(folder / "paper" / "arena.csv").set_index("method")
    assert set(table.index) == {"On-Policy RL", "HPT", "SFT+RL"} and table.loc["HPT", "seeds"] == 2
    for column in ("rank", "rank, equal"):
        assert sorted(int(rank.split()[0]) for rank in table[column]) == [1, 2, 3]
    scores = arena.scores(jobs_in(folder)).set_index(["method", "seed"])
    assert scores.loc[("on_policy", 0), "demonstrations"] == 0 < scores.loc[("hpt", 0), "demonstrations"]
    assert scores.loc[("sft_rl", 0), "demonstrations"] == 16  # four steps of four traces in the first stage
    spent = 2 * scores["generated_tokens"] + 6 * scores["trained_tokens"]
    assert (scores["operations"] == spent).all() and scores["equal"].between(0, 1).all()


def test_one_s_own_method_is_added_by_one_command(folder, tmp_path, monkeypatch, capsys):
    """Its run is added, the others are not trained again."""
    import json

    before = {path: path.stat().st_mtime_ns for path in folder.glob("paper/*/metrics.jsonl")}
    (tmp_path / "arena_of_ones_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        main(
            [
                "arena",
                "--methods",
                "arena_of_ones_own:mine",
                "--seeds=0",
                "--runs-dir",
                str(folder),
                "--values",
                json.dumps(SMALL),
            ]
        )
        assert "Mine" in capsys.readouterr().out and len(jobs_in(folder)) == 6
    finally:
        METHODS.pop("mine", None)
    monkeypatch.undo()
    assert len(jobs_in(folder)) == 5  # without the file that knows it
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_budgets_are_not_compared(folder):
    asked = arena.jobs(["paper"], folder, ["on_policy"], [0], **{**SMALL, "max_steps": 5})
    assert arena.trained(folder / "paper", asked["paper"]) == []
    corner = arena.jobs(["corner"], folder, ["on_policy"], [0, 1], **SMALL)["corner"]
    assert [job.config.model for job in corner] == ["tiny:own_share=0", "tiny:own_share=0,seed=1"]
    assert arena.trained(folder / "paper", corner) == []


def test_other_parameters_are_not_other_seeds(folder, caplog):
    for job in arena.jobs(["paper"], folder, ["hpt"], [2], **SMALL, gate=1)["paper"]:
        train(job.config, job.run_dir)
    counts = {}
    for name, method, values in (("usual", "on_policy", {}), ("asked", "hpt", {"gate": 1})):
        asked = arena.jobs(["paper"], folder, [method], [0], **SMALL, **values)["paper"]
        found = [job.config.method for job in arena.trained(folder / "paper", asked)]
        counts[name] = [method.gate for method in found if method.name == "hpt"]
    assert counts == {"usual": [0, 0], "asked": [1]}
    assert "1 runs of hpt with other parameters are left out" in caplog.text


def test_a_run_that_fails_does_not_hide_the_others(folder, capsys, monkeypatch):
    def failing(*_, **__):
        raise experiments.RunsFailedError("one failed")
        yield

    monkeypatch.setattr(experiments, "run", failing)
    with pytest.raises(experiments.RunsFailedError):
        arena.compare(["paper"], folder, ["on_policy"], [0], **SMALL)
    assert "SFT+RL" in capsys.readouterr().out


def test_curves_over_cost(folder):
    figure = arena.plot_cost({"paper": arena.mean_curves(arena.curves(jobs_in(folder)))})
    lines = {line.get_label(): line.get_xdata() for line in figure.axes[0].get_lines()}
    assert {"On-Policy RL", "HPT", "SFT+RL"} <= set(lines) and all(x[0] == 0 and x[-1] > 0 for x in lines.values())


def test_ranks_know_their_uncertainty():
    """Two that cannot be told apart, and one far behind: standard error 1 / sqrt(4) of the deviation of all."""
    spread = np.array([-0.015, -0.005, 0.005, 0.015])
    rows = [
        {"method": method, "seed": seed, "id": mean + error, "model": "tiny"}
        for method, mean in (("luffy", 0.5), ("hpt", 0.505), ("sft", 0.3))
        for seed, error in enumerate(spread)
    ]
    table = arena.standings(pd.DataFrame(rows)).set_index("method")
    assert table["rank"].to_dict() == {"hpt": 1, "luffy": 2, "sft": 3}
    assert table.loc["luffy", ["rank low", "rank high"]].tolist() == [1, 2]
    assert table.loc["sft", ["rank low", "rank high"]].tolist() == [3, 3]
    error = spread.std(ddof=1) / 2  # 0.0129 / 2
    # hpt is the best unless the difference, with an error of sqrt(2) as much, turns: P(z < 0.005 / 0.00913)
    expected = 0.5 * (1 + torch.erf(torch.tensor(0.005 / (error * 2**0.5) / 2**0.5)).item())
    assert table.loc["hpt", "best"] == pytest.approx(expected, abs=0.02) and table.loc["sft", "best"] == 0
    alone = arena.standings(pd.DataFrame(rows[::4]))  # a seed each: an order, and nothing else
    assert alone["rank"].tolist() == [1, 2, 3] and alone[["half", "rank low", "rank high", "best"]].isna().all(
        axis=None
    )
    assert table.loc["luffy", "half"] == pytest.approx(100 * 2.262 * error, rel=1e-3)  # t with 9 degrees of freedom


def test_what_a_token_counts_for():
    p = torch.tensor([0.01, 0.1, 0.5, 0.9])
    expected = {
        "mixed": p, "luffy": 0.1 * p / (p + 0.1) ** 2, "trapo": (p / 0.1).clamp(max=1),
        "rl_plus": (1 - p).sqrt() * 2 * p / (p + (p + 1) / 2), "prefix_rft": torch.ones(4), "psft": torch.ones(4),
        "hpt": torch.zeros(4), "pope": torch.zeros(4),
    }  # fmt: skip
    for name, weights in expected.items():
        torch.testing.assert_close(arena.token_weights(METHODS[name](), p)[0], weights, atol=1e-5, rtol=1e-4)
    likelihoods = {
        "hpt": torch.full((4,), 0.1), "dft": p, "chord_phi": 0.1 * p * (1 - p), "luffy": torch.zeros(4),
        "srft": torch.full((4,), 0.03 * np.exp(-0.5)),
    }  # fmt: skip
    for name, weights in likelihoods.items():
        torch.testing.assert_close(arena.token_weights(METHODS[name](), p)[1], weights)
    figure = arena.plot_token_weights(["luffy", "dft", "ampo", "pope", "sft"])
    lines = [[line.get_label() for line in axis.get_lines()] for axis in figure.axes]
    assert lines == [["LUFFY, AMPO"], ["DFT", "SFT"]]


def test_the_worlds_and_as_many_trials_for_each():
    asked = arena.jobs(list(arena.WORLDS), "runs")
    for world, jobs in asked.items():
        found = {job.config.method.name for job in jobs}
        assert set(arena.RIVALS) < found and len(jobs) == len({job.run_dir for job in jobs}), world
    assert {job.config.method.name for job in asked["paper"]} - set(arena.RIVALS) == set(ARENA_METHODS) - {"opd"}
    trials = [variant for preset in ("tuning", "arena_tuning") for variant in presets.load_preset(preset)["variants"]]
    for name in METHODS.keys() - {"opd"}:
        count = 6 if name == "sft_rl" else 5  # the best of five stood at an edge
        assert sum(name in variant["methods"] for variant in trials) == count, name
