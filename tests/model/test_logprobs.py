"""Packing and log-probs against the plain computation: padded nothing, whole logits, one sequence at a time."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURES, random_model

from luffy.model import attention
from luffy.model.logprobs import Head, head_logprobs, prepare, token_logprobs
from luffy.model.packing import TokenSequence, deal, pack


def random_sequences(count=9, vocab=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, vocab, (n,), generator=generator).tolist()  # noqa: E731
    size = lambda high: int(torch.randint(1, high, (1,), generator=generator))  # noqa: E731
    prompts = [draw(size(6)) for _ in range(max(2, count // 3))]  # most of them have several completions
    return [TokenSequence(prompts[int(size(len(prompts) + 1)) - 1], draw(size(25))) for _ in range(count)]


def plain_logprobs(model, sequence, temperature=1.0):
    ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
    logits = model(ids).logits[0].float() / temperature
    logp = logits.log_softmax(-1)
    first = len(sequence.prompt_ids)
    entropy = -(logp.exp() * logp).sum(-1)[first - 1 : -1]
    return logp[:-1].gather(-1, ids[0, 1:, None])[first - 1 :, 0], entropy


def packed_logprobs(model, sequences, *, micro_batch_tokens=80, temperature=1.0, chunk_size=7):
    total = sum(len(s.completion_ids) for s in sequences)
    logp, entropy = torch.zeros(total), torch.zeros(total)
    for batch in pack(sequences, micro_batch_tokens=micro_batch_tokens):
        part = token_logprobs(model, batch, temperature=temperature, chunk_size=chunk_size)
        logp = logp.index_put((batch.token_index,), part[0])
        entropy = entropy.index_put((batch.token_index,), part[1])
    return logp, entropy


def test_micro_batches_respect_the_token_budget():
    sequences = random_sequences(30)
    batches = pack(sequences, micro_batch_tokens=80)
    assert all(batch.input_ids.numel() <= 80 for batch in batches)
    seen = torch.cat([batch.token_index for batch in batches])
    assert sorted(seen.tolist()) == list(range(sum(len(s.completion_ids) for s in sequences)))
    (long, *_) = pack([*sequences, TokenSequence([3], [4] * 100)], micro_batch_tokens=80)
    assert long.input_ids.numel() == 101  # a sequence of more than that has a micro-batch of its own


def test_a_micro_batch_by_hand():
    """Two completions of one prompt and one of another: the first prompt stands once, in front of both."""
    (batch,) = pack(
        [TokenSequence([5, 6], [7, 8]), TokenSequence([9], [4]), TokenSequence([5, 6], [3])], micro_batch_tokens=100
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 3, 9, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.predictors.tolist() == [1, 2, 1, 5]
    assert batch.targets.tolist() == [7, 8, 3, 4]
    assert batch.token_index.tolist() == [0, 1, 3, 2]
    layout = batch.layout
    places = [layout.expand[start:end].tolist() for start, end in zip(layout.bounds, layout.bounds[1:], strict=False)]
    assert places == [[0, 1, 2, 3] + [3] * 4, [0, 1, 4] + [4] * 5, [5, 6] + [6] * 6]  # rounded up to eight
    assert layout.runs == ((3, 8),) and layout.longest == 8
    assert layout.expand[layout.keep].tolist() == list(range(7))


def test_sharing_a_prompt_saves_its_tokens_and_long_families_are_split():
    group = [TokenSequence([3] * 10, [4] * 5) for _ in range(8)]
    (batch,) = pack(group, micro_batch_tokens=1000)
    assert batch.input_ids.numel() == 10 + 8 * 5
    halves = pack(group, micro_batch_tokens=35)
    assert len(halves) > 1 and sum(len(half.targets) for half in halves) == 40
    # ranks that go forward together: many groups with long prompts and short answers stay whole
    many = [TokenSequence([3 + g] * 40, [4] * 5) for g in range(16) for _ in range(8)]
    shares = [pack(many, micro_batch_tokens=1000, part=part, parts=2) for part in range(2)]
    assert [[batch.input_ids.numel() for batch in share] for share in shares] == [[640], [640]]


def test_a_long_prompt_is_not_repeated_without_end():
    """64 short answers behind one prompt of 200 tokens: few tokens, of which attention would make 13,000."""
    sequences = [TokenSequence([3] * 200, [4 + i % 7] * 5) for i in range(64)]
    batches = pack(sequences, micro_batch_tokens=1000)
    assert 3 <= len(batches) <= 6
    for batch in batches:
        assert batch.input_ids.numel() <= 1000 and len(batch.layout.expand) <= 4 * 1000 * 1.05  # rounding to eights


def test_many_sequences_of_more_than_half_a_micro_batch_are_packed_at_once():
    """No two of them fit together, which the number of micro-batches has to grow towards."""
    sequences = [TokenSequence([3], [4] * (60 + i % 30)) for i in range(600)]
    started = time.perf_counter()
    batches = pack(sequences, micro_batch_tokens=100, parts=8)
    assert len(batches) == 75 and time.perf_counter() - started < 20


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        pack([TokenSequence([], [3])], micro_batch_tokens=8)


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_chunked_equals_plain_with_gradients(architecture, tied, temperature):
    model, sequences = random_model(architecture, tied), random_sequences()
    plain = [torch.cat(part) for part in zip(*(plain_logprobs(model, s, temperature) for s in sequences), strict=True)]
    packed = packed_logprobs(model, sequences, temperature=temperature)
    for expected, actual in zip(plain, packed, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, len(plain[0]))
    gradients = []
    for logp, entropy in (plain, packed):
        model.zero_grad()
        (logp @ weights + 0.3 * entropy @ weights.flip(0)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_sequences_do_not_see_each_other():
    """Changing one sequence of a micro-batch leaves the others' log-probs alone."""
    model, sequences = random_model("Qwen2"), random_sequences(4)
    before = packed_logprobs(model, sequences, micro_batch_tokens=200)[0]
    changed = [sequences[0], TokenSequence([5, 6, 7], sequences[1].completion_ids), *sequences[2:]]
    after = packed_logprobs(model, changed, micro_batch_tokens=200)[0]
    parts = [len(s.completion_ids) for s in sequences]
    for i, (a, b) in enumerate(zip(before.split(parts), after.split(parts), strict=True)):
        assert (torch.allclose(a, b, atol=1e-5)) == (i != 1)


