"""The rules of the methods after LUFFY, by hand: schedules, ratios, who joins a group, memory, weights."""

import itertools
import math

import numpy as np
import pytest
import torch

from luffy import ConfigError, make_config, objective, shaping
from luffy.methods import METHODS
from luffy.methods.arena.trapo import micro_groups
from luffy.methods.rows import ROLLOUT, Batch, Draw, Memory, Now, Row, Signal, Start, Trace
from luffy.methods.schedules import at
from luffy.training.problems import draw_problems, spare_problem


def trace(length):
    return Trace(np.arange(length, dtype=np.int32))


def row(reward=0.0, foreign=0, length=4, group=0, index=0, problem=0, **values):
    tokens = np.arange(length, dtype=np.int32)
    logprobs = np.full(length, -1.0, np.float32)
    return Row(problem, group, index, tokens, tokens, foreign, logprobs, False, reward=reward, **values)


def played(method, rights, traces=(10,), size=8, **values):
    """The starts of each round of a group whose rounds have so many right rows, one number a round."""
    draw = Draw(0, [trace(n) for n in traces], size, seed=0, step=values.pop("step", 0), memory=Memory(), **values)
    rounds, group, made = method.rounds(draw), [], []
    try:
        starts = next(rounds)
        for right in itertools.chain(rights, itertools.repeat(0)):
            made.append(starts)
            for i, start in enumerate(starts):
                length = len(start.tokens) + (0 if start.whole else 3)
                group.append(row(float(i < right), len(start.tokens), length, index=len(group), round=len(made) - 1))
            starts = rounds.send(list(group))
    except StopIteration:
        return made, group


def lengths(starts):
    return [len(start.tokens) for start in starts]


# --- schedules and shapings ------------------------------------------------------------------------------------------


def test_schedules():
    """CHORD's published one: warm-up 200, then half a cosine over 400 steps from .5 to .02."""
    mu = dict(start=0.5, end=0.02, steps=400, warmup=200)
    assert [at(mu, step) for step in (0, 100, 200, 400, 600, 900)] == pytest.approx([0, 0.25, 0.5, 0.26, 0.02, 0.02])
    assert at(0.3, 17) == 0.3
    line = dict(start=1.0, end=0.0, steps=4, shape="linear")
    assert [at(line, step) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [at({**line, "shape": "step"}, step) for step in (0, 3, 4)] == [1, 1, 0]
    hints = METHODS["uft"]().hint_share  # q(t) = .05 + .45 (1 + cos(pi t / 300))
    assert [at(hints, step) for step in (0, 75, 150, 300)] == pytest.approx(
        [0.95, 0.05 + 0.45 * (1 + np.cos(np.pi / 4)), 0.5, 0.05]
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("fast", "a number, or a mapping as JSON"),
        ({"start": 1, "end": 0}, "start, end, steps"),
        ({"start": 1, "end": 0, "steps": -1}, "at least 0"),
        ({"start": 1, "end": 0, "steps": 1, "shape": "round"}, "cosine, linear, step"),
        ({"start": True, "end": 0, "steps": 1}, "must have numbers"),
        (1.5, "a share of the loss"),
        ({"start": 1.2, "end": 0, "steps": 1}, "a share of the loss"),
    ],
)
def test_impossible_schedules(given, told):
    with pytest.raises(ConfigError, match=told):
        make_config("chord_mu", mu=given)


def test_a_schedule_by_flag_and_in_a_file(tmp_path):
    from luffy.cli import parse_train
    from luffy.config import from_dict

    given = '{"start": 0.5, "end": 0.1, "steps": 10}'
    config, _, _ = parse_train(["--method", "chord_mu", "--mu", given, "--run-dir", str(tmp_path)])
    assert at(config.method.mu, 0) == 0.5 and at(config.method.mu, 10) == 0.1
    assert from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        (shaping.Parabola(), lambda p: p * (1 - p)),
        (shaping.TrustRegion(0.1), lambda p: torch.clamp(p / 0.1, max=1)),
    ],
)
def test_weights_of_the_new_shapings(shape, weight):
    """In the policy term by their gradient, and in the likelihood term."""
    p = torch.tensor([0.01, 0.05, 0.2, 0.5, 0.9], requires_grad=True)
    (slope,) = torch.autograd.grad(shape(p).sum(), p)
    torch.testing.assert_close(slope * p, weight(p))
    torch.testing.assert_close(shape.gradient_weight(p), weight(p))
    ones = torch.ones(5)
    signal = Signal(ones, ones, 0.5 * ones, ones, torch.ones(5, dtype=torch.bool), torch.arange(5))
    torch.testing.assert_close(signal.shaped(shape, p.detach().log()).likelihood, 0.5 * weight(p.detach()))


