"""Whether two expressions or equations in one notation (notation.py) are equal, by math-verify and its parser.

A text is only compared as mathematics if it is read whole: what the parser would skip or misread (words, clock times,
numbers in a base, dots, primes) makes it no expression. Runs in the checker's processes, which can be killed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .meaning import same, without_unit

# What the parser of expressions would skip or misread.
_UNREADABLE = re.compile(
    r"\\text|:|'|\\prime|\\ldots|\\mod|\\pmod|\\mid|\\equiv|\\overline|\\langle|\d \d|\d_|\)_|#|\\to|\\perp|\\parallel"
    r"|\\dot(?!\{[a-z]\})|[^\x00-\x7f]"
)
_GAMMA = re.compile(r"\\gamma(?![A-Za-z])")  # the parser takes it for the function, whose value at a pole is anything
_DECIMAL = re.compile(r"\d+\.\d+")


@lru_cache(maxsize=4096)
def expression(text: str, floats: bool = False) -> Any:
    """What math-verify's parser makes of a tidy text, or None if it cannot read it whole. Decimals are exact fractions,
    unless `floats`."""
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
    from sympy import Basic, nan, zoo

    if _UNREADABLE.search(text) or text.count("{") != text.count("}"):
        return None
    text = _GAMMA.sub(r"\\varsigma ", text)
    if not floats:
        text = _DECIMAL.sub(_as_fraction, text)
    try:
        real = not re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", text)
        parsed = latex2sympy(text, is_real=real, convert_degrees=False, normalization_config=None)
    except Exception:  # the parser's many ways of saying that this is not mathematics
        return None
    undefined = isinstance(parsed, Basic) and parsed.has(nan, zoo)  # they are equal to whatever is undefined too
    return None if undefined else parsed


def _as_fraction(match: re.Match[str]) -> str:
    value = Fraction(match[0])
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value.numerator)


def meanings(text: str, gold: str = "") -> list[str]:
    """The expressions that a text may stand for: angles in degrees or as numbers, \\log to base e or 10, percentages.
    gold: of an answer its ground truth; where that is an angle in radians, degrees are no plain number."""
    text = without_unit(text)[0] if "\\text" in text else text
    if "^{\\circ}" in text:
        radians = re.sub(r"(\d+(?:\.\d+)?)\^\{\\circ\}", r"(\1\\cdot\\frac{\\pi}{180})", text)
        plain = text.replace("^{\\circ}", "")
        inside = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)
        found = [radians] if inside or "\\pi" in gold else [radians, plain]
    else:
        found = [text]
    found += [re.sub(r"\\log(?![_A-Za-z])|\\log_\{e\}", r"\\ln ", each) for each in found if "\\log" in each]
    if found[0].endswith("%"):
        found = [each.removesuffix("%") for each in found] + [
            f"\\frac{{{each.removesuffix('%')}}}{{100}}" for each in found
        ]
    return found


def equivalent(gold: str, answer: str) -> bool:
    from math_verify import verify

    if same(gold, answer):
        return True
    ours, theirs = expression(gold), expression(answer)
    if ours is None or theirs is None:
        return False
    ours, theirs = _with_units(ours, theirs)
    if _clearly_differ(ours, theirs):
        return False
    if verify([ours], [theirs], timeout_seconds=None, allow_set_relation_comp=True) and not numbers_differ(
        ours, theirs
    ):
        return True
    if _same_equation(ours, theirs):
        return True
    if not _DECIMAL.search(gold + answer):
        return False
    ours, theirs = expression(gold, floats=True), expression(answer, floats=True)
    return verify([ours], [theirs], timeout_seconds=None) and not numbers_differ(ours, theirs)


def _clearly_differ(ours: Any, theirs: Any) -> bool:
    """Whether two expressions have other values at two points: quick, where math-verify would simplify for long."""
    from sympy import Expr, Float
    from sympy.core.function import AppliedUndef

    if not (isinstance(ours, Expr) and isinstance(theirs, Expr)) or ours.has(AppliedUndef) or theirs.has(AppliedUndef):
        return False
    symbols = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    for shift in (0.0, 0.29):
        # sympy's own numbers have room for any exponent, and digits to spare for what cancels
        point = {symbol: Float(0.73 + shift + 0.41 * place, 40) for place, symbol in enumerate(symbols)}
        try:
            first, second = (side.subs(point).evalf(30) for side in (ours, theirs))
            sizes = [abs(value).evalf(15) for value in (first - second, first, second)]
            if not all((size.is_Float and size.is_finite) or size == 0 for size in sizes):
                return False
        except (TypeError, ValueError, OverflowError, AttributeError):
            return False
        if not sizes[0] > 1e-5 * max(sizes[1:]):
            return False
    return True


def _with_units(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """With i as the imaginary unit on both sides; symbols of one name are one, whatever the parser assumes of them."""
    from sympy import Basic, I, Symbol

    if not (isinstance(ours, Basic) and isinstance(theirs, Basic)):
        return ours, theirs
    names = {symbol.name for side in (ours, theirs) for symbol in side.free_symbols}
    if "i" not in names:
        return ours, theirs
    real = {name: I if name == "i" else Symbol(name, real=True) for name in names}
    first, second = (side.subs({symbol: real[symbol.name] for symbol in side.free_symbols}) for side in (ours, theirs))
    return first, second


def _same_equation(ours: Any, theirs: Any) -> bool:
    """Whether one equation is a multiple of the other."""
    from sympy import Eq, Expr, simplify

    if not (isinstance(ours, Eq) and isinstance(theirs, Eq)):
        return False
    first, second = ours.lhs - ours.rhs, theirs.lhs - theirs.rhs
    if not (isinstance(first, Expr) and isinstance(second, Expr)) or 0 in (first, second):
        return False
    ratio = simplify(first / second)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def numbers_differ(gold: Any, answer: Any) -> bool:
    """Whether numbers that math-verify calls equal are not, alone or at the same place of a tuple, set or relation.

    It rounds absolutely, to 6 decimals or by dropping a difference below 1e-15, so that all tiny numbers are one to
    it: 1/2004! = 1/2006!. Exact numbers must not differ at all, decimal fractions below 1e-3 only by a thousandth of
    their size.
    """
    from sympy import Basic, Expr, Float

    if not (isinstance(gold, Basic) and isinstance(answer, Basic)) or gold == answer:
        return False
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        same_form = gold.func == answer.func and len(gold.args) == len(answer.args)
        return same_form and any(numbers_differ(*pair) for pair in zip(gold.args, answer.args, strict=True))
    if not (gold.is_number and answer.is_number):
        return False
    gold, answer = gold.doit(), answer.doit()
    difference = (gold - answer).evalf(30)
    if not (gold.has(Float) or answer.has(Float)):
        # a precision of 1 is how evalf says that it cannot tell the value from zero
        return bool(difference.is_Float and difference._prec != 1 and difference != 0)
    size = max(abs(gold.evalf(30)), abs(answer.evalf(30)))
    return bool(size < 1e-3 and abs(difference) > size / 1000)
