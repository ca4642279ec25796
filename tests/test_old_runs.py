"""Runs that were begun when a configuration was one flat class with every field of every method."""

import json
from pathlib import Path

import pytest
from helpers import assert_same_run, cut_short

from luffy import RunDirectory, RunError, experiments, resume, train

# As they were written then: luffy's in full, of the others what differs from it.
OLD = json.loads(Path(__file__).with_name("old_configs.json").read_text())


def old(method, **values):
    return {**OLD["luffy"], **OLD.get(method, {}), "method": method, **values}


def read(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return RunDirectory(folder).config()


def test_old_configurations_are_read(tmp_path):
    luffy = read(tmp_path, old("luffy", gamma=0.3, keep_checkpoints=5, lr_schedule="linear"))
    assert luffy.method.gamma == 0.3 and luffy.max_steps == 4 and luffy.save_total_limit == 5
    assert luffy.update.lr_scheduler_type == "linear" and luffy.sampling.num_generations == 4
    shaped = read(tmp_path, old("on_policy", on_shaping="regularized", gamma=0.2))
    assert shaped.method.gamma == 0.2 and shaped.method.epsilon == 0.2
    two = read(tmp_path, old("sft_rl"))
    assert two.method.first_stage_num_off_policy == 1 and two.method.sft_learning_rate == 1e-3
    assert [stage.method.name for stage, _ in RunDirectory(tmp_path).stages(two)] == ["sft", "on_policy"]
    assert read(tmp_path, old("mixed")).method.ratios.clip == (0.2, 0.2)


def test_old_configurations_that_lack_a_field_or_have_one_without_effect(tmp_path):
    few = {name: value for name, value in old("luffy").items() if name not in ("shaping_exponent", "template_kwargs")}
    assert read(tmp_path, few) == read(tmp_path, old("luffy"))
    assert read(tmp_path, old("sft", supervised=True, beta=0.1, num_off_policy=1, sft_loss_coef=1.0)).method.beta == 0
    assert read(tmp_path, old("rl_sft_loss", sft_loss_coef=0.0)).method.sft_loss_coef == 0


def test_a_directory_of_an_old_name_is_found(tmp_path):
    """An ablation that was begun then goes on in the directories that it has."""
    config = read(tmp_path, old("luffy"))
    there = tmp_path / "luffy-seed0-0123abcd"
    there.mkdir()
    read(there, old("luffy"))
    assert experiments.make_job(config, tmp_path).run_dir == there
    assert experiments.make_job(config.replace(gamma=0.2), tmp_path).run_dir != there


def test_what_can_no_longer_be_said_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"method luffy has no sft_loss_coef now, which is 0\.1 there"):
        read(tmp_path, old("luffy", sft_loss_coef=0.1))


@pytest.mark.parametrize("method", ["luffy", "sft_rl"])
def test_an_old_run_goes_on(method, tmp_path):
    then = read(tmp_path, old(method))
    run = train(then, tmp_path / "whole")
    cut = cut_short(run.path, tmp_path / "old", 4)
    (cut / "config.json").write_text(json.dumps(old(method)))
    assert RunDirectory(cut).config() == then and then.world.verbosity == 0  # which traces had no choice of then
    assert_same_run(resume(cut), run)
