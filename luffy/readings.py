"""Whether two answers in one notation (notation.py) say the same: lists, intervals, units, equations; below them
math-verify compares expressions.

An answer is only compared as mathematics if it is read whole: what the parser would skip or misread (words, clock
times, numbers in a base, dots, primes) makes it a text, which must be the same text. Runs in the checker's processes,
which can be killed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .notation import GROUPED, exact, options, same, without_unit, words

MAX_CHARACTERS = 2000  # longer answers are compared as texts only
MAX_PARTS = 60

_PAIRS = {"(": ")", "[": "]", "{": "}"}
_CLOCK = re.compile(r"\d{1,2}:\d{2}(?::\d{2})?")
_IN_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\{(\d+)\}")
_NAME = r"(?:\\?[A-Za-z]+'?(?:_\{[^{}]*\})?(?:\^\{[^{}]*\})?)"
_LEFT = re.compile(rf"(?:m?\\angle ?)?(?:\|?{_NAME}+\|?(?:\([^()=]*\))?|\([A-Za-z](?:,[A-Za-z])*\)|\\overline\{{[A-Z]+\}}|\\text\{{[A-Za-z]+\}})")
_RELATION = re.compile(r"<|>|\\leq|\\geq|\\neq")
_SEPARATOR = re.compile(r"\\text\{(?:and|or)\}")
_BUILDER = re.compile(rf"\\\{{({_NAME})(?:\\in ?\\mathbb\{{R\}})?(?:\\mid|\||:)(.*)\\\}}")
# What the parser of expressions would skip or misread.
_UNREADABLE = re.compile(
    r"\\text|:|'|\\prime|\\ldots|\\mod|\\pmod|\\mid|\\equiv|\\overline|\\langle|\d \d|\d_|\)_|#|\\to|\\perp|\\parallel|\\dot(?!\{[a-z]\})|[^\x00-\x7f]"
)
_DECIMAL = re.compile(r"\d+\.\d+")
_UNITS = {
    alias: names.split()[0]
    for names in (
        "cm centimeter centimetre", "mm millimeter millimetre", "m meter metre", "km kilometer kilometre", "in inch inche",
        "ft foot feet", "yd yard", "mi mile", "kg kilogram", "g gram", "mg milligram", "lb pound", "oz ounce", "s sec second",
        "min minute", "h hr hour", "day", "week", "month", "year", "dollar", "cent", "l liter litre", "ml milliliter millilitre",
        "mph", "kmh km/h", "m/s", "a.m am", "p.m pm",
    )
    for alias in names.split()
}  # fmt: skip


def equal(gold: str, answer: str) -> bool:
    """Whether a tidy answer says what a tidy ground truth says."""
    if not gold or not answer:
        return False
    if same(gold, answer):
        return True
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return False
    chosen = options(gold)
    if chosen is not None:
        return chosen == _options(answer)
    if words(gold) is not None or words(answer) is not None:
        return gold == "\\emptyset" and answer == "\\{\\}"
    for special in (_bases, _ratios):
        verdict = special(gold, answer)
        if verdict is not None:
            return verdict
    numbers = _numbers(gold, answer)
    if numbers is not None:
        return numbers
    return _lists(gold, answer)


def _options(answer: str) -> str | None:
    """The options of an answer: letters alone, or one letter with the option's text behind a sign: (B) 12, B: the cat."""
    found = options(answer.upper() if len(answer) == 1 else answer)
    if found is not None:
        return found
    match = re.match(r"(?:\\text\{)?\s*(?:\(([A-J])\)|([A-J])[).:}])(?!\s*\(?[A-J]\b\)?\s*\}?$)", answer)
    return (match[1] or match[2]) if match else None


def _bases(gold: str, answer: str) -> bool | None:
    """Numbers in a base: the same digits, and the same base if the answer says one."""
    ours, theirs = _IN_BASE.fullmatch(gold), _IN_BASE.fullmatch(answer)
    if not ours and not theirs:
        return None
    if not ours:
        return False
    return (theirs is not None and ours.groups() == theirs.groups()) or answer == ours[1]


