"""Which part of a completion is its answer: the last closed box, or the letter of a multiple-choice question.

Text is untrusted and may be long; every scan is linear in its length.
"""

from __future__ import annotations

import re

from .notation import tidy

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_MATHEMATICS = re.compile(r"[$\d\\]")
_NOT_SO = re.compile(r"[^$\d\\]*(?:\bnot|\bnever|n['’]t)\b[^$\d\\]{0,20}[$\d\\]", re.IGNORECASE)
_IS_WRONG = re.compile(r"[$\d})\]]\s*(?:is|are|was)\s+(?:\w+ )?(?:wrong|incorrect|false)\b", re.IGNORECASE)
_THAT_IS_WRONG = re.compile(r"\W*(?:that|this|it)\s+(?:is|was)\s+(?:\w+ )?(?:wrong|incorrect|false)\b", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>([^<]*)</answer>")
_AROUND = r"(?:[\s$*~]|\\[()\[\],;! ])*"
_JOIN = re.compile(rf"{_AROUND}(?:[,;、&]?\s*(?:\b(?:and|or)\b|和|或)|[,;、&]){_AROUND}")


def boxes(text: str) -> tuple[list[str], bool]:
    """The contents of the last closed \\boxed{...} and of those that a comma, "and" or "or" joins to it, in their
    order; and whether the text's last box is closed."""
    found: list[tuple[int, int, int]] = []  # of closed boxes: where the command starts, the content starts, it ends
    waiting: list[tuple[int, int, int]] = []  # of open ones: the first two, and the depth of braces around the box
    depth = 0
    for match in _BOX.finditer(text):
        token = match[0]
        if len(token) > 2:
            waiting.append((match.start(), match.end(), depth))
            depth += 1
        elif waiting and token == "{":
            depth += 1
        elif waiting and token == "}":
            depth -= 1
            if depth == waiting[-1][2]:
                start, inside, _ = waiting.pop()
                while found and found[-1][0] > start:  # a box within this one
                    found.pop()
                found.append((start, inside, match.end()))
    closed = not waiting or bool(found and found[-1][0] > waiting[-1][0])
    first = len(found) - 1
    while first > 0 and found[first][0] - found[first - 1][2] < 40:
        if not _JOIN.fullmatch(text, found[first - 1][2], found[first][0]):
            break
        first -= 1
    return [text[inside : end - 1] for _, inside, end in found[max(0, first) :]], closed


def boxed(text: str) -> bool:
    """Whether a text boxes an answer, and its last box is closed."""
    contents, closed = boxes(text)
    return closed and any(content.strip() for content in contents)


def final_answer(text: str) -> str | None:
    """What a solution gives as its answer: its last closed box, several if they are joined (those that say the same
    count once), else what its last <answer> tag holds. None if it has neither, or its last box is cut off."""
    contents, closed = boxes(text)
    if not closed:
        return None
    if contents:
        return ", ".join(dict.fromkeys(content.strip() for content in contents))
    tags = _ANSWER_TAG.findall(text)
    return tags[-1] if tags else None


def denies(text: str) -> bool:
    """Whether the last sentence with mathematics in a text, or the one behind it, says that it is not so: "the answer
    is not 42", "$42$ is wrong", "$42$. That is false." Other negations ("which is not prime") deny nothing."""
    sentences = [part for part in re.split(r"[.!?](?:\s|$)|\n", text) if re.search(r"\w", part)]
    place = next((i for i in reversed(range(len(sentences))) if _MATHEMATICS.search(sentences[i])), None)
    if place is None:
        return False
    after = sentences[place + 1] if place + 1 < len(sentences) else ""
    said = sentences[place]
    return bool(_NOT_SO.match(said) or _IS_WRONG.search(said) or _THAT_IS_WRONG.match(after))


# --- multiple choice -------------------------------------------------------------------------------------------------

_OPTION = re.compile(r"\(? ?([A-Za-z1-9])(?: ?[).:\]}]+(.*))?", re.DOTALL)
_SEVERAL = re.compile(r"[,;&/]|(?:and|or)\b|\(?[A-Z]\)?$")
_STATED = re.compile(
    r"(?i:\banswer)(?:\s+is\b(?:\s*:)?|\s*:)(?:[\s*_$({\[]|\\\(|\\(?:text|mathrm|textbf|mathbf)\b)*+([A-Z1-9])(?![\w'])"
)


def letter(solution: str) -> str:
    """The option that a solution chooses: the letter that its box (or answer tag) begins with, or the one after its
    last "answer:" or "answer is"; "" if there is none. A box with more than one option chooses none."""
    given = final_answer(solution)
    if given is None:
        stated = _STATED.findall(solution) if boxes(solution)[1] else []
        return stated[-1] if stated else ""
    match = _OPTION.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1 ", tidy(given)).strip())
    rest = (match[2] or "").strip() if match else ""
    if not match or _SEVERAL.match(rest):
        return ""
    return match[1] if rest else match[1].upper()


def options(text: str) -> str | None:
    """The options that a tidy text names, sorted (`A, C` and `CA` are both "AC"); None if it says anything else."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if not re.fullmatch(r"\(?[A-J]\)?(?:(?:,| |and|,and)*\(?[A-J]\)?)*", bare):
        return None
    found = sorted(re.findall(r"[A-J]", bare))
    return "".join(found) if len(set(found)) == len(found) else None
