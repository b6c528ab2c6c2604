"""Oracle of estimators of KL(policy || reference) from samples of the policy, and of controllers of its weight.

Schulman, "Approximating KL divergence" (2020): with u = log pi_ref(y) - log pi(y) of a token drawn from pi,
    k1 = -u                 unbiased, may be negative
    k2 = u^2 / 2            biased, small variance
    k3 = exp(u) - 1 - u     unbiased, never negative
Controllers: Ziegler et al., arXiv:1909.08593, section 2.2.
"""

import math


def k1(logp, ref_logp):
    """(estimate, derivative by logp)"""
    return logp - ref_logp, 1.0


def k2(logp, ref_logp):
    return 0.5 * (ref_logp - logp) ** 2, logp - ref_logp


def k3(logp, ref_logp):
    u = ref_logp - logp
    return math.exp(u) - 1 - u, 1 - math.exp(u)


def fixed_controller(coefficient, kl):
    """The weight of the penalty after a step whose divergence was kl."""
    return coefficient


def adaptive_controller(coefficient, kl, target, gain=0.1):
    """e = clip((KL - target) / target, -0.2, 0.2); coefficient (1 + gain e)."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coefficient * (1 + gain * error)
