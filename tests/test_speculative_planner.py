"""The planner reproduces the table of arXiv:2211.17192 and its formulas against simulation."""

from __future__ import annotations

import random

import pytest

from posttrain.cli import main
from posttrain.speculative.planner import best_gamma, expected_operations, expected_speedup, expected_tokens, plan

# Table 2 and 4 of the paper: c of the three drafts, (gamma, alpha, the expected improvement it prints)
COST = {"small": 0.02, "base": 0.04, "large": 0.11}
TABLE = [
    ("small", 7, 0.75, 3.2), ("base", 7, 0.80, 3.3), ("large", 7, 0.82, 2.5),
    ("small", 7, 0.62, 2.3), ("base", 5, 0.68, 2.4), ("large", 3, 0.71, 2.0),
    ("small", 5, 0.65, 2.4), ("base", 5, 0.73, 2.6), ("large", 3, 0.74, 2.0),
    ("small", 5, 0.53, 1.9), ("base", 3, 0.55, 1.8), ("large", 3, 0.56, 1.6),
]  # fmt: skip


def test_the_papers_table():
    """alpha is printed with two digits, the improvement with one: it lies between what alpha +- 0.005 give, rounded. Of one row the
    paper prints 2.0 where its alpha gives 1.92 to 1.95."""
    other = []
    for draft, gamma, alpha, printed in TABLE:
        low, high = (round(expected_speedup(alpha + error, gamma, COST[draft]), 1) for error in (-0.005, 0.005))
        if not low <= printed <= high:
            other.append((draft, gamma, alpha, printed, low, high))
    assert other == [("large", 3, 0.71, 2.0, 1.9, 1.9)]


def test_the_command_prints_it(capsys):
    assert main(["speculative", "plan", "--alpha", "0.75", "0.8", "--gamma", "7", "--c", "0.02"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["0.75", "0.02", "7", "3.60", "3.16", "2.26", "9", "3.20"],
        ["0.80", "0.02", "7", "4.16", "3.65", "1.96", "11", "3.82"],
    ]
    assert main(["speculative", "plan", "--alpha", "0.5", "--c", "0.1", "--pass-costs", "1", "1.5", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[2] == "0"  # where a longer pass costs that much, no draft pays
    assert main(["speculative", "plan", "--alpha", "1.5", "--c", "0.1"]) == 1
    assert main(["speculative", "plan", "--alpha", "0.5", "--c", "0", "--pass-costs", "0"]) == 1
    assert "alpha is 1.5; expected" in capsys.readouterr().err


def test_expected_tokens_against_coins():
    generator = random.Random(0)
    counts = []
    for _ in range(20000):
        accepted = 0
        while accepted < 5 and generator.random() < 0.7:
            accepted += 1
        counts.append(accepted + 1)
    mean = sum(counts) / len(counts)
    error = (sum((count - mean) ** 2 for count in counts) / len(counts) ** 2) ** 0.5
    assert abs(mean - expected_tokens(0.7, 5)) < 4 * error


def test_ends():
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.0, 4) == 1 and expected_tokens(0.5, 0) == 1
    assert expected_speedup(0.9, 0, 0.3) == 1
    assert best_gamma(0.1, 0.2) == 0 and best_gamma(0.3, 0.2) > 0  # a gain is possible iff alpha > c
    assert plan(0.5, None, 0.9).gamma == 0
    assert expected_operations(1.0, 3, 0.0) == 1  # nothing is computed in vain, and the draft is free


@pytest.mark.parametrize("wrong", [(-0.1, 1, 0.1), (0.5, -1, 0.1), (0.5, 1, -0.1), (0.5, 1, float("inf"))])
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(ValueError, match="expected"):
        plan(*wrong)