def test_gradient_does_not_depend_on_the_split():
    model, sequences = random_model("Qwen2"), random_sequences(12)
    gradients = []
    for micro_batch_tokens in (1, 40, 256, 10_000):
        model.zero_grad()
        for batch in pack(sequences, micro_batch_tokens=micro_batch_tokens):
            logp, entropy = token_logprobs(model, batch)
            ((batch.token_index % 5 - 2.0) @ logp.exp() + 0.1 * entropy.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("upstream", ["both", "logp", "entropy"])
def test_head_equals_autograd(mode, biased, upstream):
    """Values and gradients of the analytic head against torch's own of whole logits."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    head = torch.nn.Linear(16, 50, bias=biased, dtype=dtype)
    hidden, targets = torch.randn(23, 16, dtype=dtype, requires_grad=True), torch.randint(50, (23,))
    weights = torch.randn(2, 23)
    found = []
    for ours in (True, False):
        head.zero_grad()
        hidden.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            if ours:
                logp, entropy = head_logprobs(
                    hidden, head.weight, targets, bias=head.bias, temperature=0.7, chunk_size=5
                )
            else:
                logps = (head(hidden).float() / 0.7).log_softmax(-1)
                logp, entropy = logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)
        loss = (weights[0] @ logp if upstream != "entropy" else 0) + (weights[1] @ entropy if upstream != "logp" else 0)
        loss.backward()
        found.append([logp, entropy, hidden.grad, *(p.grad for p in head.parameters())])
    tolerance = 1e-5 if mode == "float32" else 2e-2
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_a_frozen_head_passes_the_gradient_on():
    head, hidden = Head(4, 7).requires_grad_(False), torch.randn(3, 4, requires_grad=True)
    logp, _ = head(hidden, torch.tensor([1, 2, 3]), chunk_size=2)
    (expected,) = torch.autograd.grad(
        head(hidden).log_softmax(-1).gather(-1, torch.tensor([[1], [2], [3]])).sum(), hidden
    )
    logp.sum().backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None


def test_head_without_tokens_has_a_gradient_of_zero():
    head, hidden = Head(4, 7), torch.zeros(0, 4, requires_grad=True)
    logp, entropy = head(hidden, torch.zeros(0, dtype=torch.long))
    (logp.sum() + entropy.sum()).backward()
    assert not head.weight.grad.any() and hidden.grad.shape == (0, 4)


def test_the_gradient_of_a_half_precision_head_is_summed_in_full():
    """256 chunks each of which adds less than bfloat16 can tell from their sum."""
    hidden = torch.ones(256, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logp, _ = head_logprobs(hidden, weight, torch.zeros(256, dtype=torch.long), chunk_size=1)
    logp.sum().backward()
    assert weight.grad[:, 0].tolist() == [128.0, -128.0]
    one_by_one = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        one_by_one += 0.5
    assert one_by_one < 500  # what summing in bfloat16 would come to


MEASURE = """
import torch
from luffy.model.logprobs import head_logprobs
torch.set_num_threads(1)
chunk, words = 128, 100_000
weight = torch.randn(words, 8, requires_grad=True)
hidden = torch.randn(384, 8, requires_grad=True)
targets = torch.randint(words, (384,))
head_logprobs(hidden[:1], weight[:9], targets[:1] % 9)[0].sum().backward()  # whatever torch needs once

def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = peak()
logp, entropy = head_logprobs(hidden, weight, targets, chunk_size=chunk)
(logp.sum() + entropy.sum()).backward()
print((peak() - before) / (chunk * words * 4))
"""


def test_two_and_a_half_chunks_of_logits_are_alive():
    """Measured in a process of its own: 384 states, 100,000 words, chunks of 128 are 49 MB each."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1.0 < float(done.stdout) < 2.5


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_a_prepared_model_is_what_it_was_to_everyone_else(architecture, tied):
    """The same logits as by transformers' own attention, with padding and without, and the same saved files."""
    model = random_model(architecture, tied)
    ids, mask = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        model.config._attn_implementation = "sdpa"
        theirs = model(ids, attention_mask=mask).logits
        model.config._attn_implementation = attention.NAME
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert attention.NAME not in (Path(folder) / "config.json").read_text()


def test_model_that_scales_its_logits_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = GraniteForCausalLM(GraniteConfig(**sizes, vocab_size=61, logits_scaling=8.0, initializer_range=0.2)).eval()
    with pytest.raises(ValueError, match="transforms its logits"):
        prepare(model)


def test_a_model_that_is_not_prepared_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    (batch,) = pack([TokenSequence([3], [4, 5])], micro_batch_tokens=10)
    with pytest.raises(ValueError, match="not prepared"):
        token_logprobs(LlamaForCausalLM(LlamaConfig(**sizes)), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_loses_the_layout_is_refused(monkeypatch, dtype):
    """One whose attention is not told where sequences begin would have them see each other. It stays as it was."""
    model = random_model("Qwen2").to(dtype)
    prepare(model)
    plain = attention.sdpa_attention_forward
    attention.AttentionInterface.register(
        "forgetful", lambda *states, layout=None, **kwargs: plain(*states[:4], None, **kwargs)
    )
    model.get_output_embeddings().__class__ = torch.nn.Linear
    monkeypatch.setattr(attention, "NAME", "forgetful")
    with pytest.raises(ValueError, match="keep packed sequences apart"):
        prepare(model)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.config._attn_implementation == "luffy_packed"


def test_a_rotary_embedding_that_depends_on_the_row_is_refused():
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4, original_max_position_embeddings=16)
    with pytest.raises(ValueError, match="longrope"):
        random_model("Llama", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors})


