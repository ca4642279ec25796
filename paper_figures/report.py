"""The results in words and tables: RESULTS.md, and the part of the README between two marks. Computed, never edited.

`python -m paper_figures.baselines --accept` writes both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from luffy.evaluation.stats import interval
from luffy.methods import METHODS, PAPER_METHODS
from luffy.study import arena, cost
from luffy.study.experiments import Job
from luffy.study.inference import VERDICTS
from luffy.study.results import BASE, base_scores, is_percent

from . import arena as arena_of
from . import claims, make_runs, tables
from . import map as leads_of
from .runs import BASE_MODEL, Runs, set_of

FILE = Path(__file__).parent / "RESULTS.md"
README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- results: written by python -m paper_figures.baselines --accept -->", "<!-- end of results -->")
COLUMNS = {
    "id": "in distribution", "ood": "out of distribution", "id T=0.1": "in, at T = 0.1", "pass@8": "pass@8",
    "entropy_answer": "entropy of an answer", "length": "length", "operations": "operations",
}  # fmt: skip
README_COLUMNS = {name: COLUMNS[name] for name in ("id", "ood", "pass@8")}


def texts(runs: Runs) -> dict[Path, str]:
    """What RESULTS.md and the README should hold. Raises ValueError if the README lacks the marks."""
    verdicts, leads, table = claims.table(runs), leads_of.data(runs), main_table(runs)
    wanted = make_runs.jobs(Path("runs"))
    lacking = make_runs.missing(wanted, runs)
    before, start, rest = README.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"{README} lacks the marks {MARKS}")
    # the paper's sets; what the arena lacks stands in RESULTS.md
    parts = (len(jobs) - _of_arena(jobs) for jobs in (wanted, lacking))
    worlds = arena_of.scores(runs)
    said = _readme(runs, verdicts, leads, arena_of.summary(worlds), *parts)
    return {
        FILE: _results(runs, verdicts, leads, table, worlds, wanted, lacking),
        README: f"{before}{start}\n\n{said}\n\n{end}{after}",
    }


def main_table(runs: Runs, columns: Mapping[str, str] = COLUMNS) -> str:
    """A row for the base models and for every method of the main runs: mean +- half-width of the 95% interval over
    seeds. Operations in millions."""
    chosen = runs.of()
    chosen = chosen.assign(operations=cost.spent_on(chosen["generated_tokens"], chosen["trained_tokens"]) / 1e6)
    bases = base_scores(chosen)
    known = {column: bases[f"base {column}"] for column in ("id", "ood")} | _untrained(runs)
    rows = {BASE: {"seeds": len(bases), **{name: _cell(name, known.get(name)) for name in columns}}}
    for method in [method for method in PAPER_METHODS if method in set(chosen["method"])]:
        part = chosen[chosen["method"] == method]
        rows[METHODS[method].label] = {"seeds": len(part), **{name: _cell(name, part[name]) for name in columns}}
    table = pd.DataFrame.from_dict(rows, orient="index").rename(columns=dict(columns))
    table.index.name = "method"
    return table.to_markdown(disable_numparse=True)


def _untrained(runs: Runs) -> dict[str, pd.Series[float]]:
    """What was measured of base models as of final ones: accuracy at T = 0.1 and pass@8, as shares."""
    table = runs.extras.get("temperatures", pd.DataFrame(columns=["method", "temperature", "pass@1", "pass@8"]))
    base = table[table["method"] == BASE_MODEL]
    return {
        "id T=0.1": base[np.isclose(base["temperature"].astype(float), 0.1)]["pass@1"] / 100,
        "pass@8": base[np.isclose(base["temperature"].astype(float), 0.6)]["pass@8"] / 100,
    }


def _cell(column: str, values: pd.Series[float] | None) -> str:
    mean, half = interval([] if values is None else ((100 if is_percent(column) else 1) * values).tolist())
    return tables.with_interval(mean, half) if mean == mean else "–"


def verdict_lists(verdicts: pd.DataFrame) -> str:
    """Every claim under its verdict, with our value, its interval, the seeds and the paper's value."""
    parts = []
    for verdict in (*VERDICTS, "no data"):
        rows = verdicts[verdicts["verdict"] == verdict].to_dict("records")
        if not rows:
            continue
        lines = [f"**{verdict.capitalize()}** ({len(rows)}):", ""]
        for row in rows:
            line = f"- {row['claim']} ({row['where']})"
            if verdict != "no data":
                numbers = [_number(row[name]) for name in ("ours", "low", "high")]
                span = f" [{numbers[1]}, {numbers[2]}]" if row["low"] == row["low"] else ""
                seeds = "one seed" if row["seeds"] == 1 else f"{row['seeds']:.0f} seeds"
                line += f": {numbers[0]}{span} {row['unit']}, {seeds}"
            line += f"; paper {row['paper']:+.1f}" if row["paper"] == row["paper"] and row["paper"] is not None else ""
            if verdict == "undecided" and row["seeds needed"] == row["seeds needed"]:
                needed = "over 1,000" if math.isinf(row["seeds needed"]) else f"{row['seeds needed']:.0f}"
                line += f"; would take {needed} seeds"
            lines.append(line)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _number(value: float) -> str:
    return f"{value:+.1f}" if abs(value) >= 10 else f"{value:+.2f}"


