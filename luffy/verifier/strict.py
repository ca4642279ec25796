"""Two opinions on every answer of an evaluation, and which grader they come from.

The first is the reward's own: math-verify in the verifier's processes (or a user's function). The second is a strict
rule that only knows strings and numbers: the letter of a choice, or the last box, normalised. Neither is the paper's.
Its tables since May 2025 use the grader of "understand-r1-zero" (boxed answer, then sympy, then math-verify), those
before used math-verify alone. The two differ by up to 3.5 points on the same models. Our numbers therefore compare
with each other; against published ones a point or two says nothing.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from .answers import final_answer, letter
from .meaning import GROUPED, exact, same, without_unit
from .notation import tidy
from .pool import is_dangerous

GRADER_PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")
GRADER_MODULES = (
    "notation.py",
    "meaning.py",
    "answers.py",
    "expressions.py",
    "readings.py",
    "worker.py",
    "pool.py",
    "strict.py",
)


def strict_answer(solution: str, kind: str = "math") -> str:
    """What the strict rule takes for the answer in the part of a completion that states it, "" if there is none.

    kind "choice": the letter in the last box or, without a box, after the last "answer:" or "answer is".
    kind "math": the last box, normalised.
    """
    return letter(solution) if kind == "choice" else normalised(final_answer(solution) or "")


def strict_right(gold: str, answer: str, kind: str = "math") -> bool:
    """Whether a strict answer is the ground truth: as normalised text, or as a rational number, whatever its unit."""
    truth = gold.strip() if kind == "choice" else normalised(gold)
    if not answer or answer == truth:
        return bool(answer)
    if kind == "choice":
        return False
    ours, theirs = (exact(without_unit(text)[0]) for text in (truth, answer))
    return ours is not None and ours == theirs


def normalised(text: str) -> str:
    """A tidy answer (notation.py) without degree and percent signs, separators of thousands and a leading `x =`."""
    text = tidy(text).replace("^{\\circ}", "").replace("%", "")
    text = re.sub(r"^[A-Za-z]=(?=.)", "", text)
    return text.replace(",", "") if GROUPED.fullmatch(text) else text


def unreadable(gold: str) -> str:
    """Why no answer can be right by a ground truth, not even its own text in a box: "" if one can."""
    text = f"\\boxed{{{gold}}}"
    if not tidy(gold):
        return "it says nothing"
    if is_dangerous(text):
        return "it is too long, too deep or too large to be compared"
    return "" if same(tidy(gold), tidy(final_answer(text) or "")) else "its braces do not match"


@cache
def grader_version() -> str:
    """Names the graders: versions of the packages, and a hash of our modules' sources. Another one means that an
    evaluation is graded again."""
    digest = hashlib.sha256()
    for name in GRADER_MODULES:
        digest.update((Path(__file__).parent / name).read_bytes())
    versions = " ".join(f"{package} {metadata.version(package)}" for package in GRADER_PACKAGES)
    return f"{versions} luffy {digest.hexdigest()[:12]}"
