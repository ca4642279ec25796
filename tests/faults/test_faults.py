"""The fault campaign in short: each fault a few times. `python tests/faults/campaign.py` is the long one."""

import pytest
from answers import HONEST, honest, hostile, near_misses
from disk import damaged, damaged_cache, full, read_only, too_large
from jupyter_kernels import kernel_kills
from kills import kills, second_start, verifier_kills
from outcome import Outcome, table
from soak import soak

from luffy.verifier import Verifier


def survived(outcomes, least):
    """That nothing was lost, of so many faults at least."""
    found = list(outcomes)
    assert len(found) >= least
    assert not [outcome for outcome in found if outcome.lost]


def test_kills(tmp_path):
    survived(kills(tmp_path, 10), 10)


def test_a_second_start(tmp_path):
    survived(second_start(tmp_path), 4)


def test_kills_of_the_verifier(tmp_path):
    survived(verifier_kills(tmp_path, 3), 1)


def test_a_kill_of_a_notebooks_kernel(tmp_path):
    survived(kernel_kills(tmp_path, 1, steps=20), 1)


def test_files_that_may_not_grow(tmp_path):
    survived(too_large(tmp_path, 4), 4)


@pytest.mark.parametrize("fault", [full, read_only])
def test_disks(tmp_path, fault):
    found = list(fault(tmp_path, 2))
    if not found:
        pytest.skip("this user may not mount a file system")
    survived(found, 2)


def test_damage(tmp_path):
    survived(damaged(tmp_path / "checkpoints", 4), 4)
    survived(damaged_cache(tmp_path / "cache", 12), 12)


def test_a_soak(tmp_path):
    survived(soak(tmp_path, 60), 8)


def test_hostile_answers_and_near_misses():
    """Nothing that is wrong is paid, nothing hangs, and honest answers beside them are."""
    cases = [*hostile(4), *near_misses(6), *honest(40)]
    with Verifier(workers=2, timeout_s=2, memory_mb=1024) as verifier:
        scores = verifier.score([case.completion for case in cases], [case.gold for case in cases])
    wrong = [case for case, score in zip(cases, scores, strict=True) if score != case.family.startswith(HONEST)]
    assert not wrong, [(case.family, case.gold, case.completion[:120]) for case in wrong]


def test_there_are_enough_of_them():
    for cases in (list(hostile(24)), list(near_misses(22))):
        assert len({(case.gold, case.completion) for case in cases}) >= 300


def test_the_table():
    said = table([Outcome("a", "1"), Outcome("a", "2", "all"), Outcome("b", "3")])
    assert "| a | 2 | 1 | 1 |" in said and "| b | 1 | 1 | 0 |" in said and "- a, 2: all" in said
