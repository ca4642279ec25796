import math

import pytest
import torch

from luffy import shaping
from luffy.objective import group_advantages, policy_loss


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- advantages ------------------------------------------------------------------------------------------------------


def test_union_baseline_by_hand():
    """One right trace among seven wrong rollouts: 7/8 and -1/8."""
    advantages = group_advantages(tensor(1, *[0] * 7), torch.zeros(8, dtype=torch.long))
    assert advantages.tolist() == [7 / 8] + [-1 / 8] * 7


def test_groups_in_any_order_and_with_gaps():
    rewards, ids = tensor(1, 0, 0, 1, 1), torch.tensor([9, -3, 9, -3, 9])
    assert group_advantages(rewards, ids).tolist() == pytest.approx([1 / 3, -1 / 2, -2 / 3, 1 / 2, 1 / 3])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("scale", ["none", "group"])
def test_group_without_spread_gets_zero(value, scale):
    assert (
        group_advantages(tensor(*[value] * 4), torch.zeros(4, dtype=torch.long), scale_rewards=scale).tolist()
        == [0] * 4
    )


def test_scaled_by_unbiased_std():
    rewards = tensor(1, 0, 0, 0)  # mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4
    scaled = group_advantages(rewards, torch.zeros(4, dtype=torch.long), scale_rewards="group")
    assert scaled.tolist() == pytest.approx([0.75 / (0.5 + 1e-6)] + [-0.25 / (0.5 + 1e-6)] * 3)


def test_baseline_mask_centres_every_row():
    """RL with SFT loss: the mean is that of the on-policy rows, and the demonstration is centred by it too."""
    rewards, ids = tensor(1, 0, 1, 1), torch.zeros(4, dtype=torch.long)
    mask = torch.tensor([True, True, True, False])
    assert group_advantages(rewards, ids, baseline_mask=mask).tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3, 1 / 3])
    std = math.sqrt(1 / 3)
    scaled = group_advantages(rewards, ids, baseline_mask=mask, scale_rewards="group")
    assert scaled.tolist() == pytest.approx([x / (std + 1e-6) for x in (1 / 3, -2 / 3, 1 / 3, 1 / 3)])


def test_bad_advantage_input_is_refused():
    rewards, ids = tensor(1, 0), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"groups \[1\]"):
        group_advantages(rewards, ids, baseline_mask=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="scale_rewards"):
        group_advantages(rewards, ids, scale_rewards="batch")
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(rewards, ids[:1])


# --- loss ------------------------------------------------------------------------------------------------------------

REGULARIZED = shaping.get("regularized", gamma=0.1)


def test_loss_by_hand():
    """Two on-policy tokens (ratios 1.5 and 0.5), one off-policy token of probability 0.1, one masked token."""
    logp = tensor(math.log(0.6), math.log(0.2), math.log(0.1), math.nan)
    old = tensor(math.log(0.4), math.log(0.4), math.nan, math.nan)
    advantages = tensor(1, -1, 0.875, 100)
    mask, off = torch.tensor([True, True, True, False]), torch.tensor([False, False, True, False])
    loss, metrics = policy_loss(logp, old, advantages, mask, off, off_shaping=REGULARIZED)
    assert loss.item() == pytest.approx(-(1.5 - 0.5 + 0.875 * 0.5) / 3)
    assert metrics == pytest.approx(
        {
            "pg_loss": -1.4375 / 3,
            "on_pg_loss": -0.5,
            "off_pg_loss": -0.4375,
            "pg_clipfrac": 0,
            "ppo_kl": (math.log(0.4 / 0.6) + math.log(0.4 / 0.2)) / 2,
            "on_policy_prob": 0.4,
            "off_policy_prob": 0.1,
            "off_ratio_mean": 0.5,
            "off_ratio_min_clip_frac": 0,
            "off_ratio_max_clip_frac": 0,
        }
    )
    clipped, metrics = policy_loss(
        logp, old, advantages, mask, off, off_shaping=REGULARIZED, clip=(0.2, 0.2), normalizer=10
    )
    # ratio 1.5 with A = 1 is held at 1.2; ratio 0.5 with A = -1 at 0.8: PPO's pessimistic side
    assert clipped.item() == pytest.approx(-(1.2 - 0.8 + 0.4375) / 10)
    assert metrics["pg_clipfrac"] == 1


