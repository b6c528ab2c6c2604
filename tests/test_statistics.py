"""Hand-worked numbers, published tables, and exact enumeration where a formula is an approximation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import statistics as stats


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_newcombes_table(correct: int, n: int, low: float, high: float) -> None:
    interval = stats.wilson_interval(correct, n)
    assert (round(interval[0], 4), round(interval[1], 4)) == (low, high)


def test_wilson_ends() -> None:
    assert stats.wilson_interval(0, 0) == (0.0, 1.0)
    assert stats.wilson_interval(0, 7)[0] == 0.0
    assert stats.wilson_interval(7, 7)[1] == 1.0
    for correct, n in ((-1, 3), (4, 3), (0, -1)):
        with pytest.raises(ValueError, match="impossible"):
            stats.wilson_interval(correct, n)
    with pytest.raises(ValueError, match="confidence"):
        stats.wilson_interval(1, 2, confidence=1.0)


@given(st.integers(0, 400), st.integers(1, 400), st.floats(0.5, 0.999))
def test_wilson_contains_the_estimate_mirrors_and_shrinks(correct: int, n: int, confidence: float) -> None:
    correct = min(correct, n)
    low, high = stats.wilson_interval(correct, n, confidence)
    assert 0 <= low <= correct / n <= high <= 1
    mirrored = stats.wilson_interval(n - correct, n, confidence)
    assert abs(low - (1 - mirrored[1])) <= 8 * math.ulp(1.0)  # some dozen roundings of numbers below 1
    wider = stats.wilson_interval(4 * correct, 4 * n, confidence)
    assert wider[1] - wider[0] < high - low


def _binomial_tail(k: int, m: int) -> Fraction:
    return Fraction(sum(math.comb(m, i) for i in range(k + 1)), 2**m)


def test_mcnemar_by_hand() -> None:
    # Bentur et al. 2009 as analysed by Fagerland, Lydersen, Laake 2013: 7 against 1, exact 0.070, mid-p 0.039.
    assert stats.mcnemar(7, 1) == (2 * 9 / 256, (2 * 9 - 8) / 256)
    # Agresti's approval ratings, 150 against 86: exact p = 3.716e-05.
    assert f"{stats.mcnemar(86, 150)[0]:.3e}" == "3.716e-05"
    assert stats.mcnemar(0, 0) == (1.0, 1.0)
    assert stats.mcnemar(0, 6) == (2 / 64, 1 / 64)
    assert stats.mcnemar(12, 12) == (1.0, 1.0)
    with pytest.raises(ValueError, match="negative"):
        stats.mcnemar(-1, 3)


@given(st.integers(0, 120), st.integers(0, 120))
def test_mcnemar_is_the_binomial_sum(only_a: int, only_b: int) -> None:
    m, k = only_a + only_b, min(only_a, only_b)
    exact, mid_p = stats.mcnemar(only_a, only_b)
    assert exact == float(min(Fraction(1), 2 * _binomial_tail(k, m)))
    assert mid_p == float(2 * _binomial_tail(k, m) - Fraction(math.comb(m, k), 2**m))
    assert (exact, mid_p) == stats.mcnemar(only_b, only_a)


def test_mcnemar_large_counts_do_not_overflow() -> None:
    exact, mid_p = stats.mcnemar(2000, 4000)
    assert 0 < mid_p < exact < 1e-100
    assert stats.mcnemar(0, 5000)[0] == 0.0  # 2^-4999 is below the smallest double: rounds to 0, as it should


def test_bootstrap_matches_exact_enumeration() -> None:
    """Three items: all 27 resamples are known, so the quantiles are those of a known discrete distribution."""
    a, b = [0, 0, 1], [1, 0, 0]  # differences 1, 0, -1; P(mean = 1) = P(mean = -1) = 1/27
    assert stats.paired_bootstrap(a, b, confidence=0.95) == (-1.0, 1.0)  # 1/27 > 0.025
    low, high = stats.paired_bootstrap(a, b, confidence=0.90)  # 1/27 < 0.05 < 1/27 + 3/27
    assert (round(3 * low), round(3 * high)) == (-2, 2)


def test_bootstrap_is_seeded_and_shifts_with_the_scores() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=200), rng.normal(size=200)
    first = stats.paired_bootstrap(a, b, resamples=500, seed=1)
    assert first == stats.paired_bootstrap(a, b, resamples=500, seed=1)
    assert first != stats.paired_bootstrap(a, b, resamples=500, seed=2)
    # Scores in eighths, 256 items and quartiles of 401 resamples leave nothing to round: the shift is exact.
    a, b = rng.integers(0, 99, 256) / 8, rng.integers(0, 99, 256) / 8
    low, high = stats.paired_bootstrap(a, b, confidence=0.5, resamples=401)
    assert stats.paired_bootstrap(a, b + 8.0, confidence=0.5, resamples=401) == (low + 8.0, high + 8.0)
    assert stats.paired_bootstrap([2.0, 3.0], [2.5, 3.5]) == (0.5, 0.5)


def test_bootstrap_covers_at_its_level() -> None:
    """200 experiments with a known difference of 0.1: a 90 % interval misses it in about 20 of them.

    The number of misses is Binomial(200, ~0.1); the bounds below are its 1e-6 quantiles, found here by enumeration.
    """
    rng = np.random.default_rng(0)
    experiments, n, level = 200, 300, 0.1
    misses = 0
    for _ in range(experiments):
        u = rng.random(n)
        a, b = (u < 0.5).astype(int), ((u > 0.1) & (u < 0.7)).astype(int)
        low, high = stats.paired_bootstrap(a, b, confidence=1 - level, resamples=1000)
        misses += not low <= 0.1 <= high
    mass = np.cumsum([math.comb(experiments, i) * level**i * (1 - level) ** (experiments - i) for i in range(101)])
    assert np.searchsorted(mass, 1e-6) <= misses <= np.searchsorted(mass, 1 - 1e-6)


def _exact_power(n: int, p_a: float, p_b: float, alpha: float) -> float:
    """Probability that McNemar's exact test rejects with n items, by summing over all discordant counts."""
    power = 0.0
    for m in range(n + 1):
        p_m = math.comb(n, m) * (p_a + p_b) ** m * (1 - p_a - p_b) ** (n - m)
        q = p_b / (p_a + p_b)
        for only_b in range(m + 1):
            if stats.mcnemar(m - only_b, only_b)[0] < alpha:
                power += p_m * math.comb(m, only_b) * q**only_b * (1 - q) ** (m - only_b)
    return power