def test_values_of_the_new_shapings():
    """x - x^2 / 2; and x / alpha, which is 1 at alpha, then 1 + log(x / alpha)."""
    x = torch.tensor([0.05, 0.1, 0.5, 1.0])
    torch.testing.assert_close(shaping.Parabola()(x), torch.tensor([0.04875, 0.095, 0.375, 0.5]))
    expected = torch.tensor([0.5, 1.0, 1 + math.log(5), 1 + math.log(10)])
    torch.testing.assert_close(shaping.TrustRegion(0.1)(x), expected)
    for name, parameter in (("parabola", None), ("trust_region", 0.2)):
        values = {"gamma": parameter} if parameter else {}
        assert make_config("mixed", off_shaping=name, **values).method.ratios.off_shaping == shaping.get(
            name, **({"alpha": parameter} if parameter else {})
        )


# --- ratios, clips, scales -------------------------------------------------------------------------------------------


def losses(ratios, logp, old, advantage, foreign=None, **values):
    logp = torch.tensor(logp, requires_grad=True)
    foreign = torch.zeros(len(logp), dtype=torch.bool) if foreign is None else torch.tensor(foreign)
    found = objective.token_losses(logp, torch.tensor(old), torch.tensor(advantage), foreign, ratios, **values)
    (slope,) = torch.autograd.grad(found.losses.sum(), logp)
    return found, slope


def test_ratio_of_a_row():
    """GSPO: s = exp(mean log-ratio of the row), on every token's own gradient; rows do not see each other."""
    logp, old = [-1.0, -2.0, -0.5], [-1.2, -1.8, -1.5]
    found, slope = losses(objective.Ratios(level="row"), logp, old, [2.0, 2.0, -1.0], rows=torch.tensor([7, 7, 3]))
    first, second = 1.0, float(np.exp(1.0))  # (0.2 - 0.2) / 2, and 1.0
    torch.testing.assert_close(found.losses.detach(), torch.tensor([-2 * first, -2 * first, second]))
    torch.testing.assert_close(slope, torch.tensor([-2 * first, -2 * first, second]))


def test_clip_of_the_weight():
    """CISPO: -A clamp(r) log pi; the gradient stays where PPO has none."""
    logp, old = [np.log(0.5), np.log(0.1)], [np.log(0.25), np.log(0.1)]  # ratios 2 and 1
    found, slope = losses(objective.Ratios(clip=(0.2, 0.28), clip_kind="weight"), logp, old, [1.0, 1.0])
    torch.testing.assert_close(slope.float(), torch.tensor([-1.28, -1.0]))
    assert found.clipped.tolist() == [True, False]
    _, ppo = losses(objective.Ratios(clip=(0.2, 0.28)), logp, old, [1.0, 1.0])
    torch.testing.assert_close(ppo.float(), torch.tensor([0.0, -1.0]))


def test_no_ratio_and_a_clip_on_demonstrations():
    _, slope = losses(objective.Ratios(level="none"), [-1.0, -3.0], [-9.0, -1.0], [2.0, -1.0])
    torch.testing.assert_close(slope, torch.tensor([-2.0, 1.0]))
    logp, old = [np.log(0.5), np.log(0.11), np.log(0.05)], [np.log(0.25), np.log(0.1), np.log(0.1)]
    clipped, slope = losses(
        objective.Ratios(off_clip=(0.2, 0.28)), logp, old, [1.0] * 3, [True] * 3, teacher_logp=torch.tensor(old)
    )
    torch.testing.assert_close(slope.float(), torch.tensor([0.0, -1.1, -0.5]))  # PPO's: below it still pulls
    assert clipped.clipped.tolist() == [True, False, False]


