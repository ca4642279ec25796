"""The embedded world: arithmetic chains that a half-million-parameter model can learn to reason about.

A problem starts from a number in [0, 99] and applies operations to it: `+d`, `-d` (d = 1..9), `r` (swap the two
digits) and, in one family, `c` (nines' complement, 99 - x). Its difficulty is the number of operations plus one.
Swapping makes guessing worthless. The teacher solves a problem step by step inside a think block. A step is now and
then wrong at first and corrected after `wait`; the last line checks the ones digits:

    84+1-5r+8r?  ->  <think>84+1=85;85-5=80;80r=8;8+8=16;16r=61;check50861ok</think>\\boxed{61}

The base model (pretrain.py) answers such a question at once, and mostly wrongly; it can work step by step, but only
after another cue than `?`. So it has the skill and not the habit, which is the situation of the paper in small.

Everything that defines the world stands in this file and in pretrain.py. It was fixed before any method was
measured on it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .problems import Problem

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen2Tokenizer

MISTAKE_RATE = 0.06  # share of a teacher's steps that are first wrong and then corrected

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OP_WORDS = {"+": "plus", "-": "minus", "r": "swap", "c": "flip"}

# Words carry the space after them, so that decoding is plain concatenation and a round trip is exact.
VOCABULARY = (
    ["<pad>", "<eos>", "<unk>", "<think>", "</think>", "\\boxed{", "}", "?", "#", "=", ";", ":", "\n"]
    + ["wait", "check", "ok", "+", "-", "r", "c"]
    + [str(d) for d in range(10)]
    + [f"{word} " for word in (*DIGIT_WORDS, *OP_WORDS.values())]
)
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Family:
    """A kind of problem: its operations, how it is written, and the difficulties it is asked at."""

    name: str
    ops: str
    style: str  # "chain": 84+1r?   "words": eight four plus one swap ?   "prefix": +1r:84?   "lines": one a line
    difficulties: tuple[int, ...]


# Training and in-distribution evaluation use `chain`; the others are never trained on by the methods.
FAMILIES = {
    "chain": Family("chain", "+-r", "chain", (3, 4, 5, 6, 7)),
    "words": Family("words", "+-r", "words", (2, 3, 4, 5, 6)),
    "flip": Family("flip", "+-rc", "chain", (3, 4, 5, 6)),
    "prefix": Family("prefix", "+-r", "prefix", (2, 3, 4, 5, 6)),
    "lines": Family("lines", "+-r", "lines", (2, 3, 4, 5, 6)),
}
IN_DISTRIBUTION = "chain"
OUT_OF_DISTRIBUTION = ("words", "flip", "prefix", "lines")

# Problems are told apart by a hash of the chain they contain, however it is written: no training or pre-training text
# can contain an evaluation chain, and the complement none of train. Pre-training may see chains of both.
SPLITS = {"pretrain": range(0, 10), "train": range(0, 7), "complement": range(7, 10), "eval": range(10, 16)}


@dataclass(frozen=True)
class Chain:
    """A start value and operations such as ("+1", "r"); every intermediate value lies in [0, 99]."""

    start: int
    ops: tuple[str, ...]

    def values(self) -> list[int]:
        """The running value after each operation."""
        values, value = [], self.start
        for op in self.ops:
            value = apply(op, value)
            values.append(value)
        return values

    def bucket(self) -> int:
        return zlib.crc32(f"{self.start}{''.join(self.ops)}".encode()) % 16


def apply(op: str, value: int) -> int:
    """One operation on a value in [0, 99]. Raises ValueError for an operation the world does not have."""
    if op == "r":
        return value % 10 * 10 + value // 10
    if op == "c":
        return 99 - value
    if op[0] in "+-" and op[1:].isdigit():
        return value + int(op)
    raise ValueError(f"no operation {op!r} in this world")


def draw_chain(rng: random.Random, family: Family, difficulty: int, split: str) -> Chain:
    """A random chain of a family, of `difficulty` - 1 operations, that belongs to the split."""
    while True:
        start = value = rng.randrange(100)
        ops: list[str] = []
        for _ in range(difficulty - 1):
            kind = rng.choice([op for op in family.ops if not ops or op not in "rc" or op != ops[-1]])  # no `rr`
            if kind in "+-":
                room = min(9, 99 - value if kind == "+" else value)
                if room == 0:
                    break
                kind += str(rng.randint(1, room))
            ops.append(kind)
            value = apply(kind, value)
        chain = Chain(start, tuple(ops))
        complete = len(ops) == difficulty - 1 and ("c" not in family.ops or "c" in ops)
        if complete and chain.bucket() in SPLITS[split]:
            return chain


def write_chain(chain: Chain, style: str, cue: str = "?") -> str:
    """The problem as text, ending in its cue: `?` asks for the answer, `#` for a worked sheet."""
    ops = "".join(chain.ops)
    if style == "chain":
        return f"{chain.start}{ops}{cue}"
    if style == "prefix":
        return f"{ops}:{chain.start}{cue}"
    if style == "lines":
        return "\n".join([str(chain.start), *chain.ops]) + cue
    words = [DIGIT_WORDS[int(digit)] for digit in str(chain.start)]
    for op in chain.ops:
        words.append(OP_WORDS[op[0]])
        words += [DIGIT_WORDS[int(digit)] for digit in op[1:]]
    return "".join(f"{word} " for word in words) + cue


def worked_steps(chain: Chain) -> list[str]:
    """`84+1=85`, `85-5=80`, ..."""
    before = [chain.start, *chain.values()]
    return [f"{a}{op}={b}" for a, op, b in zip(before, chain.ops, chain.values(), strict=False)]


def teacher_trace(chain: Chain, rng: random.Random, mistake_rate: float = MISTAKE_RATE, verbosity: float = 0.0) -> str:
    """A think-style solution of the chain, as a stronger model would write it; its final answer is right.

    verbosity: share of the steps that it writes down once more (`84+1=85wait84+1=85ok`). An answer does not need that,
    so that lengths have slack in both directions.
    """
    steps = []
    for worked, value in zip(worked_steps(chain), chain.values(), strict=True):
        step = worked
        if rng.random() < mistake_rate:
            wrong = (value + rng.randint(1, 9)) % 100
            step = f"{worked.split('=')[0]}={wrong}wait{value}"
        if verbosity and rng.random() < verbosity:
            step = f"{step}wait{worked}ok"
        steps.append(step)
    check = "".join(str(value % 10) for value in chain.values())
    return f"<think>{';'.join(steps)};check{check}ok</think>\\boxed{{{chain.values()[-1]}}}"


def spoiled(trace: str, rng: random.Random) -> str:
    """The trace with another final answer, which its work does not lead to."""
    work, _, answer = trace.rpartition("\\boxed{")
    return f"{work}\\boxed{{{(int(answer[:-1]) + rng.randint(1, 99)) % 100}}}"


def make_problems(
    family: str,
    split: str,
    count: int,
    seed: int = 0,
    difficulties: tuple[int, ...] | None = None,
    trace_errors: float = 0.0,
    num_traces: int = 1,
    verbosity: float = 0.0,
) -> list[Problem]:
    """`count` different problems of a family, difficulties in turn, each with `num_traces` teacher traces.

    The same arguments give the same problems, and a larger count, or more traces, only adds to them. Traces of one
    problem differ in the teacher's mistakes only, so some are equal. trace_errors: share of traces that end in a wrong
    answer; it changes nothing else. verbosity: see `teacher_trace`.
    Raises ValueError for an unknown family or split, and if the family
    has fewer problems than asked for.
    """
    if family not in FAMILIES or split not in SPLITS:
        raise ValueError(f"no family {family!r} or no split {split!r}: there are {[*FAMILIES]} and {[*SPLITS]}")
    kind = FAMILIES[family]
    levels = difficulties or kind.difficulties
    rng = random.Random(f"{family}/{split}/{seed}")
    seen: set[Chain] = set()
    problems: list[Problem] = []
    repeats = 0
    while len(problems) < count:
        level = levels[len(problems) % len(levels)]
        chain = draw_chain(rng, kind, level, split)
        if chain in seen:
            repeats += 1
            if repeats > 1000 + 10 * count:
                raise ValueError(f"{family}/{split} does not have {count} different problems at {levels}")
            continue
        seen.add(chain)
        question = write_chain(chain, kind.style)
        traces = [teacher_trace(chain, rng, verbosity=verbosity)]
        more = random.Random(f"{family}/{split}/{seed}/traces/{len(problems)}")
        traces += [teacher_trace(chain, more, verbosity=verbosity) for _ in range(num_traces - 1)]
        errors = random.Random(f"{family}/{split}/{seed}/errors/{len(problems)}")
        traces = [spoiled(trace, errors) if errors.random() < trace_errors else trace for trace in traces]
        problems.append(
            Problem(
                prompt=({"role": "user", "content": question},),
                answer=str(chain.values()[-1]),
                traces=tuple(traces),
                source=family,
                columns={"difficulty": level},
            )
        )
    return problems


def make_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of the world's symbols: one token each, and text of the world survives a round trip unchanged.

    It is a Qwen2Tokenizer without merges, because that is the class `AutoTokenizer` makes of any tokenizer beside a
    Qwen2 model: single characters are its vocabulary, longer symbols are added tokens.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    # A byte-level vocabulary writes the newline as U+010A.
    vocabulary = {"\u010a" if token == "\n" else token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", bos_token=None
    )
    symbols = [token for token in VOCABULARY[3:] if len(token) > 1]
    tokenizer.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in symbols])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(size: str = "tiny") -> Qwen2Config:
    """Qwen2 architecture: `tiny` has 0.45M parameters, `small` about 4M. Raises ValueError for another size."""
    from transformers import Qwen2Config

    shapes: dict[str, dict[str, Any]] = {
        "tiny": dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256),
        "small": dict(hidden_size=256, num_hidden_layers=5, num_attention_heads=8, intermediate_size=768),
    }
    if size not in shapes:
        raise ValueError(f"no model size {size!r}: there are {[*shapes]}")
    return Qwen2Config(
        **shapes[size],
        vocab_size=len(VOCABULARY),
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # At this width transformers' default of 0.02 learns ten times slower.
        initializer_range=0.08 if size == "tiny" else 0.05,
        pad_token_id=VOCABULARY.index("<pad>"),
        eos_token_id=VOCABULARY.index("<eos>"),
        bos_token_id=None,
    )
