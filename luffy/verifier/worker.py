"""The worker process of pool.py: checks answers with math-verify, one at a time, and can be killed.

Reads a line at a time from standard input, the seconds that the check may take and [gold, text] as JSON, and answers
with one byte: 1 right, 0 wrong, T timed out.
Only that byte leaves the process. Parsed objects are never printed: the text of an exponent tower would not end.
Run as `python -m luffy.verifier.worker MEMORY_MB`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from .answers import boxes, denies, final_answer, letter, options
from .notation import tidy
from .readings import equal


class CheckTimeoutError(BaseException):
    """Raised by the alarm. Not an Exception, so that no `except Exception` on the way can swallow it."""


def is_right(gold: str, text: str) -> bool:
    """Whether the answer that a solution gives equals the ground truth. Without a box or an answer tag, math-verify
    looks for one in its text, unless that is denied there."""
    from math_verify import parse

    given = final_answer(text)
    if given is not None:
        return equal(tidy(gold), tidy(given))
    if not boxes(text)[1] or denies(text):
        return False
    chosen = letter(text) if options(tidy(gold)) else ""
    if chosen:
        return chosen == options(tidy(gold))
    found = [part for part in parse(text, parsing_timeout=None) if isinstance(part, str)]
    return any(equal(tidy(gold), tidy(part)) for part in found)


def main() -> None:
    memory_mb = int(sys.argv[1])
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted notebook cell must not take the workers along
    is_right("x+1", "1+x")  # import and warm up before the limits are on
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))

    def on_alarm(signum: int, frame: Any) -> None:
        raise CheckTimeoutError

    signal.signal(signal.SIGALRM, on_alarm)
    os.write(replies, b"R")
    for line in sys.stdin:
        limit_s, _, asked = line.partition(" ")
        gold, text = json.loads(asked)
        try:
            signal.setitimer(signal.ITIMER_REAL, float(limit_s))
            reply = b"1" if is_right(gold, text) else b"0"
        except CheckTimeoutError:
            reply = b"T"
        except MemoryError:
            os._exit(1)  # the heap is what it is now: the parent counts a kill and starts a fresh process
        except Exception:  # whatever a library makes of an answer that is not mathematics, it is not right
            reply = b"0"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, reply)


if __name__ == "__main__":
    main()
