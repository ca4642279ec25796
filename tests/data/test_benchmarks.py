import json
import string
from collections import Counter

import pytest
from datasets import Dataset
from paths import SHARED_DATA

from luffy import benchmarks
from luffy.data.benchmarks import BENCHMARKS, choice_problem, load
from luffy.errors import DataError
from luffy.evaluation.rewards import MathReward
from luffy.verifier.pool import Verifier
from luffy.verifier.strict import strict_answer, strict_right

real_files = pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real benchmark files are not here")
ALL, ARC = (str(SHARED_DATA / f"valid.{name}.parquet") for name in ("all", "arc_c"))


def reference_row(question, answer, source="aime"):
    return {
        "data_source": source,
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": question}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_repeated_rows_become_samples(tmp_path):
    rows = [reference_row(q, a) for _ in range(3) for q, a in [("1+1?", "2"), ("2+2?", "4")]]
    rows += [reference_row("x?", "1", "math"), reference_row("y?", "1", "math")]
    aime, math = load([write(tmp_path / "a.jsonl", rows)])
    assert (aime.name, aime.benchmark.samples, aime.benchmark.metric) == ("aime24", 3, "avg@3")
    assert [p.prompt[0]["content"] for p in aime.problems] == ["1+1?", "2+2?"]  # and no system message
    assert aime.counts == {"kept": 6}
    assert (math.name, math.benchmark.samples, len(math.problems)) == ("math500", 1, 2)


def test_rows_that_are_not_repeated_alike(tmp_path, caplog):
    """One row of three times three is missing: still three problems with three samples."""
    rows = [reference_row(f"{i}+{i}?", f"{2 * i}") for i in range(3) for _ in range(3)][1:]
    (aime,) = load([write(tmp_path / "a.jsonl", rows)])
    assert len(aime.problems) == 3 and aime.benchmark.samples == 3
    assert "not all repeated alike" in caplog.text
    rows = [reference_row(f"{i}?", "2", "math") for i in (0, 0, 1, 2, 3)]
    (math,) = load([write(tmp_path / "b.jsonl", rows)])
    assert len(math.problems) == 4 and math.benchmark.samples == 1


def test_bad_rows_are_counted_by_benchmark(tmp_path, caplog):
    rows = [reference_row("1+1?", "2"), reference_row("2+2?", ""), reference_row("x?", "1", "math")]
    aime, math = load([write(tmp_path / "a.jsonl", rows)])
    assert aime.counts == {"kept": 1, "no answer": 1} and math.counts == {"kept": 1}
    assert "row 1 rejected: no answer" in caplog.text


def test_own_files(tmp_path):
    rows = [{"problem": "1+1?", "answer": 2}, {"question": "2+2?", "final_answer": ["4", "5"]}]
    (own,) = load([write(tmp_path / "mine.jsonl", rows)])
    assert (own.name, own.benchmark.label, own.benchmark.ood, own.benchmark.kind) == ("mine", "mine", False, "math")
    assert [p.answer for p in own.problems] == ["2", "4, 5"]
    assert own.benchmark.samples == 1 and own.benchmark.window == 8192
    assert load([str(tmp_path / "mine.jsonl")]) == load(str(tmp_path / "mine.jsonl"))
    limited = load([str(tmp_path / "mine.jsonl"), "tinyworld"], limit=1)
    assert [(entry.name, len(entry.problems)) for entry in limited] == [
        *((family, 1) for family in ("chain", "words", "flip", "prefix", "lines")),
        ("mine", 1),
    ]


ARC_ROW = {"question": "Which?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"}
GPQA_ROW = {
    "Question": "Which?", "Correct Answer": "r\n", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b",
    "Incorrect Answer 3": "c",
}  # fmt: skip
MMLU_ROW = {"question": "Which?", "options": [f"o{i}" for i in range(10)], "answer": "C", "answer_index": 2}


MMLU = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 3}
LETTER = {"problem": "Which?", "options": ["w", "x"], "answer": "B"}


