"""Vetted values: of every method, and of every shipped configuration, each with its source.

A value that a published or paper-sized result depends on stands here once more, written down by hand. P4, PC1: the
paper (arXiv 2504.14945v5), Section 4 and App. C.1. R: the reference implementation, exp_scripts/*.sh. O: OpenRLHF's
flags, with which the reference trains SFT. Q: the pilot of README, "The embedded world". Ours: our own choice.
"""

import pytest

from luffy import ConfigError, RunDirectory, make_config
from luffy.methods import ARENA_METHODS, PAPER_METHODS
from luffy.study.experiments import preset_jobs
from luffy.study.presets import PRESETS, load_preset, read_values

CLIP = {"epsilon": 0.2, "epsilon_high": None}  # R: cliprange
NO_CLIP = {"epsilon": None, "epsilon_high": None}  # P4: "clipping is removed"
RL = {
    "scale_rewards": "none",
    "beta": 0.0,
    "entropy_coef": 1e-4,
    "mask_truncated_completions": False,
}  # P4 (Dr. GRPO), R
SHAPED = {"off_shaping": "regularized", "gamma": 0.1}  # P4, Eq. 6
TRACE = {"num_off_policy": 1, "trace_share": 1.0}  # P4: one of eight; R: sample_target_ratio
WHOLE = {"prefix_strategy": "random", "prefix_min": None, "prefix_max": 1.0, "prefix_shared": False}  # R
MIXED = {**RL, **TRACE, **WHOLE, "baseline": "union", "off_ratio": "pi"}  # Eq. 4; P4: pi_phi = 1
METHODS = {
    "on_policy": {**RL, **CLIP, "on_shaping": "none"},
    "on_policy_shaping": {**RL, **CLIP, "on_shaping": "regularized", "gamma": 0.1, "on_gamma": None},  # Table 4
    "on_policy_no_clip": {**RL, **NO_CLIP, "on_shaping": "none"},  # Table 4
    "mixed": {**MIXED, **CLIP, "off_shaping": "none"},  # Table 4
    "mixed_shaping": {**MIXED, **CLIP, **SHAPED},  # Table 4
    "luffy": {**MIXED, **NO_CLIP, **SHAPED},
    "sft": {"sft_loss_coef": 1.0, "entropy_coef": 0.0, "num_off_policy": 1, "sft_learning_rate": 2e-3},  # Q
    "rl_sft_loss": {**RL, **TRACE, **NO_CLIP, "sft_loss_coef": 0.003},  # R: loss_remove_clip; Q
    "sft_rl": {**RL, **CLIP, "first_stage_num_off_policy": 1, "sft_learning_rate": 1e-3, "first_stage_steps": 0,
               "complement": "tinyworld", "complement_split": "complement"},
}  # fmt: skip
SD = {"scale_rewards": "group"}  # GRPO: divided by the group's standard deviation
ARENA_METHODS_AT_500 = {  # as published, for 500 steps of 128 problems; numbers in comments are arXiv's, or ours
    "hpt": {**RL, **NO_CLIP, "gate": 0, "sft_loss_coef": 0.1},  # 2509.04419, train.sh; ours: 1.0 on sums over 8,192
    "superrl": {**SD, **CLIP, "gate": 0, "sft_loss_coef": 0.1},  # 2506.01096; HPT's coefficient
    "chord_mu": {**CLIP, "mu": {"start": 0.9, "end": 0.05, "steps": 200}, "beside": 2, "loss_type": "dapo",
                 "beta": 0.0},  # 2508.11408, mix_chord.yaml; ours: two of ten rows are a fifth
    "chord_phi": {**CLIP, "mu": 0.1, "beside": 2, "loss_type": "dapo", "beta": 0.0},  # the same
    "prefix_rft": {**RL, **CLIP, "prefix_low": {"start": 0.95, "end": 0.05, "steps": 500}, "prefix_high": 0.95,
                   "entropy_quantile": 0.8},  # 2507.01679, Section 3, A.2
    "uft": {**SD, **CLIP, "hint_pieces": 5, "hint_share": {"start": 0.95, "end": 0.05, "steps": 300}, "hint_steps": 300,
            "sft_loss_coef": 0.001, "beta": 0.001},  # 2505.16984, run.py
    "relift": {**RL, **NO_CLIP, "sft_queue": 128, "sft_loss_coef": 1.0},  # 2506.07527, train.sh
    "exgrpo": {**RL, **NO_CLIP, "replay_share": 0.5, "replay_start": 0.35, "replay_sigma": 1.0, "gamma": 0.1},
    # 2510.02245, run_exgrpo.sh
    "trapo": {**RL, **NO_CLIP, "alpha": 0.1, "first_share": 0.25, "second_share": 0.5},  # 2512.17636, train_trapo.sh
    "ampo": {**RL, **CLIP, "num_off_policy": 2, "gamma": 0.1},  # 2510.02227, train_ampo.sh
    "bread": {**SD, **CLIP, "episodes": 10, "success_min": 1 / 8, "success_max": 7 / 8},  # 2506.17211; bounds ours
    "pope": {**RL, **CLIP, "guided_share": 0.5, "prefix_share": 0.5},  # 2601.18779; shares ours
    "questa": {**RL, **CLIP, "guided_share": 1.0,
               "prefix_share": {"start": 0.5, "end": 0.25, "steps": 250, "shape": "step"}},  # 2507.13266; step ours
    "srft": {**RL, **NO_CLIP, **TRACE, "sft_weight": 0.03, "right_weight": 0.1},  # 2506.19767; ours: 0.5 on sums
    "rl_plus": {**RL, **NO_CLIP, **TRACE, "focus": 0.5},  # 2508.00222, train_RL-PLUS.sh
    "dft": {"sft_loss_coef": 1.0, "num_off_policy": 1, "entropy_coef": 0.0, "sft_learning_rate": 2e-3},  # 2508.05629; Q
    "psft": {"epsilon": 0.2, "epsilon_high": 0.28, "num_off_policy": 1, "entropy_coef": 0.0,
             "loss_type": "dapo"},  # 2508.17784, run_psft.sh
    "dapo": {**SD, "epsilon": 0.2, "epsilon_high": 0.28, "max_resamples": 10, "loss_type": "dapo"},  # 2503.14476; verl
    "gspo": {**SD, "epsilon": 3e-4, "epsilon_high": 4e-4, "loss_type": "grpo"},  # 2507.18071
    "cispo": {**SD, "epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"},  # 2506.13585; DAPO's bounds
    "maxrl": {**CLIP, "scale_rewards": "mean"},  # 2602.02710
    "opd": {**NO_CLIP, "teacher_coef": 1.0, "reward_coef": 0.0, "beta": 0.0},  # Thinking Machines, train_on_policy.py
}  # fmt: skip
PAPER = {
    "rollout_batch_size": 128, "mini_batch_size": 64, "num_generations": 8, "temperature": 1.0,  # P4
    "max_prompt_length": 1024, "max_completion_length": 8192,  # R
    "learning_rate": 1e-6, "lr_scheduler_type": "constant", "weight_decay": 0.01, "adam_beta2": 0.999,  # R
    "max_steps": 500, "beta": 0.0, "eval_temperature": 0.6, "num_iterations": 1, "loss_type": "dr_grpo",  # P4, PC1
    "max_grad_norm": 1 / 64,  # R: 1.0, on a gradient 64 times ours
    "entropy_coef": 8.4e-5,  # R: 0.001 for each of 5.4 micro-batches of 64 sequences
    "dataset": "Elliott/Openr1-Math-46k-8192", "model": "Elliott/Qwen2.5-Math-7B-16k-think",  # R
    "template": "paper", "think_format": True, "precision": "bfloat16", "recompute_old_logp": True,  # PC1, R
}  # fmt: skip
QUARTER = {"rollout_batch_size": 32, "mini_batch_size": 16, "max_completion_length": 4096, "engine": "torch"}  # ours
CONFIGURATIONS = {
    "paper": PAPER,
    "paper_plus": {**PAPER, "max_steps": 860},  # P4: LUFFY with a dagger
    "paper_1.5b": {**PAPER, "model": "models/Qwen2.5-Math-1.5B-16k-think"},  # Table 3
    "paper_7b_instruct": {**PAPER, "model": "Qwen/Qwen2.5-7B-Instruct"},  # Table 3
    "paper_llama": {**PAPER, "model": "meta-llama/Llama-3.1-8B", "template": "llama", "think_format": False,
                    "dataset": "data/easy/train.parquet"},  # R: reward 4; Figure 4
    "four_gpus": {**PAPER, "zero_stage": 3, "vllm_gpu_memory_utilization": 0.45},  # ours
    "one_gpu": {**PAPER, **QUARTER, "model": "models/Qwen2.5-Math-1.5B-16k-think", "lora_r": 32,
                "learning_rate": 1e-5},  # ours; L: ten times the rate
    "32b_8gpu": {**PAPER, "model": "Qwen/Qwen2.5-32B", "zero_stage": 3, "vllm_tensor_parallel_size": 4},  # ours
    "70b_multinode": {**PAPER, "model": "meta-llama/Llama-3.1-70B", "template": "llama", "think_format": False,
                      "dataset": "data/easy/train.parquet", "vllm_tensor_parallel_size": 8},  # ours
    "smollm": {"model": "smollm", "dataset": "school", "rollout_batch_size": 4, "num_generations": 8, "max_steps": 40,
               "temperature": 0.7, "max_completion_length": 64, "learning_rate": 2e-5, "max_grad_norm": 1 / 64},  # ours
}  # fmt: skip
PAPER_SFT = {
    "max_steps": 1071,
    "warmup_steps": 214,
    "sft_learning_rate": 5e-5,
    "entropy_coef": 0.0,
    "max_grad_norm": 1.0,
}
SUPERVISED = {  # O: three epochs in batches of 64, warm-up of a tenth, learning rate 5e-5
    "paper": PAPER_SFT,
    "paper_plus": PAPER_SFT,
    "paper_1.5b": PAPER_SFT,
    "paper_7b_instruct": PAPER_SFT,
    "paper_llama": {**PAPER_SFT, "max_steps": 171, "warmup_steps": 34},
    "four_gpus": PAPER_SFT,
    "one_gpu": {**PAPER_SFT, "max_steps": 4284, "warmup_steps": 856, "sft_learning_rate": 5e-4},
    "32b_8gpu": PAPER_SFT,
    "70b_multinode": {**PAPER_SFT, "max_steps": 171, "warmup_steps": 34},
    "smollm": {"max_steps": 40, "warmup_steps": 0, "sft_learning_rate": 5e-5, "max_grad_norm": 1.0},
}
WORLD = {  # Q, fixed before the published seeds were run
    "max_steps": 160, "num_problems": 1000, "difficulties": [3, 4, 5, 6, 7], "verbosity": 0.3, "rollout_batch_size": 16,
    "mini_batch_size": 8, "num_generations": 8, "temperature": 1.0, "entropy_coef": 1e-4, "learning_rate": 1.5e-4,
    "warmup_steps": 5, "weight_decay": 0.01, "max_grad_norm": 1 / 64, "max_completion_length": 128,
    "model": "tiny:own_share=0.4", "think_format": True, "boxed_format": True, "eval_steps": 20, "eval_problems": 400,
    "eval_temperature": 0.6, "final_eval_problems": 200, "final_eval_samples": 8, "final_eval_temperatures": [0.1],
}  # fmt: skip
TEN, FIVE = list(range(10)), list(range(5))
ARENA = {
    **WORLD,
    "learning_rate": 3e-4,
}  # Q: of HPT, the first; tests/test_paper_figures.py compares all with the trials
ABLATIONS = {  # values and seeds
    "world": (WORLD, None),
    "full": (WORLD, TEN),
    "more_seeds": ({**WORLD, "model": "tiny:own_share=0.4,seed=1"}, list(range(10, 24))),
    "map": ({**WORLD, "model": "tiny:own_share=0"}, [0, 1, 2]),
    "hard": ({**WORLD, "difficulties": [6, 7]}, FIVE),  # Figure 4
    "easy": ({**WORLD, "difficulties": [3, 4]}, FIVE),  # Figure 4
    "gamma": ({**WORLD, "gamma": 0.05}, list(range(12))),
    "plus": ({**WORLD, "max_steps": 275, "eval_steps": 25}, FIVE),  # P4: LUFFY with a dagger, 860 steps instead of 500
    "sensitivity": ({**WORLD, "trace_errors": 0.3}, [0]),
    "default": ({**WORLD, "max_steps": 100, "eval_steps": 10, "eval_problems": 60, "final_eval_samples": 4}, [0]),
    "smoke": ({"max_steps": 3, "rollout_batch_size": 4, "mini_batch_size": 2}, [0]),
    "pilot_stability": ({**WORLD, "model": "tiny:own_share=0.4,seed=3", "eval_problems": 100, "final_eval_problems": 0,
                         "max_grad_norm": 1.0, "learning_rate": 3e-4}, [101, 102]),
    "tuning": ({**WORLD, "model": "tiny:own_share=0.4,seed=3", "eval_problems": 100, "final_eval_problems": 0,
                "learning_rate": 3e-4}, [101]),
    "arena": (ARENA, None),
    "arena_corner": ({**ARENA, "model": "tiny:own_share=0"}, None),
    "arena_strong": ({**ARENA, "model": "tiny:own_share=0.8"}, None),
    "arena_tuning": ({**WORLD, "model": "tiny:own_share=0.4,seed=3", "eval_problems": 100, "final_eval_problems": 0},
                     [101]),
}  # fmt: skip
SCALED = {  # A: the authors' steps times 160 / 500, problems times 16 / 128
    "chord_mu": {"mu": {"start": 0.9, "end": 0.05, "steps": 64}},
    "prefix_rft": {"prefix_low": {"start": 0.95, "end": 0.05, "steps": 160}},
    "uft": {"hint_share": {"start": 0.95, "end": 0.05, "steps": 96}, "hint_steps": 96},
    "questa": {"prefix_share": {"start": 0.5, "end": 0.25, "steps": 80, "shape": "step"}},
    "relift": {"sft_queue": 16},
    "dft": {"max_grad_norm": 1.0},
    "psft": {"max_grad_norm": 1.0, "mini_batch_size": 2, "loss_type": "dapo"},
    "chord_phi": {"mu": 0.1, "beside": 2, "loss_type": "dapo"},
    "hpt": {"gate": 0, "sft_loss_coef": 0.1},
}


