import hashlib
import random

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy import tinyworld
from luffy.data.tinyworld import (
    FAMILIES,
    Chain,
    make_problems,
    make_tokenizer,
    teacher_trace,
    worked_steps,
    write_chain,
)
from luffy.data.tokenization import completion_text
from luffy.model.loading import TINY_MODEL
from luffy.model.pretrain import Recipe, document, pretrain
from luffy.sampling.local import TransformersSampler
from luffy.sampling.protocol import SamplingParams, SamplingRequest
from luffy.verifier.pool import solution

CHAIN = Chain(84, ("+1", "-5", "r", "+8", "r"))


def test_chain_by_hand():
    assert CHAIN.values() == [85, 80, 8, 16, 61]
    assert worked_steps(CHAIN) == ["84+1=85", "85-5=80", "80r=8", "8+8=16", "16r=61"]
    assert write_chain(CHAIN, "chain") == "84+1-5r+8r?"
    assert write_chain(CHAIN, "prefix") == "+1-5r+8r:84?"
    assert write_chain(CHAIN, "words") == "eight four plus one minus five swap plus eight swap ?"
    assert tinyworld.apply("c", 30) == 69
    with pytest.raises(ValueError, match="no operation"):
        tinyworld.apply("*2", 3)


def test_trace_by_hand():
    expected = "<think>84+1=85;85-5=80;80r=8;8+8=16;16r=61;check50861ok</think>\\boxed{61}"
    assert teacher_trace(CHAIN, random.Random(0), mistake_rate=0) == expected
    always = teacher_trace(CHAIN, random.Random(0), mistake_rate=1)
    assert always.count("wait") == 5 and always.endswith("check50861ok</think>\\boxed{61}")


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_right_different_and_in_range(family):
    problems = make_problems(family, "eval", 200)
    assert len({p.prompt[0]["content"] for p in problems}) == 200
    assert problems[:50] == make_problems(family, "eval", 50)
    assert {p.columns["difficulty"] for p in problems} == set(FAMILIES[family].difficulties)
    for p in problems:
        assert 0 <= int(p.answer) <= 99
        assert solution(p.traces[0]) == f"\\boxed{{{p.answer}}}"


def test_splits_are_disjoint_by_construction():
    buckets = {name: set(numbers) for name, numbers in tinyworld.SPLITS.items()}
    assert not buckets["train"] & buckets["complement"]
    assert not buckets["eval"] & (buckets["train"] | buckets["complement"] | buckets["pretrain"])
    train = {p.prompt[0]["content"] for p in make_problems("chain", "train", 500)}
    assert not train & {p.prompt[0]["content"] for p in make_problems("chain", "eval", 500)}
    assert not train & {p.prompt[0]["content"] for p in make_problems("chain", "complement", 500)}


def test_pretraining_never_sees_an_evaluation_chain():
    rng, seen = random.Random(0), set()
    for i in range(3000):
        seen.add(document(rng, Recipe(), primitives=i % 2 == 0)[0].rstrip("?#"))
    for family in FAMILIES:
        assert not seen & {p.prompt[0]["content"].rstrip("?") for p in make_problems(family, "eval", 300)}


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="no family"):
        make_problems("sums", "eval", 1)
    with pytest.raises(ValueError, match="does not have"):
        make_problems("chain", "eval", 5_000, difficulties=(2,))


def test_tokenizer_round_trip_is_exact():
    tokenizer = make_tokenizer()
    for family in FAMILIES:
        for p in make_problems(family, "train", 50):
            text = p.prompt[0]["content"] + p.traces[0]
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert len(tokenizer.encode("<think>\n</think>\\boxed{}wait check")) == 7
    assert len(tokenizer) == len(tinyworld.VOCABULARY)


def test_shipped_model_loads_with_plain_transformers(tiny):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_MODEL), AutoTokenizer.from_pretrained(TINY_MODEL)
    assert model.config.model_type == "qwen2" and model.config.vocab_size == len(tokenizer)
    assert 0.4e6 < model.num_parameters() < 0.5e6
    text = "eight four plus one ?<think>84+1=85wait3</think>\\boxed{85}"
    assert tokenizer.encode(text) == make_tokenizer().encode(text)
    assert sum(f.stat().st_size for f in TINY_MODEL.iterdir()) < 3e6


