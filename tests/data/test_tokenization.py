"""Problems and traces in the student's tokens."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from luffy.data import tokenization
from luffy.data.problems import Problem
from luffy.data.templates import continuation
from luffy.data.tokenization import completion_text, tokenize_problems, tokenize_traces
from luffy.errors import DataError

EOS = 1


def problem(question="84+1?", traces=("<think>84+1=85;check5ok</think>\\boxed{85}",)):
    return Problem(({"role": "user", "content": question},), "85", tuple(traces))


def tokenize_trace(trace, prompt, tokenizer):
    (tokens,) = tokenize_traces([continuation(trace, prompt)], tokenizer)
    return tokens.tolist()


def tokenized(tiny, problems, **options):
    defaults = dict(max_prompt_length=8, max_completion_length=30)
    return tokenize_problems(problems, tiny[1], **{**defaults, **options})


def test_trace_gets_eos_and_no_second_think(tiny):
    tokenizer = tiny[1]
    trace = "<think>\n84+1=85</think>\\boxed{85}"
    whole = tokenize_trace(trace, "84+1?", tokenizer)
    assert completion_text(whole, tokenizer) == trace and whole[-1] == EOS
    continued = tokenize_trace(trace, "84+1?<think>\n", tokenizer)
    assert completion_text(continued, tokenizer) == "84+1=85</think>\\boxed{85}"


def test_long_traces_are_cut_without_eos_or_dropped(tiny):
    kept, counts = tokenized(tiny, [problem()], max_completion_length=10)
    assert len(kept[0].traces[0].tokens) == 10 and EOS not in kept[0].traces[0].tokens
    assert counts["cut_traces"] == 1
    kept, counts = tokenized(tiny, [problem()], max_completion_length=10, long_traces="drop")
    assert len(kept[0].traces) == 0
    assert (counts["dropped_traces"], counts["without_trace"], counts["traces"]) == (1, 1, 0)


def test_long_and_empty_prompts_are_left_out_and_counted(tiny):
    kept, counts = tokenized(tiny, [problem(), problem("84+1+1+1+1+1+1?"), problem("")])
    assert len(kept) == 1
    assert (counts["long_prompts"], counts["empty_prompts"], counts["problems"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="no usable problem"):
        tokenized(tiny, [problem("")])


def test_trace_ends_at_its_first_eos(tiny):
    tokenizer = tiny[1]
    assert tokenize_trace("84<eos>85", "?", tokenizer) == [*tokenizer.encode("84"), EOS]
    assert tokenize_trace("84<eos>", "?", tokenizer) == [*tokenizer.encode("84"), EOS]


def test_log_probs_of_a_trace_are_one_per_token_or_refused(tiny):
    """The tokenizer says how many tokens a trace has, its end included."""
    from dataclasses import replace

    known = [-0.1 * i for i in range(len(tokenize_trace(problem().traces[0], "84+1?", tiny[1])))]
    whole = replace(problem(), trace_logprobs=(tuple(known),))
    (kept,), _ = tokenized(tiny, [whole], teacher=True)
    np.testing.assert_allclose(kept.traces[0].logprobs, np.float32(known))
    (cut,), _ = tokenized(tiny, [whole], max_completion_length=5, teacher=True)
    np.testing.assert_allclose(cut.traces[0].logprobs, np.float32(known[:5]))
    wrong = replace(problem(), trace_logprobs=(tuple(known[:-1]),))
    with pytest.raises(DataError, match=f"has {len(known) - 1} values for a trace of {len(known)} tokens"):
        tokenized(tiny, [wrong], teacher=True)
    (unread,), _ = tokenized(tiny, [wrong])  # nobody wants them
    assert unread.traces[0].logprobs is None


def test_many_traces_are_tokenized_once(tiny, tmp_path, monkeypatch):
    """Kept by what they depend on, and read where they are known, as they would be made; of two processes that want the
    same at once, one does the work."""
    texts = [f"<think>{i}+1={i + 1}</think>\\boxed{{{i + 1}}}" for i in range(50)] + ["84<eos>85", ""]
    plain = tokenize_traces(texts, tiny[1])
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tokenization, "CACHED_CHARACTERS", 100)
    made, done = tokenization._tokenize_traces, []
    monkeypatch.setattr(tokenization, "_tokenize_traces", lambda *known: done.append(known) or made(*known))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: tokenize_traces(texts, tiny[1]), range(2)))
    for one in [*found, tokenize_traces(texts, tiny[1])]:
        assert [ids.tolist() for ids in one] == [ids.tolist() for ids in plain]
        assert all(ids.dtype == np.int32 for ids in one)
    assert len(done) == 1 and len(list((tmp_path / "traces").glob("*.npz"))) == 1
    tokenize_traces([*texts, "1"], tiny[1])
    tokenize_traces(texts, tiny[1], end=5)
    assert len(done) == 3


def test_a_damaged_cache_is_made_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tokenization, "CACHED_CHARACTERS", 1)
    first = tokenize_traces(["84+1", "85"], tiny[1])
    (file,) = (tmp_path / "traces").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    again = tokenize_traces(["84+1", "85"], tiny[1])
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in first]
