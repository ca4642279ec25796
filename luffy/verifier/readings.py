"""Whether two answers in one notation (notation.py) say the same: numbers with units, lists, intervals, chains of
equalities; below them expressions.py has math-verify compare expressions.

What has no right reading (words, clock times, piecewise functions, dots) is a text, and must be the same text. Runs in
the checker's processes, which can be killed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .answers import options
from .expressions import equivalent, expression, meanings
from .meaning import GROUPED, exact, same, without_unit, words
from .notation import MAX_CHARACTERS, MAX_NESTING, depth_of

MAX_PARTS = 60

_PAIRS = {"(": ")", "[": "]", "{": "}"}
_CLOCK = re.compile(r"\d{1,2}:\d{2}(?::\d{2})?")
_MORE = re.compile(  # options behind the first: (A) or (B), A. B. C., but not (D) P(A)
    r"(?:\\text\{|[\s}])*(?:or|and)\b|(?:.*[\s,;/}])?(?:\([A-J]\)|[B-HJ][).])", re.DOTALL
)
_IN_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\{(\d+)\}")
# No name can be read in two ways (++ gives nothing back), so that a long one that is none costs no time.
_NAME = r"(?:\\?[A-Za-z]++'?(?:_\{[^{}]*\})?(?:\^\{[^{}]*\})?)"
_LEFT = re.compile(  # of an assignment
    rf"(?:m?\\angle ?)?(?:\|?{_NAME}+\|?(?:\([^()=]*\))?|\([A-Za-z](?:,[A-Za-z])*\)|\\overline\{{[A-Z]+\}}"
    r"|\\text\{[A-Za-z]+\})"
)
_FUNCTION = re.compile(r"[A-Za-z]\(([A-Za-z])\)")
_RELATION = re.compile(r"<|>|\\leq|\\geq|\\neq")
_SEPARATOR = re.compile(r"\\text\{(?:and|or)\}")
_SYSTEM = re.compile(
    r"(?:\\\{)?\\begin\{(?:cases|array|aligned)\}(?:\{[lcr]*\})?(.*)\\end\{(?:cases|array|aligned)\}", re.DOTALL
)
_BUILDER = re.compile(rf"\\\{{({_NAME})(?:\\in ?\\mathbb\{{R\}})?(?:\\mid|\||:)(.*)\\\}}")
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "crore": 10**7,
}  # fmt: skip
_SMALL = str.maketrans("²³", "23")
_UNITS = {  # by every way in which they are written; of symbols the case counts (mV, MV)
    alias: names.split()[0]
    for names in (
        "cm centimeter centimetre", "mm millimeter millimetre", "m meter metre", "km Km kilometer kilometre",
        "nm nanometer nanometre", "in inch inche", "ft foot feet", "yd yard", "mi mile", "kg Kg kilogram", "g gram",
        "mg milligram", "lb pound", "oz ounce", "s sec second", "ms millisecond", "ns nanosecond", "min minute",
        "h hr hour", "day", "week", "month", "year", "decade", "century centurie", "dollar", "cent", "euro", "rupee",
        "l L liter litre", "ml mL milliliter millilitre", "mph", "kmh km/h", "m/s", "a.m am AM", "p.m pm PM",
        "J joule", "kJ kilojoule", "V volt", "mV millivolt", "kV kilovolt", "MV megavolt", "W watt", "kW kilowatt",
        "MW megawatt", "N newton", "kN kilonewton", "Hz hertz", "kHz kilohertz", "MHz megahertz", "GHz gigahertz",
        "Pa pascal", "kPa kilopascal", "cal calorie", "kcal kilocalorie", "eV", "keV", "MeV", "mol mole",
        "mmol millimole", "kB KB kilobyte", "MB megabyte", "GB gigabyte", "TB terabyte", "byte", "bit",
    )
    for alias in names.split()
}  # fmt: skip
_NAMES = {alias: unit for alias, unit in _UNITS.items() if len(alias) > 3 and alias.islower()}


def equal(gold: str, answer: str) -> bool:
    """Whether a tidy answer says what a tidy ground truth says."""
    if not gold or not answer:
        return False
    if same(gold, answer):
        return True
    if any(len(text) > MAX_CHARACTERS or depth_of(text) > MAX_NESTING for text in (gold, answer)):
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
    """The options of an answer: letters alone, or one with the option's text behind a sign: (B) 12, B: the cat."""
    found = options(answer.upper() if len(answer) == 1 else answer)
    if found is not None:
        return found
    match = re.match(r"(?:\\text\{)?\s*(?:\(([A-J])\)|([A-J])[).:}])(?!\s*\(?[A-J]\b\)?\s*\}?$)", answer)
    if not match or _MORE.match(answer, match.end()):
        return None
    return match[1] or match[2]


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
    ours, theirs = ([value for value in map(exact, text.split(":")) if value] for text in (gold, answer))
    if (len(ours), len(theirs)) != (gold.count(":") + 1, answer.count(":") + 1):
        return False  # not all of them are numbers but 0
    if {len(ours), len(theirs)} == {1, 2}:
        ours, theirs = ([*values, Fraction(1)][:2] for values in (ours, theirs))
    return len(ours) == len(theirs) and all(a * theirs[0] == b * ours[0] for a, b in zip(ours, theirs, strict=True))