def test_clip_is_one_sided():
    """A ratio outside the range on the harmless side keeps its value and its gradient."""
    logp = tensor(math.log(0.2), math.log(0.6)).requires_grad_()
    loss, metrics = policy_loss(
        logp, tensor(math.log(0.4), math.log(0.4)), tensor(1, -1), torch.ones(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.bool), clip=(0.2, 0.2),
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 - 1.5) / 2)
    assert logp.grad.tolist() == pytest.approx([-0.25, 0.75])
    assert metrics["pg_clipfrac"] == 0


def test_clip_higher():
    logp, old = tensor(math.log(1.25)), tensor(0.0)
    arguments = logp, old, tensor(1), torch.tensor([True]), torch.tensor([False])
    assert policy_loss(*arguments, clip=(0.2, 0.28))[0].item() == pytest.approx(-1.25)
    assert policy_loss(*arguments, clip=(0.2, 0.2))[0].item() == pytest.approx(-1.2)


def test_teacher_probabilities_and_ratio_bounds():
    logp, teacher = tensor(math.log(0.2), math.log(0.05)), tensor(math.log(0.5), math.log(0.5))
    everything = torch.ones(2, dtype=torch.bool)
    arguments = logp, logp, tensor(1, 1), everything, everything
    assert policy_loss(*arguments, teacher_logp=teacher)[0].item() == pytest.approx(-(0.4 + 0.1) / 2)
    loss, metrics = policy_loss(*arguments, off_ratio_clip=(0.1, 0.15))
    assert loss.item() == pytest.approx(-(0.15 + 0.1) / 2)
    assert (metrics["off_ratio_min_clip_frac"], metrics["off_ratio_max_clip_frac"]) == (0.5, 0.5)


@pytest.mark.parametrize("name", ["regularized", "sqrt", "power"])
def test_on_policy_shaping(name):
    shape, p, old = shaping.get(name), 0.3, 0.6
    loss, _ = policy_loss(
        tensor(math.log(p)),
        tensor(math.log(old)),
        tensor(2),
        torch.tensor([True]),
        torch.tensor([False]),
        on_shaping=shape,
    )
    assert loss.item() == pytest.approx(-2 * (shape(tensor(p)) / shape(tensor(old))).item())


def random_batch(seed, shape=(6, 11)):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.rand(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    logp = (draw(*shape) * 0.98 + 0.01).log().requires_grad_()
    old = (logp.detach() + 0.6 * (draw(*shape) - 0.5)).clamp(max=-1e-3)
    lengths = 1 + (draw(shape[0]) * shape[1]).long()
    mask = torch.arange(shape[1])[None] < lengths[:, None]
    off = (draw(shape[0]) < 0.4)[:, None].expand(shape)
    return logp, old, (draw(shape[0]) - 0.5)[:, None].expand(shape), mask, off


OPTIONS = {
    "luffy": dict(off_shaping=REGULARIZED),
    "mixed": dict(clip=(0.2, 0.2)),
    "mixed_shaping": dict(off_shaping=REGULARIZED, clip=(0.2, 0.2), normalizer=8192.0),
    "on_policy_shaping": dict(on_shaping=REGULARIZED, clip=(0.2, 0.3)),
    "log": dict(off_shaping=shaping.get("log")),
    "prob_plus_log": dict(off_shaping=shaping.get("prob_plus_log")),
    "bounded": dict(off_shaping=REGULARIZED, off_ratio_clip=(0.3, 0.8)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_against_finite_differences(seed, options):
    batch = random_batch(seed, (3, 5))
    assert torch.autograd.gradcheck(lambda logp: policy_loss(logp, *batch[1:], **options)[0], batch[0])


@pytest.mark.parametrize("seed", range(3))
def test_off_policy_gradient_has_its_closed_form(seed):
    logp, old, advantages, mask, _ = random_batch(seed)
    loss, _ = policy_loss(logp, old, advantages, mask, torch.ones_like(mask), off_shaping=REGULARIZED, normalizer=1)
    (gradient,) = torch.autograd.grad(loss, logp)
    p = logp.exp()
    torch.testing.assert_close(gradient, torch.where(mask, -advantages * 0.1 * p / (p + 0.1) ** 2, 0.0).detach())


def reference_loss(logp, old, advantages, mask, off, *, gamma, cliprange):
    """paper.md-style token formulas written out as loops: shaped off ratio, clipped or plain on ratio, sum / 8192."""
    total = 0.0
    for i, j in torch.cartesian_prod(*map(torch.arange, logp.shape)).tolist():
        if not mask[i, j]:
            continue
        if off[i, j]:
            p = logp[i, j].exp()
            total = total - advantages[i, j] * (p / (p + gamma) if gamma else p)
        else:
            ratio = (logp[i, j] - old[i, j]).exp()
            plain = -advantages[i, j] * ratio
            total = total + (
                plain
                if cliprange is None
                else max(plain, -advantages[i, j] * ratio.clamp(1 - cliprange, 1 + cliprange))
            )
    return total / 8192


@pytest.mark.parametrize("gamma", [None, 0.1])
@pytest.mark.parametrize("cliprange", [None, 0.2])
def test_equals_token_by_token_formulas(gamma, cliprange):
    batch = random_batch(7)
    shape = shaping.get("regularized", gamma=gamma) if gamma else None
    clip = (cliprange, cliprange) if cliprange else None
    loss, _ = policy_loss(*batch, off_shaping=shape, clip=clip, normalizer=8192)
    expected = reference_loss(*batch, gamma=gamma, cliprange=cliprange)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, batch[0])[0] for x in (loss, expected)))


