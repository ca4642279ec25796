"""The map, the arena and the cost of accuracies, on hand-made runs."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from luffy import METHODS, make_config
from luffy.evaluation.paper_numbers import PUBLISHED
from luffy.study import arena, cost
from luffy.study.experiments import Job
from paper_figures import arena as standings
from paper_figures import claims, intervals, runs
from paper_figures import map as leads
from paper_figures.runs import NoDataError, Runs


def made(rows, curves=()):
    """Runs from rows of (set, model, method, seed, accuracy)."""
    settings = runs.settings_of(make_config())
    table = [
        {"run": i, "set": s, **settings, "model": model, "method": method, "seed": seed, "id": score, "ood": score / 2,
         "base id": 0.2, "base ood": 0.3, "generated_tokens": 200.0, "trained_tokens": 100.0}
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
    """Every cell has two seeds a point from their mean: the deviation of all is sqrt(2) points, over eight cells."""
    table = leads.data(MAP)
    assert set(table["rival"]) == {"on_policy"} and set(table["axis"]) == {"base", "teacher"}
    base = table[(table["axis"] == "base") & (table["score"] == "id")].set_index("point")
    assert base["lead"].to_dict() == pytest.approx({"0": 60, "0.1": 10, "0.4": -20})
    assert base["verdict"].to_dict() == {"0": "ahead", "0.1": "ahead", "0.4": "behind"}
    half = 2.306004 * math.sqrt(2) * math.sqrt(1 / 2 + 1 / 2)  # t(0.975, 8) = 2.306
    assert base.loc["0", "high"] - base.loc["0", "lead"] == pytest.approx(half, rel=1e-5)
    teacher = table[(table["axis"] == "teacher") & (table["score"] == "id")].set_index("point")
    assert teacher["lead"].to_dict() == pytest.approx({"3 to 7": -20, "6, 7": 20})
    # the world's own point is on both axes and is one test: four over a rival in a score
    assert teacher.loc["3 to 7", "p"] == base.loc["0.4", "p"]
    raw = 2 * stats.t.sf(60 / math.sqrt(2), 8)
    assert base.loc["0", "p"] == pytest.approx(4 * raw)
    assert base["measured"].isna().all()
    shares = [("tiny:own_share=0", 1.0, 0.1), ("tiny:own_share=0,seed=1", 1.0, 0.3), ("tiny:own_share=0", 0.6, 0.9)]
    bases = pd.DataFrame(shares, columns=["model", "temperature", "steps"])
    known = leads.data(replace(MAP, extras={"bases": bases})).set_index(["axis", "point"])["measured"]
    assert known["base", "0"].tolist() == pytest.approx([20, 20]) and known["base", "0.1"].isna().all()
    with pytest.raises(NoDataError):
        leads.points(made([("full", "tiny", "sft", 0, 0.5)]))


def test_the_rule_of_the_intervals():
    """Where a quarter of the methods vary three times as much: fewer wrong findings than by Welch's test, and more that
    are right."""
    deviations = intervals.WORLDS["a quarter vary 3 times as much"]
    none, ahead = intervals.rates(deviations, draws=300), intervals.rates(deviations, intervals.LEAD, draws=300)
    assert 0 < none.loc["rule", "alike"] < 0.03 and 0.03 < none.loc["rule", "vary more"] < 0.1
    assert none.loc["rule", "any, Holm"] < none.loc["Welch", "any, Holm"]
    assert ahead.loc["rule", "alike, Holm"] > ahead.loc["Welch", "alike, Holm"] > 0.5


def test_crossings_by_hand():
    """From +10 at 0.1 to -20 at 0.4 the lead is 0 a third of the way: at 0.2."""
    found = leads.crossings(leads.data(MAP)).set_index("score")
    assert found.loc["id", "share"] == pytest.approx(0.2) and found.loc["id", "draws with a change"] == 1
    assert found.loc["id", "low"] < 0.2 < found.loc["id", "high"]
    assert leads._crossings(np.array([0.0, 1.0]), np.array([1.0, 2.0])).tolist() == []
    assert leads._crossings(np.array([0.0, 1.0, 2.0]), np.array([5.0, 0.0, -5.0])).tolist() == [1]
    assert leads._crossings(np.array([0.0, 1.0, 3.0]), np.array([5.0, -5.0, 15.0])).tolist() == [0.5, 1.5]
    one = made([("map", f"tiny:own_share={x}", m, 0, v) for x, m, v in [
        ("0", "luffy", 0.6), ("0", "sft", 0.5), ("0.1", "luffy", 0.4), ("0.1", "sft", 0.5)]])  # fmt: skip
    alone = leads.crossings(leads.data(one)).set_index("score")
    assert alone.loc["id", "share"] == pytest.approx(0.05) and math.isnan(alone.loc["id", "draws with a change"])


def test_conclusions_say_what_the_verdicts_are():
    said = leads.conclusions(leads.data(MAP))
    assert said[0] == (
        "In distribution, LUFFY against On-Policy RL: ahead at own share 0, own share 0.1, problems 6, 7; "
        "behind at the default world."
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


def test_claims_on_other_bases_are_the_maps():
    """The same lead, interval and seeds: ten points at own share 0.1, with the deviation of all eight cells."""
    effect = claims._on_other_base("on_policy", "0.1")(MAP)
    place = leads.data(MAP).set_index(["axis", "point", "score"]).loc[("base", "0.1", "id")]
    assert (effect.value, effect.low, effect.seeds) == (place["lead"], place["low"], place["seeds"]) and effect.df == 8
    with pytest.raises(NoDataError, match=r"own share 0\.8"):
        claims._on_other_base("on_policy", "0.8")(MAP)


def test_at_equal_cost_by_hand():
    """The median of 1,600 and 1,400 is 1,500. SFT+RL spends less and ends at .8. LUFFY has no validation between 1,125
    and 1,500 operations: from .4 at 800 to .6 at 1,600 it is at .575 then."""
    table = leads.at_equal_cost(COSTS)
    row = table.iloc[0]
    assert len(table) == 1  # the default world is on both axes
    assert row["operations"] == 1500 and row["LUFFY"] == pytest.approx(57.5) and row["SFT+RL"] == pytest.approx(80)
    assert row["SFT+RL less"] and not row["LUFFY less"]
    assert math.isnan(row["LUFFY +-"])  # of one seed
    others = replace(COSTS, curves=COSTS.curves.assign(**{"eval/ood": COSTS.curves["eval/id"] / 2}))
    assert leads.at_equal_cost(others, "ood").iloc[0]["LUFFY"] == pytest.approx(28.75)


# --- the arena --------------------------------------------------------------------------------------------------------

OWN, STRONG = "tiny:own_share=0.4", "tiny:own_share=0.8"
RIVALS = {"luffy": 0.5, "sft_rl": 0.6, "on_policy": 0.4, "sft": 0.3, "rl_sft_loss": 0.45}
ARENA = made(
    [
        (s, model, method, seed, level + delta)
        for s, model, levels in (
            ("full", OWN, {**RIVALS, "mixed": 0.9}),
            ("map", STRONG, {**RIVALS, "luffy": 0.7}),
            ("map", "tiny:own_share=0", {"luffy": 0.1}),  # the others are missing
            ("arena", OWN, {"hpt": 0.7, "srft": 0.505}),
            ("arena_strong", STRONG, {"hpt": 0.4}),
            ("arena_corner", "tiny:own_share=0", {"hpt": 0.4}),
        )
        for method, level in levels.items()
        for seed, delta in enumerate((-0.01, 0.01))
    ],
    [
        {"run": run, "stage": 0, "step": step, "eval/id": 0.1 * (step + 1), "total/generated_tokens": 100.0 * step,
         "total/trained_tokens": 50.0 * step}
        for run in range(32) for step in (0, 1, 2)
    ],
)  # fmt: skip


def test_who_meets_in_a_world():
    """The world's own runs, and LUFFY and its rivals on the same base; "mixed" is none of them, and in the corner
    rivals are missing."""
    worlds = standings.scores(ARENA)
    assert {world: sorted(set(table["method"])) for world, table in worlds.items()} == {
        "paper": ["hpt", "luffy", "on_policy", "rl_sft_loss", "sft", "sft_rl", "srft"],
        "strong": ["hpt", "luffy", "on_policy", "rl_sft_loss", "sft", "sft_rl"],
    }
    assert set(worlds["strong"]["model"]) == {STRONG}
    table = standings.data(ARENA)
    first = table[(table["world"] == "paper") & (table["score"] == "id")]
    assert first["method"].tolist() == ["hpt", "sft_rl", "srft", "luffy", "rl_sft_loss", "on_policy", "sft"]
    assert first["rank"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    # two seeds a point from their mean: a deviation of sqrt(2) points over 14 runs in seven cells; t(0.975, 7)
    assert first["half"].tolist() == pytest.approx([2.364624 * math.sqrt(2) / math.sqrt(2)] * 7, rel=1e-5)
    curve = table[(table["world"] == "paper") & (table["score"] == "curve") & (table["method"] == "hpt")]
    assert curve["spent"].max() == 2 * 200 + 6 * 100 and curve["mean"].max() == pytest.approx(30)
    equal = table[(table["world"] == "paper") & (table["score"] == "equal")]
    assert equal["mean"].tolist() == pytest.approx([30] * 7)  # all spend the same: the mean of what comes late
    figure = standings.draw(table)
    names = [[label.get_text() for label in axis.get_yticklabels()] for axis in figure.axes[:2]]
    assert (
        names[0] == ["SFT", "On-Policy RL", "RL w/ SFT Loss", "LUFFY", "SRFT", "SFT+RL", "HPT"]
        and names[1][-1] == "LUFFY"
    )


def test_other_settings_do_not_meet():
    changed = ARENA.runs.copy()
    changed.loc[changed["set"] == "full", "steps"] = 7
    assert set(standings.scores(replace(ARENA, runs=changed))) == {"strong"}


def test_own_runs_beside_the_committed_ones(monkeypatch):
    """Two seeds of a method at 90% join the default world; rivals of one's own, and runs of another world, do not."""
    own = made([("arena", OWN, "maxrl", seed, 0.9) for seed in (0, 1)])
    own = replace(own, manifest={"0": {}, "1": {}})
    known = replace(ARENA, manifest={str(run): {} for run in ARENA.runs["run"]})
    asked = []

    def from_jobs(sets, source):
        asked.extend(job.config.method.name for jobs in sets.values() for job in jobs)
        return own

    monkeypatch.setattr(standings, "from_jobs", from_jobs)
    jobs = [Job(make_config(name), Path(name)) for name in ("luffy", "maxrl")]
    table = standings.beside(known, "paper", jobs)
    assert asked == ["maxrl"]
    assert arena.standings(table)["method"].tolist() == [
        "maxrl", "hpt", "sft_rl", "srft", "luffy", "rl_sft_loss", "on_policy", "sft",
    ]  # fmt: skip
    with pytest.raises(NoDataError, match="no runs of the world corner"):
        standings.beside(known, "corner", jobs)
    own.runs["steps"] = 7
    with pytest.raises(NoDataError, match="the runs of maxrl differ from the committed ones in steps"):
        standings.beside(known, "paper", jobs)
    with pytest.raises(NoDataError, match="in steps, model"):
        standings.beside(known, "strong", jobs)


