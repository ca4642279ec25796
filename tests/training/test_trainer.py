"""The training loop with real components: what a run leaves behind, what is refused, sampler and trainer."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import assert_same_run, comparable, cut_short, first_part, make_trainer
from paths import ROOT

from luffy import ConfigError, RunError, Trainer, make_config, resume, train
from luffy.errors import DataError, NonFiniteError, SamplerError
from luffy.methods.rows import Batch
from luffy.model.packing import TokenSequence, pack
from luffy.runs import RunDirectory


@pytest.fixture(scope="module")
def luffy_run(tmp_path_factory, short_run):
    return train(make_config("luffy", **short_run), tmp_path_factory.mktemp("runs") / "luffy")


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_run_directory(luffy_run, short_run):
    assert luffy_run.is_complete
    assert luffy_run.config() == make_config("luffy", **short_run)
    manifest = json.loads((luffy_run.path / "manifest.json").read_text())
    assert {"luffy", "packages", "machine", "seed", "data", "seconds"} <= manifest.keys()
    assert manifest["data"]["problems"] == 40 and manifest["seconds"]["update"] > 0
    rows = luffy_run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {"eval/id", "eval/ood"} <= rows[0].keys() and {"eval/id", "time/eval"} <= rows[4].keys()
    for name in (
        "reward/on",
        "reward/off",
        "groups/all_wrong",
        "entropy/on",
        "entropy/off",
        "off_ratio_mean",
        "grad_norm",
        "truncated/on",
        "time/sample",
        "time/update",
        "machine/peak_memory_mb",
        "total/generated_tokens",
    ):
        assert all(name in row for row in rows[1:]), name
    assert [p.name for p in sorted((luffy_run.path / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert {"chain", "words"} <= luffy_run.evaluation()["families"].keys()
    sample = json.loads((luffy_run.path / "samples" / "step-000002.json").read_text())
    assert len(sample) == 8 and [row["off_policy"] for row in sample[:4]] == [False, False, False, True]
    assert sum(row["advantage"] for row in sample[:4]) == pytest.approx(0, abs=1e-5)


def test_checkpoint_loads_with_plain_transformers(luffy_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = luffy_run.path / "final"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "84+1?"}], tokenize=False)
    assert model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3).shape[1] == 8


# --- what is refused -------------------------------------------------------------------------------------------------


def test_directory_of_another_configuration_is_refused(luffy_run):
    with pytest.raises(RunError, match="differs in gamma"):
        train(luffy_run.config().replace(gamma=0.3), luffy_run.path)


def test_directory_in_use_is_refused(luffy_run):
    with luffy_run.locked(), pytest.raises(RunError, match="another process"):
        resume(luffy_run.path)


def test_not_a_run_directory(tmp_path):
    with pytest.raises(RunError, match=r"no config\.json"):
        resume(tmp_path)


@pytest.mark.parametrize("phase", ["sample", "update"])
def test_non_finite_numbers_stop_the_run_and_harm_nothing(tmp_path, luffy_run, phase, monkeypatch):
    directory = cut_short(luffy_run.path, tmp_path / "run", 4)
    run = RunDirectory(directory)
    one = Trainer(run.config(), run)
    if phase == "sample":
        with torch.no_grad():
            next(one.model.parameters()).fill_(float("nan"))
    else:
        monkeypatch.setattr(Batch, "advantages", lambda self, **named: torch.full((len(self.rows),), float("inf")))
    with pytest.raises(NonFiniteError, match=f"step 3, {phase}.*failed-step-000003"):
        one.train()
    monkeypatch.undo()
    saved = torch.load(directory / "failed-step-000003.pt", weights_only=True)
    assert saved["phase"] == phase and isinstance(saved["rows"], list)
    assert any(row["foreign"] == len(row["token_ids"]) for row in saved["rows"])  # also what there was before
    assert run.latest_checkpoint()[0] == 2 and not run.is_complete
    assert_same_run(resume(directory), luffy_run)


def test_other_data_than_before_is_refused(tmp_path, luffy_run, monkeypatch):
    directory = cut_short(luffy_run.path, tmp_path / "run")
    monkeypatch.setattr("luffy.training.trainer.fingerprint", lambda problems: "other")
    with pytest.raises(RunError, match="not the data"):
        resume(directory)


def test_impossible_sizes_are_refused_before_training(tmp_path, short_run):
    with pytest.raises(ConfigError, match="the model has 512 positions"):
        make_trainer(tmp_path / "a", **{**short_run, "max_completion_length": 500})
    with pytest.raises(ConfigError, match="exceeds the 3 problems"):
        make_trainer(tmp_path / "b", **{**short_run, "num_problems": 3})


def test_unknown_reward_function(tmp_path, short_run):
    with pytest.raises(ConfigError, match="no reward function"):
        train(make_config("luffy", **short_run, reward="nowhere:reward"), tmp_path / "run")


def test_rows_that_a_reward_does_not_judge_take_no_part(tmp_path, short_run, monkeypatch):
    """None for every second completion: no advantage, out of the baseline and of the mean reward, but counted."""
    (tmp_path / "half.py").write_text(
        "def reward(prompts, completions, answer, **columns):\n"
        "    return [float(a in c) if len(c) % 2 else None for a, c in zip(answer, completions)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = train(make_config("luffy", **{**short_run, "final_eval_problems": 0}, reward="half:reward"), tmp_path / "run")
    samples = json.loads((run.path / "samples" / "step-000002.json").read_text())
    unjudged = [row for row in samples if len(row["completion"]) % 2 == 0]
    assert unjudged and all(row["reward"] is None and row["advantage"] == 0 for row in unjudged)
    for group in range(2):
        judged = [row for row in samples[group * 4 : group * 4 + 4] if row["reward"] is not None]
        assert sum(row["advantage"] for row in judged) == pytest.approx(0, abs=1e-4)
    row = run.metrics()[-1]
    assert all(math.isfinite(value) for value in row.values()) and row["machine/verifier_unjudged"] > 0


def test_rows_without_traces_are_refused_or_warned_of(tmp_path, short_run, caplog):
    """A method that learns from traces does not train on-policy unseen."""
    rows = [{"problem": f"8{i}+1?", "answer": f"{i}", "generations": ["x"]} for i in range(8)]
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {**short_run, "num_problems": 0, "dataset": str(path)}
    for method in ("luffy", "sft", "rl_sft_loss"):
        with pytest.raises(DataError, match="luffy data openr1"):
            make_trainer(tmp_path / method, method=method, **values)
    make_trainer(tmp_path / "on_policy", method="on_policy", **values).close()
    few = [row | ({"traces": ["<think>1</think>2"]} if i < 3 else {}) for i, row in enumerate(rows)]
    path.write_text("\n".join(map(json.dumps, few)))
    make_trainer(tmp_path / "few", **values)
    assert "only 3 of 8 problems have a trace" in caplog.text


def test_traces_that_are_all_dropped_are_refused(tmp_path, short_run):
    with pytest.raises(DataError, match="no trace of tinyworld fits max_completion_length 3"):
        make_trainer(tmp_path / "run", **{**short_run, "max_completion_length": 3}, long_traces="drop")


def test_prompts_that_are_all_too_long_name_the_bound(tmp_path, short_run):
    with pytest.raises(DataError, match=r"max_prompt_length is 3, and the longest prompt has \d+ tokens"):
        make_trainer(tmp_path / "run", **short_run, max_prompt_length=3)


def test_an_adapter_without_a_model_is_one_error(tmp_path, short_run):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not say to which model"):
        make_trainer(tmp_path / "run", **short_run, model=str(tmp_path / "adapter"))


def test_own_reward_and_own_data(tmp_path, short_run, monkeypatch):
    """A JSON-lines file in the plain schema, one row without a trace and one with two, and a user's reward."""
    (tmp_path / "mine.py").write_text(
        "def reward(prompts, completions, answer, level, **columns):\n"
        "    return [0.5 * ('boxed' in c) + level_ for c, level_ in zip(completions, level)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {
            "problem": "84+1?",
            "answer": "85",
            "traces": ["<think>84+1=85</think>\\boxed{85}", "\\boxed{85}"],
            "level": 0,
        },
        {"problem": "84-1?", "answer": "83", "traces": [], "level": 0},
        {"problem": "84-2?", "answer": "82", "traces": ["\\boxed{82}"], "level": 0},
        {"problem": "84-3?", "answer": "81", "traces": ["\\boxed{81}"], "level": 0},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {**short_run, "dataset": str(tmp_path / "p.jsonl"), "eval_datasets": [str(tmp_path / "p.jsonl")]}
    run = train(make_config("luffy", **values, reward="mine:reward", num_off_policy=2), tmp_path / "run")
    rows = run.metrics()[1:]
    assert all(row["groups/without_trace"] == 0.75 for row in rows)  # three of the four have fewer than two
    assert all(row["reward/off"] == 0.5 for row in rows)
    assert run.is_complete


