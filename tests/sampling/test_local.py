import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, random_model, trained_logprobs

from luffy.sampling import decoder
from luffy.sampling.local import TransformersSampler, _pick
from luffy.sampling.protocol import SamplingParams, SamplingRequest

PROMPTS = [np.array(ids) for ids in ([3, 4, 5], [9], [7, 7, 2, 8, 9, 20], [3, 4, 6])]


def requests(generations=5):
    return [SamplingRequest(prompt, i, g) for i, prompt in enumerate(PROMPTS) for g in range(generations)]


def sample(model, reqs, *, temperature=1.0, max_new_tokens=12, seed=0, step=0, max_rows=512):
    sampler = TransformersSampler(model, eos_ids=[1, 2], pad_id=0, max_rows=max_rows)
    found = dict(sampler.sample(reqs, SamplingParams(max_new_tokens, temperature, seed=seed, step=step)))
    assert sorted(found) == list(range(len(reqs)))
    return [found[i] for i in range(len(reqs))]


def ids(rollout):
    return rollout.token_ids.tolist()


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_greedy_equals_generate(architecture, tied):
    model = random_model(architecture, tied)
    model.generation_config.eos_token_id = [1, 2]
    for prompt, rollout in zip(
        PROMPTS, sample(model, [SamplingRequest(p, i, 0) for i, p in enumerate(PROMPTS)], temperature=0), strict=True
    ):
        expected = model.generate(
            torch.tensor(prompt)[None], attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=12
        )
        assert rollout.token_ids.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_policy(temperature):
    """Equal to the trainer's log-probs at the same temperature, for every token of every row."""
    model, reqs = random_model("Qwen2"), requests()
    rollouts = sample(model, reqs, temperature=temperature)
    sampled = torch.tensor([p for o in rollouts for p in o.logprobs])
    torch.testing.assert_close(sampled, trained_logprobs(model, reqs, rollouts, temperature), atol=1e-5, rtol=1e-5)


def test_row_does_not_depend_on_the_rest_of_the_batch():
    model, reqs = random_model("Qwen2"), requests()
    whole = sample(model, reqs)
    assert [ids(r) for r in sample(model, reqs, max_rows=3)] == [ids(r) for r in whole]
    assert [ids(r) for r in sample(model, reqs[::-1])] == [ids(r) for r in whole[::-1]]
    assert sample(model, reqs[7:8])[0].token_ids.tolist() == ids(whole[7])


def test_a_row_goes_on_from_a_prefix_in_what_is_left_of_the_window():
    """Greedy: behind its own first tokens the model says what it said without them, until the same end."""
    model = random_model("Qwen2")
    whole = sample(model, requests(1), temperature=0)
    heads = [min(2 * i, len(r.token_ids) - 1) for i, r in enumerate(whole)]
    reqs = [
        SamplingRequest(np.concatenate([prompt, r.token_ids[:k]]), i, 0, used=k)
        for i, (prompt, r, k) in enumerate(zip(PROMPTS, whole, heads, strict=True))
    ]
    assert max(heads) > 2
    for k, before, after in zip(heads, whole, sample(model, reqs, temperature=0), strict=True):
        assert ids(after) == ids(before)[k:] and after.truncated == before.truncated
        np.testing.assert_allclose(after.logprobs, before.logprobs[k:], atol=1e-5)


def test_seed_and_step_change_the_draw():
    model, reqs = random_model("Qwen2"), requests()
    draws = [[ids(r) for r in sample(model, reqs, seed=seed, step=step)] for seed, step in ((0, 0), (1, 0), (0, 1))]
    assert draws[0] != draws[1] != draws[2] != draws[0]
    assert len({tuple(tokens) for tokens in draws[0][:5]}) > 1  # generations of one prompt differ


def test_rows_end_at_the_first_eos_or_are_truncated():
    rollouts = sample(random_model("Qwen2"), requests(20), max_new_tokens=8)
    for rollout in rollouts:
        assert not {1, 2} & set(ids(rollout)[:-1])
        assert rollout.truncated == (rollout.token_ids[-1] not in (1, 2))
        assert len(rollout.token_ids) == len(rollout.logprobs) == (8 if rollout.truncated else len(rollout.token_ids))
    assert {rollout.truncated for rollout in rollouts} == {True, False}


