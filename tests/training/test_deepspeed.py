"""DeepSpeed on CPUs with gloo, in one and two real processes: the numbers of the torch engine, and exact resumption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import cut_short, differences, weights
from safetensors.torch import load_file

from luffy import make_config, train
from luffy.runs import RunDirectory

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")

WORKER = Path(__file__).with_name("ranks_worker.py")
SMALL = dict(
    steps=5, rollout_batch_size=4, mini_batch_size=2, num_generations=4, max_completion_length=48, num_problems=40,
    eval_steps=0, final_eval_problems=0, final_eval_samples=2, micro_batch_tokens=256, save_steps=4, warmup_steps=0,
    device="cpu",
)  # fmt: skip
PREFIX = dict(
    prefix_strategy="random", prefix_min=0.3, prefix_max=0.8, num_off_policy=2, trace_share=0.8, loss_type="dapo",
    num_iterations=2, beta=0.01,
)  # fmt: skip
# In five steps of Adam at these learning rates a weight moves up to 1e-3 or more; where its gradient is near zero, the
# order of summation decides the direction of a part of that.
SAME_WEIGHT = 5e-5
LORA = dict(lora_r=4, beta=0.01)
# Methods with a memory, rows beside the groups, gates, old log-probs of demonstrations, problems drawn again, ratios of
# rows, shared beginnings with a reference model, a search, a teacher.
ARENA: dict[str, tuple[int, dict]] = {
    "relift": (2, dict(sft_queue=3)), "exgrpo": (2, dict(replay_start=0.01)), "chord_phi": (3, {}), "trapo": (2, {}),
    "prefix_rft": (3, {}), "psft": (2, dict(rollout_batch_size=8)), "dapo": (2, {}), "srft": (3, {}), "gspo": (2, {}),
    "uft": (3, {}), "bread": (2, {}), "rl_plus": (3, {}), "chord_mu": (2, {}), "cispo": (3, {}),
    "opd": (2, dict(teacher="tiny:own_share=0.8")),
}  # fmt: skip
ALONE = dict(rollout_batch_size=2, mini_batch_size=1, logits_chunk_size=16)
STAGES = [(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
CASES = [(1, *stage) for stage in STAGES[:3]] + [(2, *stage) for stage in STAGES]


def launch(ranks, jobs, folder):
    """Trains the jobs, each (run directory, method, fields), in so many ranks; a single one is this process."""
    if ranks == 1:
        for path, method, values in jobs:
            train(make_config(method, **values) if method else RunDirectory(path).config(), path)
        return
    listed = folder / f"jobs-{ranks}-{len(list(folder.iterdir()))}.json"
    listed.write_text(json.dumps([[str(path), method, values] for path, method, values in jobs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(WORKER), str(listed)], capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def deepspeed(stage, offload, **values):
    return {**SMALL, "engine": "deepspeed", "zero_stage": stage, "offload_optimizer": offload, **values}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every stage in one and two ranks, two ranks with other micro-batches, and supervised, each trained once."""
    folder = tmp_path_factory.mktemp("deepspeed")
    for ranks in (1, 2):
        jobs = [(folder / f"z{z}{'o' * o}-{n}", "luffy", deepspeed(z, o)) for n, z, o in CASES if n == ranks]
        if ranks == 2:
            jobs += [(folder / f"alone-z{z}", "sft", deepspeed(z, False, **ALONE, gather_all=True)) for z in (2, 3)]
            chunks = dict(logits_chunk_size=16, micro_batch_tokens=100, gather_all=True)
            jobs.append((folder / "chunks", "luffy", deepspeed(3, False, **chunks)))
            quiet = deepspeed(3, False, entropy_coef=0.0, gather_all=True)
            jobs.append((folder / "quiet", "on_policy", quiet))
            jobs.append((folder / "chunks-again", "luffy", deepspeed(3, False, **chunks, gradient_checkpointing=True)))
            jobs += [(folder / f"lora-z{z}", "luffy", deepspeed(z, False, **LORA, gather_all=True)) for z in (2, 3)]
            jobs.append((folder / "prefix", "luffy", deepspeed(2, False, **PREFIX)))
            jobs += [(folder / name, name, deepspeed(z, False, **values)) for name, (z, values) in ARENA.items()]
            two_stages = deepspeed(3, False, steps=2, first_stage_steps=1, sample_steps=1)
            jobs.append((folder / "two-stages", "sft_rl", two_stages))
            jobs += [
                (folder / f"sft{'o' * o}", "sft", deepspeed(2, o, rollout_batch_size=16, mini_batch_size=16))
                for o in (False, True)
            ]
            jobs += [
                (
                    folder / f"bf16-z{z}",
                    "luffy",
                    deepspeed(z, False, precision="bfloat16", recompute_old_logp=True, gradient_checkpointing=True),
                )
                for z in (2, 3)
            ]
        launch(ranks, jobs, folder)
    return folder


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    sft = {**SMALL, "rollout_batch_size": 16, "mini_batch_size": 16}
    return {
        "luffy": train(make_config("luffy", **SMALL), folder / "luffy"),
        "sft": train(make_config("sft", **sft), folder / "sft"),
        "quiet": train(make_config("on_policy", **SMALL, entropy_coef=0.0), folder / "quiet"),
        "alone": train(make_config("sft", **{**SMALL, **ALONE}), folder / "alone"),
        "prefix": train(make_config("luffy", **SMALL, **PREFIX), folder / "prefix"),
        "lora": train(make_config("luffy", **SMALL, **LORA), folder / "lora"),
        "bf16": train(make_config("luffy", **SMALL, precision="bfloat16", recompute_old_logp=True), folder / "bf16"),
        **{name: train(make_config(name, **{**SMALL, **more}), folder / name) for name, (_, more) in ARENA.items()},
    }


