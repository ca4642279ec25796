import copy
import hashlib
from datetime import date

import pytest

from luffy import Verifier
from luffy.data import templates
from luffy.data.problems import Problem, problem_from_row
from luffy.data.templates import PAPER_SYSTEM_PROMPT, continuation, opens_think, render_prompt, turn_end
from luffy.data.tokenization import completion_text, tokenize_problems
from luffy.errors import TemplateError
from luffy.evaluation.rewards import MathReward
from luffy.model.loading import eos_ids

PROBLEM = Problem(({"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}), "2")


def test_the_papers_template():
    assert len(PAPER_SYSTEM_PROMPT) == 762
    digest = hashlib.sha256(PAPER_SYSTEM_PROMPT.encode()).hexdigest()
    assert digest == "a8747f1674d341836ab8fae3c29263fee4dd555f07259cdbc6dadf4104ea8926"
    text = render_prompt(PROBLEM, None, "paper")
    assert text == PAPER_SYSTEM_PROMPT + "\nUser: This is the problem:\n1+1?\nAssistant: <think>\n"


def test_the_others_to_the_letter():
    expected = {
        "no": "1+1?",
        "llama": "User: 1+1? Answer: Let's think step by step.",
        "qwen": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        "simplerl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1+1?\nPlease reason "
        "step by step, and put your final answer within\\boxed{{}}.<|im_end|>\n<|im_start|>assistant\n",
    }
    for name, text in expected.items():
        assert render_prompt(PROBLEM, None, name) == text
    prime = render_prompt(PROBLEM, None, "prime")
    assert prime.startswith("A conversation between User and Assistant. The user asks a question,")
    assert prime.endswith("User: 1+1?\n\nPresent the answer in LaTex format: \\boxed{Your answer}. Assistant:")
    assert {*expected, "prime", "paper", "chat"} == {*templates.TEMPLATES}


def test_the_tokenizers_own(tiny):
    assert render_prompt(problem_from_row({"problem": "1+1?", "answer": "2"}), tiny[1]) == "1+1?"
    assert render_prompt(PROBLEM, tiny[1], "chat") == "Think.1+1?"  # its own template sees every message


def test_a_template_that_is_not_there(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template: choose one by name"):
        render_prompt(PROBLEM, tokenizer)
    with pytest.raises(TemplateError, match="no template 'qwem'"):
        render_prompt(PROBLEM, tokenizer, "qwem")
    assert render_prompt(PROBLEM, tokenizer, "no") == "1+1?"


@pytest.mark.parametrize("end", ["<think>", "<think>\n", "<think>\n\n", "<think> ", "<think>\r\n"])
def test_an_open_think_block_whatever_white_space_follows(end):
    assert opens_think(f"Q{end}") and not opens_think(f"Q{end}</think>") and not opens_think("Q")
    for trace in ("<think>84+1=85</think>5", "<think>\r\nA</think>5", "\n<think>\nA</think>5", "A</think>5"):
        text = f"Q{end}{continuation(trace, f'Q{end}')}"
        assert text.count("<think>") == 1 and text.endswith("</think>5")
        assert continuation(trace, "Q") == trace
    with Verifier(workers=1) as verifier:
        judged = MathReward(verifier, think=None).batch()
        for completion in ("I try \\boxed{5} wait", "so</think>\\boxed{5}"):
            judged.add(Problem(PROBLEM.prompt, "5"), f"Q{end}", completion)
        assert judged.finish() == [0.0, 1.0]


def templated(tiny, template):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}?"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)


def test_a_demonstration_ends_as_the_template_ends_a_turn(tiny):
    tokenizer = templated(tiny, TURNS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tokenizer) == end and turn_end(tokenizer, "paper") == turn_end(tiny[1]) == tokenizer.eos_token_id
    always = templated(tiny, "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>")
    assert turn_end(always) == always.eos_token_id  # a think block that is opened is no end
    assert {end, tokenizer.eos_token_id} <= set(eos_ids("tiny", tokenizer))
    problems = [Problem(({"role": "user", "content": "84+1?"},), "85", ("85<eos>", "85<|im_end|>61"))]
    tokenized, _ = tokenize_problems(problems, tokenizer, max_prompt_length=20, max_completion_length=20)
    assert [trace.tokens.tolist() for trace in tokenized[0].traces] == [[*tokenizer.encode("85"), end]] * 2
    for last in (end, tokenizer.eos_token_id):
        assert completion_text([*tokenizer.encode("85"), last], tokenizer, (end,)) == "85"


def test_the_date_of_a_template_is_given(tiny):
    for template in (DATED, "{{ strftime_now('%d %b %Y') }}?"):
        tokenizer = templated(tiny, template)
        assert render_prompt(PROBLEM, tokenizer, day=date(2024, 7, 26)) == "26 Jul 2024?"
        assert render_prompt(PROBLEM, tokenizer) != "26 Jul 2024?"


def test_variables_of_a_template(tiny):
    tokenizer = templated(tiny, "{{ 'slow' if enable_thinking else 'fast' }}")
    assert render_prompt(PROBLEM, tokenizer) == "fast"
    assert render_prompt(PROBLEM, tokenizer, template_kwargs={"enable_thinking": True}) == "slow"


def test_a_template_without_a_place_for_the_system_message(tiny, caplog):
    templates._log_merged.cache_clear()
    tokenizer = templated(tiny, NO_SYSTEM)
    assert [render_prompt(PROBLEM, tokenizer) for _ in range(2)] == ["Think.\n\n1+1?<|im_end|>\n"] * 2
    assert caplog.text.count("takes no system message") == 1
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(TemplateError, match="refuses a prompt: never"):
        render_prompt(PROBLEM, tokenizer)
