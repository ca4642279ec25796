"""The numbers of the training loop: gradients against formulas, metrics by hand."""

import json

import numpy as np
import pytest
import torch
from helpers import first_part, gradient_of, make_trainer, weights

from luffy import make_config, train
from luffy.methods.rows import Batch, Row
from luffy.objective import policy_scale
from luffy.sampling.ranks import Ranks
from luffy.training.engine import learning_rate_factor
from luffy.training.metrics import Metrics, rollout_metrics

# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["luffy", "rl_sft_loss"])
def test_gradient_does_not_depend_on_micro_batches(tmp_path, method):
    """Policy, entropy, SFT and KL terms together, in one micro-batch and in many."""
    values = dict(method=method, rollout_batch_size=4, mini_batch_size=4, entropy_coef=0.01, beta=0.1)
    whole, rows = gradient_of(tmp_path / "a", micro_batch_tokens=100_000, **values)
    for micro_batch_tokens in (64, 200):
        split, _ = gradient_of(tmp_path / "b", rows, micro_batch_tokens=micro_batch_tokens, **values)
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


PREFIX = dict(prefix_strategy="fixed", prefix_min=0.5, prefix_max=0.5, num_off_policy=2)
FORMULAS = {
    "luffy": [{}, {"loss_type": "dapo"}, {"loss_type": "grpo"}, {"off_ratio": "known"}, PREFIX],
    "mixed": [{}, PREFIX],
    "on_policy_shaping": [{}],
    "rl_sft_loss": [{"sft_loss_coef": 0.7}],
    "sft": [{"sft_loss_coef": 0.7}],
}
CASES = [(method, values) for method, listed in FORMULAS.items() for values in listed]


@pytest.fixture(scope="module")
def known_teacher(tmp_path_factory):
    """Problems of the tiny world in a file, whose teacher has said how likely each token of its traces was to it."""
    from luffy import load_tokenizer, tinyworld
    from luffy.data.tokenization import tokenize_traces

    tokenizer, rng = load_tokenizer("tiny"), np.random.default_rng(0)
    lines = []
    for problem in tinyworld.make_problems(tinyworld.IN_DISTRIBUTION, "train", 40, difficulties=(3, 4)):
        tokens = tokenize_traces(problem.traces[:1], tokenizer)[0].tolist()
        logprobs = (-rng.exponential(0.7, len(tokens))).tolist()
        question = problem.prompt[0]["content"]
        line = dict(problem=question, answer=problem.answer, traces=list(problem.traces), trace_logprobs=[logprobs])
        lines.append(json.dumps(line))
    path = tmp_path_factory.mktemp("data") / "known.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(("method", "values"), CASES)
def test_gradient_is_that_of_the_formulas(tmp_path, method, values, known_teacher):
    """Each method's loss written out token by token with plain logits, on a policy that has moved since it sampled (so
    that ratios, clip and KL act): off- and on-policy terms, entropy, SFT and KL with their normalisers; rows that begin
    in a trace; a teacher whose log-probs are known."""
    values = dict(values, entropy_coef=0.01, beta=0.05, rollout_batch_size=4, mini_batch_size=4)
    # traces with log-probs for every token want a prompt that opens no think block
    known = {"dataset": known_teacher, "model": "tiny"}
    values |= known if values.get("off_ratio") else {"num_problems": 40, "num_traces": 2}
    one = make_trainer(tmp_path, method, max_grad_norm=1e9, **values)
    config, rows = one.config, one.collect(0)
    part = first_part(one, rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    gradients = {}
    one.engine.optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in one.model.named_parameters()})
    metrics = one.update(part)

    no_policy_loss = method in ("rl_sft_loss", "sft")
    baseline = [
        [r.reward for r in rows if r.group == g and not (method == "rl_sft_loss" and r.off_policy)] for g in range(4)
    ]
    in_policy = [not (row.off_policy and no_policy_loss) for row in rows]
    counted = [len(row.token_ids) * counts for row, counts in zip(rows, in_policy, strict=True)]
    tokens = sum(len(row.token_ids) for row in rows)
    own_tokens = sum(len(row.token_ids) - row.foreign for row in rows)
    shape = lambda p: p / (p + 0.1)  # noqa: E731
    loss, clipped = 0.0, 0
    for row, counts, length in zip(rows, in_policy, counted, strict=True):
        ids = torch.tensor([[*row.prompt_ids.tolist(), *row.token_ids.tolist()]])
        first, k = len(row.prompt_ids), row.foreign
        logp = one.model(ids).logits[0].log_softmax(-1)[first - 1 : -1]
        taken = logp.gather(-1, ids[0, first:, None])[:, 0]
        written = torch.from_numpy(row.logprobs)
        advantage = row.reward - sum(baseline[row.group]) / max(1, len(baseline[row.group]))
        foreign = taken[:k].exp() / (written[:k].exp() if values.get("off_ratio") else 1.0)
        gain = advantage * (foreign if method == "mixed" else shape(foreign))
        ratio = (taken[k:] - written[k:]).exp()
        if method == "on_policy_shaping":
            ratio = shape(taken[k:].exp()) / shape(written[k:].exp())
        own = advantage * ratio
        if method in ("mixed", "on_policy_shaping"):
            bounded = advantage * ratio.clamp(0.8, 1.2)
            clipped += int((bounded < own).sum())
            own = torch.minimum(own, bounded)
        if one.reference is not None:
            reference = one.reference(ids).logits[0].log_softmax(-1)[first - 1 : -1]
            gap = (reference.gather(-1, ids[0, first:, None])[:, 0] - taken)[k:]
            loss = loss + config.method.beta * (gap.exp() - gap - 1).sum() / own_tokens
        if counts:
            denominator = {
                "dr_grpo": sum(in_policy) * config.data.max_completion_length,
                "dapo": sum(counted),
                "grpo": sum(in_policy) * length,
            }[config.update.loss_type]
            loss = loss - torch.cat([gain, own]).sum() / denominator
        if no_policy_loss and k:
            loss = loss - config.method.sft_loss_coef * taken.sum() / sum(r.foreign for r in rows)
        loss = loss + config.method.entropy_coef * (logp.exp() * logp).sum() / tokens
    one.model.zero_grad()
    loss.backward()
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=2e-6, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (metrics["kl"] > 1e-4) == (method != "sft")
    assert (metrics["pg_clipfrac"] > 0) == (clipped > 0) and (clipped > 0 or method != "mixed")
    one.close()