@pytest.mark.parametrize(("ranks", "stage", "offload"), CASES)
def test_same_numbers_as_the_torch_engine(folder, by_torch, ranks, stage, offload):
    """Losses, gradient norms and every other metric over ten optimiser steps, and the weights after them."""
    run = RunDirectory(folder / f"z{stage}{'o' * offload}-{ranks}")
    metrics, weight = differences(by_torch["luffy"], run)
    assert max(metrics.values()) < 1e-4, metrics
    assert weight < SAME_WEIGHT
    assert json.loads((run.path / "manifest.json").read_text())["ranks"] == ranks


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_without_micro_batches(folder, by_torch, stage):
    """Mini-batches of one sequence, which the second rank has no part of."""
    metrics, weight = differences(by_torch["alone"], RunDirectory(folder / f"alone-z{stage}"))
    assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT


@pytest.mark.parametrize("name", ARENA)
def test_methods_that_need_more_than_groups(folder, by_torch, name):
    metrics, weight = differences(by_torch[name], RunDirectory(folder / name))
    assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT


def test_rows_that_go_forward_only(folder, by_torch):
    """Without an entropy bonus those of groups without spread: a forward pass after the last backward one."""
    metrics, weight = differences(by_torch["quiet"], RunDirectory(folder / "quiet"))
    assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT
    assert any(row["groups/all_wrong"] + row["groups/all_right"] > 0 for row in by_torch["quiet"].metrics())


@pytest.mark.parametrize("name", ["chunks", "chunks-again"])
def test_chunks_of_logits_whose_number_differs_between_ranks(folder, by_torch, name):
    """ZeRO 3 gathers the head's weight for every call of the head, which all ranks must make equally often."""
    metrics, weight = differences(by_torch["luffy"], RunDirectory(folder / name))
    assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters(folder, by_torch, stage):
    """Two ranks train adapters on a frozen, or sharded, model, whose reference is itself without them."""
    metrics, weight = differences(by_torch["lora"], RunDirectory(folder / f"lora-z{stage}"))
    assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT
    assert all(row["kl"] > 0 for row in by_torch["lora"].metrics())


