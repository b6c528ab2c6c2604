"""What speculative decoding gains, from how often a draft is accepted and what things cost.

    alpha   the probability that a drafted token is accepted, taken as the same everywhere and independent
    gamma   tokens drafted a step
    c       seconds to draft one token over seconds of a target's pass over one
    v(n)    seconds of a target's pass over n tokens over those of one: 1 while weights are what a pass reads

    E[tokens a step]  = (1 - alpha^(gamma+1)) / (1 - alpha)                               (eq. 1)
    speedup           = (1 - alpha^(gamma+1)) / ((1 - alpha) (gamma c + v(gamma+1)))      (Theorem 3.8; there v = 1)
    arithmetic        = (1 - alpha) (gamma c' + gamma + 1) / (1 - alpha^(gamma+1))        (Theorem 3.11), c' the ratio of operations

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_GAMMA = 64  # where the search for the best length ends


@dataclass(frozen=True)
class Plan:
    """One row of the planner's table: what a draft length is expected to give. operations: with c for their ratio too."""

    alpha: float
    gamma: int
    c: float
    tokens: float
    speedup: float
    operations: float
    best_gamma: int
    best_speedup: float


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens that a step yields: the accepted ones and the one more (eq. 1)."""
    _check(alpha, gamma, 0.0)
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def expected_speedup(alpha: float, gamma: int, c: float, v: Callable[[int], float] = lambda n: 1.0) -> float:
    """Tokens a second over plain decoding's (Theorem 3.8, with a pass over n tokens costing v(n) of one over one)."""
    _check(alpha, gamma, c)
    return expected_tokens(alpha, gamma) / (gamma * c + v(gamma + 1))


def expected_operations(alpha: float, gamma: int, c_operations: float) -> float:
    """Arithmetic done a token over plain decoding's (Theorem 3.11)."""
    _check(alpha, gamma, c_operations)
    return (gamma * c_operations + gamma + 1) / expected_tokens(alpha, gamma)


def best_gamma(alpha: float, c: float, v: Callable[[int], float] = lambda n: 1.0, longest: int = MAX_GAMMA) -> int:
    """The draft length 0 .. longest of the greatest speedup, the shortest of equals; 0: drafting does not pay."""
    return max(range(longest + 1), key=lambda gamma: (expected_speedup(alpha, gamma, c, v), -gamma))


def plan(alpha: float, gamma: int | None, c: float, v: Callable[[int], float] = lambda n: 1.0) -> Plan:
    """gamma None: the best one. ValueError unless 0 <= alpha <= 1, gamma >= 0 and c >= 0."""
    best = best_gamma(alpha, c, v)
    gamma = best if gamma is None else gamma
    return Plan(
        alpha=alpha,
        gamma=gamma,
        c=c,
        tokens=expected_tokens(alpha, gamma),
        speedup=expected_speedup(alpha, gamma, c, v),
        operations=expected_operations(alpha, gamma, c),
        best_gamma=best,
        best_speedup=expected_speedup(alpha, best, c, v),
    )


def _check(alpha: float, gamma: int, c: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected the probability that a drafted token is accepted, from 0 to 1")
    if gamma < 0 or int(gamma) != gamma:
        raise ValueError(f"gamma is {gamma}; expected a number of drafted tokens, 0 or more")
    if not 0 <= c < float("inf"):
        raise ValueError(f"c is {c}; expected the cost of drafting a token over that of a target's pass, 0 or more")