def test_options_reach_the_loss(tmp_path):
    values = dict(rollout_batch_size=4, mini_batch_size=4, num_problems=40)
    plain = make_trainer(tmp_path / "a", **values)
    rows = plain.collect(0)
    bounded = make_trainer(tmp_path / "b", **values, off_ratio_max=0.5, scale_rewards="group")
    metrics = [one.update(first_part(one, rows)) for one in (plain, bounded)]
    largest = [one.config.method.signal(Batch.of(rows)).advantage.abs().max() for one in (plain, bounded)]
    assert metrics[0]["off_ratio_max_clip_frac"] == 0 < metrics[1]["off_ratio_max_clip_frac"]
    assert metrics[1]["off_ratio_mean"] <= 0.5
    assert largest[1] > largest[0]


def test_learning_rate_by_hand():
    constant = [learning_rate_factor(i, 10, 3, "constant") for i in range(5)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = [learning_rate_factor(i, 10, 2, "linear") for i in range(10)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def recording(trainer):
    """(tokens, with gradient) of every forward pass that the engine does from now on."""
    passes, forward = [], trainer.engine.token_logprobs
    trainer.engine.token_logprobs = lambda batch: (
        passes.append((len(batch.targets), torch.is_grad_enabled())) or forward(batch)
    )
    return passes


def test_old_logps_are_computed_where_they_are_read_and_not_known(tmp_path):
    """Not for demonstrations, and for the first mini-batch of a step by its update's own forward pass; they are then
    those of the sampler."""
    values = dict(num_problems=40, rollout_batch_size=4, mini_batch_size=2, recompute_old_logp=True)
    one = make_trainer(tmp_path, **values)
    rows = one.collect(0)
    batch, passes = Batch.of(rows), recording(one)
    parts = one.mini_batches(batch, one.config.method.signal(batch))
    own = [row for row in rows if row.group >= 2 and not row.off_policy]
    assert len(parts) == 2 and passes == [(sum(len(row.token_ids) for row in own), False)]
    one.update(parts[0])
    assert len(passes) == 2 and passes[1][1]
    for part in parts:
        mine = ~part.signal.foreign
        assert not torch.equal(
            part.old_logp[mine], part.sampler_logp[mine]
        )  # another computation, with the same result
        torch.testing.assert_close(part.old_logp[mine], part.sampler_logp[mine], atol=1e-5, rtol=1e-5)
    one.close()


def test_rows_without_a_gradient_go_forward_only(tmp_path):
    """On-policy and without an entropy bonus a group without spread has none: the same gradient and metrics, by fewer
    tokens backward."""
    values = dict(method="on_policy", num_problems=40, rollout_batch_size=4, mini_batch_size=4, max_grad_norm=1e9)
    found = {}
    for coefficient in (0.0, 1e-12):  # so small a bonus changes nothing but which rows have a gradient
        one = make_trainer(tmp_path / str(coefficient), entropy_coef=coefficient, **values)
        rows = one.collect(0)
        for row in rows:  # the first two groups have spread
            row.reward = float(row.group < 2 and row.index % 2)
        gradients: dict[str, torch.Tensor] = {}
        one.engine.optimizer.step = lambda g=gradients, m=one.model: g.update(
            {name: p.grad.clone() for name, p in m.named_parameters()}
        )
        passes = recording(one)
        found[coefficient] = gradients, one.update(first_part(one, rows)), passes
        tokens = [sum(len(row.token_ids) for row in rows if (row.group < 2) == spread) for spread in (True, False)]
        assert passes == ([(tokens[0], True), (tokens[1], False)] if not coefficient else [(sum(tokens), True)])
        one.close()
    (few, less, _), (many, more, _) = found.values()
    assert less == pytest.approx(more, rel=1e-5, abs=1e-6)
    for name, gradient in many.items():
        torch.testing.assert_close(few[name], gradient, atol=1e-7, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_without_any_gradient_goes_on_with_its_momentum(tmp_path):
    values = dict(method="on_policy", num_problems=40, rollout_batch_size=2, mini_batch_size=2, warmup_steps=0)
    moved = {}
    for coefficient in (0.0, 1e-12):
        one = make_trainer(tmp_path / str(coefficient), entropy_coef=coefficient, **values)
        for step in range(2):
            rows = one.collect(step)
            for row in rows:
                row.reward = float(step == 0 and row.index % 2)
            one.update(first_part(one, rows))
        moved[coefficient] = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        one.close()
    for name, weight in moved[0.0].items():
        torch.testing.assert_close(weight, moved[1e-12][name], atol=2e-6, rtol=1e-5)


def test_several_passes_over_the_rows(tmp_path, short_run):
    """num_iterations: twice as many optimiser steps on the same rows; the ratio of the second pass is not 1."""
    once, twice = (
        train(make_config("mixed", **short_run, num_iterations=n, warmup_steps=0), tmp_path / str(n)) for n in (1, 2)
    )
    first, second = once.metrics()[1], twice.metrics()[1]
    assert second["total/trained_tokens"] == 2 * first["total/trained_tokens"]
    assert second["total/generated_tokens"] == first["total/generated_tokens"]
    assert second["old_logp_gap/max"] > 1.5 * first["old_logp_gap/max"]
    again = train(
        make_config("mixed", **short_run, num_iterations=2, warmup_steps=0, recompute_old_logp=True), tmp_path / "again"
    )
    assert again.metrics()[1]["old_logp_gap/max"] == pytest.approx(second["old_logp_gap/max"], rel=1e-2)


def test_truncated_rollouts_without_advantage(tmp_path, short_run):
    """mask_truncated_completions: rollouts that the window cut have none; traces and the baseline stay."""
    values = {**short_run, "max_completion_length": 30}
    plain = make_trainer(tmp_path / "a", **values)
    rows = plain.collect(0)
    rows[0].truncated = True
    rows[0].reward = 1.0
    batch = Batch.of(rows)
    masked = make_config("luffy", **values, mask_truncated_completions=True).method.signal(batch).advantage
    usual = plain.config.method.signal(batch).advantage
    cut = batch.spread(torch.tensor([row.truncated and not row.off_policy for row in rows]))
    assert (masked[cut] == 0).all() and torch.equal(masked[~cut], usual[~cut])
    assert (usual[cut] != 0).any()


def test_without_demonstrations_and_clip_luffy_is_dr_grpo(tmp_path):
    """num_off_policy = 0: nothing of LUFFY is left but R - mean and the plain ratio."""
    values = dict(rollout_batch_size=4, mini_batch_size=4)
    luffy, rows = gradient_of(tmp_path / "a", num_off_policy=0, **values)
    plain, _ = gradient_of(tmp_path / "b", rows, method="on_policy_no_clip", **values)
    assert all(torch.equal(luffy[name], plain[name]) for name in luffy)


def row(problem, group, index, prompt, tokens, foreign, truncated=False, reward=0.0):
    known = np.zeros(len(tokens), np.float32)
    return Row(problem, group, index, np.array(prompt), np.array(tokens), foreign, known, truncated, reward=reward)


def test_rl_sft_loss_takes_its_baseline_from_the_rollouts():
    rows = [row(0, 0, i, [5], [1], int(i == 3), reward=r) for i, r in enumerate([1.0, 0.0, 0.0, 1.0])]
    signal = make_config("rl_sft_loss", sft_loss_coef=0.7).method.signal(Batch.of(rows))
    assert signal.advantage.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 2 / 3])
    assert signal.policy.tolist() == [1, 1, 1, 0] and signal.likelihood.tolist() == pytest.approx([0, 0, 0, 0.7])


def test_denominators_by_hand():
    """Rows of three and one tokens, the first of them with a token of weight 0, and one that takes no part."""
    weights = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0])
    rows = torch.tensor([0, 0, 0, 1, 2])
    scale = lambda kind: policy_scale(weights, rows, loss_type=kind, window=10).tolist()  # noqa: E731
    assert scale("dr_grpo") == pytest.approx([0, 2 / 20, 1 / 20, 1 / 20, 0])
    assert scale("dapo") == pytest.approx([0, 2 / 3, 1 / 3, 1 / 3, 0])
    assert scale("grpo") == pytest.approx([0, 2 / 4, 1 / 4, 1 / 2, 0])
    with pytest.raises(ValueError, match="loss_type is"):
        scale("bnpo")


