"""The base models of the embedded world: their names, where they come from, what they are taught."""

import random
import re
from itertools import pairwise

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy import ConfigError, tinyworld
from luffy.config import DEFAULT_MODEL
from luffy.data.templates import turn_end
from luffy.model import bases
from luffy.model.bases import Base, Mixture, document, locate, own_answer, parse
from luffy.model.loading import load_tokenizer
from luffy.study import premise

CHAIN = tinyworld.Chain(84, ("+1", "-5", "r", "+8", "r"))


def test_names():
    assert parse("tiny") is None and parse("Qwen/Qwen2.5-Math-7B") is None
    assert parse("tiny:own_share=0.4,seed=2") == Base(own_share=0.4, seed=2)
    for base in (Base(0.03), Base(1.0, own_noise=0.2, own_difficulty=5, seed=7)):
        assert parse(base.name) == base
    for name, message in {
        "tiny:share=0.4": "its fields are own_share", "tiny:own_share": "its fields are", "tiny:": "its fields are",
        "tiny:own_share=much": "own_share is a number, not 'much'", "tiny:own_share=1.5": "no such base model",
        "tiny:seed=1.5": "seed is a number", "tiny:own_share=0.4,seed=-1": "no such base model",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse(name)


def test_the_default_is_shipped():
    """With two more seeds, which the published runs use; small, and with a prompt that opens a think block."""
    for seed in range(3):
        base = Base(own_share=parse(DEFAULT_MODEL).own_share, seed=seed)
        folder = locate(base)
        assert folder.parent == bases.SHIPPED
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    asked = [{"role": "user", "content": "84+1?"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "84+1?<think>"
    assert turn_end(tokenizer) == tokenizer.eos_token_id  # which demonstrations end with


def test_shipped_weights_are_those_of_the_readme():
    text = (bases.SHIPPED / "README.md").read_text()
    for folder in (path for path in bases.SHIPPED.iterdir() if path.is_dir()):
        line = next(line for line in text.splitlines() if f"`{folder.name}`" in line)
        assert bases.file_hash(folder / "model.safetensors") in line


def test_others_are_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path))
    made = []
    small = Mixture(updates=2, batch_size=4)
    real = bases.make
    monkeypatch.setattr(bases, "make", lambda base, out: (made.append(base), real(base, out, small)))
    base = Base(own_share=0.25)
    folder = locate(base)
    assert folder.parent == tmp_path / "base_models" and base.digest() in folder.name
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == 449_664
    assert AutoTokenizer.from_pretrained(folder).chat_template == bases.CHAT_TEMPLATE
    assert locate(base) == folder and made == [base]
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}

    def fails(base, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(bases, "make", fails)
    with pytest.raises(KeyboardInterrupt):
        locate(Base(own_share=0.26))
    assert not [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    assert Base(own_share=0.25, seed=1).digest() != base.digest()


def test_own_answers_by_hand():
    """Without noise the steps are right; they finish a chain within own_difficulty, of a longer one they stop."""
    rng = random.Random(0)
    text = own_answer(CHAIN, rng, Base(own_noise=0.0, own_difficulty=6))
    assert text == "84+1=85;85-5=80;80r=8;8+8=16;16r=61</think>\\boxed{61}"
    text = own_answer(CHAIN, rng, Base(own_noise=0.0, own_difficulty=4))
    assert text.startswith("84+1=85;85-5=80;80r=8</think>\\boxed{")
    noisy = [own_answer(CHAIN, rng, Base(own_noise=0.1, own_difficulty=6)) for _ in range(2000)]
    right = sum(text.endswith("{61}") for text in noisy) / len(noisy)
    assert right == pytest.approx(0.9**5, abs=0.04)
    for text in noisy:  # what follows a wrong step builds on it
        steps = [re.fullmatch(r"(\d+)([+-]\d|r)=(\d+)", step) for step in text.split("</think>")[0].split(";")]
        assert all(later[1] == earlier[3] for earlier, later in pairwise(steps))


def test_mixture():
    """Of 2,000 documents: shares as the recipe says, no evaluation chain, every prompt opens a think block or is a
    sheet."""
    base, mixture = Base(own_share=0.4), Mixture()
    documents = [document(random.Random(i), base, mixture) for i in range(2000)]
    sheets = [prompt for prompt, _ in documents if prompt.endswith("#")]
    asked = [(prompt, response) for prompt, response in documents if prompt.endswith("?<think>")]
    assert len(sheets) + len(asked) == 2000 and len(sheets) / 2000 == pytest.approx(0.1, abs=0.02)
    worked = [response for _, response in asked if "=" in response and "check" not in response]
    assert len(worked) / len(asked) == pytest.approx(0.4, abs=0.03)
    assert all("</think>\\boxed{" in response for _, response in asked)
    assert any("\n" in prompt for prompt, _ in asked)  # the family `lines`


@pytest.mark.parametrize(("model", "steps"), [(DEFAULT_MODEL, 0.4), ("tiny", 0.0)])
def test_premise(model, steps):
    """What the default world was chosen by, on a few problems: the base works step by step as often as its recipe says,
    and finishes short chains that way; the model before its further training answers at once."""
    rows = premise.measure(model, (3, 7), problems=20, samples=16, temperature=1.0)
    easy, hard, both = rows
    assert [row["difficulty"] for row in rows] == ["3", "7", "all"]
    assert both["steps"] == pytest.approx(steps, abs=0.1) and both["boxed"] > 0.9
    assert easy["pass@1"] > hard["pass@1"] and both["pass@8"] >= both["pass@1"]
    assert both["pass@1"] == pytest.approx((easy["pass@1"] + hard["pass@1"]) / 2)
    assert 0 <= easy["beyond"] <= hard["beyond"] <= 1
    if steps:
        assert easy["pass@1"] > 0.25 and hard["beyond"] > 0.5


def test_beginnings_of_traces():
    """A few tokens of a trace show the base another way to answer; all but the box leaves nothing to be done."""
    asked = dict(problems=20, samples=8, temperature=0.6)
    none, few, most = premise.by_prefix(DEFAULT_MODEL, (4,), (0.0, 0.1, 0.99), **asked)
    assert [row["share"] for row in (none, few, most)] == [0.0, 0.1, 0.99]
    assert none["steps"] < 0.6 and few["steps"] > 0.9 and most["pass@1"] == 1
    assert none["length"] < few["length"] and most["length"] <= 2  # what the model adds
    plain = premise.measure(DEFAULT_MODEL, (4,), **asked)[-1]
    assert {name: none[name] for name in plain} == plain
    (axis,) = premise.plot_prefixes({"paper": pd.DataFrame([none, few, most])}).axes
    assert axis.get_lines()[0].get_xydata().tolist()[2] == [99, 100]