def test_supervised_run_leaves_out_problems_without_a_trace(tmp_path, short_run):
    rows = [{"problem": f"84+{i}?", "answer": str(84 + i), "traces": ["\\boxed{1}"] * (i == 1)} for i in range(1, 6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        **short_run,
        "dataset": str(tmp_path / "p.jsonl"),
        "steps": 2,
        "rollout_batch_size": 1,
        "mini_batch_size": 1,
    }
    assert len(make_trainer(tmp_path / "a", method="sft", **values).problems) == 1
    assert train(make_config("sft", **values), tmp_path / "run").is_complete
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="no traces"):
        make_trainer(tmp_path / "b", method="sft", **values)


def test_packed_rows_hold_prompt_and_completion(tmp_path):
    one = make_trainer(tmp_path, num_problems=40)
    rows = one.collect(0)[:5]
    sequences = [TokenSequence(row.prompt_ids, row.token_ids) for row in rows]
    [batch] = pack(sequences, micro_batch_tokens=4096)
    assert batch.targets[batch.token_index.argsort()].tolist() == [t for row in rows for t in row.token_ids.tolist()]


# --- sampler and trainer ---------------------------------------------------------------------------------------------


def test_stale_weights_end_the_run(tmp_path, short_run):
    """A sampler that goes on with other weights than the policy's is found at once, before they do any harm."""
    one = make_trainer(tmp_path, **short_run)
    stale = copy.deepcopy(one.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stale.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    one.sampler.sampler.model = stale
    one.sampler.sampler.load_weights = lambda weights: None
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    with pytest.raises(SamplerError, match="does not have the policy's weights"):
        one.train_step(0)
    assert all(torch.equal(weight, before[name]) for name, weight in one.model.state_dict().items())
    one.close()


def test_a_copy_gets_the_weights_before_every_step(tmp_path, short_run):
    """A sampler with a model of its own, as under ZeRO-3: the same run, and no mismatch."""
    runs = []
    for name in ("shared", "copied"):
        one = make_trainer(tmp_path / name, **{**short_run, "final_eval_problems": 0})
        if name == "copied":
            one.sampler.sampler.model, one.sampler.sampler.copied = copy.deepcopy(one.model), True
        one.run.start(one.config, {})
        one.train()
        runs.append(one.run)
        assert all(row["sampler_gap/max"] < 1e-4 for row in one.run.metrics()[1:])
    assert comparable(runs[0].metrics()) == comparable(runs[1].metrics())


def test_truncated_importance_sampling(tmp_path):
    """On-policy advantages are weighted with min(cap, pi / pi_sampler), those of demonstrations are not."""
    gradients = {}
    for cap in (None, 1e9, 1.5):
        values = dict(recompute_old_logp=True, sampler_gap_limit=10.0, entropy_coef=0.0, num_problems=40)
        one = make_trainer(
            tmp_path / str(cap), vllm_importance_sampling_cap=cap, max_grad_norm=1e9, warmup_steps=0,
            mini_batch_size=16, **values,
        )  # fmt: skip
        rows = one.collect(0)
        for row in rows:
            row.logprobs = row.logprobs - np.float32(math.log(2.0))  # pi / pi_sampler = 2
        found = {}
        one.engine.optimizer.step = lambda found=found, one=one: found.update(
            {n: p.grad.clone() for n, p in one.model.named_parameters()}
        )
        metrics = one.update(first_part(one, rows))
        assert metrics["importance_weight"] == pytest.approx({None: 1.0, 1e9: 2.0, 1.5: 1.5}[cap], abs=1e-4)
        assert metrics["sampler_gap/mean"] == pytest.approx(math.log(2.0), abs=1e-4)
        assert metrics["sampler_gap/above"] == 1.0
        gradients[cap] = found
        one.close()
    # The gradient is linear in the weight: off + w on.
    for name, plain in gradients[None].items():
        torch.testing.assert_close(
            gradients[1.5][name], (plain + gradients[1e9][name]) / 2, atol=1e-7, rtol=1e-4, msg=name
        )
    assert any(not torch.allclose(gradients[1e9][n], g, rtol=1e-2) for n, g in gradients[None].items())


def test_torch_engine_refuses_several_ranks(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use engine deepspeed"):
        train(make_config("luffy", steps=1), tmp_path / "run")


# --- what is logged --------------------------------------------------------------------------------------------------


def test_every_logged_metric_has_a_line(luffy_run):
    """METRICS.md against what a run writes, both ways."""
    page = (ROOT / "luffy" / "training" / "METRICS.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`(\S+?)`", cell)}
    written = {name for row in luffy_run.metrics() for name in row}
    families = set(luffy_run.evaluation()["families"])
    general = {re.sub(f"^eval/({'|'.join(families)})/", "eval/FAMILY/", name) for name in written}
    general = {re.sub(r"^machine/verifier_\w+", "machine/verifier_NAME", name) for name in general}
    assert listed == general
