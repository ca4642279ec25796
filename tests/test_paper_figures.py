"""Tables, figures and claims: from the committed runs, from one's own, and where there are none."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from paths import ROOT

import paper_figures
from luffy import make_config, read_published, train
from luffy.methods import METHODS, PAPER_METHODS
from luffy.study.experiments import preset_jobs
from luffy.study.presets import load_preset
from paper_figures import FIGURES, TABLES, baselines, claims, curves, make_runs, report, runs
from paper_figures.runs import COMMITTED, NoDataError, Runs

PILOTS = Path(paper_figures.__file__).parent / "pilots"


@pytest.fixture(scope="module")
def committed():
    return runs.load()


@pytest.fixture(scope="module")
def own(tmp_path_factory, short_run):
    """Two methods trained for a few steps, as anyone's runs."""
    folder = tmp_path_factory.mktemp("own")
    for method in ("luffy", "sft_rl"):
        train(make_config(method, **short_run), folder / method)
    return folder


def empty():
    columns = ["run", "set", *runs.SETTINGS, "method", "seed", *runs.RESULTS]
    return Runs(pd.DataFrame(columns=columns), pd.DataFrame(columns=["run", "stage", "step", *runs.METRICS]), "nothing")


def test_the_committed_runs(committed):
    """Each is a run of today's presets, of a commit without changes that is in the history; what is still missing is
    said in RESULTS.md."""
    wanted = make_runs.jobs(Path("runs"))
    keys = [runs.key(row) for row in committed.runs.to_dict("records")]
    assert len(set(keys)) == len(keys) and set(keys) <= {runs.key_of(job) for job in wanted}
    main = committed.runs[committed.runs["set"] == "full"]
    assert set(main["method"]) == set(PAPER_METHODS)
    assert sorted(committed.manifest) == sorted(map(str, committed.runs["run"]))
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True).stdout
    for version in {facts["luffy"] for facts in committed.manifest.values()}:
        commit = version.partition("+")[2]
        found = subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
        assert not version.endswith("dirty") and (found.returncode == 0 or shallow.strip() != "false"), version
    missing = len(make_runs.missing(wanted, committed))
    said = re.findall(r"(\d+) of (\d+) runs", report.FILE.read_text())
    assert sum(int(all_) - int(there) for there, all_ in said) == missing
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) < 6e6


def test_nothing_has_drifted(committed):
    assert baselines.drift(committed) == []


def test_a_changed_number_is_found(committed, tmp_path):
    """One accuracy of one run, by a point: the data of all that shows it has changed; of all of a method's runs by
    twenty: the picture too."""
    for path in COMMITTED.iterdir():
        shutil.copy(path, tmp_path)
    table = pd.read_csv(tmp_path / "runs.csv")
    rows = table[(table["set"] == "full") & (table["method"] == "luffy")].index
    table.loc[rows[0], ["id", "chain"]] += 0.01
    table.to_csv(tmp_path / "runs.csv", index=False)
    changed = {line.split(":")[0] for line in baselines.drift(runs.load(tmp_path), pictures=())}
    assert {"table1_main", "table4_ablation", "figure3_backbones", "claims"} <= changed
    assert "figure2_weighting" not in changed and "figure5_dynamics" not in changed
    table.loc[rows, ["id", "chain"]] -= 0.2
    table.to_csv(tmp_path / "runs.csv", index=False)
    found = baselines.drift(runs.load(tmp_path), pictures=("figure3_backbones",))
    assert any("figure3_backbones: the picture has changed" in line for line in found)


def test_missing_baselines_are_found(committed, tmp_path):
    found = baselines.drift(committed, tmp_path)
    assert "table1_main: no baseline" in found and "figure2_weighting: no baseline picture" in found