# --- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(gold: str, answer: str) -> bool | None:
    """Numbers with or without units, degrees and percent signs; None if either is not a number."""
    ours, theirs = _readings(gold, of_gold=True), _readings(answer, of_gold=False)
    if not ours or not theirs:
        return None
    decimals = ("." in gold) + ("." in answer)
    values, unit = ours
    given, other = theirs
    if _differ(unit, other):
        return False
    if other == "%" and unit != "%":  # 15% is 15 where nobody asks for a share, 0.25% is not 0.25
        given = [value for value in given if value == given[-1] or abs(given[0]) >= 1]
    return any(close(a, b, decimals) for a in values for b in given) or (
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
    factor, unit = _scale(unit)
    return ([value, value / 100], "%") if percent else ([value * factor], unit)


def _scale(unit: str) -> tuple[int, str]:
    """The number that stands for a unit's first word, and the rest: 5 million dollars are 5,000,000 dollars."""
    match = re.fullmatch(r"\\text\{ ?([a-z]+?)s?\b ?(.*)\}", unit, re.IGNORECASE)
    factor = _SCALES.get(match[1].lower(), 1) if match else 1
    return (factor, f"\\text{{{match[2]}}}" if match[2] else "") if match and factor > 1 else (1, unit)


def _differ(ours: str, theirs: str) -> bool:
    """Whether two units are known ones and not the same, or of another power, as square and cubic metres."""
    names = [_unit(unit) for unit in (ours, theirs)]
    return None not in names and (names[0] != names[1] or _power(ours) != _power(theirs))


def _unit(text: str) -> str | None:
    """The known unit that a text names, whatever its power; None of any other, and of products (N m, m s^{-1})."""
    inside = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if re.search(r"\^\{-|[A-Za-z.] +[A-Za-z]", inside):
        return None
    bare = re.sub(r"[^A-Za-z./]", "", inside).rstrip(".")
    return _UNITS.get(bare) or _UNITS.get(bare.removesuffix("s")) or _NAMES.get(bare.lower().removesuffix("s"))


def _power(unit: str) -> str:
    """2 of a square unit, 3 of a cubic one."""
    found = re.search(r"[23²³]", unit)
    return found[0].translate(_SMALL) if found else "1"


def close(a: Fraction, b: Fraction, decimals: int) -> bool:
    """Whether two numbers, of which so many are written as decimal fractions, are equal: exactly, or within 1e-9 of
    their size and 5e-7. Between a decimal and another number also in six decimals, as math-verify has 1/3 = 0.333333;
    between two decimals only if that leaves five digits to compare."""
    size, difference = max(abs(a), abs(b)), abs(a - b)
    small = Fraction(1, 2 * 10**6)
    if difference == 0 or (decimals and difference <= min(size / 10**9, small)):
        return True
    if not decimals or difference >= small:
        return False
    return difference <= size / 10**4 if decimals == 1 else size >= Fraction(1, 10)


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
    for opening, closing in (("\\{", "\\}"), *map(tuple, ("()", "[]", "(]", "[)", "]]", "][", "[["))):
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
    text = re.sub(r"^[A-Za-z]\\in ?(?=\\\{)", "", text)
    system = _SYSTEM.fullmatch(text)
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
        pairs = zip(ours, theirs, strict=True)
        return other != "\\{\\}" and all(equal(_assigned(a)[1], _assigned(b)[1]) for a, b in pairs)
    if pair in ("()", "[]", "(]", "[)"):
        if other and pair != other and not (pair == "()" and other == "system"):
            return False
        return all(equal(a, _assigned(b)[1]) for a, b in zip(ours, theirs, strict=True))
    if not pair and other == "()" and GROUPED.fullmatch(gold):
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


# --- single answers and equations ---------------------------------------------------------------------------------


def _expressions(gold: str, answer: str) -> bool:
    """Single expressions and equations, read in each way that they may be meant."""
    for prefix in ("\\approx", "="):
        gold, answer = gold.removeprefix(prefix), answer.removeprefix(prefix)
    name, value = _chain(gold)
    other, given = _chain(answer)
    if given is None or value is None:
        return False
    ours, theirs = _FUNCTION.fullmatch(name), _FUNCTION.fullmatch(other)
    if ours and theirs and ours[1] != theirs[1]:  # f(x) = x for f(n) = n
        given = re.sub(rf"(?<![A-Za-z\\]){theirs[1]}(?![A-Za-z])", ours[1], given)
        answer, other = f"{name}={given}", name
    if name and other and name != other and not (name in given or other in value):
        name = other = ""  # y = 5 for x = 5
    if not name and other and "=" not in gold:
        answer = given
    elif name and not other and "=" not in answer:
        gold = value
    elif (value, given) != (gold, answer) and (not name) == (not other):
        gold, answer = value, given
    if (gold, answer) == (value, given) and "=" not in gold + answer and (same(gold, answer) or _numbers(gold, answer)):
        return True
    return any(equivalent(a, b) for a in meanings(gold) for b in meanings(answer, gold))


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
    bare = re.sub(r"\\[a-zA-Z]+", "", sides[0])
    if _LEFT.fullmatch(sides[-1]) and len(sides) == 2 and not re.search(r"[a-zA-Z]", bare):
        return sides[-1], sides[0]  # 5 = x
    variable = re.search(r"(?<![\\a-z])[a-z](?![a-z])", sides[0])
    if len(values) == len(sides) or (exact(sides[-1]) is not None and not variable):
        return "=", sides[-1]
    return "", text


# --- ranges ----------------------------------------------------------------------------------------------------------


def _is_range(text: str) -> bool:
    """Whether a text is an inequality, an interval that is not a tuple too, or a union of such."""
    if "\\cup" in text or "\\setminus" in text or "\\cap" in text or _BUILDER.fullmatch(text):
        return True
    if _RELATION.search(text):
        return True
    if re.match(r"[A-Za-z]\\in ?\\\{", text):
        return False
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
    """The set of real numbers that a text names: intervals, inequalities in one variable joined by "or", {x | ...}."""
    from sympy import Set, Symbol, Union

    built = _BUILDER.fullmatch(text)
    text = built[2] if built else re.sub(r"^[A-Za-z]\\in ?", "", text)
    pieces = split(text, separators=";")
    if len(pieces) > 1 or ("," in text and _RELATION.search(text) and not _enclosed(text)[1]):
        ranges = [_range(piece) for piece in (pieces if len(pieces) > 1 else split(text))]
        return Union(*ranges) if all(isinstance(r, Set) for r in ranges) else None
    inside, pair = _enclosed(text)
    if pair in ("]]", "][", "[["):
        text = {"]": "(", "[": "["}[pair[0]] + inside + {"]": "]", "[": ")"}[pair[1]]
    parsed = expression(text)
    if parsed is None or isinstance(parsed, Set):
        return parsed
    free: set[Symbol] = getattr(parsed, "free_symbols", set())
    if len(free) != 1:
        return None
    try:
        return parsed.subs(next(iter(free)), Symbol("x", real=True)).as_set() if _RELATION.search(text) else None
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return None