def _sets(wanted: Sequence[Job], lacking: Sequence[Job]) -> str:
    """Which runs there are, and of how many the presets consist."""
    lines: list[str] = []
    for name in make_runs.SETS:
        all_of, none_of = ([job for job in jobs if set_of(job) == name] for jobs in (wanted, lacking))
        seeds = sorted({job.config.seed for job in none_of})
        text = f"- {name}: {len(all_of) - len(none_of)} of {len(all_of)} runs"
        lines.append(text + (f"; missing are runs of seeds {', '.join(map(str, seeds))}" if none_of else ""))
    return "\n".join(lines)


def _of_arena(jobs: Sequence[Job]) -> int:
    """How many of some runs are the arena's."""
    return sum(set_of(job) in arena.WORLDS.values() for job in jobs)


def _results(
    runs: Runs,
    verdicts: pd.DataFrame,
    leads: pd.DataFrame,
    table: str,
    worlds: Mapping[str, pd.DataFrame],
    wanted: Sequence[Job],
    lacking: Sequence[Job],
) -> str:
    parts = [
        "# What came out",
        "Computed from `paper_figures/runs` by `python -m paper_figures.baselines --accept`. Accuracy in percent at "
        "temperature 0.6 is a run's score, the mean of its last four validations (400 problems a family); mean ± "
        "half-width of the 95% interval over seeds (of the base: over base models). T = 0.1 and pass@8 are of the last "
        "checkpoint. Entropy in nats, length in tokens, operations in millions per parameter.",
        table,
        f"## The runs\n\n{_sets(wanted, lacking)}",
        "## What scores vary with\n\nStandard deviations in points: over base models, over seeds on one base, and of "
        "the choice of evaluation problems. All runs are trained on the same 1,000 problems; what another choice of "
        "these would change is in no interval.\n\n" + claims.spread(runs).round(2).to_markdown(index=False),
        "## The claims of the paper\n\nPositive agrees with the paper; brackets are 95% intervals (Welch; on other "
        "bases as on the map, below). No effect: within a bound ("
        + ", ".join(f"{bound:g} {unit}" for unit, bound in claims.BOUNDS.items())
        + ") by two one-sided tests. Reproduced and contradicted: p < 0.05 after Holm's correction within a family of "
        "claims. Seeds are those of the method that has fewer; an undecided claim would take as many as are named to "
        "be told from 0, or put within the bound, with a chance of 80%, if the effect is as measured. A log point is "
        "about 1%.\n\n" + verdict_lists(verdicts) + f"\n\n{_undecided(verdicts)}",
        "## What was chosen, and how much it matters\n\nLUFFY's lead in points over each rival where something is "
        "changed. A row of one seed has a standard error of about the deviation over seeds above, times the root of 2. "
        "With several traces a problem the first stage of SFT+RL has one all the same. Learning rate 0.0006 is four "
        "times LUFFY's and On-Policy RL's, and twice that of the others (of both stages of SFT+RL).\n\n"
        + claims.sensitivity(runs).round(1).to_markdown(index=False),
    ]
    if len(leads):
        parts += [
            "## The map\n\nA base of 41% works so many of its answers step by step before training, at temperature 1 "
            "(`own share` 0.4 is the share of such answers in what it was further trained on). The base `tiny` had no "
            "further training, and answers at once. Training problems have 3 to 7 steps where nothing else is said, "
            "those of the test always. Intervals have one standard deviation for all cells, or that of the method "
            "at the point, with its degrees of freedom, where it is larger: three seeds say little of what they vary "
            "by, and in doubt the interval is wider. Verdicts: p < 0.05 after Holm's correction over the points of a "
            f"sentence; no effect: within {claims.BOUNDS['points']:g} points. A claim above that has more seeds, or "
            f"fewer tests beside it, can be decided where the map is not.\n\n{_conclusions(leads)}",
            "Where the lead changes sign along the base axis (own share, with its 95% interval, and the share of draws "
            "of the leads' errors in which it does so at all):\n\n" + _crossings(leads),
            *(
                f"At equal cost, accuracy {name} with 95% intervals (millions of operations per parameter, as many as "
                "the methods with rollouts spend in the median; * spends less in all, and stands at its end, which "
                "`best` makes no allowance for):\n\n"
                + leads_of.cost_table(runs, score).to_markdown(index=False, disable_numparse=True)
                for score, name in leads_of.COLUMNS.items()
            ),
        ]
    if worlds:
        parts += [f"## The arena\n\n{_arena(worlds, _of_arena(wanted), _of_arena(lacking))}"]
    return "\n\n".join(parts) + "\n"


