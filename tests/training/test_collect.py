"""The groups of a step: hand-made rounds, prefixes, keyed draws, with the real sampler and verifier."""

import numpy as np
import pytest
from helpers import make_trainer

from luffy.data.templates import continuation
from luffy.data.tokenization import tokenize_traces
from luffy.methods import Luffy
from luffy.methods.prefixes import prefix_shares
from luffy.methods.rows import ROLLOUT, Draw, Memory, Start, Trace, whole
from luffy.training.problems import draw_problems

EOS = 1


def test_every_problem_once_an_epoch_in_a_new_order():
    epochs = [
        [i for step in range(first, first + 5) for i in draw_problems(11, 2, seed=3, step=step)] for first in (0, 5)
    ]
    assert all(len(set(epoch)) == 10 and set(epoch) <= set(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert draw_problems(11, 2, seed=4, step=0) != draw_problems(11, 2, seed=3, step=0)
    with pytest.raises(ValueError, match="fewer than"):
        draw_problems(3, 4, seed=0, step=0)


def draw(traces, step=0, problem=0, size=8):
    tokens = [Trace(np.arange(length, dtype=np.int32)) for length in traces]
    return Draw(problem, tokens, size, seed=0, step=step, memory=Memory())


def starts(method, *arguments, **named):
    (only,) = method.rounds(draw(*arguments, **named))
    return only


def test_group_is_rollouts_and_demonstrations():
    for traces, lengths in (([5], [5]), ([], []), ([5, 6, 7], [6, 7])):
        group = starts(Luffy(num_off_policy=2), traces, problem=2)
        assert len(group) == 8 and [len(s.tokens) for s in group[: 8 - len(lengths)]] == [0] * (8 - len(lengths))
        assert len(lengths) == sum(s.whole for s in group) and all(s.whole for s in group[8 - len(lengths) :])


def test_traces_are_drawn_reproducibly_and_vary_with_the_step():
    draws = [[len(t.tokens) for t in draw([1, 2, 3, 4, 5], step, 7).some_traces(2)] for step in range(20)]
    assert draws == [[len(t.tokens) for t in draw([1, 2, 3, 4, 5], step, 7).some_traces(2)] for step in range(20)]
    assert all(len(set(found)) == 2 for found in draws) and {i for found in draws for i in found} == {1, 2, 3, 4, 5}
    assert len(draw([1, 2]).some_traces(5)) == 2


def test_share_of_groups_that_get_their_traces():
    method = Luffy(trace_share=0.3)
    got = [sum(s.whole for s in starts(method, [5], step=step)) for step in range(400)]
    assert set(got) == {0, 1} and 80 < sum(got) < 160  # 120 expected, four standard deviations of 9


# --- prefixes --------------------------------------------------------------------------------------------------------


def shares(strategy, rows=4, low=0.2, high=0.8, done=0.0, shared=False, seed=0):
    rng = np.random.default_rng(seed)
    return prefix_shares(strategy, rows=rows, low=low, high=high, done=done, shared=shared, rng=rng)


def test_shares_by_hand():
    assert shares("fixed") == pytest.approx([0.2, 0.4, 0.6, 0.8]) and shares("fixed", rows=1) == [0.8]
    assert shares("fixed", shared=True) == pytest.approx([0.2] * 4)
    drawn = shares("random", rows=1000)
    assert 0.2 <= min(drawn) < 0.21 and 0.79 < max(drawn) <= 0.8 and len(set(shares("random", shared=True))) == 1
    assert shares("linear", shared=True, done=0.25) == pytest.approx([0.6] * 4)
    assert shares("reverse_linear", shared=True, done=0.25) == pytest.approx([0.2] * 4)
    for done, falling, rising in ((0.0, 0.8, 0.08), (0.55, 0.4, 0.48), (1.0, 0.08, 0.8)):
        assert 0.9 * falling < max(shares("linear", rows=1000, done=done)) <= falling
        assert 0.9 * rising < max(shares("reverse_linear", rows=1000, done=done)) <= rising


def test_a_prefix_is_the_beginning_of_the_trace():
    method = Luffy(num_off_policy=4, prefix_strategy="fixed", prefix_min=0.0, prefix_max=1.0)
    group = starts(method, [9])
    assert [len(s.tokens) for s in group] == [0] * 5 + [3, 6, 9] and [s.whole for s in group][-3:] == [
        False,
        False,
        True,
    ]
    assert group[-2].tokens.tolist() == [0, 1, 2, 3, 4, 5]
    falling = Luffy(prefix_strategy="linear", prefix_max=0.5, prefix_steps=10, prefix_shared=True)
    assert [len(starts(falling, [20], step=step)[-1].tokens) for step in (0, 5, 10, 50)] == [10, 5, 0, 0]


def test_the_policy_goes_on_from_a_prefix(tmp_path, short_run):
    """A row that begins in a trace has its tokens, then the policy's with their log-probs; the window holds both; the
    reward is that of the whole text; a share of 1 is the whole trace, ended as it is."""
    values = dict(num_off_policy=2, num_traces=2, prefix_strategy="fixed", prefix_min=0.5, prefix_max=0.9)
    one = make_trainer(tmp_path / "run", **{**short_run, **values, "max_completion_length": 40})
    rows = one.collect(0)
    prefixed = [row for row in rows if row.prefixed]
    assert len(prefixed) == 8 and [row.index for row in prefixed] == [2, 3] * 4
    for row in prefixed:
        traces = [t.tokens for t in one.problems[row.problem].traces]
        share = (0.5, 0.9)[row.index - 2]
        trace = next(t for t in traces if t[: row.foreign].tolist() == row.token_ids[: row.foreign].tolist())
        assert row.foreign == int(share * len(trace)) and not row.off_policy
        assert np.isnan(row.logprobs[: row.foreign]).all() and np.isfinite(row.logprobs[row.foreign :]).all()
        assert len(row.token_ids) <= 40 and row.truncated == (row.token_ids[-1] != EOS)
        judged = one.reward.batch()
        judged.add(one.problems[row.problem].problem, one.problems[row.problem].prompt_text, row.text)
        assert judged.finish() == [row.reward]
    part_logps = one.logprobs(rows, one.engine.token_logprobs)
    sampled = np.concatenate([row.logprobs for row in rows])
    own = ~np.isnan(sampled)
    np.testing.assert_allclose(part_logps.numpy()[own], sampled[own], atol=1e-5)
    again = one.collect(0)
    assert [row.token_ids.tolist() for row in again] == [row.token_ids.tolist() for row in rows]
    one.close()


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_see_the_rewards_of_the_rounds_before(tmp_path, short_run, monkeypatch):
    """A hand-made method: one rollout; where it is wrong, the trace; then, where that is right, its first half."""
    seen = []

    def rounds(self, draw):
        group = yield [ROLLOUT]
        seen.append([row.reward for row in group])
        if not group[0].right:
            group = yield [whole(draw.traces[0])]
            seen.append([row.reward for row in group])
            if group[1].right:
                head = draw.traces[0].head(len(draw.traces[0].tokens) // 2)
                yield [Start(head.tokens, head.logprobs)]

    monkeypatch.setattr(Luffy, "rounds", rounds)
    one = make_trainer(tmp_path / "run", **{**short_run, "max_completion_length": 96})
    rows = one.collect(0)
    groups = [[row for row in rows if row.group == g] for g in range(4)]
    assert {len(group) for group in groups} <= {1, 3} and any(len(group) == 3 for group in groups)
    for group in groups:
        assert [row.index for row in group] == list(range(len(group)))
        if len(group) == 3:
            assert group[0].foreign == 0 and group[1].off_policy and group[1].right and group[2].prefixed
    assert all(len(rewards) in (1, 2) for rewards in seen) and len(seen) == 4 + sum(len(g) == 3 for g in groups)
    one.close()


def test_cut_trace_is_a_truncated_demonstration(tmp_path, short_run):
    one = make_trainer(tmp_path / "run", method="sft", **{**short_run, "max_completion_length": 10})
    assert all(row.truncated and row.off_policy and len(row.token_ids) == 10 for row in one.collect(0))
    one.close()


def test_supervised_groups_are_never_sampled(tmp_path, short_run):
    one = make_trainer(tmp_path / "run", method="sft", **short_run)
    one.sampler.sampler.sample = None
    first = one.problems[0]
    (trace,) = tokenize_traces([continuation(first.problem.traces[0], first.prompt_text)], one.tokenizer)
    trace = trace.tolist()
    assert one.problems[0].traces[0].tokens.tolist() == trace and trace[-1] == EOS
    assert [row.foreign for row in one.collect(0)] == [len(row.token_ids) for row in one.collect(0)]
    one.close()
