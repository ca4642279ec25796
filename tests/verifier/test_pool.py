"""The real math-verify in real worker processes, on answers that hang it, fill memory or fool it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import SHARED_DATA

from luffy.verifier import pool
from luffy.verifier.pool import Unchecked, Verifier, integers_equal, is_dangerous, solution
from luffy.verifier.worker import is_right


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout_s=2, memory_mb=1024) as verifier:
        yield verifier


def boxed(answer):
    return f"hm</think> The answer is \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("so the answer is $42$", True), ("It is not 41. The answer is $42$.", True), ("the answer is not $42$", False),
        ("$42$ is wrong", False), ("It isn't $42$.", False), ("The answer is $42$. That is false!", False),
        ("The answer is not 42. Trust me.", False), ("The answer is $42$, which is not prime", True),
        ("It is not hard to see that the answer is $42$.", True),
        ("The answer is $42$.\nDon't forget the units!", True),
    ],
)  # fmt: skip
def test_an_answer_without_a_box_that_is_denied(text, right):
    assert is_right("42", text) == right


RIGHT = [
    ("61", "61"), ("\\frac12", "0.5"), ("142.0", "142"), ("025", "25"), ("x^2+2x+1", "(x+1)^2"), ("(1,2)", "(1,2)"),
    ("\\sqrt{6}", "\\sqrt2\\sqrt3"), ("\\frac{1}{2^{99}}", "2^{-99}"), ("\\text{Evelyn}", "\\text{Evelyn}"),
    ("A", "A"), ("x^2+y^2+z^2", "x^2+y^2+z^2"), ("x^4+x^3+x^2+x+1", "x^4+x^3+x^2+x+1"), ("a^3b^2c^5", "a^3b^2c^5"),
    ("(1,1/2^{99})", "(1,2^{-99})"), ("x=\\frac{1}{2^{99}}", "x=2^{-99}"), ("720", "6!"),
    ("\\frac{\\pi}{4}", "\\arctan(1)"), ("50\\%", "0.5"), ("11\\sqrt2", "11\\sqrt{2}"),
]  # fmt: skip
WRONG = [
    ("61", "16"), ("x<3", "x>3"), ("(1,2)", "(2,1)"), ("1/2004!", "1/2006!"), ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("1/2^{99}", "1/2^{98}"), ("1+1/2^{99}", "1+1/2^{98}"),
    ("(1,1/2^{99})", "(1,1/2^{98})"), ("x=1/2^{99}", "x=1/2^{98}"),
    ("\\{1/2004!\\}", "\\{1/2006!\\}"), ("[0,1/2^{99}]", "[0,1/2^{98}]"), ("0.0000001", "0.0000002"), ("0", "1e-9"),
    ("61", ""), ("61", "\\frac{"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right_answers(verifier, gold, answer):
    assert verifier.score([boxed(answer)], [gold]) == [1.0]


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_wrong_answers_and_false_positives(verifier, gold, answer):
    assert verifier.score([boxed(answer)], [gold]) == [0.0]


BOMBS = {
    "exponent tower": "9^{9^{9^{9^{9}}}}",
    "short tower": "9^{9^{9}}",
    "tower in stars": "10**10**10**10",
    "python tower": "9**9**9",
    "factorial": "(10^9)!",
    "double factorial": "((99999!)!)",
    "literal factorial": "9999999!",
    "large power": "99999^{99999}",
    "large binomial": "\\binom{10^9}{10^8}",
    "long sum": "\\sum_{n=1}^{10^{9}} n!",
    "expansion": "(a+b+c+d+e)^{2000}",
    "nested fractions": "\\frac{1}{1+" * 400 + "2" + "}" * 400,
    "many digits": "7" * 60_000,
    "one megabyte": "x" * 1_000_000,
    "spaces after a power": "2^" + " " * 90_000,
    "nested roots": "\\sqrt{" * 55 + "2" + "}" * 55,
    "integral": "\\int_0^1 x^{x^{x^x}} dx",
    "surrogate": "6\ud8001",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_end_and_are_not_rewarded(verifier, bomb):
    started = time.perf_counter()
    assert verifier.score([boxed(bomb)], ["61"]) == [0.0]
    assert time.perf_counter() - started < 10
    assert verifier.score([boxed("\\frac{61}{3}")], ["61/3"]) == [1.0]  # and the verifier still works


def test_memory_bomb_is_confined():
    """A check that wants a gigabyte gets no more than the limit, earns nothing and leaves the verifier working."""

    def peak_mb():
        worker = verifier._workers[0].process
        status = Path(f"/proc/{worker.pid}/status").read_text() if worker else "VmPeak: 0"
        return int(next(line for line in status.splitlines() if line.startswith("VmPeak")).split()[1]) / 1024

    with Verifier(workers=1, timeout_s=20, memory_mb=450) as verifier:
        assert verifier.score([boxed("3.5")], ["7/2"]) == [1.0]
        before = peak_mb()
        assert verifier.score([boxed("\\lfloor\\frac{2^{2^{33}}}{3}\\rfloor")], ["61"]) == [0.0]
        assert before + 50 < peak_mb() <= 451 or verifier.counts["kills"] == 1
        assert verifier.score([boxed("4.5")], ["9/2"]) == [1.0]


def test_numbers_beyond_a_float_are_compared_without_writing_them_out():
    """Values are compared at a point before anything is expanded, also where no float has room for them."""
    with Verifier(workers=1, timeout_s=4) as verifier:
        for wrong, gold in [
            ("(a+b)^{3000}", "42"), ("2^{2^{33}}", "61"), ("(a+b+c)^{400}", "(a+b+d)^{400}"), ("10^{400}", "10^{401}"),
        ]:  # fmt: skip
            assert verifier.score([boxed(wrong)], [gold]) == [0.0]
        for right, gold in [("2^{400}\\cdot 2^{1600}", "2^{2000}"), ("(b+a)^{3000}", "(a+b)^{3000}")]:
            assert verifier.score([boxed(right)], [gold]) == [1.0]
        assert not verifier.counts["timeouts"]


def test_worker_that_hangs_is_killed_and_replaced():
    """A worker that ignores its alarm (here: stopped) runs into the parent's deadline."""
    with Verifier(workers=1, timeout_s=0.5) as verifier:
        assert verifier.score([boxed("3.5")], ["7/2"]) == [1.0]
        os.kill(verifier._workers[0].process.pid, signal.SIGSTOP)
        assert verifier.score([boxed("4.5")], ["9/2"]) == [0.0]
        assert verifier.counts["kills"] == verifier.counts["timeouts"] == 1
        assert verifier.score([boxed("5.5")], ["11/2"]) == [1.0]