def test_everything_is_written_in_every_format(committed, tmp_path):
    names = {path.name for path in paper_figures.draw_all(committed, tmp_path)}
    assert names == {f"{name}.{suffix}" for name in TABLES for suffix in ("md", "tex", "csv")} | {
        f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg", "pdf", "md")
    }
    assert b"luffy 0." in (tmp_path / "figure5_dynamics.png").read_bytes()  # where it came from
    assert "code of the runs: 0." in (tmp_path / "figure5_dynamics.md").read_text()
    assert "\\textbf{" in (tmp_path / "table1_main.tex").read_text()
    assert "**" not in (tmp_path / "table1_main.csv").read_text()
    first = (tmp_path / "figure5_dynamics.svg").read_bytes()
    list(paper_figures.draw_all(committed, tmp_path, ["figure5"]))
    assert (tmp_path / "figure5_dynamics.svg").read_bytes() == first  # the same every time


def test_figure_2_is_exact():
    """f'(pi) pi (1 - pi) with gamma 0.1 peaks at pi = gamma / (1 + 2 gamma) with 0.2273; without shaping at 1/2."""
    table = paper_figures.module("figure2_weighting").data(empty())
    gradient = table[table["panel"] == "gradient"]
    shaped, plain = (gradient[gradient["curve"] == name] for name in ("gamma=0.1", "pi"))
    best = shaped.loc[shaped["y"].idxmax()]
    assert best["x"] == pytest.approx(0.1 / 1.2, abs=0.005) and best["y"] == pytest.approx(0.2273, abs=1e-3)
    assert plain.loc[plain["y"].idxmax(), "x"] == pytest.approx(0.5)
    np.testing.assert_allclose(shaped["y"], 0.1 * shaped["x"] * (1 - shaped["x"]) / (shaped["x"] + 0.1) ** 2)
    more = paper_figures.module("figure2_weighting").data(empty(), gammas=(0.05, 0.5))
    assert {"gamma=0.05", "gamma=0.5"} < set(more["curve"])


def test_without_runs_every_panel_says_what_makes_them():
    for name in FIGURES:
        figure = paper_figures.draw(name, empty())
        assert isinstance(figure, Figure)
    texts = [text.get_text() for axis in paper_figures.draw("figure9_gamma", empty()).axes for text in axis.texts]
    assert all("preset" in text and "gamma" in text for text in texts) and texts
    for name in TABLES:
        assert len(paper_figures.module(name).table(empty()))
    table = claims.table(empty())
    assert set(table["verdict"]) == {"no data"} and claims.sensitivity(empty()).empty
    with pytest.raises(NoDataError, match="no complete run"):
        runs.load("/nonexistent")
    with pytest.raises(NoDataError, match=r"python -m paper_figures\.make_runs"):
        empty().extra("cases")


def test_ones_own_runs(own, tmp_path):
    loaded = runs.load(own)
    assert set(loaded.runs["method"]) == {"luffy", "sft_rl"} and set(loaded.runs["set"]) == {"full"}
    assert len(loaded.curves[loaded.curves["run"] == 1]) > len(loaded.curves[loaded.curves["run"] == 0])  # two stages
    runs.write(loaded, tmp_path / "files")
    again = runs.load(tmp_path / "files")
    assert again.runs["id"].tolist() == pytest.approx(loaded.runs["id"].tolist())
    assert again.manifest == loaded.manifest
    assert len(list(paper_figures.draw_all(again, tmp_path / "figures"))) == 4 * 3 + 14 * 4
    table = claims.table(loaded).set_index("claim")
    assert table.loc["LUFFY is above SFT+RL in distribution", "verdict"] == "undecided"  # one seed


def test_one_seed_twice_is_refused(own, tmp_path):
    shutil.copytree(own, tmp_path / "twice")
    shutil.copytree(own / "luffy", tmp_path / "twice" / "copy")
    with pytest.raises(NoDataError, match="several runs of luffy with seed 0 in full; they differ in nothing"):
        runs.load(tmp_path / "twice")


