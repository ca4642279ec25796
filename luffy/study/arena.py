"""The arena: methods under equal budgets, with intervals, ranks that know their uncertainty, and curves over cost.

A world is a preset (its base model, its problems). All methods of a world share bases, data, problems asked, steps and
rows of a group; what they spend differs, so that everything is also told at equal cost.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Config
from ..errors import RunError
from ..methods import METHODS, Method
from ..methods.rows import Batch, Now, Row
from ..model import bases
from ..objective import token_losses
from ..runs import RunDirectory
from . import cost, experiments, inference, presets, results, style
from .experiments import Job

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

log = logging.getLogger(__name__)

WORLDS = {"paper": "arena", "corner": "arena_corner", "strong": "arena_strong"}  # presets
RIVALS = ("on_policy", "luffy", "sft", "rl_sft_loss", "sft_rl")  # that every method is seen beside
DRAWS = 10_000
POINTS = 50  # of a curve over cost


def jobs(
    worlds: Sequence[str], runs_dir: str | Path, methods: Sequence[str] = (), seeds: Sequence[int] = (), **values: Any
) -> dict[str, list[Job]]:
    """The runs of each world: those of its preset and the rivals, or of the methods that are named.

    worlds: names in WORLDS, of other presets, or files of one's own. Runs that are there are found, so that a new
    method is one more. Raises ConfigError.
    """
    found = {}
    for world in worlds:
        preset = presets.over(presets.load_preset(WORLDS.get(world, world)), values)
        variants = preset.pop("variants", None) or [{}]
        if methods:
            variants = [{**variants[0], "methods": list(methods)}]
        else:
            variants = [{**variants[0], "methods": list(RIVALS)}, *variants]
        chosen = {"seeds": list(seeds)} if seeds else {}
        preset["variants"] = [{**variant, **chosen} for variant in variants]
        found[world] = experiments.preset_jobs(preset, folder_of(runs_dir, world))
    return found


def compare(
    worlds: Sequence[str],
    runs_dir: str | Path,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    parallel: int | None = None,
    **values: Any,
) -> None:
    """Trains what is missing, shows how it goes, and prints and writes the table of each world: of all that is there,
    also of methods that were asked for before. Raises RunsFailedError after that if a run failed."""
    from .plots import follow

    asked, failure = jobs(worlds, runs_dir, methods, seeds, **values), None
    try:
        follow(experiments.run([job for members in asked.values() for job in members], parallel=parallel))
    except experiments.RunsFailedError as error:
        failure = error
    for world, members in asked.items():
        folder = folder_of(runs_dir, world)
        shown = table(scores(trained(folder, members)))
        shown.to_csv(folder / "arena.csv")
        print(f"\n{world}\n\n{shown.to_markdown()}")
    if failure:
        raise failure


def folder_of(runs_dir: str | Path, world: str) -> Path:
    """Where a world's runs live."""
    return Path(runs_dir) / Path(world).stem


def trained(folder: Path, like: Sequence[Job]) -> list[Job]:
    """The complete runs of a world's folder that can be compared with the given ones: of the same base, data, steps and
    measurement. Of a method only runs that differ in nothing but their seed are taken: as it is asked for, or, if it is
    not, as most of its runs are; others are left out, with a warning."""
    wanted = {_shared(job.config) for job in like}
    asked: dict[str, set[str]] = {}
    for job in like:
        asked.setdefault(job.config.method.name, set()).add(_recipe(job.config))
    found: dict[str, dict[str, list[Job]]] = {}
    for path in sorted(folder.glob("*/config.json")):
        run = RunDirectory(path.parent)
        try:
            config = run.config()
        except RunError as error:  # such as a method whose file is not here
            log.warning("%s is left out: %s", run.path, error)
            continue
        if run.is_complete and _shared(config) in wanted:
            found.setdefault(config.method.name, {}).setdefault(_recipe(config), []).append(Job(config, run.path))
    chosen = []
    for method, recipes in found.items():
        most = max(recipes, key=lambda recipe: len(recipes[recipe]))
        kept = asked.get(method, {most})
        chosen += [job for recipe, jobs in recipes.items() if recipe in kept for job in jobs]
        if left := sum(len(jobs) for recipe, jobs in recipes.items() if recipe not in kept):
            log.warning("%d runs of %s with other parameters are left out", left, method)
    return chosen


