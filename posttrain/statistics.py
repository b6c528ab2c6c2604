"""How much a score on a finite test set says, and when two scores may be called different.

Everything here is about counts of right and wrong answers, two-sided, and needs NumPy only.

    wilson_interval   interval of one proportion       Wilson 1927, eq. in Newcombe 1998 (method 3)
    mcnemar           two systems, the same items      McNemar 1947; mid-p: Lancaster 1961, Fagerland et al. 2013
    paired_bootstrap  interval of their difference     Efron 1979, percentile interval, items resampled in pairs
    items_needed      items that would show it         Connor 1987, with the continuity correction of the exact test
    compare           all of these; refuses to claim a difference that the data cannot carry
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
_CHUNK = 1 << 22  # elements that the bootstrap holds at once (32 MiB of int64)


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion: the p with |correct/n - p| <= z sqrt(p (1 - p) / n).

    Returns (low, high) within [0, 1]; (0, 1) for n = 0, where nothing is known. Unlike the textbook
    p +- z sqrt(p (1 - p) / n) it is right near 0 and 1 and for few items. ValueError unless 0 <= correct <= n.
    """
    _check_confidence(confidence)
    if n < 0 or not 0 <= correct <= n:
        raise ValueError(f"wilson_interval: {correct} correct of {n} items is impossible; give 0 <= correct <= n")
    if n == 0:
        return 0.0, 1.0
    z2 = _NORMAL.inv_cdf(0.5 + confidence / 2) ** 2
    p = correct / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if correct == 0 else max(0.0, centre - half)  # exact ends: the formula leaves a rounding error there
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