def test_added_runs_stand_beside_the_known_ones(own):
    """A new run takes the place of the same one; settings that were not recorded before had the value of then."""
    made = runs.load(own)
    then = made.runs.assign(seed=7, verbosity=0.0).drop(columns=["num_traces", "verbosity"])
    before = Runs(then, made.curves, "before", {}, made.manifest)
    new = Runs(made.runs.assign(id=0.25), made.curves, "new", {}, made.manifest)
    merged = runs.merge(before, new)
    assert len(merged.runs) == 4 and len(merged.curves) == 2 * len(made.curves)
    assert merged.runs["seed"].tolist() == [7, 7, 0, 0] and set(merged.runs["num_traces"]) == {1}
    assert set(merged.runs["verbosity"][:2]) == {0.0}
    again = runs.merge(merged, Runs(made.runs.assign(id=0.75), made.curves, "newer", {}, made.manifest))
    assert again.runs["id"].tolist()[2:] == [0.75, 0.75] and len(again.runs) == 4 and len(again.manifest) == 4
    last = again.curves[again.curves["run"] == 3]["step"].reset_index(drop=True)
    pd.testing.assert_series_equal(last, made.curves[made.curves["run"] == 1]["step"].reset_index(drop=True))


def test_what_a_tier_does_not_measure(short_run, tmp_path):
    """No validation, no out-of-distribution benchmark, one run: nothing breaks, and panels say what is missing."""
    lines = [{"problem": f"{a}+{a}?", "answer": str(2 * a)} for a in range(10, 30)]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    values = {**short_run, "eval_steps": 0, "eval_datasets": [str(tmp_path / "mine.jsonl")]}
    train(make_config("luffy", **values), tmp_path / "runs" / "luffy")
    loaded = runs.load(tmp_path / "runs")
    assert all(isinstance(paper_figures.draw(name, loaded), Figure) for name in FIGURES)
    assert all(len(paper_figures.module(name).table(loaded)) for name in TABLES)
    assert "Avg (tiny:own_share=0.4)" in paper_figures.module("table1_main").table(loaded)  # of one benchmark
    assert set(claims.table(loaded)["verdict"]) <= {"no data", "undecided"} and claims.sensitivity(loaded).empty


def test_claims_know_the_papers_values():
    papers = {claim.statement: claim.paper for claim in claims.CLAIMS}
    assert papers["LUFFY is above SFT+RL in distribution"] == pytest.approx(1.9)
    assert papers["LUFFY is above SFT+RL out of distribution"] == pytest.approx(13.0)  # not the 16.1 of the text
    assert papers["LUFFY is above On-Policy RL in distribution"] == pytest.approx(4.6)
    assert papers["On-Policy RL is above SFT out of distribution"] == pytest.approx(9.8)
    assert papers["RL w/ SFT Loss is below SFT in distribution"] == pytest.approx(4.0)
    assert papers["LUFFY is above On-Policy RL on a weaker base"] == pytest.approx(8.0)
    table4 = read_published("table4").pivot(index="model", columns="benchmark", values="accuracy")["id"]
    ablation = {
        "LUFFY is above plain mixed-policy RL": ("LUFFY", "Mixed-Policy RL"),
        "Plain mixed-policy RL is below on-policy RL": ("On-Policy RL", "Mixed-Policy RL"),
        "Shaping improves mixed-policy RL": ("Mixed-Policy RL + Shaping", "Mixed-Policy RL"),
        "Removing the clip improves shaped mixed-policy RL": ("LUFFY", "Mixed-Policy RL + Shaping"),
        "Shaping hurts on-policy RL": ("On-Policy RL", "On-Policy RL + Shaping"),
        "Removing the clip hurts on-policy RL": ("On-Policy RL", "On-Policy RL + No Clip"),
    }
    for statement, (first, second) in ablation.items():
        assert papers[statement] == pytest.approx(table4[first] - table4[second])
    assert len(papers) == len(claims.CLAIMS)
    assert {claim.unit for claim in claims.CLAIMS} <= set(claims.BOUNDS)


