import pytest

from luffy.data import Problem
from luffy.rollouts import completion_text, draw_problems, draw_traces, plan_groups, tokenize_problems, tokenize_trace

EOS = 1


def problem(question="84+1?", traces=("<think>84+1=85;check5ok</think>\\boxed{85}",)):
    return Problem(({"role": "user", "content": question},), "85", tuple(traces))


def tokenized(tiny, problems, **options):
    defaults = dict(max_prompt_length=8, max_completion_length=30)
    return tokenize_problems(problems, tiny[1], **{**defaults, **options})


def test_trace_gets_eos_and_no_second_think(tiny):
    tokenizer = tiny[1]
    trace = "<think>\n84+1=85</think>\\boxed{85}"
    whole = tokenize_trace(trace, "84+1?", tokenizer)
    assert completion_text(whole, tokenizer) == trace and whole[-1] == EOS
    continued = tokenize_trace(trace, "84+1?<think>\n", tokenizer)
    assert completion_text(continued, tokenizer) == "84+1=85</think>\\boxed{85}"


def test_long_traces_are_cut_without_eos_or_dropped(tiny):
    kept, counts = tokenized(tiny, [problem()], max_completion_length=10)
    assert len(kept[0].traces[0]) == 10 and EOS not in kept[0].traces[0]
    assert counts["cut_traces"] == 1
    kept, counts = tokenized(tiny, [problem()], max_completion_length=10, long_traces="drop")
    assert len(kept[0].traces) == 0
    assert (counts["dropped_traces"], counts["without_trace"], counts["traces"]) == (1, 1, 0)


def test_long_and_empty_prompts_are_left_out_and_counted(tiny):
    kept, counts = tokenized(tiny, [problem(), problem("84+1+1+1+1+1+1?"), problem("")])
    assert len(kept) == 1
    assert (counts["long_prompts"], counts["empty_prompts"], counts["problems"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="no usable problem"):
        tokenized(tiny, [problem("")])


def test_every_problem_once_an_epoch_in_a_new_order():
    epochs = [
        [i for step in range(first, first + 5) for i in draw_problems(11, 2, seed=3, step=step)] for first in (0, 5)
    ]
    assert all(len(set(epoch)) == 10 and set(epoch) <= set(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert draw_problems(11, 2, seed=4, step=0) != draw_problems(11, 2, seed=3, step=0)
    with pytest.raises(ValueError, match="fewer than"):
        draw_problems(3, 4, seed=0, step=0)


def test_trace_ends_at_its_first_eos(tiny):
    tokenizer = tiny[1]
    assert tokenize_trace("84<eos>85", "?", tokenizer) == [*tokenizer.encode("84"), EOS]
    assert tokenize_trace("84<eos>", "?", tokenizer) == [*tokenizer.encode("84"), EOS]


def plan(problems, num_off_policy=1, supervised=False):
    return plan_groups(
        problems, range(len(problems)), num_generations=8, num_off_policy=num_off_policy, supervised=supervised,
        eos_id=EOS, seed=0, step=0,
    )  # fmt: skip


def test_group_is_rollouts_and_demonstrations(tiny):
    problems, _ = tokenized(tiny, [problem(), problem(traces=()), problem(traces=["5", "6", "7"])])
    demonstrations, requests, groups = plan(problems, num_off_policy=2)
    assert [groups.count(g) for g in range(3)] == [7, 8, 6]  # one trace; none: fresh rollouts instead; two of three
    assert [d.group for d in demonstrations] == [0, 2, 2]
    assert [d.index for d in demonstrations] == [7, 6, 7]
    assert all(d.off_policy and not d.truncated for d in demonstrations)
    assert {(r.prompt_index, r.generation_index) for r in requests[:7]} == {(0, g) for g in range(7)}


def test_supervised_groups_are_never_sampled(tiny):
    problems, _ = tokenized(tiny, [problem(), problem(traces=())])
    demonstrations, requests, _ = plan(problems, supervised=True)
    assert (len(demonstrations), requests) == (1, [])


def test_cut_trace_is_a_truncated_demonstration(tiny):
    problems, _ = tokenized(tiny, [problem()], max_completion_length=10)
    assert plan(problems)[0][0].truncated


def test_traces_are_drawn_reproducibly_and_vary_with_the_step():
    draws = [draw_traces(5, 2, seed=0, step=step, problem_index=7) for step in range(20)]
    assert draws == [draw_traces(5, 2, seed=0, step=step, problem_index=7) for step in range(20)]
    assert all(len(set(draw)) == 2 for draw in draws) and {i for draw in draws for i in draw} == set(range(5))
    assert sorted(draw_traces(2, 5, seed=0, step=0, problem_index=0)) == [0, 1]