def test_advantages_over_the_mean():
    """MaxRL: (R - mean) / mean: with one right of four 3 and -1, where none is right 0."""
    rewards, groups = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), torch.tensor([0] * 4 + [1] * 4)
    found = objective.group_advantages(rewards, groups, scale_rewards="mean")
    assert found.tolist() == [3, -1, -1, -1, 0, 0, 0, 0]


def test_each_problem_of_a_group_has_its_own_baseline():
    rows = [row(1.0, problem=1), row(0.0, problem=1, index=1), row(1.0, problem=2, index=2), row(1.0, group=1)]
    assert Batch.of(rows).advantages().tolist() == [0.5, -0.5, 0, 0]


# --- who joins a group -----------------------------------------------------------------------------------------------


def test_gates():
    for method, right, joined in [("hpt", 0, 1), ("hpt", 1, 0), ("superrl", 0, 1), ("superrl", 8, 0)]:
        made, _ = played(METHODS[method](), [right])
        assert len(made) == 1 + joined and made[0] == [ROLLOUT] * 8
    assert len(played(METHODS["hpt"](gate=2), [2])[0]) == 2 and len(played(METHODS["hpt"](gate=2), [3])[0]) == 1
    assert len(played(METHODS["hpt"](), [0], traces=())[0][1]) == 0  # nothing to imitate: the rollouts stay
    assert played(METHODS["ampo"](), [1])[0] == [[ROLLOUT] * 8]
    assert lengths(played(METHODS["ampo"](), [0], traces=(5, 6, 7))[0][1]).__len__() == 2


def test_what_counts_where_a_trace_has_taken_over():
    _, group = played(METHODS["hpt"](), [0], traces=(10,))
    signal = METHODS["hpt"](sft_loss_coef=0.5).signal(Batch.of(group))
    assert not signal.policy.any() and signal.likelihood.tolist() == [0.0] * 24 + [0.5] * 10
    _, group = played(METHODS["ampo"](), [0], traces=(5, 5))
    for member in group[-2:]:
        member.reward = 1.0
    signal = METHODS["ampo"]().signal(Batch.of(group))
    rows = signal.rows[signal.active].unique().tolist()
    assert rows == [0, 1, 2, 3, 4, 5, 8, 9]  # the last two rollouts have made room
    first = Batch.of(group).first
    assert signal.advantage[first][rows].tolist() == pytest.approx([-0.25] * 6 + [0.75] * 2)


def test_micro_groups():
    """TRAPO with 8 rows: 4, then 2 with a quarter unless 2 are right, 1 with half unless 4 of 6, the trace unless 7."""
    assert micro_groups(8) == [4, 2, 1, 1] and micro_groups(16) == [8, 4, 2, 2] and sum(micro_groups(6)) == 6
    cases = {
        (0, 0, 0): [[0] * 4, [5, 5], [10], [20]],
        (2, 2, 1): [[0] * 4, [0, 0], [0], [20]],
        (4, 2, 1): [[0] * 4, [0, 0], [0], [0]],
        (2, 0, 0): [[0] * 4, [0, 0], [10], [20]],
        (1, 2, 1): [[0] * 4, [5, 5], [10], [20]],
        (4, 2, 0): [[0] * 4, [0, 0], [0], [20]],
    }
    for rights, expected in cases.items():
        made, _ = played(METHODS["trapo"](), rights, traces=(20,))
        assert [lengths(starts) for starts in made] == expected, rights
    _, group = played(METHODS["trapo"](), (0, 0, 0), traces=(20,))
    signal = METHODS["trapo"]().signal(Batch.of(group))
    by_row = [signal.policy[signal.rows == i].tolist() for i in range(8)]
    assert by_row[4] == [1.0] * 8 and by_row[5] == [0.0] * 5 + [1.0] * 3  # the second of two equal beginnings
    assert signal.advantage[signal.foreign].unique().tolist() == [1.0]