def test_captions_say_what_does_not_hold():
    verdicts = pd.DataFrame(
        [
            ["Entropy stays", "Figures 2 and 6", -0.08, "nats", "contradicted"],
            ["Clipped more", "Figure 8", 0.03, "%", "reproduced"],
            ["Shaping hurts", "Table 4, Sec. 5.4", 0.1, "points", "no effect"],
        ],
        columns=["claim", "where", "ours", "unit", "verdict"],
    )
    for name in ("figure2_weighting", "figure6_shaping"):
        assert paper_figures.caption(name, verdicts).endswith("Entropy stays (contradicted: -0.08 nats).")
    assert "Shaping hurts (no effect" in paper_figures.caption("table4_ablation", verdicts)
    for name in ("figure8_clip", "figure12_temperature", "table1_main", "map"):
        assert "does not hold" not in paper_figures.caption(name, verdicts)


def test_reruns_stand_beside_the_claims(committed):
    table = claims.table(committed).set_index("claim")
    assert "-5.9 (SFT-then-RL), +5.3 (HPT)" in table.loc["LUFFY is above SFT in distribution", "re-runs"]


def test_command(tmp_path):
    command = [sys.executable, "-m", "paper_figures", "figure2", "table4", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.iterdir()} == {"figure2_weighting", "table4_ablation"}
    with pytest.raises(ValueError, match="no table or figure figure13"):
        list(paper_figures.draw_all(empty(), tmp_path, ["figure13"]))


def test_the_premise_is_what_was_measured():
    """PILOTS.md states what premise.csv holds, and the default world meets the criteria that it names."""
    table = pd.read_csv(PILOTS / "premise.csv", dtype={"difficulty": str})
    every = table[table["difficulty"] == "all"].assign(
        share=table["model"].str.extract(r"own_share=([\d.]+)")[0].astype(float)
    )
    said = (PILOTS / "PILOTS.md").read_text()
    rows = re.findall(r"^\| \**([\d.]+)\** \|((?: [\d.]+% \|){4})$", said, re.M)
    assert len(rows) == every["share"].nunique() == 5
    for share, cells in rows:
        low, high = (every[(every["share"] == float(share)) & (every["temperature"] == t)].iloc[0] for t in (0.6, 1.0))
        stated = [float(cell) for cell in re.findall(r"[\d.]+", cells)]
        assert stated[0::2] == pytest.approx([100 * low["pass@1"], 100 * high["pass@1"]], abs=0.06)
        assert stated[1::2] == pytest.approx([100 * low["beyond"], 100 * high["beyond"]], abs=0.5)
    at = every[every["temperature"] == 0.6].set_index("share")
    assert 0.15 < at.loc[0.4, "pass@1"] < 0.25 and 0.2 <= at.loc[0.4, "beyond"] <= 0.4
    assert (at["pass@1"] - 0.19).abs().idxmin() == 0.4  # nearest to the paper's base


def test_beginnings_are_what_was_measured():
    """PILOTS.md states what prefixes.csv holds."""
    table = pd.read_csv(PILOTS / "prefixes.csv").pivot(index="model", columns="share", values="pass@1")
    rows = re.findall(r"^\| \w+ \((?:`own_share` )?([\d.]+)\) \|(.*) \|$", (PILOTS / "PILOTS.md").read_text(), re.M)
    assert [share for share, _ in rows] == ["0", "0.4", "0.8"]
    for share, cells in rows:
        stated = [float(cell) for cell in cells.split("|")]
        assert stated == pytest.approx((100 * table.loc[f"tiny:own_share={share},seed=3"]).tolist(), abs=0.06)


@pytest.mark.parametrize("name", ["tuning", "arena_tuning"])
def test_trials_are_what_was_measured(name):
    """Five for every method (six where the best of five stood at an edge), of clean commits; PILOTS.md states the
    score that the table holds, under the value that it was measured with."""
    table = pd.read_csv(PILOTS / f"{name}.csv")
    assert not table["code"].str.endswith("dirty").any()
    assert all(len(part) == (6 if method == "sft_rl" else 5) for method, part in table.groupby("method"))
    measured = {}
    for row in table.to_dict("records"):
        first, *more = row["changed"].split(", ")
        field, value = first.split("=")
        measured[METHODS[row["method"]].label, field, float(value), bool(more)] = row["id"]
    labels = {label for label, *_ in measured}
    found = {key: score for key, score in stated(PILOTS / "PILOTS.md").items() if key[0] in labels}
    assert found == pytest.approx(measured, abs=0.06)


