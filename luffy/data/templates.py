"""Prompt templates by name: what surrounds a question before the policy continues.

"chat" is the tokenizer's own chat template; the others are plain text, as the models of the paper's Table 1 were
trained or evaluated with (App. C.2 and the reference's evaluation script). Their wording is an interface to those
models and is kept to the letter, oddities included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from typing import TYPE_CHECKING, Any

import jinja2

from ..errors import TemplateError

if TYPE_CHECKING:
    from .problems import Message, Problem

log = logging.getLogger(__name__)

# The system prompt of the paper (App. C.2) as it stands in the reference's data files.
PAPER_SYSTEM_PROMPT = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final solution. "
    "This involves analyzing, summarizing, exploring, reassessing, and refining your thought process through "
    "multiple iterations. Structure your response into two sections: Thought and Solution. In the Thought section, "
    'present your reasoning using the format: "<think>\n {thoughts} </think>\n". Each thought should include detailed '
    'analysis, brainstorming, verification, and refinement of ideas. After "</think>\n," in the Solution section, '
    "provide the final, logical, and accurate answer, clearly derived from the exploration in the Thought section. "
    "If applicable, include the answer in \\boxed{} for closed-form results like multiple choices or mathematical "
    "solutions."
)
THINK_OPEN = "<think>"
THINK_START = f"{THINK_OPEN}\n"


def paper(question: str) -> str:
    """LUFFY's Qwen models (App. C.2). It ends inside an open think block."""
    return f"{PAPER_SYSTEM_PROMPT}\nUser: This is the problem:\n{question}\nAssistant: {THINK_START}"


def llama(question: str) -> str:
    """The paper's LLaMA-3.1-8B models: no system prompt, no think block."""
    return f"User: {question} Answer: Let's think step by step."


def qwen(question: str) -> str:
    """Qwen2.5-Math-Instruct; the reference evaluates SimpleRL-Zero with it."""
    return _chatml("Please reason step by step, and put your final answer within \\boxed{}.", question)


def simplerl(question: str) -> str:
    """SimpleRL as in the reference, whose doubled braces and missing space are literal."""
    instruction = "Please reason step by step, and put your final answer within\\boxed{{}}."
    return _chatml("You are a helpful assistant.", f"{question}\n{instruction}")


def prime(question: str) -> str:
    """PRIME-Zero: the conversation of DeepSeek-R1-Zero with PRIME's instruction."""
    return (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        f"User: {question}\n\nPresent the answer in LaTex format: \\boxed{{Your answer}}. Assistant:"
    )


def no(question: str) -> str:
    """The bare question."""
    return question


def _chatml(system: str, user: str) -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


TEXT_TEMPLATES: dict[str, Callable[[str], str]] = {t.__name__: t for t in (paper, llama, qwen, simplerl, prime, no)}
TEMPLATES = ("chat", *TEXT_TEMPLATES)


def opens_think(prompt: str) -> bool:
    """Whether a prompt ends inside a think block that it has just opened, whatever white space follows the tag."""
    return prompt.rstrip().endswith(THINK_OPEN)


def continuation(trace: str, prompt: str) -> str:
    """A trace as it continues a prompt: without its opening of a think block that the prompt has opened already."""
    start = trace.lstrip()
    if not (opens_think(prompt) and start.startswith(THINK_OPEN)):
        return trace
    rest = start.removeprefix(THINK_OPEN)
    return rest.lstrip() if prompt[-1].isspace() else rest


def check_template(tokenizer: Any, template: str) -> None:
    """Raises TemplateError unless prompts can be rendered with this template."""
    if template not in TEMPLATES:
        raise TemplateError(f"no template {template!r}: there are {', '.join(TEMPLATES)}")
    if template == "chat" and not tokenizer.chat_template:
        raise TemplateError(
            f"{tokenizer.name_or_path or 'this tokenizer'} has no chat template: choose one by name "
            f"({', '.join(TEXT_TEMPLATES)})"
        )


def render_prompt(
    problem: Problem,
    tokenizer: Any,
    template: str = "chat",
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    day: date | None = None,
) -> str:
    """The text the policy continues.

    A text template takes the last message as the question and drops the others: it writes its own system text, as the
    reference's does. A chat template that has no place for a system message gets it at the beginning of the user's.
    template_kwargs: variables of the chat template, such as Qwen3's enable_thinking; day: what a template that writes
    the date takes for today. Raises TemplateError, see `check_template`, and if the template refuses the messages.
    """
    check_template(tokenizer, template)
    if template != "chat":
        return TEXT_TEMPLATES[template](problem.prompt[-1]["content"])
    messages = list(problem.prompt)
    try:
        try:
            return _chat(tokenizer, messages, template_kwargs, day)
        except jinja2.TemplateError:
            merged = _without_system(messages)
            if merged == messages:
                raise
            text = _chat(tokenizer, merged, template_kwargs, day)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template of {tokenizer.name_or_path} refuses a prompt: {error}") from error
    _log_merged(str(tokenizer.name_or_path))
    return text


def _chat(
    tokenizer: Any,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None,
    day: date | None,
    **more: Any,
) -> str:
    values = dict(template_kwargs or {})
    if day is not None:
        values.setdefault("strftime_now", lambda form: day.strftime(form))
        if "date_string" in str(tokenizer.chat_template):  # Llama's variable, which goes before the function
            values.setdefault("date_string", day.strftime("%d %b %Y"))
    flags = {"tokenize": False, "add_generation_prompt": True, **more}
    return tokenizer.apply_chat_template(list(messages), **flags, **values)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with a leading system message merged into the user's that follows it."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return list(messages)
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": joined}, *messages[2:]]


@cache
def _log_merged(name: str) -> None:
    log.warning("the chat template of %s takes no system message: it is merged into the user's", name)


def turn_end(tokenizer: Any, template: str = "chat") -> int:
    """The token that a completion ends with: the one that the chat template writes behind an assistant's message, the
    tokenizer's EOS where there is no such template or it writes none."""
    if template != "chat" or not tokenizer.chat_template:
        return tokenizer.eos_token_id
    said = "0"
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": said}]
    try:
        text = _chat(tokenizer, turns, None, None, add_generation_prompt=False)
    except jinja2.TemplateError:
        return tokenizer.eos_token_id
    behind = text.rpartition(said)[2].lstrip()
    if behind.startswith(THINK_OPEN):  # a template that opens a block whether or not an answer is to follow
        return tokenizer.eos_token_id
    after = tokenizer.encode(behind, add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return after[0] if after and after[0] in special else tokenizer.eos_token_id
