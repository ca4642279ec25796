"""What a base model of the embedded world can do before any training: where it stands on the map.

    python -m luffy.study.premise "tiny:own_share=0.4" "tiny:own_share=0.1,seed=1" --out bases.csv

The default world was chosen by these numbers (paper_figures/pilots/PILOTS.md). A problem counts as beyond the base if
none of `samples` answers is right; as an answer is one of a hundred, some are right by luck.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import make_config
from ..data import tinyworld
from ..data.tokenization import tokenize_problems
from ..evaluation import ask
from ..evaluation.stats import mean, pass_at_k
from ..sampling.protocol import SamplingParams

log = logging.getLogger(__name__)

TEMPERATURES = (0.6, 1.0)
KS = (1, 8, 64)


def measure(
    model: str,
    difficulties: Sequence[int],
    *,
    problems: int = 100,
    samples: int = 64,
    temperature: float = 1.0,
    **values: Any,
) -> list[dict[str, Any]]:
    """What a model can do on held-out problems, `problems` of each difficulty: a row per difficulty, and one of all.

    pass@k; "beyond", the share of problems that no answer gets right; of the answers the share with two steps or more,
    the share boxed, and their mean length. values: other fields of the configuration, such as think_format.
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
        made = tinyworld.make_problems(tinyworld.IN_DISTRIBUTION, "eval", problems, difficulties=(level,))
        tokenized, _ = tokenize_problems(made, tokenizer, max_prompt_length=64, max_completion_length=window)
        questions = [ask.Question(problem, samples, i) for i, problem in enumerate(tokenized)]
        params = SamplingParams(window, temperature, seed=level)
        judged = reward.batch()
        given = list(ask.ask(sampler, tokenizer, questions, params, ends=ends))
        for place, _, answer in given:
            judged.add(tokenized[place].problem, tokenized[place].prompt_text, answer.text)
        found: dict[int, list[dict[str, float]]] = defaultdict(list)
        for (place, _, answer), score in zip(given, judged.finish(), strict=True):
            facts = {"steps": answer.text.count("=") >= 2, "boxed": answer.boxed, "length": answer.tokens}
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
