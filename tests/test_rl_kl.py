"""Estimators of the divergence: by hand, their slopes, what they estimate; and the penalty's controller."""

from __future__ import annotations

import math

import pytest
import torch
from rl_cases import assert_same, assert_slopes, random_values

from posttrain.reference import kl as oracle
from posttrain.rl.kl import KL_ESTIMATORS, adaptive_kl_coefficient, kl_estimate


def test_by_hand():
    assert oracle.k1(-1.0, -3.0) == (2.0, 1.0)
    assert oracle.k2(-1.0, -3.0) == (2.0, 2.0)
    assert oracle.k3(math.log(0.5), 0.0) == (pytest.approx(1 - math.log(2)), pytest.approx(-1.0))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_oracle_s(estimator):
    logps, ref_logps = random_values([6], 2)
    exact = [getattr(oracle, estimator)(p, r) for p, r in zip(logps.tolist(), ref_logps.tolist(), strict=True)]
    for p, r, (_, slope) in zip(logps.tolist(), ref_logps.tolist(), exact, strict=True):
        assert_slopes(lambda x, r=r: getattr(oracle, estimator)(x[0], r)[0], [slope], [p])
    logps.requires_grad_()
    ours = kl_estimate(logps, ref_logps, estimator)
    assert_same(ours, [value for value, _ in exact])
    assert_same(*torch.autograd.grad(ours.sum(), logps), [slope for _, slope in exact])


def test_what_they_estimate():
    """Expected under the policy, k1 and k3 are the divergence itself, and k3 is never negative."""
    policy, reference = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
    divergence = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        assert_same((policy.exp() * kl_estimate(policy, reference, estimator)).sum(), divergence)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    with pytest.raises(ValueError, match="expected one of k1, k2, k3"):
        kl_estimate(policy, reference, "k4")


@pytest.mark.parametrize(("kl", "after"), ((6.0, 0.2), (6.6, 0.202), (600.0, 0.204), (3.0, 0.196), (-1.0, 0.196)))
def test_the_controller(kl, after):
    """Target 6: a tenth too much raises 0.2 by a hundredth; errors beyond a fifth count as one."""
    assert adaptive_kl_coefficient(0.2, kl, 6.0) == pytest.approx(after)
    assert adaptive_kl_coefficient(0.2, kl, 6.0) == oracle.adaptive_controller(0.2, kl, 6.0)
    assert oracle.fixed_controller(0.2, kl) == 0.2
