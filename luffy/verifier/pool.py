"""The reward: 1 if the final answer is right, else 0 (Eq. 1), judged by math-verify in processes that can be killed.

Model output is untrusted: it is never evaluated here, and a check that hangs or eats memory costs one worker process,
not the run. A check ends in one of three ways: the worker answers, its own alarm ends the check, or the parent's
deadline passes and the process is killed and replaced. A check that is not done in FIRST_S is asked again, with all its
time, once nothing else is waiting: hostile answers hold up each other, not the honest ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

from .answers import boxes, final_answer

log = logging.getLogger(__name__)

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

MAX_ANSWER_CHARACTERS = 100_000
MAX_NESTING = 60
FIRST_S = 0.1  # what a check may take before the others go first; most take a thousandth of a second
GRACE_S = 2.0  # how long after the worker's own alarm the parent waits before it kills
STARTS = 3  # of a worker, where somebody kills it while it starts
START_S = 120.0  # how long a worker may take to import its libraries
CACHE_ENTRIES = 200_000
# What a worker is sent at once. The bytes fit into its pipe, so that it never has to read on for us to write.
BATCH_CHECKS, BATCH_BYTES = 16, 32_000

# Written so that no text makes them backtrack: a scan is linear in the length of the answer.
_TOWER = re.compile(  # powers of powers of powers: ^{..^{..^ or **..**..**
    r"\^\s?[{(][^{}()^]{0,40}\^\s?[{(][^{}()^]{0,40}\^|\*\*\s?\w{1,20}\s?\*\*\s?\w{1,20}\s?\*\*"
)
_INTEGER = re.compile(r"\s*(-?\d{1,30})\s*")
_HUGE = re.compile(
    r"(?:\^|\*\*)[\s({-]*\d{6,}|(?<!\d)\d{6,}[\s)]*!|[\d)]![\s)]*!|\d{5000}|\\(?:[dt]?binom|Gamma)\s*[({]\s*\d{6,}"
)


def solution(completion: str, think: bool = True) -> str | None:
    """The part of a completion that states the answer, or None if the format forbids a reward.

    think=True is the paper's rule: what stands between the first `</think>` and a second one; without a closing
    tag there is no reward. think=False: what follows `</think>` if there is one, else the whole text; only a think
    block that is opened and never closed has no solution.
    """
    before, tag, after = completion.partition(THINK_CLOSE)
    if tag:
        return after.partition(THINK_CLOSE)[0]
    return None if think or THINK_OPEN in before else completion


def is_dangerous(text: str) -> bool:
    """Whether no grader should be asked about an answer: too long, or its boxes cheaply recognised as nested too
    deeply, an exponent tower, or a number too large to write down. What is not recognised here runs into the time
    limit."""
    if len(text) > MAX_ANSWER_CHARACTERS:
        return True
    box = final_answer(text) or ""
    depth = deepest = 0
    for character in box:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest > MAX_NESTING or bool(_TOWER.search(box) or _HUGE.search(box))


class Unchecked(float):
    """The 0.0 of an answer whose check was ended, by the alarm or by force, before it had a verdict."""


def integers_equal(answer: str, text: str) -> bool | None:
    """Whether ground truth and final answer are the same integer; None unless both are nothing else."""
    gold, given = _INTEGER.fullmatch(answer), _INTEGER.fullmatch(final_answer(text) or "")
    return int(gold[1]) == int(given[1]) if gold and given else None


@dataclass(frozen=True)
class _Check:
    """A check that is asked for: what it is kept under, [gold, text] as JSON, how long it may take (seconds), and where
    its verdict goes."""

    key: bytes
    asked: bytes
    limit: float
    verdict: Future[float] = field(default_factory=Future)

    @cached_property
    def line(self) -> bytes:
        """What a worker is sent."""
        return b"%.17g %s\n" % (self.limit, self.asked)


def _give_up(checks: Iterable[_Check]) -> None:
    """Tells whoever waits for these verdicts that there will be none."""
    for check in checks:
        if not check.verdict.cancel():  # a worker has had it
            check.verdict.set_exception(RuntimeError("the verifier was closed"))


class _Worker:
    """One checker process and the pipe to it. Started when it is first needed."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.process: subprocess.Popen[bytes] | None = None

    def check(self, lines: Sequence[bytes]) -> Iterator[str]:
        """Of each line (_Check.line): "1", "0", "T" (alarm), or "K" (no answer in time, or died: killed), which
        is the last one then. A process that somebody else has killed is replaced, once a line, and asked again."""
        place, asked_again = 0, -1
        while place < len(lines):
            if self.process is None:
                self._start()
            sent = self._send(b"".join(lines[place:]), self._deadline())
            while place < len(lines) and (reply := self._reply(self._deadline()) if sent else "") in ("1", "0", "T"):
                yield reply
                place += 1
            if place < len(lines):
                from_outside = self._killed_from_outside()
                self.kill()
                if not from_outside or asked_again == place:
                    yield "K"
                    return
                asked_again = place

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s + GRACE_S

    def _killed_from_outside(self) -> bool:
        """Whether the process was ended by a SIGKILL that is not ours: by the system, short of memory, or a person."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=0.1) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return False

    def _start(self) -> None:
        for _ in range(STARTS):
            self._spawn()
            if self._reply(time.monotonic() + START_S) == "R":
                return
            from_outside = self._killed_from_outside()
            self.kill()
            if not from_outside:
                break
        raise RuntimeError(
            f"the answer checker does not start: try `{sys.executable} -m luffy.verifier.worker {self.memory_mb}`; "
            f"is math-verify installed, and are {self.memory_mb} MB enough?"
        )

    def _spawn(self) -> None:
        # A fresh interpreter rather than a fork: the parent may hold a GPU, threads, or a notebook kernel. The package
        # is named by its folder, so that the process finds it whatever the parent's path looks like.
        home = str(Path(__file__).resolve().parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luffy.verifier.worker", str(self.memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [home, os.getenv("PYTHONPATH")])),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)

    def _send(self, line: bytes, deadline: float) -> bool:
        """Writes a line to the worker, which may be longer than the pipe; False if it does not take it in time."""
        assert self.process is not None and self.process.stdin is not None
        pipe = self.process.stdin.fileno()
        while line:
            _, writable, _ = select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))
            if not writable:
                return False
            try:
                line = line[os.write(pipe, line) :]
            except OSError:
                return False
        return True

    def _reply(self, deadline: float) -> str:
        assert self.process is not None and self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        return os.read(self.process.stdout.fileno(), 1).decode() if readable else ""

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process.wait()
            self.process = None


class Verifier:
    """Scores completions against ground truths in a few persistent processes.

    `counts` says what happened so far: "checks" (asked of a worker), "integers" (compared here), "cached",
    "prefiltered", "timeouts" (ended by the worker's alarm or the parent's deadline), "kills" (processes killed and
    replaced), "no_solution" (no closing tag), "cut_off" (the last box never closes).
    Whatever is not shown to be right is 0. Usable from any thread; use as a context manager, or call close().
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5, memory_mb: int = 1024) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"a verifier needs workers >= 1 and timeout_s > 0, not {workers} and {timeout_s}")
        self.counts: Counter[str] = Counter()
        self.timeout_s = timeout_s
        self._closed = False
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, Future[float]] = OrderedDict()
        self._waiting: deque[_Check] = deque()
        self._slow: deque[_Check] = deque()  # to be asked again when nothing else is waiting
        self._busy = 0
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = [_Worker(timeout_s, memory_mb) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes; checks still waiting are dropped."""
        with self._lock:
            self._closed = True
            _give_up([*self._waiting, *self._slow])
            self._waiting.clear()
            self._slow.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def score(self, completions: Sequence[str], answers: Sequence[str], think: bool = True) -> list[float]:
        """1.0 for each completion whose final answer equals the ground truth at the same place, else 0.0.

        think: see `solution`. Raises ValueError if the two lists differ in length.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions, {len(answers)} answers")
        futures = [self.submit(*pair, think=think) for pair in zip(completions, answers, strict=True)]
        return [future.result() for future in futures]

    def submit(self, completion: str, answer: str, *, think: bool = True) -> Future[float]:
        """Starts one check and returns at once; the future gives 1.0, 0.0, or Unchecked.

        Raises RuntimeError after close().
        """
        if self._closed:
            raise RuntimeError("the verifier is closed")
        text = solution(completion, think)
        reason = "no_solution" if text is None else "cut_off" if not boxes(text)[1] else "prefiltered"
        if text is None or reason == "cut_off" or is_dangerous(text):
            return self._known(reason, False)
        equal = integers_equal(answer, text)
        if equal is not None:
            return self._known("integers", equal)
        key = hashlib.sha256(f"{answer}\0{text}".encode(errors="replace")).digest()
        with self._lock:
            known = self._cache.get(key)
            if known is not None and not known.cancelled():
                self._cache.move_to_end(key)
                self.counts["cached"] += 1
                return known
            self.counts["checks"] += 1
            check = _Check(key, json.dumps([answer, text]).encode(), min(FIRST_S, self.timeout_s))
            self._waiting.append(check)
            self._cache[key] = check.verdict
            if len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
            self._wake()
            return check.verdict

    def _wake(self) -> None:
        """Has one more worker look at what is waiting, if one is idle. Under the lock."""
        if self._busy < len(self._workers):
            self._busy += 1
            self._threads.submit(self._work)

    def _known(self, reason: str, right: bool) -> Future[float]:
        """The verdict of an answer that no worker has to look at."""
        with self._lock:
            self.counts[reason] += 1
        done: Future[float] = Future()
        done.set_result(float(right))
        return done

    def _work(self) -> None:
        """Has one worker check what is waiting, until nothing is."""
        worker = self._idle.get()
        try:
            while batch := self._next():
                left = iter(batch)
                try:
                    for reply in worker.check([check.line for check in batch]):
                        self._settle(next(left), reply)
                        if self._closed:
                            break
                except Exception as error:  # the worker does not start, say: whoever waits for a verdict is told
                    worker.kill()  # with whatever it has answered that nobody has read
                    for check in left:
                        with self._lock:
                            self._cache.pop(check.key, None)
                        check.verdict.set_exception(error)
                with self._lock:
                    rest = list(left)  # what a killed worker was sent besides
                    if not self._closed:
                        self._waiting.extendleft(reversed(rest))
                if self._closed:
                    _give_up(rest)
        finally:
            self._idle.put(worker)

    def _next(self) -> list[_Check]:
        """Some of what is waiting, at most a fair share of it; or a slow one. Empty: the caller is to stop."""
        with self._lock:
            if not self._waiting and self._slow:
                return [self._slow.popleft()]
            # half of a fair share: what stands behind a slow check must not wait for it while another worker is idle
            share = min(BATCH_CHECKS, -(-len(self._waiting) // (2 * len(self._workers))))
            batch: list[_Check] = []
            size = 0
            while (
                self._waiting and len(batch) < share and (not batch or size + len(self._waiting[0].line) <= BATCH_BYTES)
            ):
                check = self._waiting.popleft()
                if check.verdict.running() or check.verdict.set_running_or_notify_cancel():
                    batch.append(check)
                    size += len(check.line)
                else:  # cancelled: nobody wants to know any more
                    self._cache.pop(check.key, None)
            if not batch:
                self._busy -= 1
            return batch

    def _settle(self, check: _Check, reply: str) -> None:
        with self._lock:
            if reply == "T" and check.limit < self.timeout_s and not self._closed:
                self._slow.append(replace(check, limit=self.timeout_s))
                self._wake()
                return
            if reply == "K":  # perhaps the machine's fault and not the answer's: another time it is checked again
                self._cache.pop(check.key, None)
            if reply in "TK":
                self.counts.update(["timeouts", *(["kills"] if reply == "K" else [])])
        if reply in "TK":
            log.warning("a check of an answer of %d bytes was ended (%s)", len(check.line), reply)
        check.verdict.set_result(Unchecked(0.0) if reply in "TK" else float(reply == "1"))
