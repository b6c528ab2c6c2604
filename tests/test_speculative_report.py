"""The four acceptance rates by hand, speedups, and the overlap that needs no coins."""

from __future__ import annotations

import torch
from model_cases import random_model

from posttrain.speculative import engine
from posttrain.speculative.draft_model import DraftModel
from posttrain.speculative.interface import Proposal, Requests
from posttrain.speculative.ngram import NgramDrafter
from posttrain.speculative.overlap import overlap
from posttrain.speculative.planner import expected_speedup, expected_tokens
from posttrain.speculative.report import Report

PROMPTS = [[3, 14, 15, 92, 6], [7], [1, 2, 3, 1, 2, 3, 1, 2]]


def test_counts_by_hand():
    """Three passes of two rows: drafts of 4 and 2, of 4 and none, and a tree of 6 nodes of depth 2 beside a chain."""
    report = Report()
    report.add([4, 2], [4, 2], [4, 0], 2.0, 0.5)
    report.add([4, 0], [4, 0], [1, 0], 2.0, 0.5)
    report.add([6, 2], [2, 2], [1, 2], 2.0, 0.0)
    assert (report.rows, report.passes, report.tokens, report.drafts) == (6, 3, 14, 5)
    assert report.acceptance_rate == 8 / 18 and report.mean_accepted_length == 1 + 8 / 5 and report.tokens_per_pass == 14 / 6
    assert report.alpha == 8 / (4 + 1 + 2 + 2 + 2)
    assert report.acceptance_by_position == [4 / 5, 2 / 5, 1 / 2, 1 / 2]
    assert report.lengths == {4: 2, 2: 1} and report.seconds == 7.0 and report.draft_seconds == 1.0


def test_the_prediction_is_the_theorem_where_all_drafts_are_as_long():
    report = Report()
    for accepted in (5, 2, 0, 5, 1):
        report.add([5], [5], [accepted], 1.0, 0.5)
    report.plain_seconds, report.costs = 5 + 13.0, {5: 1.0 + 5 * 0.1}
    assert report.alpha == 13 / 16
    assert report.predicted_speedup == expected_speedup(13 / 16, 5, 0.1) == expected_tokens(13 / 16, 5) / 1.5
    assert report.measured_speedup == 18 / 7.5
    report.lengths[3] += 1  # a length whose cost nobody measured
    assert report.predicted_speedup is None


def test_what_it_says():
    assert "no step" in str(Report())
    report = Report()
    report.add([0], [0], [0], 1.0, 0.0)
    assert str(report) == "1.00 tokens a pass, measured speedup n/a, predicted speedup n/a"
    report.add([2], [2], [1], 1.0, 0.0)
    assert "accepted of drafted 0.50, accepted of examined (alpha) 0.50, accepted up to each position 1.00 0.00" in str(report)


def test_overlap_by_hand():
    """Two rows of drafts of 2 and 1; the first is refused at once, so that its second place is not examined."""
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.125, 0.625, 0.25])
    target, drafted = p.log().expand(2, 3, 4), q.log().expand(2, 2, 3)
    tokens, num, accepted = torch.tensor([[1, 0], [0, -1]]), torch.tensor([2, 1]), torch.tensor([0, 1])
    requests = Requests([[0], [0]], [9, 9], torch.zeros(2), torch.zeros(2), temperature=1.0)
    total, count = overlap(Proposal(tokens, num, drafted), target, accepted, requests)
    assert count == 2 and round(total / count, 6) == 0.125 + 0.25 + 0.25
    total, count = overlap(Proposal(tokens, num), target, accepted, requests)
    assert count == 2 and round(total, 6) == 0.25 + 0.5
    requests.temperature = 0.0
    assert overlap(Proposal(tokens, num), target, accepted, requests) == (1.0, 2)


def test_overlap_is_what_coins_estimate():
    model = random_model("smollm2")
    small = random_model("smollm2", num_hidden_layers=2)
    small.load_state_dict({name: model.state_dict()[name] for name in small.state_dict()})
    for drafter, temperature in ((DraftModel(small, model), 1.0), (NgramDrafter(), 0.0)):
        _, report = engine.generate(
            model, PROMPTS * 8, 20, drafter, temperature=temperature, seed=0, draft_length=3, adaptive=False, measure_overlap=True
        )
        assert report.overlapped == report.examined > 100
        if temperature == 0:
            assert report.overlap == report.alpha
        else:
            assert abs(report.overlap - report.alpha) < 4 * (0.25 / report.examined) ** 0.5  # of coins, the largest deviation
