"""The configuration: its methods, groups, checks, names, and the ways in which values reach it."""

import json

import pytest
import yaml
from paths import ROOT

from luffy import METHODS, Config, ConfigError, RunDirectory, make_config, shaping
from luffy.cli import main, parse_train
from luffy.config import GROUPS, RENAMED, field_names, from_dict, read_file
from luffy.methods import PAPER_METHODS
from luffy.training.engines import check_installed


def test_the_nine_methods_differ_as_the_paper_says():
    """Tables 1 and 4: demonstrations in the group, shaping of either ratio, clip, SFT loss."""
    table = {}
    for name in PAPER_METHODS:
        method = make_config(name).method
        shapes = method.ratios
        shape = getattr(shapes.off_shaping, "gamma", None), getattr(shapes.on_shaping, "gamma", None)
        table[name] = (method.traces_wanted(), *shape, shapes.clip, getattr(method, "sft_loss_coef", 0))
    clip = (0.2, 0.2)
    assert table == {
        "on_policy": (0, None, None, clip, 0),
        "on_policy_shaping": (0, None, 0.1, clip, 0),
        "on_policy_no_clip": (0, None, None, None, 0),
        "mixed": (1, None, None, clip, 0),
        "mixed_shaping": (1, 0.1, None, clip, 0),
        "luffy": (1, 0.1, None, None, 0),
        "sft": (1, None, None, None, 1),
        "rl_sft_loss": (1, None, None, None, 0.003),
        "sft_rl": (0, None, None, clip, 0),
    }
    assert [name for name in METHODS if name in PAPER_METHODS] == sorted(PAPER_METHODS, key=list(METHODS).index)
    assert not make_config("sft").method.samples and len(PAPER_METHODS) == 9


def test_sft_rl_has_two_stages_on_different_problems(tmp_path):
    run = RunDirectory(tmp_path)
    values = dict(first_stage_num_off_policy=2, num_traces=2, sft_learning_rate=0.01, first_stage_steps=7)
    config = make_config("sft_rl", **values)
    (first, first_dir), (last, last_dir) = run.stages(config)
    assert first.method.name == "sft" and last.method.name == "on_policy"
    assert (first.max_steps, first.method.num_off_policy, first.method.sft_learning_rate) == (7, 2, 0.01)
    assert (first.update.lr_scheduler_type, last.update.lr_scheduler_type) == ("linear", "constant")
    assert last.model == str(first_dir / "final") and last_dir == tmp_path
    assert (first.data.dataset_split, last.data.dataset_split) == ("train", "complement")
    assert len(run.stages(make_config("luffy"))) == 1


