"""What a base model of the embedded world can do before any training: where it stands on the map.

    python -m luffy.study.premise "tiny:own_share=0.4" "tiny:own_share=0.1,seed=1" --out bases.csv

The default world was chosen by these numbers (paper_figures/pilots/PILOTS.md). A problem counts as beyond the base if
none of `samples` answers is right; as an answer is one of a hundred, some are right by luck.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import make_config
from ..data import tinyworld
from ..data.tokenization import completion_text, tokenize_problems
from ..evaluation import ask
from ..evaluation.stats import mean, pass_at_k
from ..sampling.protocol import SamplingParams
from ..verifier.answers import boxed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

TEMPERATURES = (0.6, 1.0)
KS = (1, 8, 64)
SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)  # of a trace


def measure(
    model: str,
    difficulties: Sequence[int],
    *,
    problems: int = 100,
    samples: int = 64,
    temperature: float = 1.0,
    share: float = 0.0,
    verbosity: float = 0.0,
    **values: Any,
) -> list[dict[str, Any]]:
    """What a model can do on held-out problems, `problems` of each difficulty: a row per difficulty, and one of all.

    pass@k; "beyond", the share of problems that no answer gets right; the share of answers that are boxed; of what the
    model adds to the beginning the share with two steps or more, and the mean length. share: of the teacher's trace (of
    its tokens) that an answer begins with. verbosity: of the teacher; with another one the problems are others, too.
    values: other fields of the configuration, such as think_format.
    """
    import torch

    from ..evaluation.rewards import make_reward
    from ..model.loading import eos_ids, load_model, load_tokenizer
    from ..sampling.make import make_sampler
    from ..sampling.ranks import Ranks

    torch.set_num_threads(1)
    config = make_config("on_policy", model=model, boxed_format=True, max_completion_length=128, **values)
    tokenizer = load_tokenizer(model)
    ends = eos_ids(model, tokenizer)
    sampler = make_sampler(load_model(model, device="cpu").eval(), tokenizer, config, ends, Ranks())
    reward = make_reward(config.reward)

    def answers(level: int) -> list[list[dict[str, float]]]:
        """Of each problem its answers: whether right, whether with two steps or more, whether boxed, the length."""
        window = config.data.max_completion_length
        made = tinyworld.make_problems(
            tinyworld.IN_DISTRIBUTION, "eval", problems, difficulties=(level,), verbosity=verbosity
        )
        tokenized, _ = tokenize_problems(made, tokenizer, max_prompt_length=64, max_completion_length=window)
        begun = [problem.traces[0].tokens[: int(share * len(problem.traces[0].tokens))] for problem in tokenized]
        texts = [completion_text(tokens, tokenizer, ends) for tokens in begun]
        questions = [
            ask.Question(replace(problem, prompt_ids=np.concatenate([problem.prompt_ids, tokens])), samples, i)
            for i, (problem, tokens) in enumerate(zip(tokenized, begun, strict=True))
        ]
        params = SamplingParams(window, temperature, seed=level)
        judged = reward.batch()
        given = list(ask.ask(sampler, tokenizer, questions, params, ends=ends))
        for place, _, answer in given:
            judged.add(tokenized[place].problem, tokenized[place].prompt_text, texts[place] + answer.text)
        found: dict[int, list[dict[str, float]]] = defaultdict(list)
        for (place, _, answer), score in zip(given, judged.finish(), strict=True):
            whole = boxed(texts[place] + answer.text)
            facts = {"steps": answer.text.count("=") >= 2, "boxed": whole, "length": answer.tokens}
            found[place].append({"right": score, **facts})
        return list(found.values())

    try:
        by_level = {level: answers(level) for level in dict.fromkeys(difficulties)}
    finally:
        reward.close()
    facts = {"model": model, "temperature": temperature, "samples": samples}
    rows = [{**facts, "difficulty": str(level), **_row(found, samples)} for level, found in by_level.items()]
    together = [problem for found in by_level.values() for problem in found]
    return [*rows, {**facts, "difficulty": "all", **_row(together, samples)}]


def by_prefix(
    model: str, difficulties: Sequence[int], shares: Sequence[float] = SHARES, **values: Any
) -> list[dict[str, Any]]:
    """What a model can do where answers begin with these shares of the teacher's trace: a row each, over all
    difficulties, as `measure` has it. A base that works step by step only after some cue is given it by a few tokens,
    which is to be known before methods that show such beginnings are compared."""
    return [{"share": share, **measure(model, difficulties, share=share, **values)[-1]} for share in shares]


def plot_prefixes(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy, and the share of answers that add two steps or more, over the share of the trace that is given: a panel
    for each table of `by_prefix`."""
    from . import style

    figure, axes = style.grid(max(1, len(worlds)))
    for axis, (world, rows) in zip(axes, worlds.items(), strict=False):
        axis.set(title=world, xlabel="share of the trace that is given (%)", ylabel="%", ylim=(0, 100))
        axis.plot(100 * rows["share"], 100 * rows["pass@1"], marker="o", label="accuracy")
        axis.plot(100 * rows["share"], 100 * rows["steps"], linestyle="--", label="two steps or more are added")
    style.legend_below(figure, axes)
    return figure


def _row(problems: Sequence[list[dict[str, float]]], samples: int) -> dict[str, float]:
    right = [int(sum(answer["right"] for answer in answers)) for answers in problems]
    found = {f"pass@{k}": mean([pass_at_k(samples, r, k) for r in right]) for k in KS if k <= samples}
    answers = [answer for problem in problems for answer in problem]
    return {
        "problems": len(problems),
        **found,
        "beyond": mean([r == 0 for r in right]),
        **{name: mean([answer[name] for answer in answers]) for name in ("steps", "boxed", "length")},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    import pandas as pd

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--difficulties", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--problems", type=int, default=100, help="of each difficulty")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    known = parser.parse_args(arguments)
    rows = []
    for model in known.models:
        for temperature in TEMPERATURES:
            rows += measure(model, known.difficulties, problems=known.problems, temperature=temperature)
            log.info("%s at temperature %g: %s", model, temperature, rows[-1])
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    if known.out:
        table.to_csv(known.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
