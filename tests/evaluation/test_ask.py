import pytest

from luffy import make_config
from luffy.errors import ConfigError
from luffy.evaluation import ask as evaluation
from luffy.evaluation.ask import Answer, Result, averages, columns, count, load_families, tokenize_families
from luffy.evaluation.rewards import FunctionReward, MathReward
from luffy.sampling.local import TransformersSampler
from luffy.sampling.protocol import SamplingParams
from luffy.verifier.pool import Verifier


def result(right, samples=4):
    return Result(right, samples, mean_length=10.0, truncated=0.0, think=1.0, boxed=1.0)


def test_result():
    three = result([4, 0, 1])
    assert three.accuracy == pytest.approx(5 / 12) and three.scores == [1.0, 0.0, 0.25]
    assert three.pass_at(1) == pytest.approx(5 / 12)
    assert three.pass_at(2) == pytest.approx((1 + 0 + 0.5) / 3)
    assert three.pass_at(4) == pytest.approx(2 / 3)
    means = averages({"chain": three, "words": result([4])}, ("words",))
    assert means == {"id": pytest.approx(5 / 12), "ood": 1.0}


def test_count():
    answers = [
        [Answer("<think>a</think>\\boxed{1}", 10, False), Answer("<think>a", 30, True)],
        [Answer("\\boxed{2}", 4, False), Answer("2", 4, False)],
    ]
    scores = [[1.0, 0.0], [0.4, 0.6]]
    counted = count([{"scores": s, **columns(a)} for s, a in zip(scores, answers, strict=True)])
    assert counted == Result([1, 1], 2, mean_length=12.0, truncated=0.25, think=0.25, boxed=0.5)
    for bad in ([], [{"scores": []}], [{"scores": [1.0]}, {"scores": [1.0, 0.0]}]):
        with pytest.raises(ValueError, match="completions"):
            count(bad)


def evaluate(tiny, reward, config, **options):
    model, tokenizer = tiny
    sampler = TransformersSampler(model, eos_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id)
    families = tokenize_families(load_families(config), tokenizer, config)
    params = SamplingParams(max_new_tokens=16, temperature=0.6)
    found = evaluation.evaluate(sampler, reward, tokenizer, families, params, **{"samples": 3, **options})
    return evaluation.results(families, found)


SMALL = dict(eval_problems=10, final_eval_problems=10)


def test_tiny_world_end_to_end(tiny):
    with Verifier(workers=1) as verifier:
        first = evaluate(tiny, MathReward(verifier, think=False), make_config(**SMALL))
        assert first == evaluate(tiny, MathReward(verifier, think=False), make_config(**SMALL))
    assert set(first) == {"chain", "words", "flip", "prefix", "lines"}
    assert all(len(family.right) == 10 for family in first.values())
    assert first["words"].accuracy > first["chain"].accuracy  # it has easier problems


def test_function_reward_sees_prompts_completions_and_columns(tiny):
    calls = []

    def reward(prompts, completions, answer, source, difficulty, **columns):
        calls.append((prompts, completions, answer, source, difficulty))
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    results = evaluate(tiny, FunctionReward(reward), make_config(**SMALL), samples=1)
    assert len(calls) == 1 and all(len(column) == 50 for column in calls[0])
    assert calls[0][0][0].endswith("?")
    assert sum(sum(r.right) for r in results.values()) > 0
    for returned in ([], [1.0], ["x"] * 50, [float("nan")] * 50, None):
        with pytest.raises(ConfigError, match="one finite number, or None, for each of 50 completions"):
            evaluate(tiny, FunctionReward(lambda returned=returned, **_: returned), make_config(**SMALL), samples=1)


def test_the_prompt_says_whether_an_answer_must_close_its_think_block():
    with Verifier(workers=1) as verifier:
        reward = MathReward(verifier, think=None)
        judged = reward.batch()
        problem = load_families(make_config(**SMALL))[0].problems[0]
        right = f"\\boxed{{{problem.answer}}}"
        for prompt in ("84+1?", "Assistant: <think>\n"):
            for text in (right, f"so</think>{right}"):
                judged.add(problem, prompt, text)
        assert judged.finish() == [1.0, 1.0, 0.0, 1.0]
