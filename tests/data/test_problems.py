import gzip
import json
import time

import pytest
from datasets import Dataset
from paths import SHARED_DATA

from luffy.data.problems import Problem, RowError, fingerprint, load_problems, problem_from_row
from luffy.data.templates import PAPER_SYSTEM_PROMPT
from luffy.errors import ConfigError, DataError
from luffy.model.loading import load_tokenizer

REFERENCE_ROW = {
    "data_source": "openr1",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 1+1?"}],
    "target": [
        {"role": "assistant", "content": "<think>\nOne more.</think> \\boxed{2}"},
        {"role": "assistant", "content": "b"},
    ],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": 0, "split": "default"},
}


def test_reference_schema():
    problem = problem_from_row(REFERENCE_ROW)
    assert problem.prompt[1] == {"role": "user", "content": "What is 1+1?"}
    assert (problem.answer, problem.source) == ("2", "openr1")
    assert problem.traces == ("<think>\nOne more.</think> \\boxed{2}", "b")
    assert problem.columns == {"ability": "math", "extra_info": {"index": 0, "split": "default"}}


def test_plain_schema():
    problem = problem_from_row({"problem": "1+1?", "answer": 2, "traces": ["a", "  "], "level": 3})
    assert problem == Problem(({"role": "user", "content": "1+1?"},), "2", ("a",))
    assert problem.columns == {"level": 3}
    assert problem_from_row({"problem": "1+1?", "answer": "2", "traces": None}).traces == ()
    assert problem_from_row({**REFERENCE_ROW, "target": []}).traces == ()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"problem": "x"}, "no answer"),
        ({"problem": "x", "answer": "  "}, "no answer"),
        ({"answer": "2"}, "no `problem`"),
        ({"problem": "x", "answer": "2", "traces": [3]}, "trace"),
        ({**REFERENCE_ROW, "prompt": None}, "`prompt`"),
        ({**REFERENCE_ROW, "prompt": []}, "`prompt` is empty"),
        ({**REFERENCE_ROW, "target": [{"role": "assistant"}]}, "`target`"),
        ({**REFERENCE_ROW, "reward_model": None}, "no answer"),
        ({**REFERENCE_ROW, "reward_model": "2"}, "no answer"),
        ({"problem": "x", "answer": float("nan")}, "no answer"),
        ({"problem": "x", "answer": "2", "traces": 3}, "not a list"),
        ({"problem": "x", "answer": [None]}, "no answer"),
        ({"problem": "x", "answer": [{"a": 1}]}, "no answer"),
        ({"problem": "x", "answer": 10**4300}, "no answer"),
        ({"problem": "x", "answer": "4", "final_answer": 5}, "two columns state different answers"),
        ({"problem": "x\ud800", "answer": "4"}, "surrogate"),
        ({"problem": "x", "answer": "4", "traces": ["\ud800"]}, "surrogate"),
        ({"problem": "x", "answer": "4", "traces": ["y"], "trace_logprobs": [[-(10**400)]]}, "lists of numbers"),
    ],
)
def test_malformed_rows_are_named(row, reason):
    with pytest.raises(RowError, match=reason):
        problem_from_row(row)