def _ratios(gold: str, answer: str) -> bool | None:
    """Clock times, which are texts, and ratios: 3:2 is 6:4 and 3/2."""
    if ":" not in gold:
        named = re.fullmatch(rf"{_NAME}:(.+)", answer)
        if named:
            return equal(gold, named[1])
    if ":" not in gold + answer:
        return None
    if _CLOCK.match(gold) or _CLOCK.match(answer) or "\\" in re.sub(r"\\frac|\\sqrt|\\pi", "", gold + answer):
        return False
    ours, theirs = ([exact(part) for part in text.split(":")] for text in (gold, answer))
    if None in ours or None in theirs:
        return False
    if len(ours) == 2 and len(theirs) == 1:
        theirs = [*theirs, Fraction(1)]
    if len(theirs) == 2 and len(ours) == 1:
        ours = [*ours, Fraction(1)]
    pairs = list(zip(ours, theirs, strict=False))
    return len(ours) == len(theirs) and all(a * theirs[0] == b * ours[0] for a, b in pairs) and 0 not in (ours[0], theirs[0])  # type: ignore[operator]


# --- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(gold: str, answer: str) -> bool | None:
    """Numbers with or without units, degrees and percent signs; None if either is not a number."""
    ours, theirs = _readings(gold, of_gold=True), _readings(answer, of_gold=False)
    if not ours or not theirs:
        return None
    decimal = "." in gold + answer
    values, unit = ours
    given, other = theirs
    if _differ(unit, other):
        return False
    if other == "%" and unit != "%":  # 15% is 15 where nobody asks for a share, 0.25% is not 0.25
        given = [value for value in given if value == given[-1] or abs(given[0]) >= 1]
    return any(close(a, b, decimal) for a in values for b in given) or (
        bool(re.search(r"\d,\d{3}", gold)) and not re.search(r",0", gold + answer) and _as_list(gold, answer)
    )


def _as_list(gold: str, answer: str) -> bool:
    """Whether 5,125 is the list 5, 125."""
    ours, theirs = gold.split(","), answer.split(",")
    return len(ours) == len(theirs) and [part.strip() for part in ours] == [part.strip() for part in theirs]


def _readings(text: str, of_gold: bool) -> tuple[list[Fraction], str] | None:
    """The values that a number may stand for, and its unit: 50% is 50 or 1/2."""
    if re.search(r"\d, \d", text):
        return None
    number, unit = without_unit(text)
    if of_gold and re.fullmatch(r"[A-Za-z]", unit):
        return None  # 6m is a product
    text = number if unit else text
    percent = text.endswith("%")
    text = text.removesuffix("%").removesuffix("^{\\circ}")
    value = exact(text)
    if value is None:
        return None
    return ([value, value / 100], "%") if percent else ([value], unit)


def _differ(ours: str, theirs: str) -> bool:
    """Whether two units are known ones and not the same."""
    bare = [re.sub(r"\\text|[^a-z./]", "", unit.lower()).rstrip(".") for unit in (ours, theirs)]
    names = [_UNITS.get(unit) or _UNITS.get(unit.removesuffix("s")) for unit in bare]
    return None not in names and names[0] != names[1]


def close(a: Fraction, b: Fraction, decimal: bool) -> bool:
    """Whether two numbers are equal: exactly, or within 1e-9 of their size; if one is a decimal fraction, also within
    math-verify's six decimals, as 1/3 and 0.333333, for numbers that have that many."""
    size, difference = max(abs(a), abs(b)), abs(a - b)
    if difference == 0 or (decimal and difference <= size / 10**9):
        return True
    return decimal and difference < Fraction(1, 2 * 10**6) and difference <= size / 1000


# --- lists -----------------------------------------------------------------------------------------------------------


def split(text: str, separators: str = ",;") -> list[str]:
    """The parts of a text between separators, "and" and "or" that are in no bracket."""
    text = _SEPARATOR.sub(";", text)
    parts, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        if sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign in separators and depth <= 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def _enclosed(text: str) -> tuple[str, str]:
    """The inside of a text that one pair of brackets surrounds, and the pair; else the text and ""."""
    text = text.replace("\\langle", "(").replace("\\rangle", ")")
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("]", "]"), ("]", "["), ("[", "[")):
        if not (text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing)):
            continue
        inside = text[len(opening) : -len(closing)]
        depth = 0
        for sign in inside:
            depth += (sign in "([{") - (sign in ")]}")
            if depth < 0:
                return text, ""
        return (inside, opening + closing) if depth == 0 else (text, "")
    return text, ""