def test_verdicts_of_the_arena():
    """In the default world the error of a difference is sqrt(2) points, with 7 degrees of freedom."""
    worlds = standings.scores(ARENA)
    found = arena.against(worlds["paper"], "luffy", 2.0).set_index("method")
    leads_by_hand = {"on_policy": -10, "sft": -20, "rl_sft_loss": -5, "sft_rl": 10, "hpt": 20, "srft": 0.5}
    assert found["lead"].to_dict() == pytest.approx(leads_by_hand)
    half = 2.364624 * math.sqrt(2)
    assert found.loc["hpt", "high"] - found.loc["hpt", "lead"] == pytest.approx(half, rel=1e-5)
    assert found.loc["hpt", "p"] == pytest.approx(6 * 2 * stats.t.sf(20 / math.sqrt(2), 7))  # Holm: the least of six
    assert found["verdict"][["sft_rl", "hpt", "srft"]].tolist() == ["ahead", "ahead", "undecided"]
    said = standings.conclusions(worlds)
    assert said[1] == (  # srft is in one of them, hpt ahead in one and behind in the other, and so is sft_rl
        "With each of 2 bases, against LUFFY: in distribution, behind: On-Policy RL, SFT, RL w/ SFT Loss; "
        "not decided alike: 2 of 5 methods. At equal cost, no effect: On-Policy RL, SFT, RL w/ SFT Loss, SFT+RL, HPT. "
        "Out of distribution, behind: On-Policy RL, SFT, RL w/ SFT Loss; not decided alike: 2 of 5 methods."
    )
    assert said[4] == (  # accuracies out of distribution are half as far apart
        "With the default base, against LUFFY: in distribution, ahead: SFT+RL, HPT; behind: On-Policy RL, SFT, "
        "RL w/ SFT Loss; undecided: 1 of 6 methods. At equal cost, no effect: On-Policy RL, SFT, RL w/ SFT Loss, "
        "SFT+RL, HPT, SRFT. Out of distribution, ahead: SFT+RL, HPT; behind: On-Policy RL, SFT, RL w/ SFT Loss; "
        "no effect: SRFT."
    )
    assert standings.summary(worlds) == (
        "Of 6 other methods in the default world, against LUFFY (ahead/behind/no effect/undecided): in distribution "
        "2/3/0/1, at equal cost 0/0/6/0, out of distribution 2/3/1/0. Of 5 in all 2 worlds, ahead in each: none."
    )
    assert standings.summary({"paper": worlds["paper"]}).endswith("out of distribution 2/3/1/0.")
    alike = {**worlds, "strong": worlds["paper"].assign(ood=0.5)}
    assert standings.summary(alike).endswith(
        "Of 6 in all 2 worlds, ahead in each: SFT+RL (in distribution), HPT (in distribution)."
    )
    assert standings.summary({}) == "" and standings.conclusions({}) == []
    assert len(said) == 9 and len(standings.conclusions({"paper": worlds["paper"]})) == 3