def _conclusions(leads: pd.DataFrame) -> str:
    return "\n".join(f"- {line}" for line in leads_of.conclusions(leads))


def _undecided(verdicts: pd.DataFrame) -> str:
    """How far the share of undecided claims is from what was aimed at."""
    count, all_of = int((verdicts["verdict"] == "undecided").sum()), int((verdicts["verdict"] != "no data").sum())
    return f"At most a fifth undecided was aimed at, {all_of // 5} of {all_of}: they are {count}."


def _with_gaps(table: pd.DataFrame) -> str:
    """A table of numbers, with a dash for what there is not."""
    return table.round(2).to_markdown(index=False).replace(" nan ", "  –  ")


def _crossings(leads: pd.DataFrame) -> str:
    table = leads_of.crossings(leads).assign(
        score=lambda rows: rows["score"].map(leads_of.COLUMNS),
        rival=lambda rows: [METHODS[rival].label for rival in rows["rival"]],
    )
    return _with_gaps(table)


def _arena(worlds: Mapping[str, pd.DataFrame], wanted: int, lacking: int) -> str:
    """wanted: runs that the arena's sets consist of; lacking: how many of them are not there yet."""
    preliminary = f"**Preliminary: of {wanted} runs {wanted - lacking} are made so far.** What one seed says is a hint."
    parts = [
        *([preliminary] if lacking else []),
        "Methods that came after LUFFY ([what each does](../luffy/methods/ARENA.md)), and beside them the rivals of "
        "their worlds. Accuracy in percent, in distribution (`id`), where it was trained, and out of distribution "
        "(`ood`), over base models in equal parts: the mean of the last four validations. `equal` is the accuracy in "
        "distribution at equal cost: the mean of the validations in the last quarter of the operations that the "
        "methods with rollouts spend in the median (of those that a method spends itself where that is less, *). Ranks "
        "have their 95% range; `best` is the chance to be the best. Costs are means of a run; `demonstrations` counts "
        "rows that are a trace or begin in one. Verdicts: p < 0.05 after Holm's correction over methods; no "
        f"effect: within {claims.BOUNDS['points']:g} points by two one-sided tests. Intervals have one standard "
        "deviation for all methods of a world, or a method's own, with its degrees of freedom, where that is larger; "
        "in the first table every method has its own.",
        "![Accuracy of every method with intervals, and over operations](baselines/arena.png)",
        "\n".join(f"- {line}" for line in arena_of.conclusions(worlds)),
    ]
    for world, table in worlds.items():
        budget = f"equal cost: {table['budget'].iloc[0] / 1e6:.1f} million operations per parameter"
        title = arena_of.TITLES[world].capitalize()
        parts.append(f"**{title}** ({budget})\n\n{arena.table(table).to_markdown()}")
    if "paper" in worlds:
        parts.append(
            "What papers claim of their own runs on their benchmarks, and how far our order in the default world "
            "agrees: Kendall's tau, with three methods or more, and its 95% interval over our means' errors; what is "
            "claimed counts as exact:\n\n" + _with_gaps(arena_of.agreement(worlds))
        )
    return "\n\n".join(parts)


def _readme(runs: Runs, verdicts: pd.DataFrame, leads: pd.DataFrame, arena_says: str, wanted: int, lacking: int) -> str:
    """The text between the marks of the README."""
    counts = verdicts["verdict"].value_counts()
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (*VERDICTS, "no data") if verdict in counts)
    preliminary = f"Preliminary: {wanted - lacking} of {wanted} runs are made so far; so few seeds decide little."
    return "\n\n".join(
        [
            *([preliminary] if lacking else []),
            "![LUFFY's lead over four rivals, with intervals](notebooks/pictures/map.png)",
            "Where LUFFY is ahead or behind, elsewhere undecided. Percent: answers that the base works step by step "
            "(41: the default world); problems: steps of those trained on.",
            _places(leads_of.distinct(leads)),
            "The default world, accuracy in percent, mean ± half-width of the 95% interval over seeds:",
            main_table(runs, README_COLUMNS),
            *([f"{arena_says} ([arena](paper_figures/RESULTS.md#the-arena))"] if arena_says else []),
            f"Of {counts.sum()} claims of the paper: {said} ([RESULTS.md](paper_figures/RESULTS.md)).",
        ]
    )


def _places(leads: pd.DataFrame) -> str:
    """The decided points of the map, a row per rival."""
    rows: dict[str, dict[str, str]] = {}
    for (rival, score), part in leads.groupby(["rival", "score"], sort=False):
        found = leads_of.decided(part, own=False)
        said = "; ".join(f"{verdict}: {', '.join(places)}" for verdict, places in found.items())
        rows.setdefault(METHODS[rival].label, {})[leads_of.COLUMNS[score]] = said or "nowhere decided"
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "against"
    return table.to_markdown()