def test_rows_that_begin_in_a_trace(folder, by_torch):
    """Two ranks: prefixes, another denominator, a KL term and two passes over the rows, as in one process."""
    metrics, weight = differences(by_torch["prefix"], RunDirectory(folder / "prefix"))
    assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT
    assert all(row["groups/prefix_share"] > 0 for row in by_torch["prefix"].metrics())


@pytest.mark.parametrize("offload", [False, True])
def test_every_micro_batch_counts_in_supervised_training(folder, by_torch, offload):
    """Published SFT baselines suffered from an offloaded optimiser that kept the first micro-batch's gradient only."""
    run = RunDirectory(folder / f"sft{'o' * offload}")
    lengths = [row["total/trained_tokens"] for row in run.metrics()]
    assert lengths[0] > 2 * 256  # several micro-batches in each rank
    metrics, weight = differences(by_torch["sft"], run)
    assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_with_master_weights(folder, by_torch, stage):
    run = RunDirectory(folder / f"bf16-z{stage}")
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.bfloat16}
    rows = list(zip(run.metrics(), by_torch["bf16"].metrics(), strict=True))
    # the sampled texts part ways after a while, the first step's do not
    assert abs(rows[0][0]["sft_loss"] - rows[0][1]["sft_loss"]) < 0.05
    assert all(row["sampler_gap/mean"] < 0.1 for row, _ in rows)
    shard = load_file(run.path / "final" / "optimizer" / "rank0.safetensors")
    assert {tensor.dtype for tensor in shard.values()} == {torch.float32}


def test_checkpoint_is_sharded_and_loads_with_plain_transformers(folder):
    from transformers import AutoModelForCausalLM

    final = folder / "z3-2" / "final"
    shards = [load_file(path) for path in sorted((final / "optimizer").glob("rank*.safetensors"))]
    assert [path.name for path in final.glob("*.safetensors")] == ["model.safetensors"]  # vLLM takes all there are
    sizes = [sum(tensor.numel() for tensor in shard.values()) for shard in shards]
    model = AutoModelForCausalLM.from_pretrained(final)
    assert sum(sizes) == 3 * model.num_parameters() and max(sizes) < 1.2 * min(sizes)
    whole = {name: tensor for shard in shards for name, tensor in shard.items()}
    for name, parameter in model.named_parameters():
        assert torch.equal(whole[f"{name}/fp32"], parameter)


def test_a_sharded_model_is_never_whole_in_a_rank():
    """From loading on a rank has its share alone, and nothing is left behind for models that are loaded whole."""
    from luffy.model.loading import load_model
    from luffy.sampling.ranks import join
    from luffy.training.engines import load_policy

    config = make_config("luffy", **deepspeed(3, False))
    join(config)
    model, whole = load_policy(config, config.model), load_model(config.model, device="cpu")
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert parameter.numel() == 0 and torch.equal(parameter.ds_tensor.view(other.shape), other)


def test_a_damaged_sharded_model_is_found_by_its_engine(tmp_path):
    from luffy.errors import ConfigError
    from luffy.model.loading import load_model, load_tokenizer
    from luffy.training.trainer import Trainer

    model = load_model("tiny", device="cpu")
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("tiny").save_pretrained(tmp_path / "model")
    config = make_config("luffy", **deepspeed(3, False), model=str(tmp_path / "model"), sampler="transformers")
    with pytest.raises(ConfigError, match="damaged"):
        Trainer(config, RunDirectory(tmp_path / "run"))


def test_two_stages(folder):
    """The second goes on from the first's checkpoint; only the first rank writes samples."""
    run, first = RunDirectory(folder / "two-stages"), RunDirectory(folder / "two-stages" / "first_stage")
    assert run.is_complete and first.is_complete and first.config().method.name == "sft"
    assert len(first.metrics()) == 1 and len(run.metrics()) == 2
    assert sorted(path.name for path in (run.path / "samples").iterdir()) == ["step-000001.json", "step-000002.json"]