def test_a_search_for_the_shortest_beginning():
    """BREAD, ten pieces of ten tokens: 5 will do, 2 is too hard, 3 too, 4 will do; it is learned, not what is shown."""
    made, group = played(METHODS["bread"](), [0, 4, 0, 0, 2], traces=(100,))
    assert [set(lengths(starts)) for starts in made] == [{0}, {50}, {20}, {30}, {40}]
    signal = METHODS["bread"]().signal(Batch.of(group))
    kept = signal.rows[signal.active].unique().tolist()
    assert kept == list(range(32, 40)) and not signal.policy[signal.foreign].any()
    _, group = played(METHODS["bread"](), [0, 4, 0, 0, 8], traces=(100,))  # 4 is too easy: 5 it is
    signal = METHODS["bread"]().signal(Batch.of(group))
    assert signal.rows[signal.active].unique().tolist() == list(range(8, 16))
    assert len(played(METHODS["bread"](), [1])[0]) == 1
    assert len(played(METHODS["bread"](), [0], traces=())[0]) == 1
    assert [set(lengths(s)) for s in played(METHODS["bread"](), [0] * 9, traces=(100,))[0]] == [
        {0},
        {50},
        {70},
        {80},
        {90},
    ]


def test_prefixes_and_hints():
    starts = [played(METHODS["prefix_rft"](), [0], traces=(100,), step=step)[0][0] for step in range(60)]
    found = [lengths(group)[-1] for group in starts]
    assert all(lengths(group)[:-1] == [0] * 7 for group in starts) and min(found[:3]) >= 90 and max(found) <= 95
    late = [lengths(played(METHODS["prefix_rft"](), [0], traces=(100,), step=600 + i)[0][0])[-1] for i in range(60)]
    assert min(late) < 20 and max(late) > 80
    hints = [lengths(played(METHODS["uft"](), [0], traces=(100,), step=step)[0][0]) for step in range(310)]
    assert all(len(set(group)) == 1 and group[0] in (0, 20, 40, 60, 80, 99) for group in hints)
    means = [np.mean([group[0] for group in hints[i : i + 60]]) for i in (0, 120, 240)]
    assert means[0] > 85 and 35 < means[1] < 65 and means[2] < 25 and not any(group[0] for group in hints[300:])
    signal = METHODS["uft"]().signal(Batch.of(played(METHODS["uft"](), [3], traces=(100,))[1]))
    assert signal.policy[signal.foreign].eq(0).all() and signal.likelihood[signal.foreign].eq(0.001).all()


def test_guided_groups():
    pope = [lengths(played(METHODS["pope"](), [0], traces=(100,), step=step)[0][0]) for step in range(200)]
    assert {tuple(set(group)) for group in pope} == {(0,), (50,)} and 70 < sum(group[0] > 0 for group in pope) < 130
    questa = [lengths(played(METHODS["questa"](), [0], traces=(100,), step=step)[0][0])[0] for step in (0, 249, 250)]
    assert questa == [50, 50, 25]


def test_demonstrations_beside_the_groups():
    problems = [[trace(5 + i)] if i != 2 else [] for i in range(6)]
    made, _ = played(METHODS["chord_mu"](), [4], problems=problems)
    others = [start.problem for start in made[0][8:]]
    assert len(set(others)) == 2 and not {0, 2} & set(others) and made[0][:8] == [ROLLOUT] * 8
    assert lengths(made[0][8:]) == [5 + other for other in others]
    rows = [row(float(i < 4), index=i) for i in range(8)] + [row(1.0, 4, 4, index=8, problem=3)]
    for step, mu in ((0, 0.9), (100, 0.475), (200, 0.05)):
        signal = METHODS["chord_mu"]().signal(Batch.of(rows, step))
        own = ~signal.foreign
        assert signal.policy[own].unique().tolist() == pytest.approx([1 - mu])
        assert signal.likelihood[signal.foreign].unique().tolist() == pytest.approx([mu])
        assert signal.advantage[own].abs().unique().tolist() == [0.5]  # of the rollouts alone


