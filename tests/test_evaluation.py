import itertools

import pytest
from conftest import SHARED_DATA

from luffy import evaluation
from luffy.config import Config
from luffy.evaluation import FamilyResult, averages, pass_at_k
from luffy.rewards import FunctionReward, MathReward
from luffy.sampling import TransformersSampler
from luffy.verifier import Verifier


def test_pass_at_k_by_hand_and_by_enumeration():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 4, 1) == 1.0 and pass_at_k(4, 0, 4) == 0.0
    for n, right in [(6, 2), (7, 3)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations(range(n), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws))
    for bad in [(4, 5, 1), (4, 1, 0), (4, 1, 5)]:
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def test_family_result():
    result = FamilyResult(right=[4, 0, 1], samples=4, mean_length=10.0, truncated=0.0, think=1.0)
    assert result.accuracy == pytest.approx(5 / 12)
    assert result.pass_at(1) == pytest.approx(5 / 12)
    assert result.pass_at(2) == pytest.approx((1 + 0 + 0.5) / 3)
    assert result.pass_at(4) == pytest.approx(2 / 3)
    means = averages({"chain": result, "words": FamilyResult([4], 4, 1.0, 0, 0)}, ("words",))
    assert means == {"id": pytest.approx(5 / 12), "ood": 1.0}


def evaluate(tiny, reward, config, **options):
    model, tokenizer = tiny
    sampler = TransformersSampler(model, eos_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id)
    families = evaluation.tokenize_families(evaluation.evaluation_problems(config, 10), tokenizer, config)
    defaults = dict(samples=3, temperature=0.6, max_new_tokens=16, seed=0)
    return evaluation.evaluate(sampler, reward, tokenizer, families, **{**defaults, **options})


def test_tiny_world_end_to_end(tiny):
    with Verifier(workers=1) as verifier:
        first = evaluate(tiny, MathReward(verifier, think=False), Config())
        assert first == evaluate(tiny, MathReward(verifier, think=False), Config())
    assert set(first) == {"chain", "words", "flip", "prefix"}
    assert all(len(result.right) == 10 for result in first.values())
    assert first["words"].accuracy > first["chain"].accuracy  # it has easier problems


def test_function_reward_sees_prompts_completions_and_columns(tiny):
    calls = []

    def reward(prompts, completions, answer, source, difficulty, **columns):
        calls.append((prompts, completions, answer, source, difficulty))
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    results = evaluate(tiny, FunctionReward(reward), Config(), samples=1)
    assert len(calls) == 1 and all(len(column) == 40 for column in calls[0])
    assert calls[0][0][0].endswith("?")
    assert sum(sum(r.right) for r in results.values()) > 0
    with pytest.raises(ValueError, match="returned 0 values"):
        evaluate(tiny, FunctionReward(lambda **_: []), Config(), samples=1)


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real benchmark files are not here")
def test_real_problems_end_to_end(tiny):
    config = Config(eval_datasets=(str(SHARED_DATA / "valid.all.parquet"),), max_prompt_length=2048)
    with Verifier(workers=1) as verifier:
        results = evaluate(tiny, MathReward(verifier, think=False), config, samples=1)
    assert set(results) == {"math", "olympiad_bench", "minerva", "aime", "amc", "aime25"}
