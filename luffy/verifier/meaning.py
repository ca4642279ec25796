"""What a tidy text (notation.py) says: a number, a unit behind one, words, or the same as another. Pure functions."""

from __future__ import annotations

import re
from fractions import Fraction

from .notation import UNIT_LETTERS, UNITS

_DECIMAL = r"\d{1,60}(?:\.\d{1,60})?"
_NUMBER = re.compile(
    rf"([+-]?)\(?([+-]?)(?:(\d{{0,30}})\\frac\{{([+-]?)(\d{{1,60}})\}}\{{([+-]?)(\d{{1,60}})\}}|({_DECIMAL})/({_DECIMAL})"
    rf"|({_DECIMAL})(?:\\times10\^\{{(-?\d{{1,3}})\}})?|10\^\{{(-?\d{{1,3}})\}})\)?"
)
_PREFIX = re.compile(
    r"-?(?:\d*\\frac\{-?\d+\}\{\d+\}|\d[\d,]*/\d+|\d[\d,]*(?:\.\d+)?(?:\\times10\^\{-?\d+\})?)%?(?:\^\{\\circ\})?"
)
GROUPED = re.compile(r"([+-]?)([1-9]\d{0,2}(?:,\d{3})+)(\.\d+)?")
_TAIL = re.compile(
    r"(?: |\\cdot|\*|/|\(|\)|\\mu|\\Omega|\\text\{[^{}]*\}|[A-Za-z]|[^\x00-\x7f]|\^\{-?\d\}|(?<=[A-Za-z])[23](?!\d))+"
)
_TEXT_TAIL = re.compile(r"(?<=[\d})]) ?\\text\{[^{}]*\}(?:\^\{-?\d\})?$")
_COUNTED = (
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|pi)\b(?![-)])"
)
_NO_UNIT = re.compile(  # words that say more of a number than what it counts: 5 plus six, 5 squared, 5 is wrong
    rf"\b(?:and|or|not|isn|is|are|but|if|wrong|false|incorrect|really|maybe|perhaps|least|most|than|mod|modulo)\b"
    rf"|\b{_COUNTED}|\{{ ?(?:squared|cubed|factorial|doubled|tripled|halved|half)\b(?!-)"
    r"|\{ ?(?:tenth|hundredth|thousandth|fifth|sixth|seventh|eighth|ninth|third)s?\b",
    re.IGNORECASE,
)


def exact(text: str) -> Fraction | None:
    """The rational number that a tidy text writes out: integer, decimal, fraction, mixed number or power of ten."""
    grouped = GROUPED.fullmatch(text)
    if grouped:
        text = grouped[1] + grouped[2].replace(",", "") + (grouped[3] or "")
    match = _NUMBER.fullmatch(text)
    if not match or text.count("(") != text.count(")"):
        return None
    outer, inner, whole, over_sign, over, under_sign, under, left, right, decimal, exponent, power = match.groups()
    sign = -1 if [outer, inner, over_sign, under_sign].count("-") % 2 else 1
    if over is not None:
        if int(under) == 0 or (whole and (over_sign or under_sign)):
            return None
        return sign * (int(whole or 0) + Fraction(int(over), int(under)))
    if left is not None:
        return sign * Fraction(left) / Fraction(right) if Fraction(right) else None
    if power is not None:
        return sign * Fraction(10) ** int(power)
    return sign * Fraction(decimal) * Fraction(10) ** int(exponent or 0)


def without_unit(text: str) -> tuple[str, str]:
    """A tidy text and the unit behind it: (15, \\text{cm}) of 15\\text{cm}; "" where there is none.

    Letters in mathematics are only a unit behind a number, and if they are known as one.
    """
    number = _PREFIX.match(text)
    if number and _TAIL.fullmatch(text, number.end()):
        tail = text[number.end() :]
        bare = re.findall(r"[A-Za-z]+", re.sub(r"\\text\{[^{}]*\}|\\(?:mu|Omega|cdot)", " ", tail))
        if (
            re.search(r"[A-Za-z]|[^\x00-\x7f]", tail)
            and all(run in UNITS or run in UNIT_LETTERS for run in bare)
            and _is_unit(tail)
        ):
            return number[0], tail.strip()
    match = _TEXT_TAIL.search(text)
    if match and match.start() > 0 and _is_unit(match[0]):
        return text[: match.start()], match[0].strip()
    return text, ""


def _is_unit(tail: str) -> bool:
    return not (
        _NO_UNIT.search(tail) or re.search(r"\b[eE]\d|\{ ?k ?\}", tail) or re.search(r"(?<![A-Za-z^{-])\d", tail)
    )


def words(text: str) -> str | None:
    """The words of a tidy text that says nothing else, in small letters; None for mathematics."""
    match = re.fullmatch(r"(?:\\text\{([^{}]*)\})", text)
    return " ".join(re.findall(r"\w+", match[1].lower())) if match else None


def same(gold: str, answer: str) -> bool:
    """Whether two tidy texts say the same to a reader who knows no mathematics, whatever the spaces and fonts."""
    if _bare(gold) == _bare(answer) != "":
        return True
    said = words(gold)
    return said is not None and said == re.sub(r"[^\w ]", "", _bare(answer, " ").lower()).strip()


def _bare(text: str, space: str = "") -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text) if "\\text{" in text else text
    text = re.sub(r"(?<=\d) (?=\d)", "_", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if GROUPED.fullmatch(text) else text
    return re.sub(r"\s+", space, text).strip().removeprefix("+")