def test_shaping_takes_its_parameter():
    values = dict(gamma=0.3, shaping_weight=0.2, shaping_exponent=0.7)
    for name, expected in {
        "regularized": shaping.Regularized(0.3),
        "log": shaping.Log(0.2),
        "power": shaping.Power(0.7),
        "sqrt": shaping.Power(0.5),
    }.items():
        assert make_config("luffy", off_shaping=name, **values).method.ratios.off_shaping == expected
    own = make_config("luffy", on_shaping="regularized", on_gamma=0.4, **values).method.ratios
    assert own.on_shaping == shaping.Regularized(0.4) and own.off_shaping == shaping.Regularized(0.3)
    assert make_config("on_policy_shaping", gamma=0.3).method.ratios.on_shaping == shaping.Regularized(0.3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gama": 0.1}, "did you mean gamma"),
        ({"max_steps": 0}, "max_steps must be greater than 0, not 0"),
        ({"steps": 1.5}, "max_steps must be a valid integer"),
        ({"steps": True}, "max_steps must be a number, not True"),
        ({"learning_rate": "fast"}, "learning_rate must be a valid number"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"num_off_policy": 9}, "exceeds num_generations"),
        ({"mini_batch_size": 5}, "does not divide"),
        ({"off_shaping": "p_div_p"}, "off_shaping must be 'none', 'regularized'"),
        ({"on_shaping": "log"}, "on_shaping must be"),
        ({"epsilon_high": 0.3}, "epsilon_high without epsilon"),
        ({"epsilon": 1.0}, "epsilon must be less than 1"),
        ({"off_ratio_min": 0.5, "off_ratio_max": 0.1}, "exceeds off_ratio_max"),
        ({"num_off_policy": 8}, "leaves no rollout"),
        ({"prefix_min": 0.5, "prefix_max": 0.2}, "exceeds prefix_max"),
        ({"prefix_max": 1.5}, "prefix_max must be less than or equal to 1"),
        ({"precision": "bfloat16"}, "needs recompute_old_logp"),
        ({"sft_loss_coef": 0.1}, "method luffy has no sft_loss_coef, which .*sft"),
        ({"template_kwargs": "thinking"}, "template_kwargs must be a mapping"),
        ({"reward": "mine"}, "module:function"),
        ({"difficulties": 3}, "difficulties must be a valid tuple"),
        ({"difficulties": [1]}, "difficulties must be greater than or equal to 2"),
        ({"steps": float("inf")}, "max_steps must be"),
        ({"dataset_split": "trian"}, "splits"),
        ({"device": "gpu"}, "device is"),
        ({"eval_datasets": []}, "eval_datasets .*at least 1"),
        ({"num_off_policy": 2}, "exceeds num_traces 1"),
        ({"zero_stage": 0}, "zero_stage must be"),
        ({"engine": "deepspeed", "device": "cuda:1"}, "each rank has its own GPU"),
        ({"zero_stage": 4}, "zero_stage must be"),
        ({"vllm_importance_sampling_cap": 2.0}, "needs recompute_old_logp"),
        ({"vllm_servers": ["host:1"]}, "need sampler vllm"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization must be"),
        ({"method": 3}, "method must be the name of one"),
    ],
)
def test_impossible_configurations_are_one_clear_error(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"method": "luffy", **values})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adam_beta2", 1.0), ("verifier_timeout", 1e10), ("learning_rate", 1e300), ("reward", ":f"), ("reward", "..:f"),
        ("dataset", ""), ("model", " "), ("model", "a\0b"), ("eval_datasets", ("",)),
        ("template_kwargs", "[" * 100_000), ("template_kwargs", {"a": {1}}),
        ("template_kwargs", {"a": float("nan")}), ("difficulties", (10**9,)),
        ("num_threads", 10**400), ("device", "cuda:٣"), ("vllm_servers", ("localhost:abc",)),
        ("vllm_servers", ("localhost",)), ("vllm_servers", ("a:70000",)), ("vllm_servers", ("a:1", "http://a:1/")),
        ("template_kwargs", '{"a": NaN}'), ("vllm_servers", ("[::1]:9",)),
    ],
)  # fmt: skip
def test_a_value_that_would_fail_later_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} ") as error:
        make_config("luffy", **{name: value})
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_group_of_one_has_no_mean():
    for method in ("on_policy", "gspo", "sft_rl", "hpt"):
        with pytest.raises(ConfigError, match="num_generations 1"):
            make_config(method, num_generations=1)
    assert make_config("sft", num_generations=1) and make_config("opd", num_generations=1, teacher="tiny")


def test_impossible_schedules():
    for value in (10**400, 10**5000, {"start": 10**400, "end": 0, "steps": 5}, "[" * 100_000, 1e12):
        with pytest.raises(ConfigError, match=r"^mu must"):
            make_config("chord_mu", mu=value)
    with pytest.raises(ConfigError, match=r"^max_steps must .* a int too large to write"):  # not even in a message
        make_config("luffy", max_steps=10**5000)


def test_servers_may_be_named_in_several_ways():
    servers = ("localhost:8000", "http://10.0.0.1:80", "https://node-3.example:443/", "http://gateway:80/vllm")
    assert make_config("luffy", sampler="vllm", vllm_servers=servers).sampling.vllm_servers == servers


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_gives_the_new_one(name):
    with pytest.raises(ConfigError, match=f"{name} is called {RENAMED[name]} now"):
        make_config("luffy", **{name: 1})
    with pytest.raises(ConfigError, match=f"{name} is called {RENAMED[name]} now"):
        parse_train(["--run-dir", "x", f"--{name.replace('_', '-')}", "1"])


def test_a_choice_that_is_gone_says_why():
    with pytest.raises(ConfigError, match="no row_tokens any more: packed sequences go through attention one by one"):
        make_config("luffy", row_tokens=64)
    with pytest.raises(SystemExit, match="no attn_implementation any more"):
        main(["plan", "paper", "--attn-implementation", "sdpa"])


