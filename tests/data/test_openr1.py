"""From rows in the hub's schema to the paper's data, by the filters of the reference."""

import json

import pytest
from helpers import random_model

from luffy import load_problems, openr1
from luffy.data.problems import problem_from_row
from luffy.data.templates import PAPER_SYSTEM_PROMPT, paper, render_prompt
from luffy.data.tokenization import tokenize_problems
from luffy.errors import ConfigError, DataError
from luffy.model.loading import TINY_MODEL, load_model, load_tokenizer


def row(problem, generations, answer="7", **columns):
    """generations: (text, right, complete) each."""
    texts, right, complete = ([g[i] for g in generations] for i in range(3))
    return {
        "problem": problem, "answer": answer, "generations": texts, "correctness_math_verify": right,
        "is_reasoning_complete": complete, "uuid": problem, **columns,
    }  # fmt: skip


RIGHT = ("<think>\n1+6=7</think>\\boxed{7}", True, True)
SECOND = ("<think>\n2+5=7</think>\\boxed{7}", True, True)
WRONG = ("<think>\n1+6=8</think>\\boxed{8}", False, True)
TRUNCATED = ("<think>\n1+6=7", True, False)
LONG = ("<think>\n" + "1+6=7;" * 20 + "</think>\\boxed{7}", True, True)

ROWS = [
    row("right", [RIGHT]),
    row("wrong", [WRONG]),
    row("truncated", [TRUNCATED]),
    row("too long", [LONG]),
    row("first wrong, then too long, then right twice", [WRONG, LONG, RIGHT, SECOND]),
    row("no generations", []),
    row("no answer", [RIGHT], answer=None),
    row("right", [SECOND]),  # there already
    {"problem": "lists are missing", "answer": "7", "generations": ["x"]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def test_filters_and_counts(tokenizer):
    train, complement, counts = openr1.prepare(ROWS, tokenizer, max_trace_tokens=40, drop_repeated=True)
    assert [r["prompt"][1]["content"] for r in train] == ["right", "first wrong, then too long, then right twice"]
    assert [r["target"] for r in train] == [[{"role": "assistant", "content": RIGHT[0]}]] * 2
    assert [r["prompt"][1]["content"] for r in complement] == [
        "wrong", "truncated", "too long", "no generations", "lists are missing",
    ]  # fmt: skip
    assert counts == {
        "rows": 9,
        "rejected: no problem or no answer": 1,
        "repeated problems": 1,
        "rejected: problem is there already": 1,
        "generations": 9,
        "generations: right and complete": 5,
        "generations: at most 40 tokens": 3,
        "problems: with a right and complete generation": 3,
        "training set": 2,
        "complement": 5,
    }


def test_repeated_problems_answers_and_flags_as_people_have_them(tokenizer):
    yes = ("<think>\n1-1=0</think>\\boxed{0}", "True", True)
    no = ("<think>\n1-1=1</think>\\boxed{1}", "False", "true")
    rows = [row("right", [RIGHT]), row("right", [SECOND]), row("zero", [no, yes], answer=0)]
    rows += [row("is it so?", [RIGHT], answer=answer) for answer in ("proof", "\\text{Proof}", "notfound", "not found")]
    train, _, counts = openr1.prepare(rows, tokenizer, max_trace_tokens=40, num_traces=2)
    assert [r["reward_model"]["ground_truth"] for r in train] == ["7", "7", "0"]
    assert [r["target"][0]["content"] for r in train] == [RIGHT[0], SECOND[0], yes[0]]
    assert len(train[2]["target"]) == 1  # "False" is no
    assert counts["repeated problems"] == 1 and counts["rejected: the answer is none that can be checked"] == 4


def test_the_length_counts_tokens_of_the_student(tokenizer):
    length = len(tokenizer.encode(RIGHT[0], add_special_tokens=False))
    for limit, kept in ((length, 1), (length - 1, 0)):
        assert len(openr1.prepare(ROWS[:1], tokenizer, max_trace_tokens=limit)[0]) == kept
    assert openr1.SETS == {"full": 8192, "easy": 2048, "hard": 4096}


def test_several_traces(tokenizer):
    train, _, _ = openr1.prepare(ROWS, tokenizer, max_trace_tokens=40, num_traces=2)
    assert [m["content"] for m in train[1]["target"]] == [RIGHT[0], SECOND[0]]


def test_files_train_as_they_are(tmp_path, tokenizer):
    """train.parquet is the reference's schema, which load_problems reads; sft.jsonl leaves out the opening think."""
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(r) for r in ROWS))
    counts = openr1.write(str(source), tmp_path / "out", tokenizer, max_trace_tokens=40, drop_repeated=True)
    assert json.loads((tmp_path / "out" / "counts.json").read_text()) == counts
    problems, _ = load_problems(str(tmp_path / "out" / "train.parquet"))
    assert [p.traces for p in problems] == [(RIGHT[0],)] * 2 and problems[0].answer == "7"
    assert problems[0].prompt[0] == {"role": "system", "content": PAPER_SYSTEM_PROMPT}
    unseen, _ = load_problems(str(tmp_path / "out" / "complement.parquet"))
    assert len(unseen) == 5 and not any(p.traces for p in unseen)
    lines = [json.loads(line) for line in (tmp_path / "out" / "sft.jsonl").read_text().splitlines()]
    assert lines[0]["target"][0]["content"] == RIGHT[0].removeprefix("<think>\n")
    tokenized, _ = tokenize_problems(
        problems, tokenizer, template="paper", max_prompt_length=2000, max_completion_length=40
    )
    assert tokenizer.decode(tokenized[0].traces[0].tokens.tolist()) == "1+6=7</think>\\boxed{7}<eos>"


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROWS[1]))
    with pytest.raises(DataError, match="no problem is left"):
        openr1.write(str(source), tmp_path / "out", tokenizer)


def test_example_rows_hold_every_case(tokenizer):
    rows = openr1.example_rows()
    _, _, counts = openr1.prepare(rows, tokenizer, max_trace_tokens=64)
    assert counts["rows"] == 200 and counts["rejected: no problem or no answer"] == 4
    assert counts["generations"] > counts["generations: right and complete"] > counts["generations: at most 64 tokens"]
    assert 100 < counts["training set"] < counts["problems: with a right and complete generation"]


def test_extended_context(tmp_path):
    folder = openr1.extend_context(TINY_MODEL, tmp_path / "long")
    model, before = load_model(folder), load_model("tiny")
    assert model.config.rope_parameters["rope_theta"] == 40_000 and model.config.max_position_embeddings == 16_384
    assert all((a == b).all() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    tokenizer = load_tokenizer(folder)
    question = 'What is "1\\2" in\nHTML <b>?'
    messages = [{"role": "system", "content": "left out"}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == paper(question)


def test_the_template_of_an_extended_model_writes_its_bos(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    random_model("Llama").save_pretrained(tmp_path / "base")
    fast.save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(openr1.extend_context(tmp_path / "base", tmp_path / "long"))
    text = render_prompt(problem_from_row({"problem": "1+1?", "answer": "2"}), tokenizer)
    assert text == f"<s>{paper('1+1?')}"
    assert tokenizer.encode(text, add_special_tokens=False).count(0) == 1


def test_other_rotary_embeddings_are_refused(tmp_path):
    folder = openr1.extend_context(TINY_MODEL, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no plain rotary embedding"):
        openr1.extend_context(folder, tmp_path / "longer")
