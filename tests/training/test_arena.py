"""The methods after LUFFY, each through the real trainer: cut and resumed to the bit, in any micro-batches, and what
their metrics count."""

import numpy as np
import pytest
from helpers import assert_same_run, cut_short

from luffy import ConfigError, RunDirectory, make_config, resume, train
from luffy.methods import ARENA_METHODS
from luffy.model.loading import load_model, load_tokenizer

SHORT = dict(
    steps=4, rollout_batch_size=4, mini_batch_size=2, num_problems=40, num_generations=8, max_completion_length=64,
    difficulties=(3, 5), verbosity=0.0, eval_steps=0, final_eval_problems=0, save_steps=2, sample_steps=0,
)  # fmt: skip
VALUES = {
    "opd": {"teacher": "tiny:own_share=0.4"},
    "relift": {"sft_queue": 3},
    "exgrpo": {"replay_start": 0.01},
    "questa": {"prefix_share": {"start": 0.5, "end": 0.25, "steps": 2, "shape": "step"}},
}
PREFIXED = ("prefix_rft", "uft", "trapo", "bread", "pope", "questa")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arena")
    found = {}

    def run(name):
        if name not in found:
            found[name] = train(make_config(name, **{**SHORT, **VALUES.get(name, {})}), folder / name)
        return found[name]

    return run


@pytest.mark.parametrize("name", ARENA_METHODS)
def test_a_run_that_is_cut_ends_as_the_other(name, runs, tmp_path):
    run = runs(name)
    assert all(np.isfinite(value) for line in run.metrics() for value in line.values())
    assert any(line["grad_norm"] > 0 for line in run.metrics())
    assert_same_run(resume(cut_short(run.path, tmp_path / "cut", 4)), run)


@pytest.mark.parametrize("name", ARENA_METHODS)
def test_no_gradient_depends_on_micro_batches(name, runs, tmp_path):
    """Rows of a mini-batch in micro-batches with a tenth of the tokens each; with a memory also in later steps."""
    steps = 4 if name in ("relift", "exgrpo") else 1
    values = {**SHORT, **VALUES.get(name, {}), "steps": steps, "micro_batch_tokens": 150}
    cut = train(make_config(name, **values), tmp_path / "run").metrics()
    for ours, theirs in zip(cut, runs(name).metrics(), strict=steps == 4):
        for key in ("grad_norm", "pg_loss", "entropy", "sft_loss", "rows/unused", "total/generated_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key


def test_counts_of_what_the_methods_do(runs):
    """Replay replays, gates gate, prefixes continue, queues empty themselves, groups are drawn again."""
    lines = {name: runs(name).metrics() for name in ARENA_METHODS}

    def values(name, key):
        return [line[key] for line in lines[name]]

    assert any(values("exgrpo", "rows/replayed")) and not any(values("exgrpo", "total/demonstrations"))
    for line in lines["hpt"]:  # traces where no rollout is right, whose rollouts are not learned from
        assert line["groups/without_trace"] == pytest.approx(1 - line["groups/all_wrong"])
    for line in lines["superrl"]:
        assert line["groups/without_trace"] == pytest.approx(1 - line["groups/all_wrong"])
    for name in ("srft", "rl_plus", "dft", "psft"):  # a trace in every group
        assert values(name, "total/demonstrations") == [4, 8, 12, 16]
    for line, last in zip(lines["ampo"], [0, *values("ampo", "total/demonstrations")], strict=False):
        assert line["total/demonstrations"] - last == 4 * line["groups/all_wrong"]  # one for each group, which has one
    guided = np.diff([0, *values("trapo", "total/demonstrations")])  # of up to four rows in each of four groups
    assert (guided >= 4 * np.array(values("trapo", "groups/all_wrong"))).all() and (guided < 16).any()
    for name in ("exgrpo", "relift"):  # what is remembered at the cut goes through the checkpoint
        assert (runs(name).path / "checkpoints" / "step-000002" / "memory.npz").stat().st_size > 500
    assert any(values("hpt", "rows/unused")) and values("hpt", "total/demonstrations")[-1] > 0
    assert any(values("dapo", "groups/redrawn")) and any(values("dapo", "rows/unused"))
    assert any(values("bread", "rows/unused"))
    for name in PREFIXED:
        assert any(0 < share < 1 for share in values(name, "prefix/share")), name
    assert values("questa", "prefix/share")[0] > values("questa", "prefix/share")[3]
    for name in ("chord_mu", "chord_phi"):
        assert values(name, "total/demonstrations") == [8, 16, 24, 32]
    shown = values("relift", "total/demonstrations")
    assert shown[0] == 0 and shown[-1] > 0 and shown[-1] % 3 == 0
    assert values("opd", "kl")[0] > 0 == values("maxrl", "kl")[0]
    assert len(RunDirectory(runs("relift").path).metrics()) == 4


def test_what_contradicts_a_method_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="on_shaping is not for gspo"):
        make_config("gspo", on_shaping="sqrt")
    with pytest.raises(ConfigError, match="no ratio of rollouts"):
        make_config("srft", epsilon=0.2)
    other = tmp_path / "other"
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_tokens(["~"])
    tokenizer.save_pretrained(other)
    load_model("tiny", device="cpu").save_pretrained(other)
    with pytest.raises(ConfigError, match="has other tokens than"):
        train(make_config("opd", **SHORT, teacher=str(other)), tmp_path / "run")


def test_a_finished_run_is_the_teacher(runs, tmp_path):
    teacher = str(runs("dft").path / "final")
    run = train(make_config("opd", **{**SHORT, "steps": 1}, teacher=teacher), tmp_path / "run")
    assert run.is_complete and run.metrics()[0]["kl"] > 0


def test_distillation_as_a_loss_and_with_rewards(tmp_path):
    """The teacher in the KL term, in the advantage, and there beside the reward: three gradients; without any of them
    there is none."""
    values = {**SHORT, "steps": 1, "entropy_coef": 0.0, "teacher": "tiny:own_share=0.8"}
    parts = {
        "loss": {"teacher_coef": 0.0, "beta": 0.1}, "advantage": {}, "both": {"reward_coef": 1.0},
        "nothing": {"teacher_coef": 0.0},
    }  # fmt: skip
    norms = {
        name: train(make_config("opd", **values, **part), tmp_path / name).metrics()[-1]["grad_norm"]
        for name, part in parts.items()
    }
    assert norms.pop("nothing") == 0 and min(norms.values()) > 0 and len(set(norms.values())) == 3
