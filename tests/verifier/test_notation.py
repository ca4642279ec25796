"""Answers as people write them, through the functions that the verifier's processes call."""

import json
import re

import pytest
from paths import SHARED_DATA

from luffy.verifier.answers import boxes, final_answer, letter, options
from luffy.verifier.meaning import exact
from luffy.verifier.notation import tidy
from luffy.verifier.readings import equal
from luffy.verifier.strict import strict_answer, strict_right, unreadable
from luffy.verifier.worker import is_right

# gold, answers that say the same, answers that do not
ANSWERS = [
    ("1.04e-3", ["1.04 \\times 10^{-3}", "1.04 \\cdot 10^{-3}", "0.00104", "1.04E-3", "1.04 × 10⁻³"],
        ["1.04e-4", "1.05e-3", "1.04", "-3"]),
    ("1.04e-3", ["1.04 \\times 10^{-3}\\,\\mathrm{erg\\,s^{-1}}", "1.04 x 10^-3", "1.04e-3.", "1.04e-3 \\text{ m}"],
        ["1.04 \\times 10^{3}"]),
    ("2.7778e-6", ["0.0000027778"], ["2.7773e-6", "2.7779e-6"]),
    ("0.0012345", ["0.00123450"], ["0.0012349"]),
    ("c^{2}\\left(\\gamma^{2}-1\\right)", ["c^2\\gamma^2 - c^2"], ["c^{2}\\left(\\gamma^{2}-2\\right)"]),
    ("1e+16", ["10^{16}", "10000000000000000", "1 \\times 10^{16}"], ["10^{15}", "16"]),
    ("243", ["2.43 \\times 10^2", "243.0", "\\frac{486}{2}"], ["2.43", "24.3", "244"]),
    ("29", ["0.29 \\times 100", "29.0"], ["0.29", "28.9999"]),
    ("\\frac{1}{3}", ["0.333333", "1/3", "0.\\overline{3}", "⅓"], ["0.33", "0.3", "3", "0"]),
    ("0.1\\overline{6}", ["\\frac16"], ["0.16", "0"]),
    ("3+4\\mathrm{i}", ["3+4i", "4i + 3", "3 + 4 i"], ["7", "3-4i", "5"]),
    ("2\\mathrm{e}", ["2e"], ["2", "5.4"]),
    ("-1", ["i^2", "−1", "- 1"], ["1", "i"]),
    ("\\begin{cases} x=1\\\\y=2\\end{cases}", ["x=1, y=2", "(1,2)"], ["2", "x=9, y=2", "(2,1)"]),
    ("f(x)=\\begin{cases} x, & x\\ge 0\\\\ -x, & x<0\\end{cases}", [], ["0", "|x|+1", "x"]),
    ("n \\equiv 3 \\pmod 7", ["n\\equiv 3\\pmod{7}", "n \\equiv 3 \\mod 7"], ["3", "n \\equiv 4 \\pmod 7"]),
    ("\\langle 1,2,3\\rangle", ["(1,2,3)"], ["1.2", "6", "\\langle 3,2,1 \\rangle"]),
    ("2\\mathbf{i}+3\\mathbf{j}", ["3\\mathbf{j}+2\\mathbf{i}", "2\\vec{i}+3\\vec{j}"],
        ["3", "2\\mathbf{j}+3\\mathbf{i}"]),
    ("9 \\text{ chickens and } 10 \\text{ rabbits}", ["9 chickens and 10 rabbits"], ["9 \\text{ chickens}", "9", "19"]),
    ("5 \\text{ feet } 3 \\text{ inches}", ["5\\text{ feet }3\\text{ inches}"],
        ["5\\text{ feet }4\\text{ inches}", "5", "15"]),
    ("1, 2, \\ldots, n", ["1,2,\\dots,n"], ["1,2,n", "n"]),
    ("3:45", ["3 : 45"], ["6:90", "3:46", "\\frac{1}{15}"]),
    ("3:2", ["6:4", "3/2"], ["2:3", "3"]),
    ("2516_8", ["2516_{8}", "2516_{\\text{eight}}", "2516"], ["2516_9", "2515_8", "1358"]),
    ("\\{x \\mid x>3\\}", ["x>3", "(3,\\infty)"], ["3", "x \\ge 3", "x<3"]),
    ("\\text{stop}", ["stop", "Stop."], ["post", "stops"]),
    ("0", ["0^\\circ", "0.0"], ["115\\,000", "", "\\emptyset"]),
    ("115,000", ["115\\,000", "115{,}000", "115 000", "1.15 \\times 10^5"], ["115", "(115,0)", "0"]),
    ("1, 100", ["1,100", "(1,100)", "100, 1"], ["1100", "1", "101"]),
    ("2,552,004", ["2552004"], ["(2,552,004)", "2552", "4"]),
    ("11 5/6", ["\\frac{71}{6}", "11\\frac56"], ["11", "5/6", "55/6"]),
    ("6m", ["6 m", "m \\cdot 6"], ["6", "6n"]),
    ("15 \\mathrm{~cm}", ["15", "15 \\text{ centimeters}", "15cm"], ["15 \\text{ m}", "16 \\text{ cm}"]),
    ("\\frac{\\pi}{3}", ["60^\\circ"], ["60", "\\frac{\\pi}{6}"]),
    ("\\frac{1}{4}", ["25\\%", "0.25"], ["0.25\\%", "25"]),
    ("(2,3]", ["2<x\\le3", "]2,3]", "x \\in (2,3]"], ["(2,3)", "[2,3]", "2<x<3"]),
    ("(-\\infty,-1)\\cup(3,\\infty)", ["x<-1\\text{ or }x>3"], ["(3,\\infty)", "x<-1"]),
    ("3x-y+13=0", ["y=3x+13", "6x - 2y + 26 = 0", "y - 3x = 13"], ["y=3x-13", "13", "3x+y+13=0"]),
    ("f(x)=2x+1", ["2x+1", "y=2x+1"], ["2x", "f(x)=2x-1"]),
    ("\\ln 2", ["\\log 2", "\\log_e 2"], ["2", "\\ln 3"]),
    ("\\binom{10}{3}", ["C_{10}^{3}", "120", "{10 \\choose 3}"], ["30", "\\binom{10}{4}"]),
    ("1 \\pm \\sqrt{19}", ["1+\\sqrt{19}, 1-\\sqrt{19}"], ["1+\\sqrt{19}", "\\pm\\sqrt{19}"]),
    ("x=1 \\text{ or } x=2", ["1, 2", "x=2, x=1"], ["1", "x=2", "1, 3"]),
    ("A, C", ["AC", "C, A", "\\text{A and C}"], ["A", "A, B", "ACD"]),
    ("B", ["(B) 12", "\\text{B) 12}", "B: the cat", "b", "B."], ["A or B", "A, B", "C", "Because"]),
    ("\\text{No solution for } a=3", [], ["3", "a=3"]),
    ("5 \\text{ million}", ["5000000", "5\\text{ million}", "5{,}000{,}000", "5 million dollars"],
        ["5", "5\\text{ billion}"]),
    ("12345678901", ["12345678901.0", "12{,}345{,}678{,}901"], ["12345678902.0", "1.23456789\\times 10^{10}"]),
    ("10000000000.25", ["10000000000.250", "\\frac{40000000001}{4}"], ["10000000001.25", "10000000000.5"]),
    ("\\frac{12345678901}{2}", ["6172839450.5"], ["6172839451.0", "6172839450.50001"]),
    ("A", ["(A)", "A. 12", "(A) A cat", "(A) P(B)", "A. angle B: 30", "(A) f(B) = C"],
        ["(A) or (B)", "A: or B", "A. B. C.", "(A), (B)"]),
    ("5 \\text{ kV}", ["5", "5 kilovolts"], ["5 V", "5\\text{ mV}", "5\\text{e6}", "5\\text{ MV}"]),
    ("5 \\text{ J}", ["5\\text{ N m}", "5\\text{ joules}", "5"], ["5\\text{ kJ}", "5\\text{ nm}"]),
    ("10", ["10\\text{ times}", "10\\text{ more}", "10\\text{ three-digit numbers}", "10\\text{ half-lives}",
        "10\\text{ (ten)}", "10\\text{ to the nearest integer}"],
        ["10\\text{ plus six}", "10\\text{ times seven}", "10\\text{ tenths}", "10\\text{ lakh}", "10\\text{ doubled}",
        "10\\text{ squared}", "10\\text{ or more}", "10\\text{ maybe}"]),
    ("75 \\text{ feet squared}", ["75", "75\\text{ feet squared}"], ["76"]),
    ("10 \\text{ times}", ["10"], ["11"]),
    ("5", ["x=5", "|AB|=5", "\\angle A=5", "5 \\text{ ways}", "\\text{Area}=5"],
        ["5=6", "5x", "5 \\text{ or } 6", "1 5"]),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "same", "different"), ANSWERS, ids=[case[0][:30] for case in ANSWERS])