def test_gradient_checkpointing_recomputes_and_changes_nothing(tmp_path, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    values = dict(rollout_batch_size=4, mini_batch_size=4)
    plain, rows = gradient_of(tmp_path / "a", **values)
    calls, forward = [], Qwen2DecoderLayer.forward
    monkeypatch.setattr(Qwen2DecoderLayer, "forward", lambda *a, **k: calls.append(0) or forward(*a, **k))
    gradient_of(tmp_path / "b", rows, **values)
    without = len(calls)
    recomputed, _ = gradient_of(tmp_path / "c", rows, gradient_checkpointing=True, **values)
    layers = 3  # the model is also run when it is loaded, to check its head
    assert len(calls) - without == without + layers
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-4)


def test_bfloat16_and_checkpointing_train(tmp_path, short_run):
    values = dict(steps=2, precision="bfloat16", recompute_old_logp=True, gradient_checkpointing=True)
    run = train(make_config("luffy", **{**short_run, **values}), tmp_path / "run")
    assert run.is_complete and {w.dtype for w in weights(run).values()} == {torch.float32}
    full = train(make_config("luffy", **{**short_run, "steps": 2}), tmp_path / "full")
    loss, expected = (r.metrics()[1]["sft_loss"] for r in (run, full))
    assert loss != expected and loss == pytest.approx(expected, rel=0.02)