@pytest.mark.parametrize(("p_a", "p_b"), [(0.05, 0.30), (0.10, 0.40), (0.0, 0.2)])
def test_items_needed_gives_the_stated_power(p_a: float, p_b: float) -> None:
    """Exact power at the answer is at least 0.8, and a quarter fewer items would fall short of it."""
    n = stats.items_needed(p_a + p_b, p_b - p_a)
    assert _exact_power(n, p_a, p_b, 0.05) >= 0.8
    assert _exact_power(3 * n // 4, p_a, p_b, 0.05) < 0.8


def test_items_needed_by_hand_and_bounds() -> None:
    # discordant = difference = 1: sqrt(n) = (1.95996 + sqrt(1.95996^2 + 4)) / 2 = 2.38015, n = 5.665 -> 6.
    # Six items that all favour B give p = 2/64 < 0.05; five give 2/32 > 0.05.
    assert stats.items_needed(1.0, 1.0) == 6
    assert stats.items_needed(0.3, -0.1) == stats.items_needed(0.3, 0.1)
    for discordant, difference in ((0.2, 0.0), (0.1, 0.2), (1.5, 0.2)):
        with pytest.raises(ValueError, match="expected 0 <"):
            stats.items_needed(discordant, difference)


def test_compare_claims_what_the_data_carry() -> None:
    a = [1] * 60 + [0] * 40
    b = [1] * 58 + [0] * 2 + [1] * 24 + [0] * 16
    c = stats.compare(a, b, "before", "after")
    assert (c.only_a, c.only_b, c.a_correct, c.b_correct) == (2, 24, 60, 82)
    assert c.p_value == stats.mcnemar(2, 24)[0]
    assert c.significant and c.items_needed is None
    assert str(c).startswith("after is better than before (after 0.820, before 0.600: difference +0.220 [")
    assert c.difference_interval[0] > 0
    worse = stats.compare(b, a, "before", "after")
    assert str(worse).startswith("before is better than after")


def test_compare_refuses_what_the_data_cannot_carry() -> None:
    c = stats.compare([1] * 60 + [0] * 40, [1] * 50 + [0] * 10 + [1] * 14 + [0] * 26)
    assert not c.significant
    assert c.items_needed == stats.items_needed(0.24, 0.04)
    text = str(c)
    assert text.startswith("no difference can be claimed") and f"about {c.items_needed} items" in text
    five = stats.compare([0] * 5, [1] * 5)  # all five favour B, yet p = 1/16
    assert not five.significant and five.items_needed == 6
    same = stats.compare([1, 0, 1, 0], [0, 1, 1, 0])
    assert same.items_needed is None and "none was observed" in str(same)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_compare_never_claims_without_p_below_alpha(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    c = stats.compare(a, b)
    assert ("is better than" in str(c)) == (stats.mcnemar(c.only_a, c.only_b)[0] < 0.05)
    assert c.items_needed is None or c.items_needed > c.n


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [([1, 0], [1], "same items"), ([], [], "at least one"), ([1, 2], [1, 0], "right"), ([1, math.nan], [1, 0], "NaN")],
)
def test_bad_input_is_named(a: list[float], b: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        stats.compare(a, b)


def test_p_values_print_like_a_paper() -> None:
    assert [stats.format_p(p) for p in (0.25, 0.0012, 3.2e-5, 0.0)] == ["= 0.250", "= 0.001", "= 3.2e-05", "< 1e-99"]