def test_answers(gold, same, different):
    for answer in (gold, *same):
        assert is_right(gold, f"so \\boxed{{{answer}}}"), answer
    for answer in different:
        assert not is_right(gold, f"so \\boxed{{{answer}}}"), answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{4}. Wait, \\boxed{5}", "5"),
        ("\\boxed{5} wait, no: \\boxed{7", None),
        ("\\boxed{1}, \\boxed{2} and \\boxed{3}", "1, 2, 3"),
        ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
        ("\\boxed{5} so again \\boxed{5}", "5"),
        ("\\boxed{5}, \\boxed{5}", "5"),
        ("\\boxed{\\text{\\boxed{5}}}", "\\text{\\boxed{5}}"),
        ("\\boxed{\\frac{1}{2}} {", "\\frac{1}{2}"),
        ("\\boxed{ a } b } c", "a"),
        ("\\boxed{open \\boxed{7}", "7"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\fbox{13}", "13"),
        ("\\boxed {13}", "13"),
        ("<answer>13</answer>", "13"),
        ("the answer is 13", None),
    ],
)
def test_the_last_closed_box_counts(text, answer):
    assert final_answer(text) == answer
    if answer is None and "boxed" in text:
        assert not boxes(text)[1] and not is_right("5", text)


def test_options_and_letters():
    assert options("A,C") == options("CA") == "AC" and options("A or x") is None and options("AA") is None
    for answer in "ABCDEFGHIJ":
        for text in (
            "\\boxed{X. 12}",
            "\\boxed{\\text{(X) }12}",
            "\\boxed{X.}",
            "The answer is X.",
            "**Answer: X**",
            "\\boxed{\\text{X}}",
        ):
            assert letter(text.replace("X", answer)) == answer
    for text in ("\\boxed{A, B}", "\\boxed{(A) or (B)}", "\\boxed{A mixture}", "\\boxed{A", "", "an answer"):
        assert letter(text) == ""


