"""Generalised advantage estimation and whitening: by hand, against the oracle, and its two ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_cases import assert_same, flat, random_values, rows

from posttrain.reference import gae as oracle
from posttrain.rl.gae import gae, whiten


def test_by_hand():
    """delta = (1 + 0.5 * 4 - 2, 3 - 4) = (1, -1); A_0 = 1 + 0.5 * 0.5 * -1."""
    assert oracle.gae([1.0, 3.0], [2.0, 4.0], 0.5, 0.5) == ([0.75, -1.0], [2.75, 3.0])
    assert oracle.gae([7.0], [2.0], 0.9, 0.9) == ([5.0], [7.0])


def test_whitening_by_hand():
    """Mean 2, variance (1 + 0 + 1) / 2 = 1 in three tokens of two completions."""
    scale = (1 + 1e-8) ** -0.5
    assert oracle.whiten([[1.0, 2.0], [3.0]]) == [[-scale, 0.0], [scale]]
    assert oracle.whiten([[1.0, 2.0], [3.0]], shift_mean=False) == [[2 - scale, 2.0], [2 + scale]]


@pytest.mark.parametrize("lengths", ([1], [4], [3, 1, 6, 2], [1, 1, 1]))
@pytest.mark.parametrize(("gamma", "lam"), ((1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)))
def test_the_oracle_s(lengths, gamma, lam):
    rewards, values = random_values(lengths, 2)
    exact = [oracle.gae(r, v, gamma, lam) for r, v in zip(rows(rewards, lengths), rows(values, lengths), strict=True)]
    for ours, column in zip(gae(rewards, values, torch.tensor(lengths), gamma, lam), zip(*exact, strict=True), strict=True):
        assert_same(ours, flat(column))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 99))
def test_the_two_ends(lengths, seed):
    """lambda 1: the discounted return whatever the values; lambda 0: one residual."""
    rewards, values = random_values(lengths, 2, seed)
    sizes = torch.tensor(lengths)
    _, returns = gae(rewards, values, sizes, 0.9, 1.0)
    discounted = [
        [sum(0.9**l * row[t + l] for l in range(len(row) - t)) for t in range(len(row))] for row in rows(rewards, lengths)
    ]
    residuals, _ = gae(rewards, values, sizes, 0.9, 0.0)
    following = [[*row[1:], 0.0] for row in rows(values, lengths)]
    for ours, expected in ((returns, flat(discounted)), (residuals, rewards + 0.9 * flat(following) - values)):
        scale = max(1.0, rewards.abs().max().item(), values.abs().max().item())
        assert ((ours - expected).abs() <= 64 * torch.finfo(torch.float64).eps * scale * max(lengths)).all()


@pytest.mark.parametrize("shift_mean", (True, False))
def test_whitening_is_the_oracle_s(shift_mean):
    lengths = [3, 1, 4]
    (values,) = random_values(lengths, 1, spread=5.0)
    assert_same(whiten(values + 3, shift_mean), flat(oracle.whiten(rows(values + 3, lengths), shift_mean)))


def test_one_value_has_no_deviation():
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert torch.isfinite(whiten(torch.full((5,), 2.0))).all()