def test_the_mean_of_the_trials_is_that_of_the_six():
    """Under every learning rate of the table."""
    table = pd.read_csv(PILOTS / "tuning.csv")
    six = table[table["method"].isin(paper_figures.module("table4_ablation").METHODS)]
    means = six.groupby("changed")["id"].agg(["mean", "size"])
    assert len(means) == 5 and (means["size"] == 6).all()
    found = stated(PILOTS / "PILOTS.md")
    for changed, mean in means["mean"].items():
        rate = float(changed.removeprefix("learning_rate="))
        assert found["mean of the six", "learning_rate", rate, False] == pytest.approx(mean, abs=0.06)


def stated(file):
    """The scores in the tables of trials: (method, field, value, whether more is changed) -> score."""
    found, head, sections = {}, [], file.read_text().split("\n## ")
    chosen = [text for text in sections if text.startswith(("Tuning", "The trials of the arena"))]
    assert len(chosen) == 2
    for line in "\n".join(chosen).splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        if cells and cells[0].startswith("learning rate"):
            field = "sft_learning_rate" if "SFT" in cells[0] else "learning_rate"
            head = [(field, float(rate)) for rate in cells[1:]]
        elif len(cells) == 2 and "·" in cells[1]:  # a method's own parameter: value: score · value: score
            method, what = cells[0].split(", ", 1)
            first = "first stage (" in what or method == "SFT"
            field = "sft_loss_coef" if what.startswith("coef") else "sft_learning_rate" if first else "learning_rate"
            for part in cells[1].split(" · "):
                value, score = part.replace("*", "").split(": ")
                found[method, field, float(value.split()[0]), " with " in value] = float(score)
        elif len(cells) == len(head) + 1:
            of_head = zip(head, cells[1:], strict=True)
            found |= {
                (cells[0], field, rate, False): float(score) for (field, rate), score in of_head if score.strip("-")
            }
        elif not cells:
            head = []
    return found


def test_the_arena_has_the_best_rates_of_the_trials():
    """Of every method, on a pilot seed; no best one at an edge that was not extended."""
    table = pd.read_csv(PILOTS / "arena_tuning.csv")
    table[["name", "rate"]] = table["changed"].str.split("=", expand=True)
    best = table.loc[table.groupby("method")["id"].idxmax()].set_index("method")
    arena = {job.config.method.name: job.config.to_dict() for job in preset_jobs(load_preset("arena"), "runs")}
    assert set(best.index) == set(arena)
    for method, row in best.iterrows():
        tried = table[table["method"] == method]["rate"].astype(float)
        assert arena[method][row["name"]] == float(row["rate"]), method
        assert tried.min() < float(row["rate"]) < tried.max(), method


def test_the_base_in_figures_of_training():
    """Rewards and lengths at the temperature of training, over the difficulties that are trained on."""
    rows = [
        ("tiny:own_share=0.4", 1.0, 6, 0.1, 10), ("tiny:own_share=0.4,seed=1", 1.0, 7, 0.3, 20),
        ("tiny:own_share=0.4", 0.6, 6, 0.9, 99), ("tiny:own_share=0.4", 1.0, 3, 0.9, 99), ("tiny", 1.0, 6, 0.9, 99),
        ("tiny:own_share=0.4", 1.0, "all", 0.9, 99),
    ]  # fmt: skip
    bases = pd.DataFrame(rows, columns=["model", "temperature", "difficulty", "pass@1", "length"])
    made = Runs(pd.DataFrame(), pd.DataFrame(), "hand-made", {"bases": bases})
    found = curves.of_base(made, ["reward/on", "entropy/on", "length/on"], (6, 7)).set_index("metric")["mean"]
    assert found.to_dict() == pytest.approx({"reward/on": 0.2, "length/on": 15})
    assert curves.of_base(Runs(pd.DataFrame(), pd.DataFrame(), "none"), ["reward/on"]).empty
