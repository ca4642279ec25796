"""The map and the cost of accuracies, on hand-made runs."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from luffy import make_config
from luffy.study import cost
from paper_figures import claims, runs
from paper_figures import map as leads
from paper_figures.runs import NoDataError, Runs


def made(rows, curves=()):
    """Runs from rows of (set, model, method, seed, accuracy)."""
    settings = runs.settings_of(make_config())
    table = [
        {"run": i, "set": s, **settings, "model": model, "method": method, "seed": seed, "id": score, "ood": score / 2,
         "base id": 0.2, "base ood": 0.3}
        for i, (s, model, method, seed, score) in enumerate(rows)
    ]  # fmt: skip
    frame = pd.DataFrame(table).reindex(columns=["run", "set", *runs.SETTINGS, "method", "seed", *runs.RESULTS])
    lines = pd.DataFrame(list(curves)).reindex(columns=["run", "stage", "step", *runs.METRICS])
    return Runs(frame, lines, "hand-made")


MAP = made(
    [
        (s, model, method, seed, level + delta)
        for s, model, levels in (
            ("map", "tiny:own_share=0", {"luffy": 0.7, "on_policy": 0.1}),
            ("map", "tiny:own_share=0.1", {"luffy": 0.6, "on_policy": 0.5}),
            ("full", "tiny:own_share=0.4", {"luffy": 0.5, "on_policy": 0.7, "mixed": 0.9}),
            ("hard", "tiny:own_share=0.4", {"luffy": 0.3, "on_policy": 0.1}),
        )
        for method, level in levels.items()
        for seed, delta in enumerate((-0.01, 0.01))
    ]
)


def test_leads_by_hand():
    """Every cell has two seeds a point from their mean: the pooled deviation is sqrt(2) points, over eight cells."""
    table = leads.data(MAP)
    assert set(table["rival"]) == {"on_policy"} and set(table["axis"]) == {"base", "teacher"}
    base = table[(table["axis"] == "base") & (table["score"] == "id")].set_index("point")
    assert base["lead"].to_dict() == pytest.approx({"0": 60, "0.1": 10, "0.4": -20})
    assert base["verdict"].to_dict() == {"0": "ahead", "0.1": "ahead", "0.4": "behind"}
    half = 2.306004 * math.sqrt(2) * math.sqrt(1 / 2 + 1 / 2)  # t(0.975, 8) = 2.306
    assert base.loc["0", "high"] - base.loc["0", "lead"] == pytest.approx(half, rel=1e-5)
    teacher = table[(table["axis"] == "teacher") & (table["score"] == "id")].set_index("point")
    assert teacher["lead"].to_dict() == pytest.approx({"3 to 7": -20, "6, 7": 20})
    # the world's own point is on both axes and is one test: four a score, eight in all
    assert teacher.loc["3 to 7", "p"] == base.loc["0.4", "p"]
    raw = 2 * stats.t.sf(60 / math.sqrt(2), 8)
    assert base.loc["0", "p"] == pytest.approx(8 * raw)
    with pytest.raises(NoDataError):
        leads.points(made([("full", "tiny", "sft", 0, 0.5)]))


def test_crossings_by_hand():
    """From +10 at 0.1 to -20 at 0.4 the lead is 0 a third of the way: at 0.2."""
    found = leads.crossings(leads.data(MAP)).set_index("score")
    assert found.loc["id", "share"] == pytest.approx(0.2) and found.loc["id", "draws with a change"] == 1
    assert found.loc["id", "low"] < 0.2 < found.loc["id", "high"]
    assert math.isnan(leads._crossing(np.array([0.0, 1.0]), np.array([1.0, 2.0])))
    assert leads._crossing(np.array([0.0, 1.0, 2.0]), np.array([5.0, 0.0, -5.0])) == 1
    one = made([("map", f"tiny:own_share={x}", m, 0, v) for x, m, v in [
        ("0", "luffy", 0.6), ("0", "sft", 0.5), ("0.1", "luffy", 0.4), ("0.1", "sft", 0.5)]])  # fmt: skip
    alone = leads.crossings(leads.data(one)).set_index("score")
    assert alone.loc["id", "share"] == pytest.approx(0.05) and math.isnan(alone.loc["id", "draws with a change"])


def test_conclusions_say_what_the_verdicts_are():
    said = leads.conclusions(leads.data(MAP))
    assert said[0] == (
        "In distribution, LUFFY against On-Policy RL: ahead at own share 0, own share 0.1, problems 6, 7; "
        "behind at own share 0.4, problems 3 to 7."
    )


def curve(run, stage, points):
    """(step, generated, trained, accuracy) of a stage."""
    names = ("step", "total/generated_tokens", "total/trained_tokens", "eval/id")
    return [{"run": run, "stage": stage, **dict(zip(names, point, strict=True))} for point in points]


COSTS = made(
    [("full", "tiny:own_share=0.4", "luffy", 0, 0.6), ("full", "tiny:own_share=0.4", "sft_rl", 0, 0.8)],
    [
        *curve(0, 0, [(0, math.nan, math.nan, 0.2), (1, 100, 100, 0.4), (2, 200, 200, 0.6)]),
        *curve(1, 0, [(0, math.nan, math.nan, 0.2), (1, 0, 100, 0.3)]),
        *curve(1, 1, [(1, math.nan, math.nan, 0.3), (2, 100, 100, 0.8)]),
    ],
)


def test_operations_add_up_over_stages():
    spent = cost.operations(COSTS.curves).tolist()
    assert spent == [0, 800, 1600, 0, 600, 600, 1400]


def test_cost_to_reach_by_hand():
    """Between validations it is interpolated: .5 halfway from 800 to 1,600; .55 halfway from 600 to 1,400. What is
    never reached costs all there was."""
    assert claims.cost_to_reach(COSTS, "luffy", 0.5).tolist() == [1200]
    assert claims.cost_to_reach(COSTS, "sft_rl", 0.55).tolist() == pytest.approx([1000])
    assert claims.cost_to_reach(COSTS, "luffy", 0.9).tolist() == [1600]


def test_at_equal_cost_by_hand():
    """SFT+RL spends the least, 1,400, and ends at .8. LUFFY has no validation between 1,050 and 1,400 operations: from
    .4 at 800 to .6 at 1,600 it is at .55 then."""
    row = leads.at_equal_cost(COSTS).iloc[0]
    assert row["operations"] == 1400 and row["LUFFY"] == pytest.approx(55) and row["SFT+RL"] == pytest.approx(80)