def test_problems_that_take_the_place_of_others():
    drawn = draw_problems(20, 4, seed=0, step=3)
    spares = [spare_problem(20, drawn, group, 0, 3, attempt) for attempt in range(5) for group in range(4)]
    known = [spare for spare in spares if spare is not None]
    assert sorted(known + drawn) == list(range(20)) and spares[16:] == [None] * 4
    made, group = played(METHODS["dapo"](), [0, 8, 3], spare=lambda attempt: 5 + attempt)
    assert [starts[0].problem for starts in made] == [None, 5, 6]
    for member in group:
        member.problem = 4 + member.round
    signal = METHODS["dapo"]().signal(Batch.of(group))
    assert signal.rows[signal.active].unique().tolist() == list(range(16, 24))
    assert len(played(METHODS["dapo"](max_resamples=1), [0, 0], spare=lambda attempt: 5)[0]) == 2
    assert len(played(METHODS["dapo"](), [0, 0], spare=lambda attempt: None)[0]) == 1


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_queue_of_unsolved_problems():
    method, memory = METHODS["relift"](sft_queue=2), Memory()
    for step, (problem, reward) in enumerate([(3, 0.0), (4, 1.0), (5, 0.0), (3, 0.0), (7, 0.0)]):
        method.remember(memory, Batch.of([row(reward, problem=problem), row(0.0, problem=problem, index=1)], step))
    assert list(memory.numbers) == [5, 3, 7]
    problems = [[trace(i + 1)] for i in range(9)]
    for group, due in ((0, [3, 7]), (1, [])):
        (starts,), _ = [played_with(method, memory, group, problems)], None
        assert [(s.problem, s.apart, s.whole) for s in starts[8:]] == [(p, True, True) for p in due]
    method.remember(memory, Batch.of([row(0.0, 4, 4, problem=p, apart=True) for p in (3, 7)], 9))
    assert list(memory.numbers) == [5]


def played_with(method, memory, group, problems):
    draw = Draw(0, problems[0], 8, seed=0, step=0, memory=memory, group=group, problems=problems)
    return next(method.rounds(draw))


def test_replay_of_half_solved_problems():
    method, memory = METHODS["exgrpo"](replay_share=1.0), Memory()
    poor = [row(float(i < 1), problem=1, index=i) for i in range(8)]
    method.remember(memory, Batch.of(poor))
    assert not memory  # one of eight is less than replay_start
    good = [row(float(i < 4), problem=2, index=i) for i in range(8)]
    solved = [row(1.0, problem=3, group=1, index=i) for i in range(8)]
    good[2].logprobs = np.full(4, -0.1, np.float32)  # the surest
    method.remember(memory, Batch.of(good + solved))
    assert memory.numbers == {2: 4.0} and len(memory.of(2)) == 4 and not memory.of(3)
    starts = played_with(method, memory, 0, [[]] * 4)
    assert [s.problem for s in starts] == [2] * 8 and [s.replayed for s in starts] == [False] * 7 + [True]
    assert starts[-1].whole and starts[-1].logprobs.tolist() == pytest.approx([-0.1] * 4)
    method.remember(memory, Batch.of([row(0.0, problem=2, index=i) for i in range(8)]))
    assert memory.numbers == {2: 0.0}  # no longer half solved
    memory.numbers[2] = 4.0
    memory.numbers |= {7: 1.0}  # a bucket three deviations away: e^-4.5 of the weight
    memory.keep(7, Start(np.arange(3, dtype=np.int32), np.zeros(3, np.float32), whole=True), most=8)
    chosen = [next(method.rounds(Draw(p, [], 8, 0, 0, memory)))[0].problem for p in range(1000)]
    assert 2 < chosen.count(7) < 30  # 11 expected
    again = Memory()
    again.restore(memory.arrays())
    assert again.numbers == memory.numbers and list(again.starts) == list(memory.starts)


# --- weights that follow the policy ----------------------------------------------------------------------------------


def now(logp, entropy, old=None, reference=None, rows=None):
    tensors = [torch.tensor(values) for values in (logp, entropy, old or logp)]
    reference = None if reference is None else torch.tensor(reference)
    return Now(*tensors, reference, torch.zeros(len(logp), dtype=torch.long) if rows is None else torch.tensor(rows))


