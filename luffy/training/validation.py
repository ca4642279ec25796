"""Evaluations of the policy during a run: a few problems now and then, and the final evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.tokenization import TokenizedProblem
from ..evaluation import ask
from ..evaluation.rewards import Reward
from ..sampling.protocol import SamplingParams
from .restart import Restarting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Validation:
    """Asks the held-out problems of each family. here: which of them, counted through all families, this rank asks."""

    def __init__(
        self,
        config: Config,
        families: Mapping[str, Sequence[TokenizedProblem]],
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        reward: Reward,
        sampler: Restarting,
        here: Callable[[int], bool],
    ) -> None:
        self.config, self.families, self.tokenizer, self.ends = config, families, tokenizer, ends
        self.reward, self.sampler, self.here = reward, sampler, here

    def results(self, per_family: int, samples: int, temperature: float | None = None) -> dict[str, ask.Result]:
        """Asks the first problems of each family, each on one rank, and returns the results on all. temperature: of
        the sampling, eval_temperature if it is None."""
        config = self.config
        temperature = config.evaluation.eval_temperature if temperature is None else temperature
        families = {family: problems[:per_family] for family, problems in self.families.items()}
        params = SamplingParams(config.data.max_completion_length, temperature, seed=config.seed)
        found: dict[int, dict[str, list[Any]]] = self.sampler.use(
            lambda sampler: ask.evaluate(
                sampler, self.reward, self.tokenizer, families, params, samples=samples, ends=self.ends, here=self.here
            ),
            dict,
        )
        shares = self.sampler.ranks.gather(found)
        return ask.results(families, {i: line for share in shares for i, line in share.items()})

    def row(self) -> dict[str, float]:
        """Accuracy on a few problems of each family, as metrics."""
        options = self.config.evaluation
        results = self.results(options.eval_problems, 1)
        row = {f"eval/{name}": value for name, value in ask.averages(results, options.ood_sources).items()}
        for family, result in results.items():
            row |= {f"eval/{family}/accuracy": result.accuracy, f"eval/{family}/length": result.mean_length}
        return row

    def final(self, totals: Mapping[str, int]) -> dict[str, Any]:
        """The final evaluation as it is written down, with the totals of the training."""
        options = self.config.evaluation
        if not options.final_eval_problems:
            return {"families": {}, "averages": {}, "totals": dict(totals)}
        results = self.results(options.final_eval_problems, options.final_eval_samples)
        others = {str(t): self.results(options.final_eval_problems, 1, t) for t in options.final_eval_temperatures}
        return {
            "temperature": options.eval_temperature,
            **self._readable(results),
            "temperatures": {temperature: self._readable(found) for temperature, found in others.items()},
            "totals": dict(totals),
        }

    def _readable(self, results: dict[str, ask.Result]) -> dict[str, Any]:
        return {
            "averages": ask.averages(results, self.config.evaluation.ood_sources),
            "families": {family: result.to_dict() for family, result in results.items()},
        }
