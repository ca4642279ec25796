"""The estimate of memory and time: by hand, and against measured peaks."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import random_model
from paths import ROOT

from luffy import ConfigError, make_config
from luffy.cli import main
from luffy.study.presets import read_values
from luffy.training.plan import SHAPES, Shape, plan, shape_of


def configuration(name, method="luffy"):
    return make_config(**{**read_values(name, method), "method": method})


def test_parameters_are_counted_exactly():
    assert SHAPES["Qwen2.5-Math-7B"].parameters == 7_615_616_512  # model cards
    assert SHAPES["Qwen2.5-Math-1.5B"].parameters == 1_543_714_304
    assert SHAPES["Llama-3.1-8B"].parameters == 8_030_261_248
    for architecture, tied in (("Qwen2", True), ("Qwen2", False), ("Llama", False)):
        model = random_model(architecture, tied)
        shape = Shape(32, 2, 4, 2, 48, 61, tied, 8, qkv_bias=architecture == "Qwen2")
        assert shape.parameters == model.num_parameters()
    assert shape_of("tiny").parameters == 449_664
    assert shape_of("Elliott/Qwen2.5-Math-7B-16k-think") == SHAPES["Qwen2.5-Math-7B"]


@pytest.mark.parametrize(
    ("name", "ranks"), [("paper", 8), ("paper_llama", 8), ("paper_7b_instruct", 8), ("four_gpus", 4), ("one_gpu", 1)]
)
def test_the_files_fit(name, ranks):
    made = plan(configuration(name), ranks=ranks)
    assert not made.problems and 0.3 < max(made.phases.values()) / made.capacity < 0.95


def test_parts_by_hand():
    """Qwen2.5-Math-7B, bfloat16 with float32 masters, ZeRO-2 on 8 GPUs: 2 P + 4 P/8 + 12 P/8."""
    made = plan(configuration("paper"), ranks=8)
    parameters = 7_615_616_512
    assert made.memory["weights"] == 2 * parameters
    assert made.memory["gradients"] == 4 * parameters // 8
    assert made.memory["optimiser"] == 12 * parameters // 8
    assert made.memory["logits"] == 2.5 * 4 * 2048 * 152_064 + 6 * 3584 * 152_064
    assert made.memory["sampler"] == int(0.5 * 80 * 2**30)
    # 1,024 completions of 2,211 tokens and a quarter of the prompt window, on 8 GPUs at 40% of 312 Tflop/s
    tokens = 1024 * (2211 + 256) / 8
    assert made.seconds["update"] == pytest.approx(8 * parameters * tokens / (0.4 * 312e12))
    twice = plan(configuration("paper").replace(num_iterations=2, beta=0.1), ranks=8)
    assert twice.seconds["update"] == pytest.approx(2 * made.seconds["update"])
    # seven of eight rows are the policy's own, of which the second of two mini-batches needs old log-probs
    assert twice.seconds["reference"] == pytest.approx(7 / 8 * 2 * parameters * tokens / (0.4 * 312e12))
    assert made.seconds["old log-probs"] == pytest.approx(twice.seconds["reference"] / 2)
    assert made.seconds["reference"] == 0
    prefixes = configuration("paper").replace(prefix_max=0.1, num_off_policy=7)
    assert plan(prefixes, ranks=8).seconds["sample"] > plan(configuration("paper"), ranks=8).seconds["sample"]
    offloaded = plan(configuration("paper").replace(offload_optimizer=True), ranks=8)
    assert offloaded.memory["optimiser"] == 0 and offloaded.host == 12 * parameters


@pytest.mark.parametrize(
    ("ranks", "values", "told"),
    [
        (1, {}, "set offload_optimizer, or use more GPUs"),
        (8, {"vllm_gpu_memory_utilization": 0.9}, "sampling takes .* lower vllm_gpu_memory"),
        (8, {"vllm_gpu_memory_utilization": 0.15}, "raise vllm_gpu_memory"),
        (8, {"micro_batch_tokens": 262_144}, "the update takes .* lower micro_batch_tokens"),
        (8, {"gradient_checkpointing": False}, "gradient_checkpointing"),
    ],
)
def test_impossible_plans_say_what_to_change(ranks, values, told):
    made = plan(configuration("paper").replace(**values), ranks=ranks)
    assert made.problems and any(re.search(told, problem) for problem in made.problems), made.problems


def test_impossible_questions():
    with pytest.raises(ConfigError, match="no GPU"):
        plan(configuration("paper"), gpu="b900")
    with pytest.raises(ConfigError, match="use engine deepspeed"):
        plan(configuration("one_gpu"), ranks=2)


def test_command_line(capsys):
    main(["plan", "paper", "--gpus", "8"])
    assert "7.62B parameters on 8 x a100" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="does not fit"):
        main(["plan", "paper", "--gpus", "1"])
    assert "IMPOSSIBLE: sampling takes" in capsys.readouterr().out


MEASURE = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from luffy import make_config
from luffy.model.packing import TokenSequence, pack
from luffy.model.logprobs import prepare
from luffy.training.engine import TorchEngine
from luffy.training.plan import Shape, plan

torch.set_num_threads(1)
shape = Shape(384, 6, 6, 3, 1024, 8000, True, 64)
settings = Qwen2Config(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3,
    intermediate_size=1024, vocab_size=8000, tie_word_embeddings=True)
config = make_config("sft", micro_batch_tokens=1388, logits_chunk_size=512, max_prompt_length=352,
    max_completion_length=148, rollout_batch_size=8, mini_batch_size=8)
# seven answers behind one prompt, of which attention has 2.5 times as many tokens
(batch,) = pack([TokenSequence([1] * 352, [2] * 148) for _ in range(7)], micro_batch_tokens=1388)

def update(engine):
    engine.backward(-engine.token_logprobs(batch)[0].mean())
    engine.step()

def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

tiny = Qwen2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    intermediate_size=8, vocab_size=16)
model = Qwen2ForCausalLM(tiny)
prepare(model)
update(TorchEngine(model, config, 1))  # whatever torch needs once
for checkpointing in (True, False):
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
    before = peak()
    model = Qwen2ForCausalLM(settings)
    prepare(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    chosen = config.replace(gradient_checkpointing=checkpointing)
    engine = TorchEngine(model, chosen, 1)
    update(engine)
    update(engine)
    made = plan(chosen, shape=shape)
    print((peak() - before) / (made.phases["updating"] - made.memory["reserve"]))
    del model, engine
"""


def test_estimate_of_an_update_against_the_measured_peak():
    """A 13M-parameter model, one micro-batch of 1,536 tokens in float32, with and without checkpointing, in a process
    whose C library gives every block back at once: its peak is then that of its tensors."""
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env={**os.environ, **exact})
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(ratio) for ratio in done.stdout.split()]
    assert len(ratios) == 2 and all(0.7 < ratio < 1.05 for ratio in ratios), ratios


def test_gpu_script_on_a_cpu():
    """tests/gpu/throughput.py at its smallest size: it runs, and its numbers are numbers."""
    pytest.importorskip("deepspeed")
    script = ROOT / "tests" / "gpu" / "throughput.py"
    flags = ["--size", "test", "--device", "cpu", "--updates", "1", "--micro-batches", "1"]
    flags += ["--engine", "deepspeed"]
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["device"] == "cpu" and result["tokens_per_s"] > 0 and result["peak_gib"] > 0
