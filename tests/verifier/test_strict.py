import pytest

from luffy.verifier.strict import grader_version, normalised, strict_answer, strict_right
from luffy.verifier.worker import is_right


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("204", "so \\boxed{204}", True),
        ("025", "\\boxed{25}", True),
        ("142.0", "\\boxed{142}", True),
        ("1000", "\\boxed{1,000}", True),
        ("12,345,678", "\\boxed{12345678}", True),
        ("(1,234)", "\\boxed{(1,234)}", True),
        ("\\frac{1}{2}", "\\boxed{\\dfrac12}", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("-\\frac{3}{4}", "\\boxed{-3/4}", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3,\\frac{\\pi}{2})}", True),
        ("90", "\\boxed{90^\\circ}", True),
        ("50", "\\boxed{50\\%}", True),
        ("5", "\\boxed{x = 5}", True),
        ("5", "\\boxed{5.}", True),
        ("12", "\\boxed{12\\text{ cm}}", True),
        ("1.04e-3", "\\boxed{1.04 \\times 10^{-3}}", True),
        ("1.04e-3", "\\boxed{0.00104\\text{ m}}", True),
        ("1.04e-3", "\\boxed{1.04 \\times 10^{3}}", False),
        ("\\text{Evelyn}", "\\boxed{Evelyn}", True),
        ("5", "the answer is 5", False),  # no box
        ("5", "\\boxed{4} no, \\boxed{5}", True),
        ("5", "\\boxed{5} no, \\boxed{4}", False),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", True),
        ("2\\sqrt{2}", "\\boxed{\\sqrt{8}}", False),  # equal, but not by this rule
        ("5", "\\boxed{}", False),
        ("\\$18.90", "\\boxed{18.90}", True),
        ("18.90", "\\boxed{\\$18.90}", True),
        ("\\$32,\\!348", "\\boxed{32348}", True),
        ("10.5", "\\boxed{2 1/2}", False),
        ("12", "\\boxed{12", False),  # truncated: perhaps 123
        ("1", "\\boxed{1/0}", False),
        ("9" * 5000, "\\boxed{" + "9" * 5001 + "}", False),
    ],
)
def test_strict_rule_for_expressions(gold, completion, right):
    assert strict_right(gold, strict_answer(completion)) is right


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("B", "\\boxed{B}", True),
        ("B", "\\boxed{\\text{B}}", True),
        ("B", "\\boxed{(B)}", True),
        ("B", "\\boxed{B) a planet}", True),
        ("B", "\\boxed{B. a planet}", True),
        ("B", "\\boxed{Because}", False),
        ("B", "A is tempting, but ANSWER: B", True),
        ("B", "Answer: A? No. The correct answer is (B).", True),
        ("B", "the answer is $B$", True),
        ("B", "ANSWER: C", False),
        ("A", "A planet has no answer", False),
        ("A", "The answer is a planet", False),
        ("A", "\\boxed{A mixture of salt and water}", False),
        ("A", "I will answer A question like this", False),
        ("B", "ANSWER: B. To answer I used elimination", True),
        ("B", "so the answer is \\(B\\)", True),
        ("B", "Answer: \\text{B}", True),
        ("B", "**Answer:** B", True),
        ("B", "\\boxed{$B$}", True),
        ("2", "\\boxed{2}", True),
        ("J", "\\boxed{J}", True),
        ("B", "\\boxed{C} ANSWER: B", False),  # the box counts
    ],
)
def test_strict_rule_for_letters(gold, completion, right):
    assert strict_right(gold, strict_answer(completion, "choice"), "choice") is right


def test_normalised_keeps_what_matters():
    assert normalised("\\dfrac{ 1 }{ 2 }") == "\\frac{1}{2}"
    assert normalised("(1, 2)") == "(1,2)" and normalised("1,2,3") == "1,2,3"
    assert normalised("10,000") == "10000" and normalised("1{,}000{,}000") == "1000000"
    assert normalised("x=") == "x="


def test_a_ground_truth_that_leaves_mathematics_half_way():
    """Minerva has such a one: compared by its second half only, the right answer would be wrong."""
    gold = "x_{0} \\cos (\\omega t)+$ $\\dot{x}_{0} \\sin (\\omega t) / \\omega"
    assert is_right(gold, "\\boxed{x_0 \\cos(\\omega t) + \\frac{\\dot{x}_0}{\\omega}\\sin(\\omega t)}")
    assert not is_right(gold, "\\boxed{\\frac{\\dot{x}_0}{\\omega}\\sin(\\omega t)}")
    assert is_right("\\$18.90", "\\boxed{18.90}")
    olympiad = "$(-\\infty, 0) \\cup\\{1\\}$."  # whole, between its own dollars
    assert is_right(olympiad, "\\boxed{(-\\infty, 0) \\cup \\{1\\}}") and not is_right(olympiad, "\\boxed{0}")


def test_the_version_names_packages_and_sources():
    version = grader_version()
    assert "math-verify 0" in version and "sympy 1" in version and version.split()[-2] == "luffy"