def test_numbers_are_exact():
    assert exact("1.04\\times10^{-3}") == exact(tidy("0.00104")) == exact(tidy("1.04E-3"))
    assert exact("-2\\frac{1}{2}") == -2.5 and exact("1/0") is None and exact("x") is None and exact("1 2") is None


def test_ground_truths_that_nothing_matches():
    assert unreadable("\\frac{1}{2}") == unreadable("\\text{stop}") == ""
    assert "nothing" in unreadable("$ $") and "braces" in unreadable("\\frac{1}{2")
    assert "too large" in unreadable("9^{9^{9^{9}}}")


STRANGE = [
    "",
    "\\",
    "\\frac",
    "\\sqrt[",
    "^",
    "\\text{",
    "\ud8001",
    "½" * 500,
    "\\left" * 2000,
    "a\x00b",
    "x^" + "-" * 1900,
]
STRANGE += [
    part * (n // len(part))
    for n in (1900, 90_000)
    for part in ("{", "}", "^{", "\\text{", "a", "1", "~ ", ". ", "answer is ")
]
STRANGE += [
    "a" * 1900 + "-",
    "1" * 1900 + "x",
    "5" + "ab" * 900 + "!",
    "answer is" + " " * 90_000 + "x",
    "\\boxed{" * 9000,
]


@pytest.mark.parametrize("place", range(len(STRANGE)))
def test_text_of_any_kind_is_read_in_time(place):
    """Nothing raises, and no pattern goes back and forth: each of these would take hours if one did."""
    text = STRANGE[place]
    assert isinstance(tidy(text), str) and isinstance(letter(text), str)
    assert not equal(tidy("x+1"), tidy(text)) and strict_answer(f"\\boxed{{{text}}}") != "x+1"


def test_digits_of_other_scripts():
    assert tidy("٣") == "3"


UPRIGHT_I = r"(?<![A-Za-z\\])i(?![A-Za-z])"
DIGITS = str.maketrans("0123456789(),", "０１２３４５６７８９（），")
REWRITINGS = {  # harmless ways of writing a ground truth, each with what it can be done to
    "a full stop": (".*", lambda g: f"{g}."),
    "a comma": (".*", lambda g: f"{g},"),
    "a tie": (".*", lambda g: f"{g}~"),
    "spaces": (".*", lambda g: f"\\, {g} \\;"),
    "display style": (".*", lambda g: f"\\displaystyle {g}"),
    "thousands by a thin space": ("\\d{4,}", lambda g: f"{int(g):,}".replace(",", "\\,")),
    "thousands by a comma in braces": ("\\d{4,}", lambda g: f"{int(g):,}".replace(",", "{,}")),
    "thousands by a comma": ("\\d{4,}", lambda g: f"{int(g):,}"),
    "upright e": (r".*(?<![A-Za-z\\])e\^.*", lambda g: re.sub(r"(?<![A-Za-z\\])e(?=\^)", r"\\mathrm{e}", g)),
    "upright i": (rf"[^wt]*{UPRIGHT_I}[^w]*", lambda g: re.sub(UPRIGHT_I, r"\\mathrm{i}", g)),
    "a degree sign": (r".*\^\{?\\circ.*", lambda g: re.sub(r"\^\{?\\circ\}?", "°", g)),
    "\\degree": (r".*\^\{?\\circ.*", lambda g: re.sub(r"\^\{?\\circ\}?", r"\\degree", g)),
    "display fractions": (r".*\\frac.*", lambda g: g.replace("\\frac", "\\dfrac")),
    "fractions without braces": (r".*\\frac\{\d\}\{\d\}.*",
        lambda g: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", g)),
    "the minus of unicode": (r"(?!.*e-\d).*-.*", lambda g: g.replace("-", "−")),
    "full-width signs": (r"[^\\$]*", lambda g: g.translate(DIGITS)),
    "the root of unicode": (r".*\\sqrt\{\d+\}.*", lambda g: re.sub(r"\\sqrt\{(\d+)\}", r"√\1", g)),
    "infinity": (r".*\\infty.*", lambda g: g.replace("\\infty", "∞")),
    "bold": (r"-?\d+", lambda g: f"\\mathbf{{{g}}}"),
    "a unit": (r"\d+", lambda g: f"{g}~\\text{{cm}}"),
    "a Chinese unit": (r"\d+", lambda g: f"{g}个"),
    "a name": (r"-?\d+", lambda g: f"x = {g}"),
    "powers of ten": (r"[\d.]+e-?\d+", lambda g: re.sub(r"e(.*)", r" \\times 10^{\1}", g)),
    "powers of ten with a dot": (r"[\d.]+e-?\d+", lambda g: re.sub(r"e(.*)", r" \\cdot 10^{\1}", g)),
    "powers of ten with a unit": (r"[\d.]+e-?\d+", lambda g: re.sub(r"e(.*)", r" \\times 10^{\1} \\mathrm{~m/s}", g)),
    "a capital E": (r"[\d.]+e-?\d+", lambda g: g.replace("e", "E")),
}  # fmt: skip


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real benchmark files are not here")
def test_harmless_writing_of_real_ground_truths_is_never_refused():
    """Both graders, all ground truths of the six sets; a table of their agreement is printed (pytest -s)."""
    pytest.importorskip("datasets")
    from luffy.data.problems import load_problems

    golds = sorted({problem.answer for problem in load_problems(str(SHARED_DATA / "valid.all.parquet"))[0]})
    assert len(golds) > 1000 and not any(map(unreadable, golds))
    print("\nrewriting, ground truths, refused by the reward, by the strict rule")
    for name, (where, write) in {"itself": (".*", str), **REWRITINGS}.items():
        written = [(gold, write(gold)) for gold in golds if re.fullmatch(where, gold, re.DOTALL)]
        refused = [pair for pair in written if not is_right(pair[0], f"\\boxed{{{pair[1]}}}")]
        strict = sum(not strict_right(gold, strict_answer(f"\\boxed{{{text}}}")) for gold, text in written)
        print(f"{name}, {len(written)}, {len(refused)}, {strict}")
        assert written and not refused, name
    for gold in golds:
        assert is_right(gold, f"\\fbox{{{gold}}}") and is_right(gold, f"\\boxed{{4242}}. Wait, \\boxed{{{gold}}}")


@pytest.mark.skipif(not (SHARED_DATA.parent / "cases").exists(), reason="the collected cases are not here")
def test_collected_cases():
    cases = json.loads((SHARED_DATA.parent / "cases" / "grading.json").read_text())
    paid, refused = [], []
    for case in cases:
        text = case["completion"].partition("</think>")[2] or case["completion"]
        if case.get("kind") == "choice":
            right = strict_right(case["gold"], strict_answer(text, "choice"), "choice")
        else:
            right = is_right(case["gold"], text)
        if right != bool(case["expected"]):
            (paid if right else refused).append(case)
    assert len(cases) > 600 and not paid and len(refused) <= 0.02 * len(cases), (paid, refused)