TUNED = {  # Q: the trials of the preset `tuning`
    "luffy": {"learning_rate": 1.5e-4},
    "sft": {"sft_learning_rate": 2e-3},
    "rl_sft_loss": {"learning_rate": 3e-4, "sft_loss_coef": 0.003},
    "sft_rl": {"learning_rate": 3e-4, "sft_learning_rate": 2e-3},
}


def configuration(name, method="luffy"):
    return make_config(**{**read_values(name, method), "method": method})


def shown(config, expected):
    values = config.to_dict()
    return {name: values[name] for name in expected}


@pytest.mark.parametrize("method", METHODS)
def test_methods(method):
    config = make_config(method)
    assert shown(config, METHODS[method]) == METHODS[method]
    schedule = {"lr_scheduler_type": "constant", "max_grad_norm": 1 / 64}  # P4; R: 1.0, on a gradient 64 times ours
    linear = {"lr_scheduler_type": "linear", "max_grad_norm": 1.0}  # O; ours
    assert shown(config, schedule) == (linear if method == "sft" else schedule)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name):
    assert shown(configuration(name), CONFIGURATIONS[name]) == CONFIGURATIONS[name]
    assert shown(configuration(name, "sft"), SUPERVISED[name]) == SUPERVISED[name]
    if name not in ("paper_plus", "smollm"):
        # R: 1.0, for rows of which 56 are counted
        assert configuration(name, "rl_sft_loss").method.sft_loss_coef == pytest.approx(5.4 / 56, rel=0.01)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations(name):
    """The first run of LUFFY in each, or of all; the seeds; and no published run has a seed or a base model of the
    pilots."""
    values, seeds = ABLATIONS[name]
    preset = load_preset(name)
    jobs = preset_jobs(preset, "runs")
    first = next((job.config for job in jobs if job.config.method.name == "luffy"), jobs[0].config)
    assert shown(first, values) == values
    assert preset.get("seeds") == seeds
    if name not in ("pilot_stability", "tuning", "arena_tuning"):
        assert all(job.config.seed < 100 and "seed=3" not in job.config.model for job in jobs)


