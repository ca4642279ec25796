"""Packing and log-probs against the plain computation: padded nothing, whole logits, one sequence at a time."""

import pytest
import torch
from helpers import ARCHITECTURES, random_model

from luffy.model.logprobs import check_model, head_logprobs, token_logprobs
from luffy.model.packing import TokenSequence, deal, fill_rows, pack


def random_sequences(count=9, vocab=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, vocab, (n,), generator=generator).tolist()  # noqa: E731
    size = lambda high: int(torch.randint(1, high, (1,), generator=generator))  # noqa: E731
    return [TokenSequence(draw(size(6)), draw(size(25))) for _ in range(count)]


def plain_logprobs(model, sequence, temperature=1.0):
    ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
    logits = model(ids).logits[0].float() / temperature
    logp = logits.log_softmax(-1)
    first = len(sequence.prompt_ids)
    entropy = -(logp.exp() * logp).sum(-1)[first - 1 : -1]
    return logp[:-1].gather(-1, ids[0, 1:, None])[first - 1 :, 0], entropy


def packed_logprobs(model, sequences, *, row_tokens=40, micro_batch_tokens=80, temperature=1.0, chunk_size=7):
    total = sum(len(s.completion_ids) for s in sequences)
    logp, entropy = torch.zeros(total), torch.zeros(total)
    for batch in pack(sequences, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens):
        part = token_logprobs(model, batch, temperature=temperature, chunk_size=chunk_size)
        logp = logp.index_put((batch.token_index,), part[0])
        entropy = entropy.index_put((batch.token_index,), part[1])
    return logp, entropy


def test_rows_hold_every_sequence_once_and_no_more_than_they_can():
    lengths = [7, 3, 9, 1, 1, 5, 8, 2]
    rows = fill_rows(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(8))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 4  # 36 tokens need four rows of ten
    with pytest.raises(ValueError, match="11 tokens"):
        fill_rows([11], 10)


def test_micro_batches_respect_the_token_budget():
    sequences = random_sequences(30)
    batches = pack(sequences, row_tokens=40, micro_batch_tokens=80)
    assert all(batch.input_ids.numel() <= 80 for batch in batches)
    seen = torch.cat([batch.token_index for batch in batches])
    assert sorted(seen.tolist()) == list(range(sum(len(s.completion_ids) for s in sequences)))


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        pack([TokenSequence([], [3])], row_tokens=8, micro_batch_tokens=8)


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
    """Changing one sequence of a row leaves the others' log-probs alone."""
    model, sequences = random_model("Qwen2"), random_sequences(4)
    before = packed_logprobs(model, sequences, row_tokens=200, micro_batch_tokens=200)[0]
    changed = [sequences[0], TokenSequence([5, 6, 7], sequences[1].completion_ids), *sequences[2:]]
    after = packed_logprobs(model, changed, row_tokens=200, micro_batch_tokens=200)[0]
    parts = [len(s.completion_ids) for s in sequences]
    for i, (a, b) in enumerate(zip(before.split(parts), after.split(parts), strict=True)):
        assert (torch.allclose(a, b, atol=1e-5)) == (i != 1)


def test_gradient_does_not_depend_on_the_split():
    model, sequences = random_model("Qwen2"), random_sequences(12)
    gradients = []
    for row_tokens, micro_batch_tokens in [(1, 1), (40, 40), (64, 256), (1000, 10_000)]:
        model.zero_grad()
        for batch in pack(sequences, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens):
            logp, entropy = token_logprobs(model, batch)
            ((batch.token_index % 5 - 2.0) @ logp.exp() + 0.1 * entropy.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-4, rtol=1e-4)


def test_only_chunk_times_vocabulary_logits_are_alive():
    """The head is asked for at most chunk_size tokens at a time, in forward and again in backward."""
    head, seen = torch.nn.Linear(8, 50, bias=False), []
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    hidden = torch.randn(23, 8, requires_grad=True)
    logp, _ = head_logprobs(hidden, head, torch.arange(23), chunk_size=5)
    logp.sum().backward()
    assert max(shape[0] for shape in seen) == 5
    assert sum(shape[0] for shape in seen) == 2 * 23


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_ordinary_models_pass_the_check(architecture, tied):
    check_model(random_model(architecture, tied))


def test_model_that_scales_its_logits_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = GraniteForCausalLM(GraniteConfig(**sizes, vocab_size=61, logits_scaling=8.0, initializer_range=0.2)).eval()
    with pytest.raises(ValueError, match="transforms its logits"):
        check_model(model)


# --- dealing micro-batches to ranks ----------------------------------------------------------------------------------


def test_deal_balances():
    assert deal([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert deal([7], 3) == [[0], [], []]


def test_parts_cover_every_token_once_and_are_equally_many():
    sequences = [TokenSequence([3] * (1 + i % 5), [4] * (1 + 7 * i % 23)) for i in range(37)]
    total = sum(len(s.completion_ids) for s in sequences)
    for parts in (1, 2, 3, 50):
        shares = [pack(sequences, row_tokens=32, micro_batch_tokens=64, part=p, parts=parts) for p in range(parts)]
        assert len({len(share) for share in shares}) == 1
        index = torch.cat([batch.token_index for share in shares for batch in share])
        assert sorted(index.tolist()) == list(range(total))
        sizes = [sum(len(batch.targets) for batch in share) for share in shares]
        assert parts == 50 or max(sizes) - min(sizes) <= 32