@pytest.mark.parametrize(
    ("row", "right"), [(ARC_ROW, "y"), (GPQA_ROW, "r"), (MMLU_ROW, "o2"), (MMLU, "z"), (LETTER, "x")]
)
def test_multiple_choice_of_the_hub(row, right, tmp_path):
    path = str(tmp_path / "choices.parquet")
    name = next(name for name in ("question", "problem", "Question") if name in row)
    Dataset.from_list([{**row, name: f"Which {i}?"} for i in range(40)]).to_parquet(path)
    (first,), (again,), (other,) = load([path]), load([path]), load([path], option_seed=1)
    assert first == again != other
    assert first.benchmark.kind == "choice" and len(first.problems) == 40
    for i, problem in enumerate(first.problems):
        shown = problem.columns["options"]
        assert shown[string.ascii_uppercase.index(problem.answer)] == right
        lines = problem.prompt[0]["content"].split("\n")
        assert lines[:2] == [f"Which {i}?", ""] and lines[2:-1] == [f"{x}) {o}" for x, o in zip("ABCDEFGHIJ", shown)]  # noqa: B905
    assert len({problem.answer for problem in first.problems}) > 1  # the order differs between problems


def test_letters_mean_what_they_meant():
    problem = choice_problem("Which?", ["w", "x", "y", "z"], 2, seed=(0, 5))
    shown, order = problem.columns["options"], problem.columns["order"]
    assert [["w", "x", "y", "z"][i] for i in order] == shown and sorted(order) == [0, 1, 2, 3]
    assert order[string.ascii_uppercase.index(problem.answer)] == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ARC_ROW, "answerKey": "D"}, "neither the place nor the letter"),
        ({**MMLU_ROW, "answer_index": 10}, "neither the place nor the letter"),
        ({**MMLU, "choices": "wxyz"}, "options are not a list"),
        ({**MMLU, "choices": list("abcdefghijklmnopqrstuvwxyz1")}, "27 options"),
        ({**GPQA_ROW, "Incorrect Answer 2": None}, "options are not texts"),
        ({**GPQA_ROW, "Question": " "}, "no question"),
    ],
)
def test_bad_choices_are_rejected(row, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        load([write(tmp_path / "a.jsonl", [row])])


def test_what_is_not_there(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [reference_row("1+1?", "2")])
    with pytest.raises(DataError, match=r"has no arc_c: there is aime24"):
        load([f"{path}#arc_c"])
    assert [entry.name for entry in load([f"{path}#aime24"])] == ["aime24"]
    with pytest.raises(DataError, match="two benchmarks of the name aime24"):
        load([path, path])
    with pytest.raises(DataError, match="no benchmark"):
        load([])
    with pytest.raises(DataError, match="has no problems: there is nothing"):
        load([write(tmp_path / "empty.jsonl", [])])
    with pytest.raises(DataError, match="no data file"):
        load([str(tmp_path / "missing.parquet")])
    with pytest.raises(DataError, match=r"cannot load math-ai/aime25 \(test\) from the hub"):
        load(["aime25"])  # the tests are offline


def test_the_papers_nine():
    paper = [b for b in BENCHMARKS.values() if b.hub]
    assert [b.name for b in paper if not b.ood] == ["aime24", "aime25", "amc", "math500", "minerva", "olympiad"]
    assert [b.name for b in paper if b.ood] == ["arc_c", "gpqa", "mmlu_pro"]
    assert {b.name for b in paper if b.samples == 32} == {"aime24", "aime25", "amc"}
    assert {b.kind for b in paper if b.ood} == {"choice"} and {b.window for b in paper} == {8192}


def test_own_files_are_not_taken_for_the_papers(tmp_path):
    rows = [{"problem": "1+1", "answer": "2", "source": s} for s in ("math", "amc", "algebra")]
    names = [entry.name for entry in load([write(tmp_path / "a.jsonl", rows)])]
    assert names == ["own-amc", "math", "algebra"] or names == ["math", "own-amc", "algebra"]
    (gpqa,) = load([write(tmp_path / "gpqa.jsonl", [{"problem": "1+1", "answer": "2"}])])
    assert gpqa.name == "own-gpqa" and gpqa.benchmark.size == 0
    rows = [{"problem": f"{i}", "answer": "2", "source": f"https://x/{i}"} for i in range(60)]
    with pytest.raises(DataError, match="60 different sources"):
        load([write(tmp_path / "b.jsonl", rows)])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe{}")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else")
    for name in ("a.json", "b.jsonl", "c.parquet"):
        with pytest.raises(DataError, match="cannot read"):
            load([str(tmp_path / name)])


