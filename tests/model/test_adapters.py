"""LoRA: what is trained, what is sampled, saved and taken up again; against peft's own model and plain torch."""

import json
import shutil

import pytest
import torch
from helpers import assert_same_run, cut_short
from safetensors.torch import load_file

from luffy import make_config, resume, train
from luffy.cli import main
from luffy.errors import ConfigError
from luffy.evaluation.options import resolve_model
from luffy.model import adapters
from luffy.model.loading import load_model
from luffy.runs import RunDirectory
from luffy.training.engines import load_policy

LORA = dict(lora_r=4, lora_alpha=8, learning_rate=3e-3, warmup_steps=0)
TOKENS = torch.tensor([[5, 9, 14, 7, 30, 11]])


def disturbed(model):
    """Adapters that change something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = make_config("luffy", model="tiny", **LORA)
    return disturbed(load_policy(config, "tiny").eval())


@pytest.fixture(scope="module")
def run(tmp_path_factory, short_run):
    return train(make_config("luffy", **short_run, **LORA, beta=0.01), tmp_path_factory.mktemp("lora") / "run")


def test_whole_weights_are_those_of_the_adapters_forward_pass(adapted):
    plain = load_model("tiny").eval()
    names = dict(plain.named_parameters())
    found = {name: make() for name, _, make in adapters.whole(adapted)}
    assert found.keys() == names.keys()
    layer = adapted.model.layers[0].mlp.up_proj
    by_hand = layer.base_layer.weight + 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(found["model.layers.0.mlp.up_proj.weight"], by_hand.detach())
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(found[name])
        torch.testing.assert_close(plain(TOKENS).logits, adapted(TOKENS).logits, atol=1e-5, rtol=0)


def test_new_adapters_change_nothing_and_off_is_the_base():
    base = load_model("tiny").eval()
    model = load_policy(make_config("luffy", model="tiny", **LORA), "tiny").eval()
    assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    disturbed(model)
    assert not torch.allclose(model(TOKENS).logits, base(TOKENS).logits, atol=1e-2)
    with adapters.off(model):
        assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in model.named_parameters())


def test_only_adapters_are_trained_and_kept(run):
    """The frozen weights are the base model's to the bit; the optimiser and the checkpoint know the adapters only."""
    state = torch.load(run.path / "final" / "optimizer.pt", weights_only=True)["optimizer"]
    saved = load_file(run.path / "final" / adapters.WEIGHTS)
    assert len(state["state"]) == len(saved) and all(".lora_" in name for name in saved)
    assert not (run.path / "final" / "model.safetensors").exists()
    model = load_policy(run.config(), run.path / "final")
    base = dict(load_model(run.config().model).named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])
    assert any(tensor.abs().max() > 1e-4 for name, tensor in saved.items() if "lora_B" in name)


def test_samples_are_of_the_merged_weights_and_the_reference_is_the_base(run):
    rows = [row for row in run.metrics() if row["step"]]
    assert all(0 < row["sampler_gap/max"] < 1e-4 for row in rows)
    assert 0 < rows[0]["kl"] < rows[-1]["kl"]  # in the first step's second update, and later


def test_loss_falls():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        values = dict(steps=20, rollout_batch_size=8, mini_batch_size=8, eval_steps=0, final_eval_problems=0, lora_r=4)
        found = train(make_config("sft", **values, sft_learning_rate=1e-2, warmup_steps=0), f"{folder}/run").metrics()
    assert found[-1]["sft_loss"] < 0.8 * found[0]["sft_loss"]


def test_resumes_to_the_bit(run, tmp_path):
    again = RunDirectory(cut_short(run.path, tmp_path / "cut", 4))
    resume(again.path)
    assert_same_run(run, again)


def test_other_tools_read_it(run, tmp_path):
    """peft loads the checkpoint; `luffy data merge` writes a plain folder; both are what evaluations load."""
    from peft import PeftModel

    source = resolve_model(str(run.path))
    with torch.no_grad():
        ours = load_model(source).eval()(TOKENS).logits
        theirs = PeftModel.from_pretrained(load_model(run.config().model), source).eval()(TOKENS).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        main(["data", "merge", "--model", str(run.path), "--out", str(tmp_path / "plain")])
        assert torch.equal(load_model(tmp_path / "plain").eval()(TOKENS).logits, ours)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == dict(load_model("tiny").named_parameters()).keys()


def test_what_does_not_fit_is_one_error(run, tmp_path):
    with pytest.raises(ConfigError, match=r"lora_target_modules \['key'\]: the model has down_proj"):
        load_policy(make_config("luffy", model="tiny", lora_r=4, lora_target_modules=["key"]), "tiny")
    with pytest.raises(ConfigError, match="of another model or rank"):
        load_policy(run.config().replace(lora_r=8), run.path / "final")
    nameless = tmp_path / "nameless"
    shutil.copytree(run.path / "final", nameless)
    settings = json.loads((nameless / adapters.SETTINGS).read_text()) | {"base_model_name_or_path": None}
    (nameless / adapters.SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="does not say to which model"):
        load_model(nameless)
    with pytest.raises(ConfigError, match="load_in_4bit"):
        make_config("luffy", load_in_4bit=True)


def test_an_adapter_on_an_adapter(tmp_path, short_run):
    """SFT+RL: the second stage's is on the first one's, and whoever loads the run gets the changes of both."""
    values = {**short_run, **LORA, "first_stage_steps": 4, "sft_learning_rate": 1e-2}
    run = train(make_config("sft_rl", **values), tmp_path / "run")
    first, last = (load_model(path / "final").eval() for path in (run.path / "first_stage", run.path))
    alone = load_model("tiny:own_share=0.4")
    adapters.attach(alone, run.path / "final")
    second = make_config("on_policy", **short_run, **LORA, model=str(run.path / "first_stage" / "final"))
    policy = load_policy(second, run.path / "final")
    with torch.no_grad():
        logits = [model.eval()(TOKENS).logits for model in (policy, last, first, alone)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    assert not torch.allclose(logits[1], logits[2], atol=1e-4)
    assert not torch.allclose(logits[1], logits[3], atol=1e-3)