def test_worker_that_does_not_read_is_killed():
    """A long answer fills the pipe of a stopped worker: writing has the same deadline."""
    with Verifier(workers=1, timeout_s=0.5) as verifier:
        assert verifier.score([boxed("3.5")], ["7/2"]) == [1.0]
        os.kill(verifier._workers[0].process.pid, signal.SIGSTOP)
        long = "word " * 19_000 + "\\boxed{4.5}"
        assert verifier.score([f"</think>{long}"], ["9/2"]) == [0.0]
        assert verifier.counts["kills"] == 1
        assert verifier.score([f"</think>{long}"], ["9/2"]) == [1.0]  # a kill is not remembered as a verdict


def test_what_was_sent_with_a_check_that_is_killed_is_checked_by_the_next_worker():
    with Verifier(workers=1, timeout_s=0.5) as verifier:
        assert verifier.score([boxed("3.5")], ["7/2"]) == [1.0]
        os.kill(verifier._workers[0].process.pid, signal.SIGSTOP)
        answers = [f"{2 * i + 1}/2" for i in range(40)]
        scores = verifier.score([boxed(i + 0.5 + (i % 3 == 2)) for i in range(40)], answers)
        assert verifier.counts["kills"] == 1 and scores.count(0.0) == 13 + 1
        assert [bool(score) for score in scores[1:]] == [i % 3 != 2 for i in range(1, 40)]


def test_closing_ends_what_is_waiting():
    verifier = Verifier(workers=1)
    verdicts = [verifier.submit(boxed(f"x^{{{i}}}+1"), f"1+x^{i + 40}") for i in range(200)]
    verdicts[0].result()
    verifier.close()
    assert all(verdict.done() for verdict in verdicts)
    assert any(verdict.cancelled() for verdict in verdicts)


def test_cancelled_checks_cost_the_others_nothing():
    with Verifier(workers=1) as verifier:
        verdicts = [verifier.submit(boxed(i + 0.5 + (i % 3 == 2)), f"{2 * i + 1}/2") for i in range(60)]
        cancelled = {i for i in range(0, 60, 7) if verdicts[i].cancel()}
        assert cancelled
        for i in set(range(60)) - cancelled:
            assert verdicts[i].result() == (i % 3 != 2), i
        assert verifier.score([boxed("7.5")], ["15/2"]) == [1.0]  # one of the cancelled, now to be known


def test_a_worker_that_does_not_start_is_tried_again(monkeypatch):
    with Verifier(workers=1) as verifier:
        start = type(verifier._workers[0])._start

        def fail(worker):
            raise RuntimeError("no")

        monkeypatch.setattr(
            type(verifier._workers[0]), "_start", lambda self: (_ for _ in ()).throw(RuntimeError("no"))
        )
        for verdict in [verifier.submit(boxed(i + 0.5), f"{2 * i + 1}/2") for i in range(20)]:
            with pytest.raises(RuntimeError, match="no"):
                verdict.result()
        monkeypatch.setattr(type(verifier._workers[0]), "_start", start)
        assert verifier.score([boxed(i + 0.5) for i in range(20)], [f"{2 * i + 1}/2" for i in range(20)]) == [1.0] * 20


