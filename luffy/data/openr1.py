"""From OpenR1-Math-220k to the paper's data: training set, complement, SFT file, and a base model with a long context.

The filters are the reference's (prepare_openr1_data_v6): of each problem the generations that are right
(`correctness_math_verify`) and complete (`is_reasoning_complete`), of those the ones of at most `max_trace_tokens` in
the student's tokens; problems without one are left out and form the complement, from which the second stage of SFT+RL
takes problems that the first has not seen. The paper's Easy and Hard sets are the same with 2,048 and 4,096 tokens
(App. C.1).

Counts may differ from the published ones by three things. The reference counts tokens with a tokenizer that it calls
Qwen2.5-1.5B-Instruct-ds-tok and that nobody has published, here the student's counts (the vocabularies should be the
same; special tokens are not counted). Rows whose answer cannot be checked are rejected here. And
question and answer are stripped of white space at their ends.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..errors import ConfigError, DataError
from . import tinyworld
from .problems import hopeless, problem_from_row, read_rows
from .templates import PAPER_SYSTEM_PROMPT, THINK_START, continuation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EXAMPLE = "example"
NO_ANSWERS = {"proof", "notfound", "null", "nan", "n/a", "notavailable", "noanswer", "notprovided"}
# What the reference's builder counts on the hub's full set: rows read, and rows of its training set (App. C.1).
PUBLISHED = {"rows": 93_733, "training set": 45_714, "complement": 48_019}
SETS = {"full": 8192, "easy": 2048, "hard": 4096}  # longest trace in tokens

Row = dict[str, Any]


def right_generations(row: Row) -> list[str]:
    """The generations of a row that are right and complete. Lists that are missing or too short count as no."""
    texts = row.get("generations") or []
    right = row.get("correctness_math_verify") or []
    complete = row.get("is_reasoning_complete") or []
    return [text for text, ok, whole in zip(texts, right, complete, strict=False) if text and _yes(ok) and _yes(whole)]


def _yes(value: Any) -> bool:
    """Whether a flag is set; as text only where it says so ("False" does not)."""
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def prepare(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_trace_tokens: int = SETS["full"],
    num_traces: int = 1,
    drop_repeated: bool = False,
) -> tuple[list[Row], list[Row], Counter[str]]:
    """Splits rows in the hub's schema into training set and complement, both in the reference's schema.

    num_traces: traces kept per problem, the first ones that fit (the paper: one). Returns the two lists and counts of
    rows and generations at every filter. A row without a problem, or without an answer that can be checked ("proof",
    "notfound"), is rejected. A problem that stands in several rows is kept in each of them, as the reference does,
    unless drop_repeated.
    """
    counts: Counter[str] = Counter()
    train: list[Row] = []
    complement: list[Row] = []
    seen: set[str] = set()
    remaining = iter(tqdm(rows, desc="problems", unit=""))
    while batch := list(islice(remaining, 256)):
        fresh = []
        for row in batch:
            counts["rows"] += 1
            question, answer = (
                "" if row.get(name) is None else str(row[name]).strip() for name in ("problem", "answer")
            )
            if not question or not answer:
                counts["rejected: no problem or no answer"] += 1
            elif re.sub(r"\\text|[${}\s.]", "", answer.lower()) in NO_ANSWERS:
                counts["rejected: the answer is none that can be checked"] += 1
            else:
                counts["repeated problems"] += question in seen
                if drop_repeated and question in seen:
                    counts["rejected: problem is there already"] += 1
                else:
                    fresh.append((question, answer, row))
                seen.add(question)
        candidates = [right_generations(row) for _, _, row in fresh]
        flat = [text for texts in candidates for text in texts]
        lengths = iter([len(ids) for ids in tokenizer(flat, add_special_tokens=False)["input_ids"]] if flat else [])
        for (question, answer, row), texts in zip(fresh, candidates, strict=True):
            fitting = [text for text in texts if next(lengths) <= max_trace_tokens]
            counts["generations"] += len(row.get("generations") or [])
            counts["generations: right and complete"] += len(texts)
            counts[f"generations: at most {max_trace_tokens} tokens"] += len(fitting)
            counts["problems: with a right and complete generation"] += bool(texts)
            chosen = train if fitting else complement
            chosen.append(_reference_row(question, answer, fitting[:num_traces], len(chosen)))
    counts["training set"], counts["complement"] = len(train), len(complement)
    return train, complement, counts


def _reference_row(question: str, answer: str, traces: Sequence[str], index: int) -> Row:
    return {
        "data_source": "openr1",
        "prompt": [{"role": "system", "content": PAPER_SYSTEM_PROMPT}, {"role": "user", "content": question}],
        "target": [{"role": "assistant", "content": trace} for trace in traces],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index, "split": "default"},
    }


def sft_rows(train: Iterable[Row]) -> Iterator[Row]:
    """The training set as other trainers (OpenRLHF) read it: prompt and target messages, the target without the opening
    of the think block, which their generation prompt ends with."""
    for row in train:
        for target in row["target"]:
            text = continuation(target["content"], THINK_START)
            yield {"prompt": row["prompt"], "target": [{"role": "assistant", "content": text}]}


def write(
    source: str,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_trace_tokens: int = SETS["full"],
    num_traces: int = 1,
    limit: int = 0,
    drop_repeated: bool = False,
) -> Counter[str]:
    """Writes train.parquet, complement.parquet, sft.jsonl and counts.json and returns the counts.

    source: hub name, a .parquet/.json/.jsonl file in its schema, or "example". Raises DataError if nothing is left.
    """
    from datasets import Dataset

    rows = example_rows() if source == EXAMPLE else read_rows(source)
    if limit:
        rows = islice(rows, limit)
    train, complement, counts = prepare(
        rows, tokenizer, max_trace_tokens=max_trace_tokens, num_traces=num_traces, drop_repeated=drop_repeated
    )
    if unmatchable := hopeless([problem_from_row(row) for row in train], source):
        counts["unmatchable ground truths"] = len(unmatchable)
    for name, count in counts.items():
        published = f" (published set: {PUBLISHED[name]:,})" if name in PUBLISHED and source != EXAMPLE else ""
        log.info("%s: %d%s", name, count, published)
    if not train:
        raise DataError(f"{source}: no problem is left for training ({dict(counts)})")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(train).to_parquet(str(folder / "train.parquet"))
    if complement:
        Dataset.from_list([{k: v for k, v in row.items() if k != "target"} for row in complement]).to_parquet(
            str(folder / "complement.parquet")
        )
    with open(folder / "sft.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in sft_rows(train))
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    return counts


def example_rows(count: int = 200, seed: int = 0) -> list[Row]:
    """Rows in the hub's schema, made of the embedded world: problems with one to four generations of its teacher, some
    of them wrong, cut off or rambling, and a few rows without an answer."""
    rng = random.Random(seed)
    rows = []
    for index, problem in enumerate(tinyworld.make_problems("chain", "train", count, seed=seed, num_traces=4)):
        generations, right, complete = [], [], []
        for trace in problem.traces[: rng.randint(1, 4)]:
            kind = rng.choice(("right", "right", "wrong", "cut", "rambling"))
            if kind == "wrong":
                trace = tinyworld.spoiled(trace, rng)
            elif kind == "cut":
                trace = trace[: len(trace) // 2]
            elif kind == "rambling":
                work, end = trace.split(";check", 1)
                trace = f"{';'.join([work] * 4)};check{end}"
            generations.append(trace)
            right.append(kind in ("right", "rambling"))
            complete.append(kind != "cut")
        rows.append(
            {
                "problem": problem.prompt[0]["content"],
                "answer": problem.answer if index % 50 else None,
                "source": "tinyworld",
                "generations": generations,
                "correctness_math_verify": right,
                "is_reasoning_complete": complete,
            }
        )
    return rows


# --- the base model --------------------------------------------------------------------------------------------------


def think_chat_template(bos: str = "") -> str:
    """The paper's prompt (App. C.2) as a chat template: its own system text, the last message as the problem. bos: what
    it begins with, for models that want it."""
    before = f"{bos}{PAPER_SYSTEM_PROMPT}\nUser: This is the problem:\n"
    after = f"\nAssistant: {THINK_START}"
    return f"{{{{ {json.dumps(before)} + messages[-1]['content'] + {json.dumps(after)} }}}}"


def extend_context(
    source: str | Path, out: str | Path, *, rope_theta: float = 40_000.0, max_position_embeddings: int = 16_384
) -> Path:
    """Writes a model's folder again with a longer context and the think template, its weights unchanged, as the paper
    did with Qwen2.5-Math (4,096 positions, rope_theta 10,000). source: a folder or hub name. Returns `out`.

    Raises ConfigError if the model has no plain rotary embedding.
    """
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source)))
    settings = AutoConfig.from_pretrained(folder)
    rope = getattr(settings, "rope_parameters", None)
    if not rope or rope.get("rope_type") != "default":
        raise ConfigError(f"{source} has no plain rotary embedding whose base could be changed, but {rope}")
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    settings.rope_parameters = {**rope, "rope_theta": rope_theta}
    settings.max_position_embeddings = max_position_embeddings
    settings.save_pretrained(target)
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", target / "generation_config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begins = tokenizer.bos_token_id is not None and tokenizer.encode("0")[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = think_chat_template(tokenizer.bos_token if begins else "")
    tokenizer.model_max_length = max_position_embeddings
    tokenizer.save_pretrained(target)
    return target