def test_each_method_in_the_published_set():
    """What is a method's own, tuned (Q) or on another scale."""
    jobs = {job.config.method.name: job.config for job in preset_jobs({**load_preset("full"), "seeds": [0]}, "runs")}
    assert jobs["sft"].update.max_grad_norm == 1.0  # its loss is a mean over tokens
    assert {name: shown(jobs[name], values) for name, values in TUNED.items()} == TUNED


def test_seeds_that_were_added():
    """What PILOTS.md says, fixed before they were trained."""
    seeds: dict[str, set[int]] = {}
    for name in ("full", "more_seeds", "map"):
        for job in preset_jobs(load_preset(name), "runs"):
            base = job.config.model.split(",")[0]
            seeds.setdefault(f"{name.replace('more_seeds', 'full')} {job.config.method.name} {base}", set()).add(
                job.config.seed
            )
    for key, found in seeds.items():
        if key.startswith("full"):
            count = 24 if key.split()[1] in ("luffy", "on_policy") else 10
        else:
            count = 5 if key.endswith(("own_share=0", "own_share=0.8")) else 3
        assert found == set(range(count)), key


@pytest.mark.parametrize("method", ARENA_METHODS_AT_500)
def test_methods_of_the_arena(method):
    config = make_config(method, **({"teacher": "tiny"} if method == "opd" else {}))
    assert shown(config, ARENA_METHODS_AT_500[method]) == ARENA_METHODS_AT_500[method]