def mcnemar(only_a: int, only_b: int) -> tuple[float, float]:
    """Two-sided p-values of "each discordant item is as likely to favour A as B".

    only_a: items that A alone got right; only_b: items that B alone got right. With k = min, m = only_a + only_b
    and X ~ Binomial(m, 1/2):

        exact = min(1, 2 P(X <= k))        never rejects more often than the stated level; conservative
        mid-p = 2 P(X <= k) - P(X = k)     closer to the level, sometimes a little above it

    Returns (exact, mid_p); both are the correctly rounded quotient of integers, whatever the size. (1, 1) for m = 0.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"mcnemar: counts cannot be negative, given {only_a} and {only_b}")
    m, k = only_a + only_b, min(only_a, only_b)
    term = total = 1  # C(m, 0)
    for i in range(1, k + 1):
        term = term * (m - i + 1) // i
        total += term
    return min(1.0, 2 * total / (1 << m)), (2 * total - term) / (1 << m)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mean(b) - mean(a) when whole items (pairs) are drawn again with replacement.

    a, b: one score per item, the same items in the same order (bool, 0/1 or any float). The same seed gives the same
    interval. Resampling n items and counting their differences is one multinomial draw over the distinct differences,
    which for right/wrong answers are only -1, 0 and 1.
    """
    _check_confidence(confidence)
    a_scores, b_scores = _paired(a, b)
    if resamples < 1:
        raise ValueError(f"paired_bootstrap: resamples must be at least 1, given {resamples}")
    n = len(a_scores)
    differences = b_scores - a_scores
    values, counts = np.unique(differences, return_counts=True)
    rng = np.random.default_rng(seed)
    means = []
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        draws = min(rows, resamples - start)
        if len(values) <= 16:
            means.append(rng.multinomial(n, counts / n, size=draws) @ values / n)
        else:
            means.append(differences[rng.integers(n, size=(draws, n))].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def items_needed(discordant: float, difference: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Items for McNemar's exact test to find `difference` at level `alpha` with probability `power`.

    discordant = P(the two answers differ in correctness), difference = accuracy of one minus the other,
    0 < |difference| <= discordant <= 1. Connor's condition with the 1 that the exact test's discreteness costs,

        n |difference| - 1 >= z_(1 - alpha/2) sqrt(n discordant) + z_power sqrt(n (discordant - difference^2)),

    is quadratic in sqrt(n). ValueError outside those ranges (no number of items shows a difference of zero).
    """
    d = abs(difference)
    if not 0 < d <= discordant <= 1:
        raise ValueError(
            f"items_needed: expected 0 < |difference| <= discordant <= 1, given difference {difference} and discordant {discordant}"
        )
    if not (0 < alpha < 1 and 0 < power < 1):
        raise ValueError(f"items_needed: alpha and power lie between 0 and 1, given {alpha} and {power}")
    slope = _NORMAL.inv_cdf(1 - alpha / 2) * math.sqrt(discordant)
    slope += _NORMAL.inv_cdf(power) * math.sqrt(max(0.0, discordant - d * d))
    root = (slope + math.sqrt(max(0.0, slope * slope + 4 * d))) / (2 * d)
    return math.ceil(root * root)


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same items. `significant` is McNemar's exact p below alpha, and nothing else."""

    a_name: str
    b_name: str
    n: int
    a_correct: int
    b_correct: int
    only_a: int
    only_b: int
    difference_interval: tuple[float, float]  # paired bootstrap, b - a
    p_value: float  # McNemar, exact
    p_mid: float
    alpha: float
    confidence: float
    items_needed: int | None  # to show the observed difference; None when it is significant or exactly zero

    @property
    def a_accuracy(self) -> float:
        return self.a_correct / self.n

    @property
    def b_accuracy(self) -> float:
        return self.b_correct / self.n

    @property
    def difference(self) -> float:
        """Accuracy of b minus accuracy of a."""
        return (self.b_correct - self.a_correct) / self.n

    @property
    def significant(self) -> bool:
        return self.p_value < self.alpha

    def __str__(self) -> str:
        low, high = self.difference_interval
        figures = (
            f"{self.b_name} {self.b_accuracy:.3f}, {self.a_name} {self.a_accuracy:.3f}: difference "
            f"{self.difference:+.3f} [{low:+.3f}, {high:+.3f}], McNemar p {format_p(self.p_value)}, n = {self.n}"
        )
        if self.significant:
            better, worse = (self.b_name, self.a_name) if self.difference > 0 else (self.a_name, self.b_name)
            return f"{better} is better than {worse} ({figures})"
        if self.items_needed is None:
            return f"no difference can be claimed, and none was observed ({figures})"
        return (
            f"no difference can be claimed ({figures}); if the observed one is real, "
            f"about {self.items_needed} items would show it (alpha {self.alpha:g}, power 0.8)"
        )


def compare(
    a_correct: Sequence[bool],
    b_correct: Sequence[bool],
    a_name: str = "A",
    b_name: str = "B",
    alpha: float = 0.05,
    seed: int = 0,
) -> Comparison:
    """Compare two systems' right (True) and wrong answers to the same items, in the same order.

    Print the result: it claims a difference only where McNemar's exact test carries it at level `alpha`, and otherwise
    says how many items would be needed. ValueError when the lists differ in length, are empty, or hold anything but
    0 and 1.
    """
    a, b = _paired(a_correct, b_correct)
    for name, scores in ((a_name, a), (b_name, b)):
        if not np.isin(scores, (0.0, 1.0)).all():
            raise ValueError(f"compare: answers of {name} must be right (1) or wrong (0)")
    if not 0 < alpha < 1:
        raise ValueError(f"compare: alpha lies between 0 and 1, given {alpha}")
    n = len(a)
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    p_value, p_mid = mcnemar(only_a, only_b)
    needed = None
    if p_value >= alpha and only_a != only_b:
        needed = max(n + 1, items_needed((only_a + only_b) / n, (only_b - only_a) / n, alpha))
    return Comparison(
        a_name=a_name,
        b_name=b_name,
        n=n,
        a_correct=int(a.sum()),
        b_correct=int(b.sum()),
        only_a=only_a,
        only_b=only_b,
        difference_interval=paired_bootstrap(a, b, 1 - alpha, seed=seed),  # type: ignore[arg-type]
        p_value=p_value,
        p_mid=p_mid,
        alpha=alpha,
        confidence=1 - alpha,
        items_needed=needed,
    )


def format_p(p: float) -> str:
    """A p-value as papers print it: three digits, then an exponent, never a bare 0."""
    if p >= 0.001:
        return f"= {p:.3f}"
    return f"= {p:.1e}" if p > 1e-99 else "< 1e-99"


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a_scores, b_scores = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_scores.ndim != 1 or a_scores.shape != b_scores.shape:
        raise ValueError(
            "a paired comparison needs one score per item from each system, for the same items: "
            f"given shapes {a_scores.shape} and {b_scores.shape}"
        )
    if len(a_scores) == 0:
        raise ValueError("a paired comparison needs at least one item, given none")
    if not (np.isfinite(a_scores).all() and np.isfinite(b_scores).all()):
        raise ValueError("a paired comparison needs finite scores; some are NaN or infinite")
    return a_scores, b_scores


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, given {confidence}")
