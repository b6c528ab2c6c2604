"""Oracle of generalised advantage estimation and of whitening, in float64.

Schulman et al., arXiv:1506.02438: with the state's value V and the reward r of the action taken in it,
    delta_t = r_t + gamma V_(t+1) - V_t                     the residual; V after the last action is 0
    A_t = sum_l (gamma lambda)^l delta_(t+l)                eq. 16
    R_t = A_t + V_t                                         what the value function is fitted to
lambda = 1 is the return minus the value (eq. 18), lambda = 0 the residual alone (eq. 17).
"""

import math


def gae(rewards, values, gamma, lam):
    """One completion's rewards and values by token -> (advantages, returns)."""
    T = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < T else 0.0) - values[t] for t in range(T)]
    advantages = [sum((gamma * lam) ** l * delta[t + l] for l in range(T - t)) for t in range(T)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def whiten(values, shift_mean=True):
    """Completions' values, by token -> the same with mean 0 (or, not shifted, the mean they had) and deviation 1 over all tokens.

    The variance divides by one less than their number; 1e-8 is added to it.
    """
    flat = [x for row in values for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    back = 0.0 if shift_mean else mean
    return [[(x - mean) / math.sqrt(variance + 1e-8) + back for x in row] for row in values]