def test_memory_is_given_back(tmp_path):
    """DeepSpeed keeps references to the model for good; a run with two stages must not hold two."""
    from luffy.training.trainer import Trainer

    for stage in (2, 3):
        trainer = Trainer(make_config("luffy", **deepspeed(stage, False)), RunDirectory(tmp_path / str(stage)))
        trainer.train_step(0)
        inner = trainer.engine.engine.optimizer.optimizer
        held = [*trainer.model.parameters(), *(t for state in inner.state.values() for t in state.values())]
        assert len(held) > 38 and sum(t.untyped_storage().nbytes() for t in held) > 0
        trainer.engine.close()
        assert sum(t.untyped_storage().nbytes() for t in held) == 0


def test_resumes_exactly_and_with_another_number_of_ranks(folder, tmp_path):
    same = [cut_short(folder / name, tmp_path / name, 5) for name in ("z2-2", "z3o-2")]
    fewer = [cut_short(folder / name, tmp_path / f"{name}-by-1", 5) for name in ("z3-2", "z1o-2")]
    more = [cut_short(folder / name, tmp_path / f"{name}-by-2", 5) for name in ("z3-1",)]
    launch(2, [(path, "", {}) for path in (*same, *more)], tmp_path)
    launch(1, [(path, "", {}) for path in fewer], tmp_path)
    for path in same:
        metrics, weight = differences(RunDirectory(folder / path.name), RunDirectory(path))
        assert max(metrics.values()) == weight == 0.0, path
    for path in (*fewer, *more):
        metrics, weight = differences(RunDirectory(folder / path.name.split("-by")[0]), RunDirectory(path))
        assert max(metrics.values()) < 1e-4 and weight < SAME_WEIGHT, path


def test_missing_optimiser_state_is_an_error(folder, tmp_path):
    from luffy.errors import RunError
    from luffy.training.trainer import Trainer

    path = cut_short(folder / "z2-1", tmp_path / "run", 5)
    shard = next((path / "checkpoints" / "step-000004").glob("optimizer/*"))
    run = RunDirectory(path)
    trainer = Trainer(run.config(), run)
    shard.unlink()
    with pytest.raises(RunError, match="no optimiser state of"):
        trainer.engine.load_optimizer(shard.parent.parent)


def test_command_line(tmp_path):
    """`luffy train --nproc 2`, and an error in every rank that ends all of them."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "steps": 2}.items()]
    command = [sys.executable, "-m", "luffy.cli", "train", "--nproc", "2", "--run-dir", str(tmp_path / "run"), *flags]
    command += ["--final-eval-problems", "3", "--eval-steps", "2", "--eval-problems", "3"]
    done = subprocess.run([*command, "--engine", "deepspeed"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    run = RunDirectory(tmp_path / "run")
    assert done.stderr.count("step 2/2: reward") == 1 and run.is_complete
    alone = train(run.config().replace(engine="torch"), tmp_path / "alone")
    assert run.evaluation()["families"] == alone.evaluation()["families"]  # the ranks share the problems
    assert run.metrics()[0].items() >= {"step": 0, "eval/id": alone.metrics()[0]["eval/id"]}.items()
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0 and "--nproc 2 needs engine deepspeed" in refused.stderr


def test_no_group_gives_up_sooner_than_ours(tmp_path):
    """DeepSpeed's clone of all ranks had torch's time-out; the first rank may write for longer."""
    from datetime import timedelta

    code = """
import sys, torch, torch.distributed as dist
from luffy import make_config
from luffy.runs import RunDirectory
from luffy.training.trainer import Trainer
values = dict(engine="deepspeed", zero_stage=3, device="cpu", num_problems=40, final_eval_problems=0, eval_steps=0)
with Trainer(make_config("luffy", **values), RunDirectory(sys.argv[1])):
    groups = list(dist.distributed_c10d._world.pg_map)
    times = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    print(len(groups), times)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, _, times = done.stdout.strip().splitlines()[-1].partition(" ")
    assert int(count) >= 2 and times == str({timedelta(hours=2).total_seconds()})