@pytest.mark.parametrize("architecture", ["Qwen2", "Mistral"])
def test_sliding_window_is_refused(architecture):
    values = dict(use_sliding_window=True, max_window_layers=0) if architecture == "Qwen2" else {}
    with pytest.raises(ValueError, match="attention that is not full"):
        random_model(architecture, sliding_window=4, **values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
def test_flash_attention_of_packed_sequences_equals_one_call_for_each_length(architecture, monkeypatch):
    """In bfloat16 on a GPU: log-probs, and the gradient of a loss of them."""
    model, sequences = random_model(architecture, head_dim=16).to("cuda", torch.bfloat16), random_sequences(40)
    batch = pack(sequences, micro_batch_tokens=4096)[0].to("cuda")
    flash, calls, found = attention._varlen, [], []
    monkeypatch.setattr(attention, "_varlen", lambda *states: calls.append(1) or flash(*states))
    for takes in (True, False):
        if not takes:
            monkeypatch.setattr(attention, "_flash_takes", lambda query, value: False)
        model.zero_grad()
        logp, entropy = token_logprobs(model, batch)
        (logp.sum() + 0.1 * entropy.sum()).backward()
        found.append((logp.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])))
    assert len(calls) == 2  # once a layer, and not where it is not to
    torch.testing.assert_close(found[0][0], found[1][0], atol=0.15, rtol=0.05)
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99


# --- dealing micro-batches to ranks ----------------------------------------------------------------------------------


def test_deal_balances():
    assert deal([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert deal([7], 3) == [[0], [], []]


def test_parts_cover_every_token_once_and_are_equally_many_and_full():
    sequences = [TokenSequence([3] * (1 + i % 5), [4] * (1 + 7 * i % 23)) for i in range(37)]
    total = sum(len(s.completion_ids) for s in sequences)
    for parts in (1, 2, 3, 50):
        shares = [pack(sequences, micro_batch_tokens=64, part=p, parts=parts) for p in range(parts)]
        assert len({len(share) for share in shares}) == 1
        index = torch.cat([batch.token_index for share in shares for batch in share])
        assert sorted(index.tolist()) == list(range(total))
        if parts < 50:  # ranks go forward and backward together: those of a round are about equally full
            for at_once in zip(*shares, strict=True):
                sizes = [batch.input_ids.numel() for batch in at_once]
                assert min(sizes) > 0.75 * max(sizes)
