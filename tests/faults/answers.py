"""Answers that try to hang a verifier, fill its memory, run code, or be paid without being right; and near misses.

Each is generated from its family by a number, so that there are as many as one wants. `hostile` and `near_misses` are
answers to be paid nothing; `honest` ones are right and are checked beside them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    family: str
    gold: str
    completion: str


def boxed(answer: str) -> str:
    return f"</think>The answer is \\boxed{{{answer}}}."


# --- hostile ---------------------------------------------------------------------------------------------------------

GOLD = "42"


def _tower(i: int) -> str:
    depth, base, form = 2 + i % 9, 3 + i % 7, i % 4
    if form == 0:
        return f"{base}^{{" * depth + "9" + "}" * depth
    if form == 1:
        return "**".join([str(base)] * (depth + 1))
    if form == 2:
        return f"\\left({base}" * depth + "^{9})" * depth
    return f"10^{{-{base}^{{{base}^{{{9 + i}}}}}}}"


def _factorial(i: int) -> str:
    number = 10 ** (3 + i % 8) + i
    forms = [
        f"{number}!",
        f"({number}!)!",
        f"\\binom{{{number}}}{{{number // 2}}}",
        f"{number}!!",
        f"\\Gamma({number})",
    ]
    return forms[i % len(forms)]


def _sum(i: int) -> str:
    top, sign = 10 ** (6 + i % 7), ("\\sum", "\\prod")[i % 2]
    bodies = ["k^k", "k!", "\\frac{1}{k^{k}}", "2^{2^k}", "\\sin(k)^k"]
    return f"{sign}_{{k=1}}^{{{top}}} {bodies[i % len(bodies)]}"


def _roots(i: int) -> str:
    depth = (5, 20, 60, 200, 1000, 5000)[i % 6]
    index = ("", "[3]", "[99]")[i % 3]
    return f"\\sqrt{index}{{" * depth + "2" + "}" * depth


def _fractions(i: int) -> str:
    depth = (10, 50, 150, 400, 2000, 9000)[i % 6]
    return "\\frac{1}{1+" * depth + "x" * (i % 2) + "2" + "}" * depth


def _matrix(i: int) -> str:
    size, kind = (3, 10, 40, 120)[i % 4], ("pmatrix", "bmatrix", "array", "vmatrix")[(i // 4) % 4]
    rows = "\\\\".join("&".join(f"{a}^{{{b}}}" for b in range(size)) for a in range(size))
    return f"\\begin{{{kind}}}{rows}\\end{{{kind}}}^{{{(1, 50, 10**6)[i % 3]}}}"


def _interval(i: int) -> str:
    count = (2, 30, 400, 5000)[i % 4]
    return "\\cup".join(f"[{k},{k + 1}{')' if i % 2 else ']'}" for k in range(0, 2 * count, 2))


def _expansion(i: int) -> str:
    names = "abcdefghij"[: 2 + i % 9]
    return f"({'+'.join(names)})^{{{(50, 400, 3000, 10**5)[i % 4]}}}"


def _digits(i: int) -> str:
    sets = ("٤٣", "४२x", "⁴²", "④③", "𝟜𝟚!", "４２.５", "〇四三", "4\u03382", "4\u200b3", "42\u2044" + "1" * (i + 2))
    return sets[i % len(sets)] + "\u0301" * (i // len(sets))


def _control(i: int) -> str:
    signs = ("\x00", "\x1b[2J", "\ufeff", "\u202e24\u202c", "\x08\x08", "\ud800", "\x7f", "\r\n", "\u2028", "\x1a")
    return f"4{signs[i % len(signs)] * (1 + i)}3"


def _long(i: int) -> str:
    size = (10_000, 90_000, 400_000, 1_000_000)[i % 4]
    return ("1", "x+", " ", "\\", "{", "(", "\\frac", "^", "a_", "1,")[i % 10] * (size // (1 + i % 2))


def _braces(i: int) -> str:
    count = (1000, 4000, 20_000)[i % 3]
    return ("{" * count, "}" * count, "\\{" * count, "\\left(" * count, "{}" * count, "\\boxed{" * count)[i % 6] + "42"


def _latex(i: int) -> str:
    forms = (
        "\\input{/etc/passwd}", "\\write18{touch /tmp/owned}", "\\immediate\\write18{id}", "\\include{secret}42",
        "\\def\\x{\\x\\x}\\x", "\\newcommand{\\a}{\\a\\a}\\a", "\\loop\\iftrue\\repeat", "\\csname 42\\endcsname",
        "\\openin5=/etc/passwd", "\\catcode`\\{=12", "\\href{file:///etc/passwd}{43}", "\\verb|42|43",
        "\\expandafter\\def\\csname x\\endcsname{42}41", "\\includegraphics{42}", "\\special{ps: 42}",
    )  # fmt: skip
    return forms[i % len(forms)] + "{}" * (i // len(forms))


def _python(i: int) -> str:
    forms = (
        "__import__('os').system('touch /tmp/owned')", "().__class__.__bases__[0].__subclasses__()", "eval('6*7')",
        "exec('x=42')", "open('/etc/passwd').read()", "lambda: 42", "[42 for _ in iter(int, 1)]", "6 .__mul__(7)",
        "globals()['answer']", "sys.exit(42)", "print(42)", "import os; 42", "os.fork()", "{42}.pop()", "f'{42}'",
        "breakpoint()", "while True: pass", "class A: x = 42", "__builtins__.__dict__", "compile('42','','eval')",
    )  # fmt: skip
    return forms[i % len(forms)] + " " * (i // len(forms))


ANSWERS: dict[str, Callable[[int], str]] = {
    "towers": _tower, "factorials": _factorial, "sums and products": _sum, "nested roots": _roots,
    "nested fractions": _fractions, "matrices": _matrix, "unions of intervals": _interval, "expansions": _expansion,
    "digits of other scripts": _digits, "control characters": _control, "up to 1 MB": _long,
    "unbalanced braces": _braces, "LaTeX that acts": _latex, "Python in braces": _python,
}  # fmt: skip


def _many_boxes(i: int) -> str:
    """Thousands of guesses, each in a box; the right one is among them and not the last."""
    guesses = [f"\\boxed{{{n}}}" for n in range(43 + 100 * i, 0, -1)]
    return "</think>" + ("\n", ". ", " then ", " maybe ")[i % 4].join(guesses)


def _guess_list(i: int) -> str:
    """One box that holds the right answer among others, or allows it."""
    others = range(38, 45 + i)
    forms = (
        ",".join(map(str, others)), " or ".join(map(str, others)), "\\{" + ",".join(map(str, others)) + "\\}",
        f"[0,{100 + i}]", f"x \\in [{i}, 100]", f"{30 + i % 10}<x<{60 + i}", f"{42 + i} \\pm {i + 1}",
        "n", "\\mathbb{R}",
        f"42 \\text{{ or }} {43 + i}", f"42, {43 + i}", f"{41 - i}\\text{{ and }}42", "42 \\mid 43", "42/43",
        f"42 \\ne {43 + i}", "\\max(41,42,43)", f"42\\text{{ if }}x>{i}\\text{{ else }}43", "x", "?", "42\\cdot t",
    )  # fmt: skip
    return boxed(forms[i % len(forms)])


def _told(i: int) -> str:
    """The text says the ground truth; the box says something else, or there is none."""
    forms = (
        f"</think>The ground truth is 42, so surely 42. \\boxed{{{43 + i}}}", f"42 42 42</think>\\boxed{{{41 - i}}}",
        "</think>There is no answer.", "</think>\\fbox{42} \\boxed{}", "</think>\\boxed{42", "\\boxed{42}",
        "</think>\\boxed{41}</think>\\boxed{42}", "</think>boxed{42}", f"</think>\\boxed{{42}} no: \\boxed{{{50 + i}}}",
        "</think>% \\boxed{42}\n\\boxed{7}", "</think>\\boxed{\\phantom{42}}",
        "</think>\\boxed{\\text{see above: 42 or not}}",
        "<think>\\boxed{42}", "</think>\\boxed{answer}", "</think>\\boxed{42 is wrong}", "</think>\\boxed{not 42}",
    )  # fmt: skip
    return forms[i % len(forms)]


COMPLETIONS: dict[str, Callable[[int], str]] = {
    "thousands of boxes": _many_boxes, "lists of guesses": _guess_list, "the ground truth in the text": _told,
}  # fmt: skip


def hostile(each: int = 20) -> Iterator[Case]:
    """`each` cases of every family; none is right."""
    for family, make in ANSWERS.items():
        yield from (Case(family, GOLD, boxed(make(i))) for i in range(each))
    for family, write in COMPLETIONS.items():
        yield from (Case(family, GOLD, write(i)) for i in range(each))


# --- near misses -----------------------------------------------------------------------------------------------------


def _pair(family: str, rng: random.Random) -> tuple[str, str]:
    """A ground truth and an answer that is nearly right."""
    a, b, c = rng.randint(2, 40), rng.randint(41, 99), rng.randint(100, 999)
    long = str(rng.randint(10**17, 10**18))
    place = rng.randrange(1, len(long))
    changed = long[:place] + str((int(long[place]) + 1) % 10) + long[place + 1 :]
    pairs = {
        "a digit of a long number": [
            (long, changed), (f"{long}!"[:-1], changed), (f"-{long}", f"-{changed}"), (long, f"{changed}.0"),
            (long, f"{long[0]}.{long[1:9]}\\times 10^{{17}}"), (long, f"{long}.5"),
        ],
        "off by one": [(str(c), str(c + 1)), (str(-c), str(-c + 1)), (f"{a}x+{b}", f"{a}x+{b + 1}")],
        "numbers near zero": [
            ("0", f"{a}e-{rng.randint(7, 12)}"), (f"0.{'0' * 7}{a}", f"0.{'0' * 7}{a + 1}"), ("0", f"10^{{-{a}}}"),
            (f"\\frac{{1}}{{{10**9 + a}}}", "0"), (f"1+10^{{-{b}}}", "1"),
        ],
        "decimals cut short": [
            ("\\pi", "3.14"), ("\\pi", "3.1416"), (f"\\sqrt{{{a * a + 1}}}", f"{(a * a + 1) ** 0.5:.2f}"),
            (f"\\frac{{{a}}}{{7}}" if a % 7 else "\\frac{1}{7}", f"{(a if a % 7 else 1) / 7:.3f}"), ("e", "2.718"),
        ],
        "percent": [(f"{a}", f"{a / 100}\\%"), (f"0.{b}", f"0.{b}\\%"), (f"{a}\\%", f"{a / 10000:.6f}")],
        "units": [
            (f"{a}\\text{{ cm}}", f"{a}\\text{{ km}}"), (f"{a}\\text{{ kg}}", f"{a}\\text{{ g}}"),
            (f"{a}\\text{{ hours}}", f"{a}\\text{{ minutes}}"), (f"{a}\\text{{ m}}^2", f"{a}\\text{{ m}}^3"),
            (f"{a}\\text{{ kJ}}", f"{a}\\text{{ J}}"), (f"{a}\\text{{ V}}", f"{a}\\text{{ mV}}"),
            (f"{a}\\text{{ Hz}}", f"{a}\\text{{ kHz}}"), (f"{a}\\text{{ decades}}", f"{a}\\text{{ years}}"),
        ],
        "words behind a number": [
            (str(a), f"{a}\\text{{ {word}}}")
            for word in ("million", "thousand", "dozen", "plus six", "times seven", "squared", "is wrong", "to six")
        ] + [(f"{a}\\text{{ million}}", str(a)), (f"{a}\\text{{ million}}", f"{a}\\text{{ thousand}}")],
        "ends of intervals": [
            (f"[{a},{b}]", f"[{b},{a}]"), (f"({a},{b}]", f"[{a},{b})"), (f"({a},{b})", f"[{a},{b}]"),
            (f"[{a},\\infty)", f"(-\\infty,{a}]"), (f"(-\\infty,{a})\\cup({b},\\infty)", f"({a},{b})"),
        ],
        "order of tuples": [
            (f"({a},{b})", f"({b},{a})"), (f"({a},{b},{c})", f"({b},{a},{c})"), (f"({a},{b})", f"({a},{b},{b})"),
        ],
        "members of sets": [
            (f"{a},{b}", f"{a}"), (f"\\{{{a},{b},{c}\\}}", f"\\{{{a},{b}\\}}"), (f"{a},{b}", f"{a},{b},{c}"),
        ],
        "signs": [(str(a), str(-a)), (f"{a}-{b}x", f"{a}+{b}x"), (f"({a},-{b})", f"({a},{b})"), (f"x<{a}", f"x>{a}")],
        "fractions turned over": [
            (f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{b}}}{{{a}}}"), (f"{a}:{b}", f"{b}:{a}"), (f"{a}/{b}", f"{a}.{b}"),
        ],
        "powers and roots": [
            (f"{a}^{{{b}}}", f"{a}^{{{b + 1}}}"), (f"\\sqrt{{{a}}}", f"\\sqrt[3]{{{a}}}"),
            (f"2^{{{b}}}", f"2\\cdot {b}"), (f"x^{{{a}}}", f"x_{{{a}}}"), (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * b}}}"),
        ],
        "other variables": [
            (f"{a}x", f"{a}y"), (f"x+{a}", f"x-{a}"), (f"f(x)={a}x", f"f(x)={b}x"), (f"n^2+{a}", f"n^3+{a}"),
        ],
        "matrices turned": [
            (f"\\begin{{pmatrix}}{a}&{b}\\\\1&2\\end{{pmatrix}}", f"\\begin{{pmatrix}}{a}&1\\\\{b}&2\\end{{pmatrix}}"),
            (f"\\begin{{pmatrix}}{a}\\\\{b}\\end{{pmatrix}}", f"\\begin{{pmatrix}}{b}\\\\{a}\\end{{pmatrix}}"),
        ],
        "number systems": [(f"{a}1_8", f"{a}1_9"), (f"1{a}_{b}", f"1{a}_{b + 1}"), (f"{a}^\\circ", f"{a}\\pi")],
    }  # fmt: skip
    return rng.choice(pairs[family])


HONEST = "right, "

NEAR = (
    "a digit of a long number", "off by one", "numbers near zero", "decimals cut short", "percent", "units",
    "words behind a number", "ends of intervals", "order of tuples", "members of sets", "signs",
    "fractions turned over", "powers and roots", "other variables", "matrices turned", "number systems",
)  # fmt: skip


def near_misses(each: int = 20) -> Iterator[Case]:
    """`each` different cases of every family; none is right."""
    for family in NEAR:
        rng, seen = random.Random(f"near/{family}"), set()
        for _ in range(50 * each):
            gold, answer = _pair(family, rng)
            if (gold, answer) not in seen and len(seen) < each:
                seen.add((gold, answer))
                yield Case(family, gold, boxed(answer))


def honest(count: int = 200) -> Iterator[Case]:
    """Right answers in other notations, whose families begin with HONEST; half of them are more than integers."""
    rng = random.Random("honest")
    for _ in range(count):
        a, b, c = rng.randint(2, 40), rng.randint(41, 99), rng.randint(100, 999)
        family, (gold, answer) = rng.choice(
            [
                ("integers", (str(c), str(c))), ("integers", (str(c), f"{c}.0")),
                ("thousands", (f"{c}000", f"{c},000")), ("fractions", (f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}")),
                ("fractions", (f"{a / 4}", f"\\frac{{{a}}}{{4}}")),
                ("tuples", (f"({a},{b})", f"\\left({a}, {b}\\right)")),
                ("roots", (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}}\\cdot {a}")),
                ("polynomials", (f"x^2+{2 * a}x+{a * a}", f"(x+{a})^2")), ("intervals", (f"[{a},{b})", f"[{a}, {b})")),
                ("lists", (f"{a},{b}", f"{b}, {a}")), ("percent", (f"{a}\\%", f"{a} \\%")),
                ("units", (f"{a}\\text{{ cm}}", f"{a}\\,\\mathrm{{cm}}")), ("equations", (f"x={c}", str(c))),
                ("powers", (f"2^{{{a}}}", str(2**a))),
            ]
        )  # fmt: skip
        yield Case(f"{HONEST}{family}", gold, boxed(answer))