@pytest.mark.parametrize("name", list(shaping.SHAPINGS))
@pytest.mark.parametrize("logp", [-1e-7, -60.0, -95.0, -105.0, -1000.0])
def test_improbable_tokens_stay_finite(name, logp):
    token = torch.tensor([logp], requires_grad=True)
    one = torch.ones(1)
    loss, _ = policy_loss(token, one, one, one.bool(), one.bool(), off_shaping=shaping.get(name))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(token.grad).all()


def test_padded_equals_packed():
    batch = random_batch(3)
    mask = batch[3]
    packed, _ = policy_loss(*(t[mask] for t in batch), off_shaping=REGULARIZED)
    torch.testing.assert_close(policy_loss(*batch, off_shaping=REGULARIZED)[0], packed)


def test_off_ratio_is_bounded_and_empty_off_mask_is_dr_grpo():
    logp, old, advantages, mask, off = random_batch(11)
    ratio = REGULARIZED(logp.exp())
    assert ratio.min() > 0 and ratio.max() <= 1 / 1.1
    loss, _ = policy_loss(logp, old, advantages, mask, torch.zeros_like(off), off_shaping=REGULARIZED)
    torch.testing.assert_close(loss, -(advantages * (logp - old).exp())[mask].sum() / mask.sum())


def test_zero_advantage_has_zero_gradient():
    logp, old, advantages, mask, off = random_batch(5)
    loss, _ = policy_loss(logp, old, torch.zeros_like(advantages), mask, off, off_shaping=REGULARIZED)
    assert torch.autograd.grad(loss, logp)[0].abs().max() == 0


@pytest.mark.parametrize("kind", ["no off-policy", "no on-policy", "nothing"])
def test_metrics_of_empty_parts_are_zero(kind):
    logp, old, advantages, mask, off = random_batch(1)
    off = torch.full_like(off, kind == "no on-policy")
    mask = mask & (kind != "nothing")
    loss, metrics = policy_loss(logp, old, advantages, mask, off, off_shaping=REGULARIZED, clip=(0.2, 0.2))
    assert math.isfinite(loss.item()) and all(math.isfinite(value) for value in metrics.values())
    loss.backward()
    assert torch.isfinite(logp.grad).all()


def test_bad_loss_input_is_refused():
    logp, old, advantages, mask, off = random_batch(2)
    with pytest.raises(ValueError, match="advantages has shape"):
        policy_loss(logp, old, advantages[:, :1], mask, off)
    with pytest.raises(ValueError, match="bool"):
        policy_loss(logp, old, advantages, mask.float(), off)
    with pytest.raises(ValueError, match="teacher_logp"):
        policy_loss(logp, old, advantages, mask, off, teacher_logp=old[0])