def test_files_keep_the_good_rows_and_count_the_others(tmp_path, caplog):
    rows = [
        {"problem": "1+1?\u2028", "answer": "2"},
        {"problem": "2+2?", "answer": ""},
        {"problem": "3+3?", "answer": "6"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n{broken\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        problems, counts = load_problems(str(tmp_path / f"a.{suffix}"))
        assert [problem.answer for problem in problems] == ["2", "6"]
        assert counts["kept"] == 2 and counts["no answer"] == 1
    assert "row 1 rejected: no answer" in caplog.text
    assert sum(load_problems(str(tmp_path / "a.jsonl"))[1].values()) == 4


def test_several_columns_may_state_one_answer():
    row = {"problem": "x", "answer": "so we get #### 4", "final_answer": 4, "solution": "as \\boxed{5} shows"}
    assert problem_from_row(row).answer == "4"
    for answer, other in (
        ("\\frac12", 0.5), ("A", "(A)"), ("x=5", "5"), ("5 cm", "5"), ("Yes", "yes"), ("\\sqrt{8}", "2\\sqrt{2}"),
        ("5", float("nan")), ("5", " "), ("so it is 5 of 6", "5"),
    ):  # fmt: skip
        assert problem_from_row({"problem": "x", "answer": answer, "final_answer": other}).answer == answer


def test_rows_that_differ_in_a_picture_do_not_contradict_each_other(tmp_path):
    rows = [{"problem": "Find x.", "answer": a, "image": {"bytes": a}} for a in ("2", "3")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert len(load_problems(str(tmp_path / "a.json"))[0]) == 2


def test_rows_that_contradict_each_other(tmp_path, caplog):
    rows = [("1+1?", "2"), ("1+1?", "3"), ("1+1?", "2.0"), ("2+2?", "4")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"problem": p, "answer": a}) for p, a in rows))
    problems, counts = load_problems(str(tmp_path / "a.jsonl"))
    assert [problem.answer for problem in problems] == ["2", "2.0", "4"]
    assert counts["a row before it has the same problem with another answer"] == 1
    assert "row 1 rejected: a row before it" in caplog.text


@pytest.mark.parametrize("bad", ["[" * 100_000, '{"problem": "x", "answer": %s}' % ("9" * 5000), "[1, 2]", "null"])
def test_a_line_that_cannot_be_read_is_one_rejected_row(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n' + bad)
    problems, counts = load_problems(str(tmp_path / "a.jsonl"))
    assert len(problems) == 1 and sum(counts.values()) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", ""), ("a.csv", "problem,problem,answer\na,b,4\n"), ("a.csv", "problem,answer\n2+2,4\na,b,c\n"),
        ("a.csv", 'problem,answer\n"2+2,4\nx,5\n'), ("a.csv", "p" * 200_000 + ",answer\nx,4\n"), ("a.json", "5"),
        ("a.json", "[" * 100_000), ("a.parquet", "PAR1abcdefPAR1"), ("a.jsonl.gz", "no archive"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"cannot read .*{name}: \S") as error:
        load_problems(str(tmp_path / name))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_parquet_in_the_reference_schema(tmp_path):
    Dataset.from_list([REFERENCE_ROW] * 2).to_parquet(tmp_path / "a.parquet")
    assert load_problems(str(tmp_path / "a.parquet"))[0] == [problem_from_row(REFERENCE_ROW)] * 2


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "x"}\n')
    with pytest.raises(DataError, match="no usable problem"):
        load_problems(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="no data file"):
        load_problems(str(tmp_path / "b.parquet"))


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real benchmark files are not here")
@pytest.mark.parametrize(("name", "rows"), [("valid.all", 6023), ("valid.arc_c", 1172)])
def test_real_files_load_whole(name, rows):
    problems, counts = load_problems(str(SHARED_DATA / f"{name}.parquet"))
    assert len(problems) == counts["kept"] == rows
    system = {m["content"] for p in problems for m in p.prompt if m["role"] == "system"}
    assert system <= {PAPER_SYSTEM_PROMPT}


def test_fingerprint_tells_data_apart():
    a, b = problem_from_row(REFERENCE_ROW), problem_from_row({**REFERENCE_ROW, "target": None})
    assert fingerprint([a]) == fingerprint([a]) != fingerprint([b])


ROW = {"question": "2+2?", "answer": "4"}


@pytest.mark.parametrize(
    ("row", "answer", "traces"),
    [
        (ROW, "4", ()),
        ({"prompt": [{"role": "user", "content": "2+2?"}], "solution": "4"}, "4", ()),
        ({"prompt": "2+2?", "solution": "So \\boxed{4}."}, "4", ()),
        ({"question": "2+2?", "answer": "Two and two.\n#### 4"}, "4", ()),
        ({"problem": "2+2?", "answer": 0}, "0", ()),
        ({"problem": "2+2?", "answer": 1e16}, "1e+16", ()),
        ({"problem": "2+2?", "final_answer": ["4", "5"]}, "4, 5", ()),
        ({"problem": "2+2?", "answer": "4", "traces": ["a", None, "b"]}, "4", ("a", "b")),
        (
            {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4!"}], "answer": "4"},
            "4",
            ("4!",),
        ),
    ],
)
def test_schemas_as_people_have_them(row, answer, traces):
    problem = problem_from_row(row)
    assert problem.prompt == ({"role": "user", "content": "2+2?"},)
    assert (problem.answer, problem.traces) == (answer, traces)


def test_a_refused_row_lists_its_columns():
    with pytest.raises(RowError, match=r"no `problem` text, nor another question \(columns: text, label\)"):
        problem_from_row({"text": "2+2?", "label": "4"})
    with pytest.raises(RowError, match=r"no answer \(columns: problem\)"):
        problem_from_row({"problem": "2+2?"})


FILES = ("a.jsonl", "A.JSONL", "a.json", "a.jsonl.gz", "a.JSON.GZ", "a.csv", "A.CSV", "a.parquet", "A.PARQUET")


@pytest.mark.parametrize("name", FILES)
def test_files_as_people_have_them(tmp_path, name, monkeypatch):
    """With a byte order mark, packed, with capital suffixes, under ~."""
    rows = [ROW, {"question": "5-5?", "answer": "025"}]
    kind = name.lower()
    if "json" in kind:
        lines = "\n".join(map(json.dumps, rows)) if "jsonl" in kind else json.dumps(rows)
        raw = f"\ufeff{lines}".encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    elif "csv" in kind:
        (tmp_path / name).write_text("\ufeffquestion,answer\n2+2?,4\n5-5?,025\n", encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(str(tmp_path / name))
    monkeypatch.setenv("HOME", str(tmp_path))
    problems, counts = load_problems(f"~/{name}")
    assert [problem.answer for problem in problems] == ["4", "025"] and counts == {"kept": 2}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/does/not/exist", "no data set /does/not/exist: there is no folder"),
        ("./data/none", "there is no folder ./data/none"),
        ("~/data/none", "there is no folder"),
        ("C:\\data\\none", "there is no folder"),
        ("nobody/nothing", "cannot be reached"),  # the tests are offline
    ],
)
def test_places_that_are_not_there(path, message):
    with pytest.raises(DataError, match=message) as error:
        load_problems(path)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, caplog):
    """A real request to a port that nobody listens on; what follows is offline, and within seconds."""
    from huggingface_hub import constants

    from luffy.data import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub._hub_answers.cache_clear()
    started = time.monotonic()
    with caplog.at_level("INFO"), pytest.raises(DataError, match="hub cannot be reached"):
        load_problems("nobody/nothing")
    assert time.monotonic() - started < 5 and constants.HF_HUB_OFFLINE
    assert "what is not in its cache here is not there" in caplog.text
    hub._hub_answers.cache_clear()


def test_a_folder_of_that_name_elsewhere_is_suggested(tmp_path, monkeypatch):
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no model './qwen': there is no folder \./qwen; did you mean .*models/qwen"):
        load_tokenizer("./qwen")


def test_a_file_of_another_kind_names_the_kinds(tmp_path):
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(DataError, match=r"a data file is one of \.parquet, \.csv"):
        load_problems(str(tmp_path / "x.xlsx"))


def test_ground_truths_that_nothing_matches_are_counted_and_shown(tmp_path, caplog):
    rows = [ROW, {"question": "a", "answer": "\\frac{1}{2"}, {"question": "b", "answer": "9^{9^{9^{9}}}"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, counts = load_problems(str(tmp_path / "a.jsonl"))
    assert counts == {"kept": 3, "unmatchable": 2}
    assert "2 ground truths" in caplog.text and "braces do not match" in caplog.text
