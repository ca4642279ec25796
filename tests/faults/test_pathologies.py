"""What a training does where something is always the same, nothing fits, or numbers run away: defined in each case."""

import json
import sys

import pytest

from luffy import make_config, train
from luffy.errors import ConfigError, DataError, NonFiniteError
from luffy.model.loading import load_model, load_tokenizer
from luffy.runs import RunDirectory
from luffy.training.engine import TorchEngine
from luffy.training.trainer import Trainer

REWARDS = """
def never(prompts, completions, **columns):
    return [0.0] * len(completions)


def always(prompts, completions, **columns):
    return [1.0] * len(completions)


def nothing(prompts, completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture
def values(short_run, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rewards_of_mine", raising=False)
    return {**short_run, "steps": 2}


@pytest.mark.parametrize("name", ["never", "always", "nothing"])
@pytest.mark.parametrize("method", ["luffy", "on_policy"])
def test_a_reward_that_is_always_the_same(values, tmp_path, method, name):
    """No advantage, and a gradient of the entropy bonus alone."""
    run = train(make_config(method, **values, reward=f"rewards_of_mine:{name}", entropy_coef=0.0), tmp_path / "run")
    rows = run.metrics()[1:]
    assert all(row["advantage/max"] == row["advantage/min"] == 0 for row in rows)
    assert all(row["grad_norm"] == 0 for row in rows)


def test_a_group_of_only_traces_is_refused(values):
    with pytest.raises(ConfigError, match="num_off_policy = num_generations = 4 leaves no rollout: use sft"):
        make_config("luffy", **values, num_off_policy=4, num_traces=4)


def test_traces_that_are_all_too_long(values, tmp_path):
    """Cut, they have no end, are not right, and count as truncated; dropped, there is nothing to learn from."""
    values = {**values, "max_completion_length": 8}
    run = train(make_config("luffy", **values), tmp_path / "run")
    assert all(row["reward/off"] == 0 and row["truncated/off"] == 1 for row in run.metrics()[1:])
    with pytest.raises(DataError, match="no trace of tinyworld fits max_completion_length 8"):
        train(make_config("luffy", **values, long_traces="drop"), tmp_path / "dropped")


def changed(folder, rows=0, ends=None):
    """The embedded model with rows of the vocabulary that no token has, or with other tokens that end an answer."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    if rows:
        model.resize_token_embeddings(len(tokenizer) + rows)
    if ends:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_window_of_one_token(values, tmp_path):
    """Every rollout is one token, right nowhere; training goes on."""
    run = train(make_config("on_policy", **{**values, "max_completion_length": 1}), tmp_path / "run")
    assert all(row["length/on"] == 1 and row["reward/on"] == 0 for row in run.metrics()[1:])


def test_a_model_that_ends_at_once(values, tmp_path):
    """Every token ends an answer: rollouts of one token, without a text, none of them cut."""
    model = changed(tmp_path / "brief", ends=list(range(len(load_tokenizer("tiny")))))
    run = train(make_config("on_policy", **values, model=model), tmp_path / "run")
    rows = run.metrics()[1:]
    assert all(row["length/on"] == 1 and row["reward/on"] == row["truncated/on"] == 0 for row in rows)
    samples = json.loads((run.path / "samples" / "step-000002.json").read_text())
    assert {sample["completion"] for sample in samples} == {""}


def test_a_vocabulary_that_is_larger_than_the_tokenizer(values, tmp_path):
    """Models have such rows for alignment: they are sampled at most by chance, and decode to nothing."""
    model = changed(tmp_path / "padded", rows=37)
    run = train(make_config("luffy", **values, model=model), tmp_path / "run")
    assert run.is_complete and all(row["sampler_gap/max"] < 1e-3 for row in run.metrics()[1:])


def test_a_learning_rate_that_diverges(values, tmp_path):
    """Ends in one error that names step and phase, with the batch saved, or in finite numbers."""
    config = make_config("luffy", **{**values, "steps": 4}, learning_rate=1e6, warmup_steps=0, max_grad_norm=1e9)
    try:
        run = train(config, tmp_path / "run")
    except NonFiniteError as error:
        assert "step" in str(error) and list((tmp_path / "run").glob("failed-step-*.pt"))
    else:
        numbers = json.dumps(run.metrics())
        assert "NaN" not in numbers and "Infinity" not in numbers


def test_weights_that_are_not_finite_are_not_saved(values, tmp_path, monkeypatch):
    """A finite gradient and a step that overflows all the same: one error, and the checkpoint before it stays."""
    config = make_config("luffy", **{**values, "steps": 4, "save_steps": 1, "eval_steps": 0})
    step, taken = TorchEngine.step, []

    def overflowing(self):
        taken.append(1)
        numbers = step(self)
        if len(taken) == 4:  # two a step
            next(iter(self.model.parameters())).data[0, 0] = float("inf")
        return numbers

    monkeypatch.setattr(TorchEngine, "step", overflowing)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(NonFiniteError, match=r"the weight \S+ is not finite any more"):
        train(config, run.path)
    assert run.latest_checkpoint()[0] == 1
    monkeypatch.undo()
    assert train(config, run.path).is_complete


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number(values, tmp_path, monkeypatch, where):
    """The step fails before a weight is changed, and the last checkpoint is whole."""
    config = make_config("luffy", **{**values, "steps": 4, "save_steps": 2})
    run = RunDirectory(tmp_path / "run")
    steps = []
    update = Trainer.update

    def poisoned(self, part, *, fresh=True):
        steps.append(1)
        if len(steps) == 5 and where == "gradient":
            next(self.model.parameters()).register_hook(lambda grad: grad * float("nan"))
        if len(steps) == 5 and where == "loss":
            part.scale = part.scale * float("nan")
        return update(self, part, fresh=fresh)

    monkeypatch.setattr(Trainer, "update", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 3, update: the (loss|gradient)"):
        train(config, run.path)
    assert run.latest_checkpoint()[0] == 2 and len(list(run.path.glob("failed-step-000003*.pt"))) == 1
    monkeypatch.undo()
    again = train(config, run.path)
    assert again.is_complete and again.metrics() and all(row["grad_norm"] < 1e6 for row in again.metrics()[1:])