def _parts(text: str) -> tuple[list[str], str]:
    """What a list, tuple, set, interval or system of equations holds, and its brackets."""
    system = re.fullmatch(r"(?:\\\{)?\\begin\{(?:cases|array|aligned)\}(?:\{[lcr]*\})?(.*)\\end\{(?:cases|array|aligned)\}", text)
    if system and "=" in system[1]:
        rows = [row.replace("&", "").strip().rstrip(",;") for row in system[1].split("\\\\")]
        return [row for row in rows if row], "system"
    inside, pair = _enclosed(text)
    left, sign, right = text.partition("=")
    if not pair and sign and _LEFT.fullmatch(left.strip()) and len(split(text)) > 1 and "=" not in right:
        text = right  # x = 1, 2
        inside, pair = _enclosed(text)
    if not pair and sign and _LEFT.fullmatch(left.strip()):  # D = (0, 1), (x, y) = (1, 2)
        within, pair = _enclosed(right)
        inside = within if pair else inside
    parts = [half for part in split(inside) for half in _signs(part)]
    return parts, pair


def _signs(text: str) -> list[str]:
    """Both numbers that a text with \\pm says."""
    if "\\pm" not in text and "\\mp" not in text:
        return [text]
    upper, lower = text.replace("\\pm", "+").replace("\\mp", "-"), text.replace("\\pm", "-").replace("\\mp", "+")
    return [re.sub(r"(^|[=(,{])\+", r"\1", upper), lower]


