"""The reward: 1 if the final answer is right, else 0 (Eq. 1), judged by math-verify in processes that can be killed.

Model output is untrusted: it is never evaluated here, and a check that hangs or eats memory costs one worker process,
not the run. A check ends in one of three ways: the worker answers, its own alarm ends the check, or the parent's
deadline passes and the process is killed and replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from .answers import boxes, final_answer

log = logging.getLogger(__name__)

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

MAX_ANSWER_CHARACTERS = 100_000
MAX_NESTING = 60
GRACE_S = 2.0  # how long after the worker's own alarm the parent waits before it kills
START_S = 120.0  # how long a worker may take to import its libraries
CACHE_ENTRIES = 200_000

# Written so that no text makes them backtrack: a scan is linear in the length of the answer.
_TOWER = re.compile(  # powers of powers of powers: ^{..^{..^ or **..**..**
    r"\^\s?[{(][^{}()^]{0,40}\^\s?[{(][^{}()^]{0,40}\^|\*\*\s?\w{1,20}\s?\*\*\s?\w{1,20}\s?\*\*"
)
_HUGE = re.compile(r"(?:\^|\*\*)[\s({-]*\d{6,}|(?<!\d)\d{6,}[\s)]*!|[\d)]![\s)]*!|\d{5000}")


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


class _Worker:
    """One checker process and the pipe to it. Started when it is first needed."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.process: subprocess.Popen[bytes] | None = None

    def check(self, gold: str, text: str) -> str:
        """ "1", "0", "T" (alarm), or "K" (no answer in time, or died: killed)."""
        if self.process is None:
            self._start()
        deadline = time.monotonic() + self.timeout_s + GRACE_S
        sent = self._send(json.dumps([gold, text]).encode() + b"\n", deadline)
        reply = self._reply(deadline) if sent else ""
        if reply not in ("1", "0", "T"):
            self.kill()
            return "K"
        return reply

    def _start(self) -> None:
        # A fresh interpreter rather than a fork: the parent may hold a GPU, threads, or a notebook kernel. The package
        # is named by its folder, so that the process finds it whatever the parent's path looks like.
        home = str(Path(__file__).resolve().parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luffy.verifier.worker", str(self.timeout_s), str(self.memory_mb)],
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
        if self._reply(time.monotonic() + START_S) != "R":
            self.kill()
            raise RuntimeError(
                f"the answer checker does not start: try `{sys.executable} -m luffy.verifier.worker {self.timeout_s} "
                f"{self.memory_mb}`; is math-verify installed, and are {self.memory_mb} MB enough?"
            )

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

    `counts` says what happened so far: "checks" (asked of a worker), "cached", "prefiltered", "timeouts" (ended by
    the worker's alarm or the parent's deadline), "kills" (processes killed and replaced), "no_solution" (no closing
    tag), "cut_off" (the last box never closes).
    Whatever is not shown to be right is 0. Usable from any thread; use as a context manager, or call close().
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5, memory_mb: int = 1024) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"a verifier needs workers >= 1 and timeout_s > 0, not {workers} and {timeout_s}")
        self.counts: Counter[str] = Counter()
        self._closed = False
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, Future[float]] = OrderedDict()
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
        self._closed = True
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
            self._count(reason)
            done: Future[float] = Future()
            done.set_result(0.0)
            return done
        key = hashlib.sha256(f"{answer}\0{text}".encode(errors="replace")).digest()
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
                self.counts["cached"] += 1
                return known
            self.counts["checks"] += 1
            future = self._threads.submit(self._check, key, answer, text)
            self._cache[key] = future
            if len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
            return future

    def _check(self, key: bytes, answer: str, text: str) -> float:
        worker = self._idle.get()
        reply = "K"
        try:
            reply = worker.check(answer, text)
        finally:
            self._idle.put(worker)
            if reply == "K":  # perhaps the machine's fault and not the answer's: another time it is checked again
                with self._lock:
                    self._cache.pop(key, None)
        if reply in "TK":
            self._count("timeouts", *(["kills"] if reply == "K" else []))
            log.warning("a check of an answer of %d characters was ended (%s)", len(text), reply)
            return Unchecked(0.0)
        return float(reply == "1")

    def _count(self, *names: str) -> None:
        with self._lock:
            self.counts.update(names)