def test_shipped_weights_are_those_of_the_model_card():
    digest = hashlib.sha256((TINY_MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (TINY_MODEL / "README.md").read_text()


def test_shipped_model_has_the_skill_but_not_the_habit(tiny):
    """After `#` it works step by step, after `?` it answers at once: sometimes right for two operations only."""
    model, tokenizer = tiny
    sampler = TransformersSampler(model, eos_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id)
    shares = {}
    for cue, difficulty in [("#", 5), ("?", 5), ("?", 3)]:
        problems = make_problems("chain", "eval", 60, difficulties=(difficulty,))
        prompts = [tuple(tokenizer.encode(p.prompt[0]["content"][:-1] + cue)) for p in problems]
        requests = [SamplingRequest(np.array(prompt), i, 0) for i, prompt in enumerate(prompts)]
        texts = {}
        for i, rollout in sampler.sample(requests, SamplingParams(max_new_tokens=64)):
            texts[i] = completion_text(rollout.token_ids, tokenizer)
        ends = [texts[i].rstrip("}").replace("{", "=").rsplit("=", 1)[-1] for i in range(len(problems))]
        shares[cue, difficulty] = sum(end == p.answer for end, p in zip(ends, problems, strict=True)) / len(problems)
        if cue == "?":
            assert sum("<think>" in text for text in texts.values()) <= 1
    assert shares["#", 5] > 0.8 and shares["?", 5] < 0.15 and 0.1 < shares["?", 3] < 0.6


def test_pretraining_starts_to_learn(tmp_path, caplog):
    """The command that made the shipped model, for a few updates: it writes a model that transformers loads."""
    with caplog.at_level("INFO", "luffy"):
        pretrain("tiny", tmp_path, seed=3, recipe=Recipe(updates=100, primitive_updates=60, batch_size=16))
    loss = float(caplog.text.split("loss ")[1].split()[0])
    assert loss < 2.5  # from log(44) = 3.8
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() < 0.5e6


def test_sizes():
    from transformers import Qwen2ForCausalLM

    assert 3e6 < Qwen2ForCausalLM(tinyworld.model_config("small")).num_parameters() < 5e6
    with pytest.raises(ValueError, match="no model size"):
        tinyworld.model_config("large")


def test_spoiled_traces():
    """A share of traces ends in a wrong answer; problems, the other traces and the work stay what they were."""
    clean, spoiled = (tinyworld.make_problems("chain", "train", 200, trace_errors=share) for share in (0.0, 0.3))
    assert [(p.prompt, p.answer) for p in clean] == [(p.prompt, p.answer) for p in spoiled]
    wrong = [(a, b) for a, b in zip(clean, spoiled, strict=True) if a.traces != b.traces]
    assert 40 < len(wrong) < 80
    for a, b in wrong:
        assert b.traces[0].startswith(a.traces[0].split("\\boxed")[0]) and f"{{{a.answer}}}" not in b.traces[0]
    assert all(
        f"{{{p.answer}}}" not in p.traces[0] for p in tinyworld.make_problems("chain", "train", 50, trace_errors=1.0)
    )


def test_several_traces():
    """More traces change neither the problems nor the first trace; they differ where the teacher errs."""
    one, four = (tinyworld.make_problems("chain", "train", 100, num_traces=n) for n in (1, 4))
    assert [(p.prompt, p.answer, p.traces[0]) for p in one] == [(p.prompt, p.answer, p.traces[0]) for p in four]
    assert all(len(p.traces) == 4 and all(f"{{{p.answer}}}" in trace for trace in p.traces) for p in four)
    assert 20 < sum(len(set(p.traces)) > 1 for p in four) < 100
    spoiled = tinyworld.make_problems("chain", "train", 100, num_traces=4, trace_errors=1.0)
    assert not any(f"{{{p.answer}}}" in trace for p in spoiled for trace in p.traces)