def test_a_field_of_another_method_is_refused_or_left_out_of_a_shared_file(tmp_path):
    with pytest.raises(ConfigError, match="method on_policy has no num_off_policy, which mixed, mixed_shaping, luffy"):
        make_config("on_policy", num_off_policy=2)
    (tmp_path / "c.yaml").write_text(
        "num_off_policy: 1\ngamma: 0.2\nsft_learning_rate: 1.0e-4\nlearning_rate: 1.0e-4\n"
    )
    flags = ["--config", str(tmp_path / "c.yaml"), "--run-dir", "x"]
    assert parse_train([*flags, "--method", "luffy"])[0].method.gamma == 0.2
    assert parse_train([*flags, "--method", "sft"])[0].method.sft_learning_rate == 1e-4
    assert parse_train([*flags, "--method", "on_policy"])[0].update.learning_rate == 1e-4
    (tmp_path / "c.yaml").write_text("gama: 0.2\n")
    with pytest.raises(ConfigError, match="no field 'gama'"):
        parse_train(flags)


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
    assert (config.update.learning_rate, config.world.difficulties) == (1e-4, (3, 4))
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"steps": 7, "gamma": 0.2}))
    assert read_file(tmp_path / "c.yaml") == {"steps": 7, "gamma": 0.2}
    for text in ("- 1", "a: [", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError):
            read_file(tmp_path / "bad.yaml")


def test_every_field_has_a_line_of_help():
    sources = [(ROOT / "luffy" / "config.py"), *(ROOT / "luffy" / "methods").rglob("*.py")]
    lines = [line for path in sources for line in path.read_text().splitlines()]
    for name in field_names():
        places = [i for i, text in enumerate(lines) if text.startswith(f"    {name}: ")]
        assert any(lines[i + 1].strip().startswith('"""') for i in places), name


def test_names_are_flat_and_owned_once():
    names = [name for group in GROUPS.values() for name in group.__dataclass_fields__]
    assert len(names) == len(set(names))
    for method in METHODS.values():
        assert not set(names) & {name for name in method.__dataclass_fields__ if name not in ("name", "label")}


def test_flags_over_file_over_method(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 7\ngamma: 0.2\nepsilon: 0.3\n")
    config, run_dir, launch = parse_train(
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
    method = config.method
    assert (method.name, config.max_steps, method.gamma, method.epsilon) == ("mixed", 7, 0.5, 0.3)
    assert config.world.difficulties == (3, 4) and str(run_dir) == "x" and launch.nproc == 1
    assert parse_train(["--method", "on_policy", "--epsilon", "None", "--run-dir", "x"])[0].method.ratios.clip is None


def test_bad_flags(capsys):
    for flags, message in (
        (["--gama", "0.5", "--run-dir", "x"], "--gama"),
        (["--gamma", "-1", "--run-dir", "x"], "gamma must be greater than 0, not -1.0"),
        (["--gamma", "0.5"], "--run-dir"),
        ([], "--run-dir"),
    ):
        with pytest.raises(SystemExit):
            parse_train(flags)
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(ConfigError, match="method on_policy has no num_off_policy"):
        parse_train(["--method", "on_policy", "--num-off-policy", "2", "--run-dir", "x"])
    with pytest.raises(ConfigError, match="needs engine deepspeed"):
        parse_train(["--nproc", "2", "--run-dir", "x"])


def test_a_configuration_keeps_what_another_method_shares():
    config = make_config("luffy", gamma=0.3, seed=5, learning_rate=1e-4)
    other = config.replace(method="on_policy")
    assert (other.method.name, other.seed, other.update.learning_rate) == ("on_policy", 5, 1e-4)
    sft = config.replace(method="sft")
    assert (sft.update.lr_scheduler_type, sft.update.learning_rate) == ("linear", 1e-4)
    assert config.replace(method="mixed_shaping").method.gamma == 0.1  # another method has its own parameters
    assert config.replace(gamma=0.2).method.gamma == 0.2 and config.replace(steps=3).max_steps == 3
    with pytest.raises(ConfigError, match="no method 'nonsense'"):
        Config().replace(method="nonsense")
    with pytest.raises(ConfigError, match="no field 'colour'"):
        Config(colour=3)


def test_variables_of_the_template_come_as_mapping_or_json(tmp_path):
    flags = ["--run-dir", "x", "--template-kwargs", '{"enable_thinking": false}']
    assert parse_train(flags)[0].data.template_kwargs == {"enable_thinking": False}
    (tmp_path / "c.yaml").write_text("\ufefftemplate_kwargs: {enable_thinking: false}\n", encoding="utf-8")
    config = parse_train(["--run-dir", "x", "--config", str(tmp_path / "c.yaml")])[0]
    assert config.data.template_kwargs == {"enable_thinking": False}
    assert from_dict(config.to_dict()) == config


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="sampler vllm needs the package vllm"):
        check_installed(make_config("luffy", sampler="vllm"))
    with pytest.raises(ConfigError, match="engine deepspeed needs the package deepspeed"):
        check_installed(make_config("luffy", engine="deepspeed"))
    with pytest.raises(ConfigError, match=r"report_to wandb needs the package wandb.* pip install wandb"):
        check_installed(make_config("luffy", report_to="wandb"))