def test_frequencies_follow_the_distribution():
    model = random_model("Qwen2", vocab_size=8)
    reqs = [SamplingRequest(np.array([3, 4]), 0, g) for g in range(4000)]
    first = torch.tensor([r.token_ids[0] for r in sample(model, reqs, max_new_tokens=1, max_rows=4000)])
    expected = model(torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
    observed = first.bincount(minlength=8) / 4000
    assert (observed - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5  # four standard errors at most


def test_nothing_to_sample():
    assert sample(random_model("Qwen2"), []) == []


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama", "Mistral"])
def test_fused_steps_equal_the_models_own(architecture, monkeypatch):
    """Prompts of unequal length, rows that end early: the same tokens, with the same log-probs."""
    model, reqs = random_model(architecture), requests()
    assert model.config.model_type in decoder.LIKE_LLAMA
    fused = sample(model, reqs)
    monkeypatch.setattr(decoder, "LIKE_LLAMA", frozenset())
    for ours, theirs in zip(fused, sample(model, reqs), strict=True):
        assert ids(ours) == ids(theirs)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    assert len({len(rollout.token_ids) for rollout in fused}) > 1


ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_fused_steps_rotate_as_the_model_does(rope, monkeypatch):
    """Heads of another size than the hidden states give, positions up to the model's last."""
    parameters = {"rope_theta": 1e4, "original_max_position_embeddings": 16, **rope}
    model = random_model("Llama", head_dim=12, max_position_embeddings=32, rope_parameters=parameters)
    fused = sample(model, requests(), max_new_tokens=26)
    monkeypatch.setattr(decoder, "LIKE_LLAMA", frozenset())
    assert [ids(r) for r in fused] == [ids(r) for r in sample(model, requests(), max_new_tokens=26)]


def test_half_precision_samples_what_the_trainer_says():
    model = random_model("Qwen2").bfloat16()
    rollouts = sample(model, requests())
    sampled = torch.tensor([p for o in rollouts for p in o.logprobs])
    gap = (sampled - trained_logprobs(model, requests(), rollouts)).abs()
    assert gap.mean() < 0.05 and gap.max() < 0.6


def test_a_model_that_is_not_prepared_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    with pytest.raises(ValueError, match="not prepared"):
        TransformersSampler(LlamaForCausalLM(LlamaConfig(**sizes)), eos_ids=[1], pad_id=0)


def test_fused_steps_add_every_bias(monkeypatch):
    model = random_model("Llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    fused = sample(model, requests())
    monkeypatch.setattr(decoder, "LIKE_LLAMA", frozenset())
    assert [ids(r) for r in fused] == [ids(r) for r in sample(model, requests())]


@pytest.mark.parametrize("architecture", ["Gemma", "Olmo2", "Phi3"])
def test_other_architectures_go_by_their_own_forward_pass(architecture):
    """Scaled embeddings, norms in other places, joined projections: sampler and trainer say the same of each."""
    model, reqs = random_model(architecture), requests()
    assert model.config.model_type not in decoder.LIKE_LLAMA
    rollouts = sample(model, reqs)
    torch.testing.assert_close(
        torch.tensor([p for o in rollouts for p in o.logprobs]),
        trained_logprobs(model, reqs, rollouts),
        atol=1e-5,
        rtol=1e-5,
    )


def test_top_p_by_hand():
    """Probabilities .5, .3, .15, .05 in another order: at 0.7 the first two remain, as 5/8 and 3/8."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    drawn = {}
    for uniform in (0.0, 0.1, 0.6, 0.63, 0.999):
        picked, logp = _pick(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, 0.7)
        drawn[uniform] = picked.item()
        assert logp.exp().item() == pytest.approx({1: 5 / 8, 3: 3 / 8}[picked.item()], rel=1e-6)
    assert drawn == {0.0: 1, 0.1: 1, 0.6: 1, 0.63: 3, 0.999: 3}
    tokens = [
        _pick(logits, torch.tensor([u / 50], dtype=torch.float64), 1.0, p)[0].item()
        for p in (0.45, 1.0)
        for u in range(50)
    ]
    assert set(tokens[:50]) == {1} and set(tokens[50:]) == {0, 1, 2, 3}  # one token has more than 0.45; 1 keeps all
