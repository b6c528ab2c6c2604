"""PPO's rewards and clipped losses: by hand, slopes, the oracle, and what clipping means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_cases import assert_same, assert_slopes, flat, random_values, rows

from posttrain.reference import ppo as oracle
from posttrain.rl.ppo import clipped_policy_loss, clipped_value_loss, token_rewards

LENGTHS = [3, 1, 5]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    (
        (1.5, 2.0, -2.4, 0.0, True),  # already likelier by a half: 1.2 * 2, and no push
        (0.5, 2.0, -1.0, -1.0, False),  # grew too unlikely: pushed back up
        (0.5, -2.0, 1.6, 0.0, True),  # 0.8 * 2
        (1.5, -2.0, 3.0, 3.0, False),
        (1.0, 2.0, -2.0, -2.0, False),
    ),
)
def test_a_token_by_hand(ratio, advantage, loss, slope, clipped):
    found = oracle.clipped_policy_token(math.log(ratio), 0.0, advantage, 0.2, 0.2)
    assert found == (pytest.approx(loss), pytest.approx(slope), clipped)


def test_a_value_by_hand():
    """From 1, a fifth at most: 2 counts as 1.2, which for a return of 3 is the worse one."""
    assert oracle.clipped_value_token(2.0, 1.0, 3.0, 0.2) == (pytest.approx(0.5 * 1.8**2), 0.0, True)
    assert oracle.clipped_value_token(1.1, 1.0, 3.0, 0.2) == (pytest.approx(0.5 * 1.9**2), pytest.approx(-1.9), False)


def test_rewards_by_hand():
    assert oracle.token_rewards([1.0, -2.0], [[2.0, 4.0], [1.0]], 0.5) == [[-1.0, -1.0], [-2.5]]
    ours = token_rewards(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 4.0, 1.0]), torch.tensor([2, 1]), 0.5)
    assert ours.tolist() == [-1.0, -1.0, -2.5]


def _loss(logps, old_logps, advantages, values, old_values, returns):
    """The whole objective from our parts, as the oracle's ppo_loss."""
    policy, _ = clipped_policy_loss(logps, old_logps, advantages, 0.2, 0.2)
    value, _ = clipped_value_loss(values, old_values, returns, 0.3)
    return policy.mean() + 0.5 * value.mean()


def test_the_oracle_s():
    given_values = random_values(LENGTHS, 6, seed=3, spread=0.5)
    nested = [rows(x, LENGTHS) for x in given_values]
    loss, d_logps, d_values = oracle.ppo_loss(*nested, 0.2, 0.3, 0.5)
    logps, values = (given_values[i].requires_grad_() for i in (0, 3))
    ours = _loss(*given_values)
    assert_same(ours, loss)
    for mine, theirs in zip(torch.autograd.grad(ours, (logps, values)), (d_logps, d_values), strict=True):
        assert_same(mine, flat(theirs))
    kl, scores = random_values(LENGTHS, 1, seed=4)[0], torch.randn(3, dtype=torch.float64)
    assert_same(
        token_rewards(scores, kl, torch.tensor(LENGTHS), 0.1), flat(oracle.token_rewards(scores.tolist(), rows(kl, LENGTHS), 0.1))
    )


def test_the_oracle_s_slopes():
    point = [rows(x, LENGTHS) for x in random_values(LENGTHS, 6, seed=5, spread=0.5)]
    _, d_logps, d_values = oracle.ppo_loss(*point, 0.2, 0.3, 0.5)
    for which, gradient in ((0, d_logps), (3, d_values)):

        def loss(x, which=which):
            moved = list(point)
            moved[which] = rows(torch.tensor(x, dtype=torch.float64), LENGTHS)
            return oracle.ppo_loss(*moved, 0.2, 0.3, 0.5)[0]

        assert_slopes(loss, flat(gradient).tolist(), flat(point[which]).tolist())


@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_the_loss_is_an_upper_bound(log_ratio, advantage, low, high):
    """Clipping never makes a change look better than it is, and within the bounds changes nothing."""
    x, a = torch.tensor([log_ratio], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss, clipped = clipped_policy_loss(x, torch.zeros_like(x), a, low, high)
    assert (loss >= -x.exp() * a).all()
    if 1 - low <= x.exp() <= 1 + high:
        assert torch.equal(loss, -x.exp() * a) and not clipped.any()


def test_on_policy_the_gradient_is_reinforce_s():
    """At a ratio of 1 the slope by a log-probability is minus the advantage."""
    (logps, advantages) = random_values([5], 2)
    logps.requires_grad_()
    losses, clipped = clipped_policy_loss(logps, logps.detach(), advantages, 0.2, 0.2)
    assert_same(*torch.autograd.grad(losses.sum(), logps), -advantages)
    assert not clipped.any()