def _lists(gold: str, answer: str) -> bool:
    """Answers of several parts, in order if the ground truth is a tuple; single ones as expressions."""
    if _is_range(gold) or _is_range(answer):
        return _ranges(gold, answer)
    (ours, pair), (theirs, other) = _parts(gold), _parts(answer)
    if len(ours) == 1 and GROUPED.fullmatch(answer):
        theirs = [answer.replace(",", "")]
    elif len(theirs) == 1 and GROUPED.fullmatch(gold):
        ours = [gold.replace(",", "")]
    if max(len(ours), len(theirs)) > MAX_PARTS or not ours or not theirs:
        return False
    if len(ours) == len(theirs) == 1:
        if "\\pm" in gold + answer or (pair in ("\\{\\}", "system")) or other in ("\\{\\}", "system"):
            return bool(ours[0] != gold or theirs[0] != answer) and equal(ours[0], theirs[0])
        return _expressions(*(text.replace(",", "") if GROUPED.fullmatch(text) else text for text in (gold, answer)))
    if len(ours) != len(theirs):
        return False
    names = [_assigned(part)[0] for part in ours]
    if all(names) and len(set(names)) == len(names):  # x = -1, y = 2
        given = dict(_assigned(part) for part in theirs)
        if "" not in given and len(given) == len(theirs):
            return set(given) == set(names) and all(equal(value, given[name]) for name, value in map(_assigned, ours))
        return other != "\\{\\}" and all(equal(_assigned(a)[1], _assigned(b)[1]) for a, b in zip(ours, theirs, strict=True))
    if pair in ("()", "[]", "(]", "[)"):
        if other and pair != other and not (pair == "()" and other == "system"):
            return False
        return all(equal(a, _assigned(b)[1]) for a, b in zip(ours, theirs, strict=True))
    if not pair and other == "()" and any(re.search(r"\d,\d{3}", text) for text in (gold, answer)) and exact(gold) is not None:
        return False  # 2,552,004 is a number
    left = [_assigned(part)[1] for part in theirs]
    for part in ours:
        value = _assigned(part)[1]
        found = next((place for place, candidate in enumerate(left) if equal(value, candidate)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _assigned(part: str) -> tuple[str, str]:
    """Name and value of x=5; "" and the part where nothing is assigned."""
    left, sign, right = part.partition("=")
    return (left.strip(), right.strip()) if sign and _LEFT.fullmatch(left.strip()) else ("", part)


# --- ranges ----------------------------------------------------------------------------------------------------------


def _is_range(text: str) -> bool:
    """Whether a text is an inequality, an interval that is not a tuple too, or a union of such."""
    if "\\cup" in text or "\\setminus" in text or "\\cap" in text or _BUILDER.fullmatch(text):
        return True
    if _RELATION.search(text):
        return True
    pair = _enclosed(re.sub(r"^[A-Za-z]\\in ?", "", text))[1]
    return pair in ("(]", "[)", "[]", "]]", "][", "[[") or bool(re.match(r"[A-Za-z]\\in", text))


def _ranges(gold: str, answer: str) -> bool:
    if max(len(split(text)) for text in (gold, answer)) > 8:
        return False
    ours, theirs = _range(gold), _range(answer)
    if ours is not None and theirs is not None and _same_set(ours, theirs):
        return True
    parts, others = split(gold), split(answer)
    if len(parts) > 1 and len(parts) == len(others):  # x > 0, y < 1
        return all(any(equal(part, other) for other in others) for part in parts)
    if len(parts) != 1 or len(others) != 1:
        return False
    return _expressions(gold, answer)


def _same_set(ours: Any, theirs: Any) -> bool:
    from sympy import Interval, simplify

    if ours == theirs:
        return True
    if isinstance(ours, Interval) and isinstance(theirs, Interval):
        return (ours.left_open, ours.right_open) == (theirs.left_open, theirs.right_open) and all(
            a == b or simplify(a - b) == 0 for a, b in ((ours.start, theirs.start), (ours.end, theirs.end))
        )
    return bool(ours.symmetric_difference(theirs).is_empty)


@lru_cache(maxsize=2048)
def _range(text: str) -> Any:
    """The set of real numbers that a text names: by intervals, inequalities in one variable joined by "or", {x | ...}."""
    from sympy import Set, Symbol, Union

    built = _BUILDER.fullmatch(text)
    text = built[2] if built else re.sub(r"^[A-Za-z]\\in ?", "", text)
    pieces = split(text, separators=";")
    if len(pieces) > 1 or "," in text and _RELATION.search(text) and not _enclosed(text)[1]:
        ranges = [_range(piece) for piece in (pieces if len(pieces) > 1 else split(text))]
        return Union(*ranges) if all(isinstance(r, Set) for r in ranges) else None
    inside, pair = _enclosed(text)
    if pair in ("]]", "][", "[["):
        text = {"]": "(", "[": "["}[pair[0]] + inside + {"]": "]", "[": ")"}[pair[1]]
    parsed = expression(text)
    if parsed is None or isinstance(parsed, Set):
        return parsed
    free = getattr(parsed, "free_symbols", set())
    if len(free) != 1:
        return None
    try:
        return parsed.subs(next(iter(free)), Symbol("x", real=True)).as_set() if _RELATION.search(text) else None
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return None


# --- expressions -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def expression(text: str, floats: bool = False) -> Any:
    """What math-verify's parser makes of a tidy text, or None if it cannot read it whole. Decimals are exact fractions,
    unless `floats`."""
    from latex2sympy2_extended.latex2sympy2 import latex2sympy

    if _UNREADABLE.search(text):
        return None
    if not floats:
        text = _DECIMAL.sub(_as_fraction, text)
    try:
        return latex2sympy(text, is_real=False if _imaginary(text) else True, convert_degrees=False, normalization_config=None)
    except Exception:  # the parser's many ways of saying that this is not mathematics
        return None


def _as_fraction(match: re.Match[str]) -> str:
    value = Fraction(match[0])
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value.numerator)


def _imaginary(text: str) -> bool:
    return bool(re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", text))


def _expressions(gold: str, answer: str) -> bool:
    """Single expressions and equations, read in each way that they may be meant."""
    for prefix in ("\\approx", "="):
        gold, answer = gold.removeprefix(prefix), answer.removeprefix(prefix)
    name, value = _chain(gold)
    other, given = _chain(answer)
    if given is None or value is None:
        return False
    if name and other and name != other and not (name in given or other in value):
        name = other = ""  # y = 5 for x = 5
    if not name and other and "=" not in gold:
        answer = given
    elif name and not other and "=" not in answer:
        gold = value
    elif (value, given) != (gold, answer) and (not name) == (not other):
        gold, answer = value, given
    if answer != given or gold != value:
        pass
    elif "=" not in gold + answer and (same(gold, answer) or _numbers(gold, answer)):
        return True
    return any(_equivalent(a, b) for a in _meanings(gold, of_gold=True) for b in _meanings(answer, of_gold=False, gold=gold))


def _chain(text: str) -> tuple[str, str | None]:
    """The name and the value of a chain of equalities a = b = c, ("", text) if it is none; the value is None if two of
    its numbers differ, as in 5 = 6."""
    sides = re.split(r"=|\\in(?![A-Za-z])|\\approx", text)
    if len(sides) == 1:
        return "", text
    if not all(side.strip() for side in sides):
        return "", text
    sides = [side.strip() for side in sides]
    values = [value for value in map(exact, sides) if value is not None]
    if any(not close(value, values[-1], "." in text) for value in values):
        return "", None
    if _LEFT.fullmatch(sides[0]):
        return sides[0], sides[-1]
    if _LEFT.fullmatch(sides[-1]) and len(sides) == 2 and not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", sides[0])):
        return sides[-1], sides[0]  # 5 = x
    if len(values) == len(sides) or (exact(sides[-1]) is not None and not re.search(r"(?<![\\a-z])[a-z](?![a-z])", sides[0])):
        return "=", sides[-1]
    return "", text


def _meanings(text: str, of_gold: bool, gold: str = "") -> list[str]:
    """The expressions that a text may stand for: angles in degrees or as numbers, \\log to base e or 10."""
    text, unit = without_unit(text) if "\\text" in text else (text, "")
    if "^{\\circ}" in text:
        radians = re.sub(r"(\d+(?:\.\d+)?)\^\{\\circ\}", r"(\1\\cdot\\frac{\\pi}{180})", text)
        plain = text.replace("^{\\circ}", "")
        found = [text] if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text) else [plain]
        found = [radians, *([] if found == [text] else found if of_gold or "\\pi" not in gold else [])]
    else:
        found = [text]
    found += [re.sub(r"\\log(?![_A-Za-z])|\\log_\{e\}", r"\\ln ", each) for each in found if "\\log" in each]
    if found[0].endswith("%"):
        found = [each.removesuffix("%") for each in found] + [f"\\frac{{{each.removesuffix('%')}}}{{100}}" for each in found]
    return found


def _equivalent(gold: str, answer: str) -> bool:
    from math_verify import verify

    if same(gold, answer):
        return True
    ours, theirs = expression(gold), expression(answer)
    if ours is None or theirs is None:
        return False
    ours, theirs = _with_units(ours, theirs)
    if _clearly_differ(ours, theirs):
        return False
    if verify([ours], [theirs], timeout_seconds=None, allow_set_relation_comp=True) and not numbers_differ(ours, theirs):
        return True
    if _same_equation(ours, theirs):
        return True
    if not _DECIMAL.search(gold + answer):
        return False
    ours, theirs = expression(gold, floats=True), expression(answer, floats=True)
    return verify([ours], [theirs], timeout_seconds=None) and not numbers_differ(ours, theirs)


def _clearly_differ(ours: Any, theirs: Any) -> bool:
    """Whether two expressions have other values at two points: quick, where math-verify would try to simplify for long."""
    from sympy import Expr
    from sympy.core.function import AppliedUndef

    if not (isinstance(ours, Expr) and isinstance(theirs, Expr)) or ours.has(AppliedUndef) or theirs.has(AppliedUndef):
        return False
    symbols = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    for shift in (0.0, 0.29):
        point = {symbol: 0.73 + shift + 0.41 * place for place, symbol in enumerate(symbols)}
        try:
            first, second = (complex(side.subs(point).evalf(15)) for side in (ours, theirs))
        except (TypeError, ValueError, OverflowError, AttributeError):
            return False
        if not abs(first - second) > 1e-5 * max(abs(first), abs(second)):
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
