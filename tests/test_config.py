import json

import pytest
import yaml

from luffy import METHODS, Config, ConfigError, make_config, shaping
from luffy.assembly import check_installed
from luffy.cli import parse_train
from luffy.config import FIELD_TYPES, from_dict, read_file
from luffy.methods import stages


def test_the_nine_methods_differ_as_the_paper_says():
    """Tables 1 and 4: demonstrations in the group, shaping of either ratio, clip, SFT loss, baseline."""
    table = {
        name: (
            c.num_generations,
            c.num_off_policy,
            c.off_policy_loss and c.num_off_policy > 0,
            c.off_shaping,
            c.on_shaping,
            c.clip,
            c.sft_loss_coef,
            c.baseline,
        )
        for name in METHODS
        for c in [make_config(name)]
    }
    clip = (0.2, 0.2)
    assert table["on_policy"] == (8, 0, False, "regularized", "none", clip, 0, "union")
    assert table["on_policy_shaping"] == (8, 0, False, "regularized", "regularized", clip, 0, "union")
    assert table["on_policy_no_clip"] == (8, 0, False, "regularized", "none", None, 0, "union")
    assert table["mixed"] == (8, 1, True, "none", "none", clip, 0, "union")
    assert table["mixed_shaping"] == (8, 1, True, "regularized", "none", clip, 0, "union")
    assert table["luffy"] == (8, 1, True, "regularized", "none", None, 0, "union")
    assert make_config("sft").supervised and table["sft"][1:3] == (1, False) and table["sft"][6] == 1
    assert table["rl_sft_loss"] == (8, 1, False, "regularized", "none", None, 0.03, "on_policy")
    assert table["sft_rl"] == table["on_policy"]
    assert len(METHODS) == 9


def test_sft_rl_has_two_stages_on_different_problems(tmp_path):
    first, last = stages(make_config("sft_rl"), tmp_path)
    assert first[0].supervised and not last[0].supervised
    assert last[0].model == str(first[1] / "final") and last[1] == tmp_path
    assert (first[0].dataset_split, last[0].dataset_split) == ("train", "complement")
    assert len(stages(make_config("luffy"), tmp_path)) == 1


def test_shaping_takes_its_parameter():
    config = make_config("luffy", gamma=0.3, shaping_weight=0.2, shaping_exponent=0.7)
    assert config.shaping("regularized") == shaping.Regularized(0.3)
    assert config.shaping("log") == shaping.Log(0.2)
    assert config.shaping("power") == shaping.Power(0.7)
    assert config.shaping("sqrt") == shaping.Power(0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gama": 0.1}, "did you mean gamma"),
        ({"steps": 0}, "steps must be positive"),
        ({"steps": 1.5}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"learning_rate": "fast"}, "learning_rate must be float"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"num_off_policy": 9}, "exceeds num_generations"),
        ({"mini_batch_size": 5}, "does not divide"),
        ({"off_shaping": "p_div_p"}, "off_shaping is one of"),
        ({"on_shaping": "log"}, "on_shaping is one of"),
        ({"epsilon_high": 0.3}, "epsilon_high without epsilon"),
        ({"epsilon": 1.0}, "below 1"),
        ({"off_ratio_min": 0.5, "off_ratio_max": 0.1}, "exceeds off_ratio_max"),
        ({"num_off_policy": 8}, "leaves no rollout"),
        ({"precision": "bfloat16"}, "needs recompute_old_logp"),
        ({"supervised": True}, "contradicts method luffy"),
        ({"template_kwargs": "thinking"}, "template_kwargs must be a mapping"),
        ({"reward": "mine"}, "module:function"),
        ({"difficulties": 3}, "must be a list"),
        ({"difficulties": [1]}, "2 or more"),
        ({"steps": float("inf")}, "steps must be int"),
        ({"dataset_split": "trian"}, "splits"),
        ({"device": "gpu"}, "device is"),
        ({"eval_datasets": []}, "must not be empty"),
        ({"num_off_policy": 2}, "exceeds num_traces 1"),
        ({"zero_stage": 0}, "zero_stage must be positive"),
        ({"engine": "deepspeed", "device": "cuda:1"}, "each rank has its own GPU"),
        ({"zero_stage": 4}, "zero_stage is 1, 2 or 3"),
        ({"importance_sampling_cap": 2.0}, "needs recompute_old_logp"),
        ({"vllm_servers": ["host:1"]}, "need sampler vllm"),
        ({"vllm_gpu_memory": 1.5}, "is a share"),
        ({"attention": "flex_attention"}, "needs sampler vllm"),
        ({"attention": "flash_attention_2", "sampler": "vllm"}, "needs precision bfloat16"),
    ],
)
def test_impossible_configurations_are_one_clear_error(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config("luffy", **values)


def test_a_value_that_makes_it_another_method_is_refused():
    with pytest.raises(ConfigError, match="contradicts method on_policy"):
        make_config("on_policy", num_off_policy=2)
    with pytest.raises(ConfigError, match="contradicts method sft"):
        make_config("sft", supervised=False)


def test_sft_rl_wants_other_problems_for_its_second_stage():
    with pytest.raises(ConfigError, match="needs a complement"):
        make_config("sft_rl", dataset="mine.parquet")
    with pytest.raises(ConfigError, match="must be other problems"):
        make_config("sft_rl", dataset="mine.parquet", complement="mine.parquet", complement_split="train")


def test_unknown_method():
    with pytest.raises(ConfigError, match="no method 'lufy'"):
        make_config("lufy")


def test_round_trip_and_loose_numbers(tmp_path):
    config = make_config("mixed", learning_rate="1e-4", temperature=1, difficulties=[3, 4])
    assert (config.learning_rate, config.difficulties) == (1e-4, (3, 4))
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"steps": 7, "gamma": 0.2}))
    assert read_file(tmp_path / "c.yaml") == {"steps": 7, "gamma": 0.2}
    for text in ("- 1", "a: [", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError):
            read_file(tmp_path / "bad.yaml")


