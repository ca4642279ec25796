"""One group and its tokens, against the closed forms of the paper."""

import math

import pytest
import torch

from luffy import explore, make_config, shaping


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return explore.open_trainer(make_config("luffy"), tmp_path_factory.mktemp("explore") / "run")


@pytest.fixture(scope="module")
def group(trainer):
    return explore.draw_group(trainer, 7)


def test_a_group(group):
    table = group.table()
    assert table["off_policy"].tolist() == [False] * 7 + [True]
    assert table["reward"].iloc[-1] == 1.0  # the teacher is right
    expected = table["reward"] - table["reward"].mean()  # over the union
    assert table["advantage"].tolist() == pytest.approx(expected.tolist())
    assert group.prompt.endswith("?<think>") and f"{{{group.answer}}}" in table["completion"].iloc[-1]


def test_tokens_of_the_trace(trainer, group):
    gamma = 0.3
    shapings = {"plain": shaping.get("none"), "shaped": shaping.get("regularized", gamma=gamma)}
    table = explore.trace_tokens(trainer, group, shapings)
    assert "".join(table["token"]) == group.rows[-1].text + "<eos>"
    advantage = group.advantages[-1].item()
    for row in table.to_dict("records"):
        pi = row["probability"]
        assert row["objective: plain"] == pytest.approx(pi * advantage)
        assert row["objective: shaped"] == pytest.approx(pi / (pi + gamma) * advantage)
        assert row["pull: plain"] == pytest.approx(pi * (1 - pi) * advantage, abs=1e-12)
        assert row["pull: shaped"] == pytest.approx(gamma * pi * (1 - pi) / (pi + gamma) ** 2 * advantage, abs=1e-12)
    own = explore.trace_tokens(trainer, group, {"root": lambda pi: pi.sqrt()}, row=0)
    assert own["objective: root"].tolist() == pytest.approx(
        [math.sqrt(pi) * group.advantages[0].item() for pi in own["probability"]]
    )


def test_an_update_is_the_trainers(tmp_path):
    config = make_config("luffy", warmup_steps=0, learning_rate=1e-5)
    trainer = explore.open_trainer(config, tmp_path / "run")
    group = explore.draw_group(trainer, 7)
    shapings = {"f": shaping.get("regularized", gamma=0.1)}
    before = explore.trace_tokens(trainer, group, shapings)["objective: f"].sum()
    weights = [p.clone() for p in trainer.model.parameters()]
    metrics = explore.update(trainer, group)
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert explore.trace_tokens(trainer, group, shapings)["objective: f"].sum() > before


def test_coloured_tokens_are_escaped():
    text = explore.coloured(["<think>", "8"], [0.0, 1.0])
    assert "&lt;think&gt;" in text and "<think>" not in text and 'title="1.0000"' in text


def test_plot(trainer, group):
    table = explore.trace_tokens(trainer, group, {"plain": shaping.get("none"), "root": lambda pi: pi.sqrt()})
    (axes,) = explore.plot_pull(table).axes
    assert len(axes.patches) == 2 * len(table)
