"""What holds whatever comes in: configurations, rows of data, packing, advantages, folding of repeated rows."""

import json
import math
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luffy import METHODS, benchmarks, group_advantages, load_problems, make_config
from luffy.config import GROUPS, Config, field_names, from_dict
from luffy.data.problems import Problem, RowError, problem_from_row
from luffy.errors import ConfigError, DataError
from luffy.model.packing import TokenSequence, pack

often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = sorted({f.name for group in (Config, *GROUPS.values()) for f in fields(group)} - {"method", *GROUPS})
anything = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=20), st.binary(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([0, -1, 1, 1e-300, 1e300, math.nan, math.inf, -math.inf, "", "auto", "none", [], {}, object()]),
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@often
@given(value=anything)
def test_a_value_is_taken_or_refused_by_name(name, value):
    """Every field of every group: either the configuration says the same after a round trip, or one line names the
    field and the value."""
    try:
        config = make_config("luffy", **{name: value})
    except ConfigError as error:
        said = str(error)
        # a value that is possible by itself may not go with another field, which is named then
        assert name in said or any(other in said for other in field_names()), said
        assert "\n" not in said and len(said) < 700
        return
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("method", METHODS)
@often
@given(data=st.data())
def test_a_method_takes_or_refuses_its_fields(method, data):
    own = sorted({f.name for f in fields(METHODS[method])})
    name, value = data.draw(st.sampled_from(own)), data.draw(anything)
    try:
        config = make_config(method, **{name: value})
    except ConfigError as error:
        assert "\n" not in str(error) and any(other in str(error) for other in field_names())
        return
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=9)})
messages = st.lists(st.one_of(message, st.none()), max_size=3)
cells = st.one_of(
    st.none(), st.text(max_size=12), st.integers(), st.floats(), st.booleans(), messages,
    st.lists(st.text(max_size=5), max_size=3), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)  # fmt: skip
columns = st.sampled_from(
    ["problem", "question", "prompt", "messages", "answer", "final_answer", "solution", "traces", "target",
     "reward_model", "trace_logprobs", "data_source", "generations", "other"]
)  # fmt: skip
rows = st.dictionaries(columns, cells, max_size=6)


@often
@given(row=rows)
def test_a_row_is_a_problem_or_has_a_reason(row):
    try:
        problem = problem_from_row(row)
    except RowError as error:
        assert str(error)
        return
    assert isinstance(problem, Problem) and problem.prompt and problem.answer.strip()
    assert all(isinstance(trace, str) and trace for trace in problem.traces)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(rows, max_size=12))
def test_counts_add_up(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in table))
    try:
        problems, counts = load_problems(str(path))
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert counts["kept"] == len(problems)
    assert sum(counts.values()) - counts["unmatchable"] == len(table)


@often
@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=30),
    most=st.integers(1, 120),
    parts=st.integers(1, 3),
)
def test_packing_keeps_every_token(lengths, most, parts):
    """Every completion token is in one micro-batch of one rank, behind its prompt."""
    prompts = [np.arange(1 + 5 * i, 4 + 6 * i, dtype=np.int32) for i in range(4)]
    rng = np.random.default_rng(len(lengths))
    sequences = [TokenSequence(prompts[p], rng.integers(0, 99, n).astype(np.int32)) for p, n in lengths]
    batches = [pack(sequences, micro_batch_tokens=most, part=part, parts=parts) for part in range(parts)]
    places = torch.cat([batch.token_index for part in batches for batch in part])
    total = sum(n for _, n in lengths)
    assert sorted(places.tolist()) == list(range(total))


@often
@given(
    rewards=st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0, 1e-3]), min_size=1, max_size=40),
    groups=st.integers(1, 6),
    scale=st.sampled_from(["none", "group", "mean"]),
)
def test_advantages(rewards, groups, scale):
    """They sum to 0 in every group, do not depend on the order of rows, and are 0 where all rewards are the same."""
    values, ids = torch.tensor(rewards, dtype=torch.float64), torch.arange(len(rewards)) % groups
    found = group_advantages(values, ids, scale_rewards=scale)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(len(rewards)))
    torch.testing.assert_close(group_advantages(values[order], ids[order], scale_rewards=scale), found[order])
    for group in ids.unique():
        mine = ids == group
        if scale != "mean" or values[mine].mean() > 0:
            assert abs(float(found[mine].sum())) < 1e-6 * max(1.0, float(found[mine].abs().max())) * len(rewards)
        if len(values[mine].unique()) == 1:
            assert float(found[mine].abs().max()) == 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    repeated=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=20), seed=st.integers(0, 9)
)
def test_folding_does_not_depend_on_the_order(repeated, seed, tmp_path_factory):
    table = [{"problem": f"What is {p}?", "answer": str(a), "traces": []} for p, a in repeated]
    order = np.random.default_rng(seed).permutation(len(table))
    found = []
    for part in (table, [table[i] for i in order]):
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in part))
        (loaded,) = benchmarks.load([str(path)])
        pairs = {(str(problem.prompt), problem.answer) for problem in loaded.problems}
        found.append((pairs, loaded.benchmark.samples, len(loaded.problems)))
    assert found[0] == found[1] and found[0][2] == len(Counter(repeated))
