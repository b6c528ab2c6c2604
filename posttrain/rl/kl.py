"""How far the policy is from the reference: estimators from the policy's own samples, and the weight of the penalty.

With u = log pi_ref(y) - log pi(y): k1 = -u, k2 = u^2 / 2, k3 = exp(u) - 1 - u (Schulman, "Approximating KL divergence",
2020). Oracle: reference/kl.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str = "k1") -> Tensor:
    """KL(policy || reference) token by token, of the shape of logps and ref_logps; differentiable in both."""
    u = ref_logps - logps
    if estimator == "k1":
        return -u
    if estimator == "k2":
        return 0.5 * u.square()
    if estimator == "k3":
        return torch.expm1(u) - u
    raise ValueError(f"the KL estimator is {estimator!r}; expected one of {', '.join(KL_ESTIMATORS)}")


def adaptive_kl_coefficient(coefficient: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The penalty's weight after a step whose divergence was `kl`: it grows while that exceeds the target, by at most a
    fifth of `gain` a step (Ziegler et al., arXiv:1909.08593, section 2.2)."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coefficient * (1 + gain * error)