def test_every_file_and_method_is_in_the_tables():
    files = set(PRESETS)
    assert files == {*CONFIGURATIONS, *(f"ablation_{name}" for name in ABLATIONS)}
    assert set(METHODS) == set(PAPER_METHODS) and set(ARENA_METHODS_AT_500) == set(ARENA_METHODS)


def test_each_method_in_the_arena():
    jobs = {job.config.method.name: job.config for job in preset_jobs(load_preset("arena"), "runs")}
    assert set(jobs) == set(ARENA_METHODS) - {"opd"}
    assert {name: shown(jobs[name], values) for name, values in SCALED.items()} == SCALED


@pytest.mark.parametrize("method", PAPER_METHODS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_file_is_a_configuration_of_every_method(name, method):
    config = configuration(name, method)
    laptop = name == "smollm"
    assert config.method.name == method
    assert config.engine.precision == ("float32" if laptop else "bfloat16")
    assert config.sampling.sampler == ("transformers" if laptop else "vllm")


def test_stages_of_the_paper(tmp_path):
    (first, _), (last, _) = RunDirectory(tmp_path).stages(configuration("paper", "sft_rl"))
    assert first.method.name == "sft" and first.max_steps == 1071 and first.method.sft_learning_rate == 5e-5
    assert first.update.warmup_steps == 214 and last.update.warmup_steps == 0
    assert first.update.max_grad_norm == 1.0 and last.data.dataset == "Elliott/Openr1-Math-48k-Complement"


def test_epochs_of_supervised_training():
    for name, problems in (("paper", 45_714), ("paper_llama", 7_300), ("one_gpu", 45_714)):  # three epochs of each set
        sft = configuration(name, "sft")
        assert sft.max_steps * sft.sampling.rollout_batch_size == pytest.approx(3 * problems, rel=0.01)
        assert sft.update.warmup_steps == pytest.approx(0.1 * sft.max_steps * 2, abs=1)


def test_files_of_ones_own(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: paper\nsteps: 7\nmethods: {sft: {steps: 9}}\n")
    assert configuration(mine).max_steps == 7 and configuration(mine, "sft").max_steps == 9
    assert configuration(mine).update.learning_rate == 1e-6
    mine.write_text("base: nowhere\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml, base: cannot read the configuration nowhere"):
        configuration(mine)
    mine.write_text("steps: [1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*") as error:
        configuration(mine)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="a preset of many runs"):
        configuration("ablation_smoke")
    mine.write_text("methods: {lufy: {steps: 9}}\n")
    with pytest.raises(ConfigError, match="no method 'lufy'"):
        configuration(mine)
