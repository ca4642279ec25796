"""The generated school problems: right, the same at every call, and of disjoint splits."""

import re

import pytest

from luffy import benchmarks, load_problems, make_config
from luffy.data import school
from luffy.errors import DataError
from luffy.study.presets import read_values
from luffy.verifier import Verifier

ROWS = {split: list(school.rows(split)) for split in school.SPLITS}


def test_traces_are_right_step_by_step():
    for row in (row for rows in ROWS.values() for row in rows):
        (trace,) = row["traces"]
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", trace)
        assert len(steps) == {"school": 2, "school_long": 3}[row["source"]]
        for a, sign, b, result in steps:
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert value == int(result) and 1 <= value <= 99
        assert [step[0] for step in steps[1:]] == [step[3] for step in steps[:-1]]
        assert steps[-1][3] == row["answer"] and trace.endswith(f"The answer is \\boxed{{{row['answer']}}}.")


def test_the_words_say_the_numbers():
    """Solved again from the problem's own words."""
    for row in ROWS["test"]:
        text = row["problem"]
        bags = re.search(r"has (\d+) bags with (\d+)", text)
        value = int(bags[1]) * int(bags[2]) if bags else int(re.search(r"has (\d+)", text)[1])
        for buys, gives, doubles in re.findall(r"buys (\d+) more|gives (\d+) |(doubles)", text):
            value = value * 2 if doubles else value + int(buys or 0) - int(gives or 0)
        assert str(value) == row["answer"], text


def test_splits():
    assert {split: len(rows) for split, rows in ROWS.items()} == school.SIZES
    assert ROWS["train"] == list(school.rows("train"))
    assert {row["source"] for row in ROWS["train"]} == {"school"}
    numbers = {
        split: {tuple(re.findall(r"\d+|buys|gives|doubles|bags", r["problem"])) for r in rows}
        for split, rows in ROWS.items()
    }
    assert not numbers["train"] & numbers["test"] and not numbers["complement"] & (numbers["train"] | numbers["test"])
    with pytest.raises(DataError, match="splits of school are train, complement, test, not 'dev'"):
        load_problems("school", "dev")


def test_it_is_a_data_set_and_two_benchmarks():
    problems, counts = load_problems("school")
    assert counts == {"kept": 2000} and all(problem.traces for problem in problems)
    loaded = benchmarks.load(["school"], limit=10)
    assert [entry.name for entry in loaded] == ["school", "school_long"] and len(loaded[1].problems) == 10
    with Verifier(workers=1) as verifier:
        given = [entry.problems[0] for entry in loaded]
        assert verifier.score([f"\\boxed{{{p.answer}}}" for p in given], [p.answer for p in given], think=False) == [
            1,
            1,
        ]


def test_the_preset_serves_every_method_that_is_shown():
    for method in ("on_policy", "sft", "luffy", "sft_rl"):
        config = make_config(method, **read_values("smollm", method))
        assert config.data.dataset == "school" and config.model == "smollm"