@pytest.mark.parametrize("gold", ["12", "-7", "0", "007", "12.0", "1,200", "x", "", "-0", "--7"])
def test_integers_are_compared_as_a_worker_would(gold):
    for given in ("12", " 12 ", "-7", "7", "0", "-0", "007", "1200", "+12", "12.0", "12 ", ""):
        equal = integers_equal(gold, boxed(given))
        if equal is not None:
            assert equal == is_right(gold, boxed(given)), (gold, given)
    assert integers_equal("12", boxed("12")) is True and integers_equal("12", boxed("13")) is False
    assert integers_equal("12", "12 without a box") is None


def test_closed_verifier_says_so():
    verifier = Verifier(workers=1)
    verifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        verifier.score(["</think> 3"], ["3"])


def test_counts_and_cache(verifier):
    with Verifier(workers=1) as fresh:
        fresh.score([boxed(1), boxed("0.5"), boxed("0.5"), boxed("9^{9^{9^{9}}}"), "no closing tag"], ["1"] * 5)
        assert dict(fresh.counts) == {"integers": 1, "checks": 1, "cached": 1, "prefiltered": 1, "no_solution": 1}


@pytest.mark.parametrize(
    ("completion", "think", "expected"),
    [
        ("<think>a</think> b", True, " b"),
        ("a</think> b </think> c", True, " b "),
        ("no tag \\boxed{1}", True, None),
        ("no tag \\boxed{1}", False, "no tag \\boxed{1}"),
        ("a</think> b", False, " b"),
        ("<think> never closed \\boxed{1}", False, None),
    ],
)
def test_solution(completion, think, expected):
    assert solution(completion, think) == expected


def test_ordinary_answers_are_not_filtered():
    for text in [
        "\\boxed{2^{10}}",
        "\\frac{1}{1+\\frac{1}{2}}",
        "10^{100}",
        "5!",
        "x^{2^n}",
        "\\binom{99999}{2}",
        "long prose " * 3000,
        "\\boxed{61}. Great!!",
    ]:
        assert not is_dangerous(text)


def test_many_threads(verifier):
    results = {}

    def work(i):
        results[i] = verifier.score([boxed(i + 0.5), boxed(i + 1.5)], [f"{2 * i + 1}/2"] * 2)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {i: [1.0, 0.0] for i in range(8)}


def test_no_process_is_left_behind():
    code = (
        "from luffy import Verifier\n"
        "v = Verifier(workers=2)\n"
        "print(v.score(['</think> 3'] * 2, ['3', '4']))\n"
        "print(*(w.process.pid for w in v._workers if w.process))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    scores, pids = done.stdout.splitlines()
    assert scores == "[1.0, 0.0]"
    paths = [Path(f"/proc/{pid}/cmdline") for pid in pids.split()]
    deadline = time.monotonic() + 20  # they end when they see that their parent has
    while any(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_in_a_notebook_kernel(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    source = (
        "from luffy import Verifier\n"
        "with Verifier(workers=1) as v:\n"
        "    print(v.score(['</think> 3', '</think> 9^{9^{9}}'], ['3', '3']))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    assert notebook.cells[0].outputs[0]["text"] == "[1.0, 0.0]\n"


def test_lengths_must_agree(verifier):
    with pytest.raises(ValueError, match="1 completions, 2 answers"):
        verifier.score(["a"], ["1", "2"])


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real benchmark files are not here")
def test_real_ground_truths_verify_against_themselves(verifier):
    pytest.importorskip("datasets")
    from luffy.data.problems import load_problems

    problems = load_problems(str(SHARED_DATA / "valid.all.parquet"))[0]
    golds = sorted({problem.answer for problem in problems if problem.source in ("aime", "amc", "aime25")})
    assert len(golds) > 80
    assert verifier.score([boxed(gold) for gold in golds], golds) == [1.0] * len(golds)


def test_a_slow_answer_waits_for_the_others():
    """One process: what is asked after an answer that runs into the time limit is judged before that is given up."""
    with Verifier(workers=1, timeout_s=3) as verifier:
        assert verifier.score([boxed("1/2")], ["0.5"]) == [1]  # (its process has started)
        slow = verifier.submit(boxed("\\sqrt[3]{" * 30 + "2" + "}" * 30), "42")
        others = [verifier.submit(boxed(f"{n}/2"), f"{n / 2}") for n in range(1, 41, 2)]
        assert [other.result() for other in others] == [1] * 20
        assert not slow.done() and verifier.counts["timeouts"] == 0
        assert isinstance(slow.result(), Unchecked) and verifier.counts["timeouts"] == 1


def test_what_is_slow_at_first_is_judged_all_the_same(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_S", 1e-4)
    with Verifier(workers=2, timeout_s=5) as verifier:
        assert verifier.score([boxed(answer) for _, answer in RIGHT], [gold for gold, _ in RIGHT]) == [1] * len(RIGHT)
        assert verifier.counts["timeouts"] == 0