def signal_of(rows, method):
    return method.signal(Batch.of(rows))


def test_only_uncertain_tokens_of_a_beginning_are_learned():
    method = METHODS["prefix_rft"](entropy_quantile=0.6)
    rows = [row(1.0, foreign=5, length=6), row(0.0, index=1, length=2)]
    entropy = [0.1, 0.9, 0.2, 0.8, 0.3, 0.0, 0.0, 0.0]
    found = method.live(signal_of(rows, method), now([-1.0] * 8, entropy, [-2.0] * 8, rows=[0] * 6 + [1] * 2))
    assert found.policy.tolist() == [0, 1, 0, 1, 0, 1, 1, 1]
    assert found.teacher.tolist() == [-2.0] * 5 + [0.0] * 3


def test_weights_by_the_entropy_of_a_row():
    """SRFT: demonstrations .03 e^-H, right rollouts .1 e^H, wrong ones -1."""
    method = METHODS["srft"]()
    rows = [row(1.0, length=2), row(0.0, index=1, length=2), row(1.0, 2, 2, index=2)]
    found = method.live(
        signal_of(rows, method), now([-1.0] * 6, [1.0, 3.0, 0.5, 0.5, 0.0, 1.0], rows=[0, 0, 1, 1, 2, 2])
    )
    assert found.policy.tolist() == pytest.approx([0.1 * np.exp(2)] * 2 + [1.0] * 4)
    assert found.advantage[:4].tolist() == [1, 1, -1, -1]
    assert found.likelihood.tolist() == pytest.approx([0] * 4 + [0.03 * np.exp(-0.5)] * 2)


def test_a_mixture_of_policies_as_the_teacher():
    """RL-PLUS: ratio 2p / (p_old + (p_old + 1) / 2), weight sqrt(1 - p)."""
    method = METHODS["rl_plus"]()
    rows = [row(1.0, 1, 1), row(0.0, length=1, index=1)]
    found = method.live(signal_of(rows, method), now([np.log(0.19), -1.0], [0.0, 0.0], [np.log(0.2), -1.0]))
    ratio = np.exp(np.log(0.19) - float(found.teacher[0]))
    assert ratio == pytest.approx(2 * 0.19 / (0.2 + 0.6)) and found.policy.tolist() == pytest.approx([0.9, 1.0])


def test_likelihood_that_counts_for_its_probability():
    rows = [row(1.0, 2, 2)]
    p = [0.2, 0.9]
    for name, coefficient, weights in (("dft", 1.0, p), ("chord_phi", 0.1, [0.16, 0.09])):
        method = METHODS[name]()
        found = method.live(signal_of(rows, method), now(np.log(p).tolist(), [0.0, 0.0]))
        assert found.likelihood.tolist() == pytest.approx([coefficient * w for w in weights])


def test_a_teacher_scores_rollouts():
    method = METHODS["opd"](teacher="tiny", teacher_coef=2.0)
    found = method.live(
        signal_of([row(1.0, length=2)], method), now([-1.0, -1.0], [0.0, 0.0], [-1.0, -3.0], [-0.5, -4.0])
    )
    assert found.advantage.tolist() == pytest.approx([1.0, -2.0])
    assert method.reference("policy") == "tiny" and METHODS["luffy"]().reference("policy") is None
    with pytest.raises(ConfigError, match="needs a teacher"):
        make_config("opd")


def test_means_of_rows_do_not_depend_on_what_stands_beside():
    values, rows = torch.tensor([1.0, 3.0, 10.0, 2.0]), torch.tensor([5, 5, 9, 9])
    both = now([0.0] * 4, [0.0] * 4, rows=rows.tolist())
    assert both.row_means(values, torch.tensor([True] * 4)).tolist() == [2, 2, 6, 6]
    assert both.row_means(values, torch.tensor([True, False, False, False])).tolist() == [1, 1, 0, 0]
    assert Signal.of(Batch.of([row()])).rows.tolist() == [0] * 4