def test_agreement_with_what_papers_claim():
    """Three methods in common: of three pairs two in our order, one reversed: tau = (2 - 1) / 3."""
    worlds = standings.scores(ARENA)
    scores = worlds["paper"]  # hpt 70, sft_rl 60, srft 50.5, luffy 50
    found = arena.agreement(scores, {"sft_rl": 57.0, "hpt": 52.7, "luffy": 46.3, "relift": 48.8})
    assert found["methods"] == 3 and found["tau"] == pytest.approx(1 / 3)
    assert found["low"] == found["high"] == pytest.approx(1 / 3)  # ten points apart with an error of one
    close = arena.agreement(scores, {"hpt": 60, "srft": 59.1, "luffy": 55.5})  # two of them half a point apart
    assert (close["tau"], close["low"], close["high"]) == pytest.approx((1, 1 / 3, 1))
    pair = arena.agreement(scores, {"sft_rl": 48.8, "hpt": 52.7})
    assert pair["methods"] == 2 and math.isnan(pair["tau"])
    table = standings.agreement(worlds).set_index("paper")
    assert table.loc["HPT", "methods"] == 6 and table.loc["HPT", "claimed"].startswith("HPT 52.7, LUFFY 49.8")
    assert "LUFFY" not in table.loc["TRAPO", "claimed"] and "LUFFY 55.5" in table.loc["TRAPO", "quoted"]


def test_claimed_numbers_agree_with_the_other_tables():
    """Numbers that stand in the paper's own table, or among the re-runs, are the same there."""
    labels = {method.label: name for name, method in METHODS.items()}
    claimed = pd.read_csv(PUBLISHED / "arena.csv").set_index(["paper", "method"])["accuracy"]
    own, reruns = pd.read_csv(PUBLISHED / "table1.csv"), pd.read_csv(PUBLISHED / "reruns.csv")
    own = own[(own["benchmark"] == "id") & (own["version"] == "v5")].assign(paper="LUFFY")
    reruns = reruns[reruns["benchmark"] == "id"].assign(paper=reruns["who"].str.replace(", LUFFY's copied", ""))
    compared = 0
    for row in pd.concat([own, reruns]).to_dict("records"):
        key = row["paper"], labels.get(row["model"], "")
        if key in claimed.index:
            compared += 1
            assert claimed[key] == row["accuracy"], key
    assert compared == 20
