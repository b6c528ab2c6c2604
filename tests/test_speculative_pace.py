"""Draft lengths from acceptance and times, on a made-up clock: the best, switching off, coming back, the most that is lost."""

from __future__ import annotations

import math
import random

import pytest

from posttrain.speculative.pace import PROMPT_MARGIN, Pace
from posttrain.speculative.planner import best_gamma
from posttrain.speculative.report import Report


class Machine:
    """Drafts accepted with probability alpha(token), passes of n tokens costing v(n), a drafted token c, of noisy seconds."""

    def __init__(
        self, alpha, v=lambda n: 1.0, c=0.0, noise=0.1, matches=1.0, prompt_cost=0.0, prompt=5.0, rows=1, longest=8, missed=0.0
    ):
        self.alpha, self.v, self.c, self.noise, self.matches, self.rows = alpha, v, c, noise, matches, rows
        self.missed = missed  # seconds to take in what passed without a draft
        self.report, self.generator = Report(), random.Random(0)
        self.pace = Pace(longest, True, prompt_cost, self.report)
        self.seconds, self.prompt, self.prompt_cost, self.drafting = prompt, prompt, prompt_cost, False
        self.lengths = []

    def _took(self, seconds):
        seconds *= 1 + self.noise * self.generator.random() ** 2
        self.seconds += seconds
        return seconds

    def run(self, tokens: int) -> float:
        """Seconds over those of plain decoding."""
        self.pace.prompts_seen(self.prompt, tokens)
        done = 0
        while done < tokens:
            length = self.pace.length([max(0, int(tokens - done - 1))] * self.rows)
            if self.generator.random() > self.matches:
                length = 0
            accepted = []
            for _ in range(self.rows):
                right = 0
                while right < length and self.generator.random() < self.alpha(done):
                    right += 1
                accepted.append(right)
            first = length and not self.drafting
            self.drafting = self.drafting or length > 0
            behind = self.missed if length and self.lengths and not self.lengths[-1] else 0.0
            draft = self._took(self.c * length + (self.prompt_cost * self.prompt if first else behind))
            depth = [length] * self.rows
            self.pace.stepped(depth, depth, accepted, length + 1, draft, self._took(self.v(length + 1)))
            self.lengths.append(length)
            done += 1 + sum(accepted) / self.rows
        plain = self.prompt + done * (1 + self.noise / 3)
        return self.seconds / plain


@pytest.mark.parametrize(("alpha", "c"), [(0.9, 0.05), (0.8, 0.1), (0.6, 0.1), (0.7, 0.0)])
def test_the_best_length_is_found(alpha, c):
    machine = Machine(lambda done: alpha, lambda n: 1 + 0.02 * (n - 1), c, noise=0.0)
    machine.run(3000)
    best = min(8, best_gamma(alpha, c, lambda n: 1 + 0.02 * (n - 1), longest=8))
    usual = sorted(machine.lengths[50:])[len(machine.lengths[50:]) // 2]
    assert abs(usual - best) <= 2 and machine.report.measured_speedup > 1.2


COSTLY = {"v": lambda n: 1 + 0.2 * (n - 1), "c": 0.3, "prompt_cost": 0.3, "prompt": 1.0, "noise": 0.02}


@pytest.mark.parametrize("tokens", [32, 64, 256, 1500])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("missed", [0.0, 0.5])
def test_never_much_slower_than_plain(alpha, rows, tokens, missed):
    """Where drafts are dear and bad, and so is taking in what was missed while they rested; and it says that it rested."""
    machine = Machine(lambda done: alpha, rows=rows, missed=missed, **COSTLY)
    assert machine.run(tokens) <= 1.05
    assert machine.report.rested > tokens / 2 and "switched off" in str(machine.report)


class Shaky(Machine):
    """Seconds go up and down by 15 %, with slow moments of a few steps; `true` counts them as they would have been."""

    def __init__(self, seed, *args, **fields):
        super().__init__(*args, **fields)
        self.generator, self.level, self.true = random.Random(seed), 0.0, self.prompt

    def _took(self, seconds):
        self.level = 0.7 * self.level + 0.11 * self.generator.gauss(0, 1)
        self.true += seconds
        return seconds * math.exp(self.level)


@pytest.mark.parametrize(("alpha", "c"), [(0.0, 0.25), (0.05, 0.1), (0.3, 0.35), (0.4, 0.6)])
@pytest.mark.parametrize("tokens", [48, 256])
def test_slow_moments_of_the_machine_are_not_mistaken_for_gains(alpha, c, tokens):
    """The first plain pass, of which there is one before the first draft, may be a slow one."""
    for seed in range(50):
        machine = Shaky(seed, lambda done: alpha, lambda n: 1 + 0.01 * (n - 1), c, prompt_cost=c / 2, prompt=2.0, longest=16)
        machine.run(tokens)
        assert machine.true <= 1.05 * (machine.prompt + machine.report.tokens)


def test_it_comes_back_when_the_text_changes():
    machine = Machine(lambda done: 0.0 if done < 400 else 0.95, lambda n: 1 + 0.05 * (n - 1), c=0.05)
    machine.run(2000)
    plain_part = machine.lengths[:400]
    assert sum(length == 0 for length in plain_part) > 300 and sum(machine.lengths[-50:]) / 50 > 4


def test_rare_matches_cost_nothing():
    machine = Machine(lambda done: 0.8, lambda n: 1 + 0.02 * (n - 1), matches=0.1)
    assert machine.run(500) < 0.95 and machine.report.drafts > 20


def test_prompts_that_could_not_be_won_back_are_not_read():
    dear = Machine(lambda done: 1.0, prompt_cost=0.5, prompt=500.0, noise=0.0)
    dear.run(50)
    cheap = Machine(lambda done: 1.0, prompt_cost=0.01, prompt=500.0, noise=0.0)
    cheap.run(50)
    assert dear.report.drafts == 0 and dear.report.rested > 40 and cheap.report.drafts > 0
    assert 0.01 * 500 < PROMPT_MARGIN * 550 < 0.5 * 500


def test_not_adaptive_drafts_as_long_as_it_may():
    pace = Pace(5, False, 0.0, Report())
    assert [pace.length(caps) for caps in ([9, 1], [3, 2], [0])] == [5, 3, 0]