def _shared(config: Config) -> str:
    """What all runs of a world must share."""
    sampling = config.sampling
    budget = config.max_steps, sampling.rollout_batch_size, sampling.num_generations, sampling.temperature
    data = {**asdict(config.data), "dataset_split": ""}  # (SFT+RL trains on two)
    return repr([_base(config), budget, data, config.world, config.reward, config.evaluation])


def _recipe(config: Config) -> str:
    """All of a configuration but its seeds."""
    return repr({**config.to_dict(), "seed": 0, "model": _base(config)})


def _base(config: Config) -> Any:
    base = bases.parse(config.model)
    return replace(base, seed=0).name if base else config.model


def scores(jobs: Sequence[Job]) -> pd.DataFrame:
    """One row per complete run: results.per_run, and `with_cost`."""
    done = [job for job in jobs if job.run.is_complete]
    table = results.per_run(done)
    return table if table.empty else with_cost(table.assign(run=range(len(done))), curves(done))


def with_cost(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """The scores of a world's runs, with their operations, the `budget` of equal cost (cost.equal_budget), and `equal`:
    the accuracy in distribution when as much is spent.

    table: columns run, method, generated_tokens, trained_tokens, of which operations are made. curves: as `curves` has
    them.
    """
    table = table.assign(operations=cost.spent_on(table["generated_tokens"], table["trained_tokens"]))
    sampled = table[[METHODS[method].samples for method in table["method"]]]
    budget = cost.equal_budget(sampled.groupby("method")["operations"].mean())
    table["budget"] = budget
    if "eval/id" in curves:
        found = {run: cost.reached(rows, budget) for run, rows in curves.groupby("run")}
        table["equal"] = table["run"].map(found)
    return table


def curves(jobs: Sequence[Job]) -> pd.DataFrame:
    """The metrics of all complete runs in order, with columns run (the run's place among them), method, and spent
    (operations so far)."""
    import pandas as pd

    done = [job for job in jobs if job.run.is_complete]
    frames = [pd.DataFrame(job.rows()).assign(run=i, method=job.config.method.name) for i, job in enumerate(done)]
    return with_spent(pd.concat(frames, ignore_index=True)) if frames else pd.DataFrame()


def with_spent(curves: pd.DataFrame) -> pd.DataFrame:
    """Rows of metrics with columns run and stage, in order, and what was spent until each."""
    return curves.assign(spent=cost.operations(curves)).sort_values(["run", "step"], kind="stable")


def standings(scores: pd.DataFrame, column: str = "id", seed: int = 0) -> pd.DataFrame:
    """A row per method, the best first: label, seeds, mean and half-width of the 95% interval (percent; over base
    models in equal parts, inference.cell_means), rank with its 95% range, and `best`, the chance to be the best,
    over draws of the means' errors; NaN while no method has several seeds.

    scores: of one world, with a column model, the base.
    """
    import pandas as pd

    means = inference.cell_means(scores, column, block="model")
    values = means.values
    ranks = (-means.draws(DRAWS, seed)).argsort(axis=1).argsort(axis=1) + 1.0
    if not means.known:  # with a seed each nothing is known of errors
        ranks[:] = np.nan
    low, high = np.quantile(ranks, [0.025, 0.975], axis=0, method="nearest")
    table = pd.DataFrame(
        {
            "method": means.names,
            "label": [METHODS[method].label for method in means.names],
            "seeds": means.sizes,
            column: 100 * values,
            "half": 100 * means.halves,
            "rank": (-values).argsort().argsort() + 1,
            "rank low": low,
            "rank high": high,
            "best": np.where(np.isnan(low), np.nan, (ranks == 1).mean(axis=0)),
        }
    )
    return table.sort_values(column, ascending=False, ignore_index=True)


def agreement(
    scores: pd.DataFrame, claimed: Mapping[str, float], column: str = "id", seed: int = 0
) -> dict[str, float]:
    """How far the order of methods is that of claimed accuracies: Kendall's tau (of all pairs the share in the claimed
    order, less that in the other) over the methods that both have, their number, and the 95% interval that comes of
    our means' errors. The claims count as exact. NaN with fewer than three methods."""
    means = inference.cell_means(scores, column, block="model")
    both = [i for i, method in enumerate(means.names) if method in claimed]
    found = {"methods": float(len(both)), "tau": np.nan, "low": np.nan, "high": np.nan}
    if len(both) < 3:
        return found
    first, second = np.triu_indices(len(both), 1)
    theirs = np.array([claimed[means.names[i]] for i in both])
    order = np.sign(theirs[first] - theirs[second])

    def tau(values: np.ndarray) -> np.ndarray:
        return (np.sign(values[..., first] - values[..., second]) * order).mean(axis=-1)

    found["tau"] = float(tau(means.values[both]))
    if means.known:
        drawn = tau(means.draws(DRAWS, seed)[:, both])
        found["low"], found["high"] = np.quantile(drawn, [0.025, 0.975], method="nearest")
    return found


def against(scores: pd.DataFrame, rival: str, bound: float, column: str = "id") -> pd.DataFrame:
    """How far each method is ahead of a rival: columns method, lead, low, high (points), p (Holm over the methods),
    verdict ("ahead", "behind", "no effect" within +-bound points, "undecided")."""
    import pandas as pd

    means = inference.cell_means(scores.assign(value=100 * scores[column]), "value", block="model")
    others = [method for method in METHODS if method in means.names and method != rival]
    effects = [means.difference(method, rival) for method in others]
    rows = []
    for method, effect, p in zip(others, effects, inference.holm([effect.p for effect in effects]), strict=True):
        place = {"lead": effect.value, "low": effect.low, "high": effect.high, "p": p}
        rows.append({"method": method, **place, "verdict": inference.lead(effect, p, bound)})
    return pd.DataFrame(rows, columns=["method", "lead", "low", "high", "p", "verdict"])


def table(scores: pd.DataFrame) -> pd.DataFrame:
    """The table of a world, as text: methods by their score in distribution; out of distribution, at equal cost (with
    a * if less is spent in all), the ranks in distribution and at equal cost, and what was spent.

    scores: of its runs, as `scores` has them.
    """
    import pandas as pd

    if scores.empty:
        return pd.DataFrame()
    ranked = {column: standings(scores, column) for column in ("id", "ood", "equal") if column in scores}
    others = {column: ranks.set_index("method") for column, ranks in ranked.items() if column != "id"}
    rows = []
    for row in ranked["id"].to_dict("records"):
        mine, known = scores[scores["method"] == row["method"]], row["best"] == row["best"]
        cells = {"method": row["label"], "seeds": row["seeds"], "id": _interval(row["id"], row["half"])}
        for column, ranks in others.items():
            other = ranks.loc[row["method"]]
            less = column == "equal" and mine["operations"].mean() < mine["budget"].iloc[0]
            cells[column] = _interval(other[column], other["half"]) + (" *" if less else "")
        cells["rank"] = _rank(row)
        if "equal" in others:
            cells["rank, equal"] = _rank(others["equal"].loc[row["method"]])
        cells |= {
            "best": f"{row['best']:.0%}" if known else "–",
            "generated": f"{mine['generated_tokens'].mean():,.0f}",
            "trained": f"{mine['trained_tokens'].mean():,.0f}",
            "operations (M)": f"{mine['operations'].mean() / 1e6:,.1f}",
            "demonstrations": f"{shown:,.0f}" if (shown := mine["demonstrations"].mean()) == shown else "–",
        }
        rows.append(cells)
    return pd.DataFrame(rows).set_index("method")


def _rank(row: Mapping[str, Any] | pd.Series) -> str:
    return f"{row['rank']:.0f}" + (
        f" [{row['rank low']:.0f}, {row['rank high']:.0f}]" if row["best"] == row["best"] else ""
    )


def _interval(value: float, half: float) -> str:
    return f"{value:.1f} ± {half:.1f}" if half == half else f"{value:.1f}"


def mean_curves(curves: pd.DataFrame, metric: str = "eval/id") -> pd.DataFrame:
    """Every method's validation accuracy (percent) over what was spent (operations): the mean over its runs,
    interpolated to common costs, as far as all of them go. Columns method, spent, accuracy.

    curves: of a world's runs, as `curves` has them."""
    import pandas as pd

    empty = pd.DataFrame(columns=["method", "spent", "accuracy"])
    if metric not in curves:
        return empty
    known = curves.dropna(subset=[metric]).drop_duplicates(["run", "step"], keep="last")
    frames = []
    for method in [m for m in METHODS if m in set(known["method"])]:
        runs = [rows for _, rows in known[known["method"] == method].groupby("run")]
        spent = np.linspace(0, min(rows["spent"].max() for rows in runs), POINTS)
        mean = np.mean([np.interp(spent, rows["spent"], rows[metric]) for rows in runs], axis=0)
        frames.append(pd.DataFrame({"method": method, "spent": spent, "accuracy": 100 * mean}))
    return pd.concat(frames, ignore_index=True) if frames else empty


def plot_cost(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """`mean_curves` of several worlds, a panel each."""
    figure, axes = style.grid(max(1, len(worlds)))
    for axis, (world, found) in zip(axes, worlds.items(), strict=False):
        axis.set(title=world)
        draw_cost(axis, found)
    style.legend_below(figure, axes)
    return figure


def draw_cost(axis: Axes, curves: pd.DataFrame) -> None:
    """A line per method of `mean_curves`."""
    axis.set(xlabel="operations per parameter (millions)", ylabel="accuracy (%)", ylim=(0, 100))
    for method, rows in curves.groupby("method", sort=False):
        axis.plot(rows["spent"] / 1e6, rows["accuracy"], label=METHODS[str(method)].label, **style.look(str(method)))


# --- what a demonstration counts for ----------------------------------------------------------------------------------


def token_weights(method: Method, probability: Tensor, entropy: float = 0.5) -> tuple[Tensor, Tensor]:
    """What a demonstration's token counts for at the first update of a step, over its probability, (n,) each: the
    factor on its advantage times grad log pi in the policy term, and on grad log pi in the likelihood term, with its
    coefficient. By the method's own code: a right row that begins in these tokens, among wrong rollouts.

    entropy: of every token, in nats."""
    import torch

    count = len(probability)
    prompt, tokens = np.zeros(1, np.int32), np.zeros(count + 1, np.int32)

    def row(index: int, foreign: int, reward: float) -> Row:
        length = foreign + 1
        known = np.zeros(length, np.float32)
        return Row(0, 0, index, prompt, tokens[:length], foreign, known, False, reward=reward, round=int(foreign > 0))

    rows = [*(row(i, 0, 0.0) for i in range(7)), row(7, count, 1.0)]
    batch = Batch.of(rows)
    logp = torch.cat([torch.full((7,), -1.0), probability.log().float(), torch.tensor([-1.0])]).requires_grad_()
    signal = method.signal(batch)
    now = Now(logp.detach(), torch.full_like(logp, entropy).detach(), logp.detach(), None, signal.rows)
    live = method.live(signal, now)
    losses = token_losses(
        logp, logp.detach(), live.advantage, live.foreign, method.ratios, live.teacher, live.rows
    ).losses
    (slope,) = torch.autograd.grad((losses * live.policy).sum(), logp)
    mine = live.foreign
    advantage = torch.where(live.advantage == 0, 1.0, live.advantage)
    return (-slope / advantage)[mine].detach(), live.likelihood[mine]


def plot_token_weights(names: Sequence[str], entropy: float = 0.5) -> Figure:
    """`token_weights` of methods over the probability, a panel for each of the two terms; methods with one curve share
    its line. A method whose weight is 0 has none."""
    import torch

    probability = torch.linspace(1e-3, 0.999, 400)
    figure, axes = style.grid(2, columns=2, width=5.0)
    found = {name: token_weights(METHODS[name](), probability, entropy) for name in names}
    for place, axis in enumerate(axes):
        alike: list[list[str]] = []
        for name in [name for name in names if bool((found[name][place] != 0).any())]:
            near = (group for group in alike if torch.allclose(found[name][place], found[group[0]][place], rtol=0.01))
            if (group := next(near, None)) is None:
                alike.append([name])
            else:
                group.append(name)
        for group in alike:
            label = ", ".join(METHODS[name].label for name in group)
            axis.plot(probability, found[group[0]][place], label=label, **style.look(group[0]))
        axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    for axis, term in zip(
        axes, ("policy term, per unit of advantage", "likelihood term, with its coefficient"), strict=True
    ):
        axis.set(
            title=term, xlabel="probability of the token π", ylabel="weight of ∇ log π", yscale="log", ylim=(1e-4, 12)
        )
    return figure