def test_every_field_has_a_line_of_help():
    import inspect

    source = inspect.getsource(Config)
    for name in FIELD_TYPES:
        line = next(i for i, text in enumerate(source.splitlines()) if text.startswith(f"    {name}: "))
        assert source.splitlines()[line + 1].strip().startswith('"""'), name


def test_flags_over_file_over_method(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 7\ngamma: 0.2\nepsilon: 0.3\n")
    config, run_dir, nproc = parse_train(
        [
            "--method",
            "mixed",
            "--config",
            str(tmp_path / "c.yaml"),
            "--run-dir",
            "x",
            "--gamma",
            "0.5",
            "--difficulties",
            "3",
            "4",
        ]
    )
    assert (config.method, config.steps, config.gamma, config.epsilon, config.off_shaping) == (
        "mixed",
        7,
        0.5,
        0.3,
        "none",
    )
    assert config.difficulties == (3, 4) and str(run_dir) == "x" and nproc == 1
    assert parse_train(["--method", "on_policy", "--epsilon", "None", "--run-dir", "x"])[0].clip is None


def test_bad_flags(capsys):
    with pytest.raises(SystemExit):
        parse_train(["--gama", "0.5", "--run-dir", "x"])
    with pytest.raises(SystemExit):
        parse_train(["--method", "on_policy", "--num-off-policy", "2", "--num-traces", "2", "--run-dir", "x"])
    assert "contradicts method on_policy" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="--run-dir"):
        parse_train(["--gamma", "0.5"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "sft"}, "contradicts method sft, which is supervised=True"),
        ({"method": "luffy", "off_policy_loss": False}, "contradicts method luffy"),
        ({"method": "nonsense"}, "no method 'nonsense'"),
        ({"method": "sft", "supervised": True, "off_policy_loss": False}, "supervised training needs"),
    ],
)
def test_a_configuration_cannot_be_labelled_as_another_method(values, message):
    with pytest.raises(ConfigError, match=message):
        Config(**values)
    with pytest.raises(ConfigError, match=message):
        Config().replace(**values)


def test_variables_of_the_template_come_as_mapping_or_json(tmp_path):
    flags = ["--run-dir", "x", "--template-kwargs", '{"enable_thinking": false}']
    assert parse_train(flags)[0].template_kwargs == {"enable_thinking": False}
    (tmp_path / "c.yaml").write_text("\ufefftemplate_kwargs: {enable_thinking: false}\n", encoding="utf-8")
    config = parse_train(["--run-dir", "x", "--config", str(tmp_path / "c.yaml")])[0]
    assert config.template_kwargs == {"enable_thinking": False}
    assert from_dict(config.to_dict()) == config


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="sampler vllm needs the package vllm"):
        check_installed(make_config("luffy", sampler="vllm"))
    with pytest.raises(ConfigError, match="engine deepspeed needs the package deepspeed"):
        check_installed(make_config("luffy", engine="deepspeed"))