def test_kl_to_the_base_model_is_zero_at_the_start_and_grows(tmp_path, short_run):
    run = train(
        make_config("luffy", **{**short_run, "beta": 0.01, "learning_rate": 1e-3, "warmup_steps": 0}), tmp_path / "kl"
    )
    kl = [row["kl"] for row in run.metrics()[1:]]
    assert kl[0] < kl[-1] and all(value >= 0 for value in kl)


def test_rollout_metrics_by_hand():
    rows = [
        row(0, 0, 0, [5, 5], [3, 1], 0, reward=1.0),
        row(0, 0, 1, [5, 5], [3, 3, 3, 3], 0, truncated=True),
        row(0, 0, 2, [5, 5], [3, 3, 1], 3, reward=1.0),
        row(1, 1, 0, [5], [1], 0),
        row(1, 1, 1, [5], [1], 0),
        row(2, 2, 0, [5], [3, 3, 3, 1], 3, reward=1.0),
    ]
    metrics = rollout_metrics(rows, torch.tensor([1 / 3, -2 / 3, 1 / 3, 0.0, 0.0, 0.0]), traces_wanted=1)
    assert metrics["reward/mean"] == 0.5 and metrics["reward/on"] == 0.25 and metrics["reward/off"] == 1.0
    assert metrics["reward/prefix"] == 1.0 and metrics["prefix/share"] == 0.75
    assert metrics["groups/all_wrong"] == 0.5 and metrics["groups/all_right"] == 0.0
    assert metrics["length/on"] == 2.0 and metrics["length/off"] == 3.0 and metrics["length/max"] == 4
    assert metrics["truncated/on"] == 0.25 and metrics["groups/off_policy_share"] == 1 / 6
    assert metrics["groups/without_trace"] == pytest.approx(1 / 3) and metrics["groups/prefix_share"] == 1 / 6
    assert rollout_metrics([], torch.zeros(0), 1)["reward/mean"] == 0.0


def test_metrics_are_sums_and_counts():
    metrics = Metrics(torch.device("cpu"))
    for values in ([1.0, 2.0, 6.0], [], [11.0]):
        metrics.means({"mean": torch.tensor(values), "none": torch.zeros(0)})
        metrics.totals({"sum": torch.tensor(float(len(values)))})
        metrics.maxima({"top": torch.tensor(values), "nothing": torch.zeros(0)})
    assert metrics.values(Ranks()) == {"mean": 5.0, "none": 0.0, "sum": 4.0, "top": 11.0, "nothing": 0.0}