def test_hub_benchmarks_are_asked_for_by_name(monkeypatch):
    asked = []

    def rows(path, split, subset=None):
        asked.append((path, split, subset))
        return [{**ARC_ROW, "source": "elsewhere"}]

    monkeypatch.setattr(benchmarks, "read_rows", rows)
    (arc,) = load(["arc_c"])
    assert asked == [("allenai/ai2_arc", "test", "ARC-Challenge")] and arc.benchmark is BENCHMARKS["arc_c"]


@real_files
def test_the_real_files_whole():
    loaded = {entry.name: entry for entry in load([ALL, ARC])}
    sizes = {name: (len(e.problems), e.benchmark.samples, e.counts) for name, e in loaded.items()}
    assert sizes == {
        "aime24": (30, 32, {"kept": 960}),
        "aime25": (30, 32, {"kept": 960}),
        "amc": (83, 32, {"kept": 2656}),
        "math500": (500, 1, {"kept": 500}),
        "minerva": (272, 1, {"kept": 272}),
        "olympiad": (675, 1, {"kept": 675}),
        "arc_c": (1172, 1, {"kept": 1172}),
    }
    assert sum(sum(e.counts.values()) for e in loaded.values()) == 6023 + 1172
    assert all(p.prompt[0]["role"] == "user" for e in loaded.values() for p in e.problems)
    assert Counter(p.answer for p in loaded["arc_c"].problems)["1"] == 3  # some have options 1) to 4)


@real_files
def test_every_real_ground_truth_verifies_against_itself():
    with Verifier(workers=2) as verifier:
        for entry in load([ALL, ARC]):
            golds = [problem.answer for problem in entry.problems]
            texts = [f"Hence the answer is \\boxed{{{gold}}}." for gold in golds]
            scores = verifier.score(texts, golds, think=False)
            kind = entry.benchmark.kind
            strict = [strict_right(g, strict_answer(t, kind), kind) for g, t in zip(golds, texts, strict=True)]
            wrong = [g for g, a, b in zip(golds, scores, strict, strict=True) if not (a and b)]
            assert wrong == [], entry.name


@pytest.mark.parametrize("order", [1, -1])
def test_repetitions_do_not_depend_on_the_order_of_rows(tmp_path, order):
    rows = [{"problem": "q1", "answer": "1"}] * 3 + [{"problem": "q2", "answer": "2"}]
    (loaded,) = load([write(tmp_path / "a.jsonl", rows[::order])])
    assert loaded.benchmark.samples == 3 and len(loaded.problems) == 2


def test_a_benchmark_of_letters_is_graded_by_its_letters(tmp_path):
    """By the reward that training and evaluation use."""
    rows = [{"question": "Which?", "choices": ["a", "b", "c"], "answer": 1}]
    (loaded,) = load([write(tmp_path / "a.jsonl", rows)])
    (problem,) = loaded.problems
    assert problem.kind == "choice"
    with Verifier(workers=1) as verifier:
        judged = MathReward(verifier, think=False).batch()
        for text in ("\\boxed{X. b}", "The answer is X.", "**Answer: X**", "\\boxed{\\text{(X) } 2}", "\\boxed{X"):
            judged.add(problem, "", text.replace("X", problem.answer))
        assert judged.finish() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert not verifier.counts["checks"]
