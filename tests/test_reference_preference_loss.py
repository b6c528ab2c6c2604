"""The oracle of preference losses: numbers worked by hand, and every derivative against finite differences."""

from __future__ import annotations

import math

import pytest

from posttrain.reference import preference_loss as oracle

SMOOTHED = {"exo_pair": 0.1, "robust": 0.1, "sigmoid": 0.1, "aot": 0.2, "aot_unpaired": 0.2, "simpo": 0.1, "sigmoid_norm": 0.1}
THIRD = {"simpo": 0.5, "discopop": 0.05}
CHOSEN, REJECTED = [-12.0, -3.5, -20.25], [-11.0, -9.5, -18.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -3.0, -21.0], [-10.5, -8.0, -21.5]
LENGTHS = [4.0, 2.0, 7.0], [5.0, 3.0, 6.0]


def _run(name, chosen, rejected, divergence="reverse_kl", beta=0.3):
    return oracle.preference_loss(
        chosen, rejected, REF_CHOSEN, REF_REJECTED, beta, name, SMOOTHED.get(name, 0.0), THIRD.get(name, 0.0), *LENGTHS,
        weights=[1.0, 0.5, 2.0], divergence=divergence, alpha=0.4,
    )  # fmt: skip


def test_dpo_by_hand():
    """beta 0.1, ratios +2 and -3: -log sigmoid(0.5) = log(1 + e^-0.5)."""
    losses, chosen, rejected, d_chosen, d_rejected = oracle.preference_loss([-5.0], [-9.0], [-7.0], [-6.0], 0.1, "sigmoid")
    assert losses == [pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-15)]
    assert (chosen, rejected) == ([pytest.approx(0.2)], [pytest.approx(-0.3)])
    slope = -0.1 / (1 + math.exp(0.5))
    assert (d_chosen, d_rejected) == ([pytest.approx(slope, rel=1e-15)], [pytest.approx(-slope, rel=1e-15)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hinge", 1 - 0.1 * 5),
        ("ipo", (2 / 2 + 3 / 3 - 5) ** 2),
        ("sppo_hard", (2 - 5) ** 2 + (-3 + 5) ** 2),
        ("apo_zero", 1 / (1 + math.exp(0.2)) + 1 / (1 + math.exp(0.3))),
        ("sigmoid_norm", math.log(1 + math.exp(-0.2))),
        ("sft", 2.5),
        ("simpo", math.log(1 + math.exp(-(0.1 * (-2.5 + 3) - 0.5)))),
        ("nca_pair", math.log(1 + math.exp(-0.2)) + 0.5 * math.log(1 + math.exp(0.2)) + 0.5 * math.log(1 + math.exp(-0.3))),
    ],
)
def test_others_by_hand(name, expected):
    """Ratios +2 over 2 tokens and -3 over 3; log-probabilities per token -2.5 and -3."""
    (loss,), *_ = oracle.preference_loss([-5.0], [-9.0], [-7.0], [-6.0], 0.1, name, 0.0, 0.5, [2.0], [3.0])
    assert loss == pytest.approx(expected, rel=1e-14)


def test_aot_compares_sorted_margins():
    """Margins -1, 6 against references -2.5, 5 in the other order: differences 1.5 and 1."""
    losses, _, _, d_chosen, _ = oracle.preference_loss([-12.0, -3.5], [-11.0, -9.5], [-5.0, -7.5], [-10.0, -5.0], 1.0, "aot")
    assert losses == [pytest.approx(math.log(1 + math.exp(-1.5))), pytest.approx(math.log(1 + math.exp(-1)))]
    assert d_chosen == [pytest.approx(-1 / (1 + math.exp(1.5))), pytest.approx(-1 / (1 + math.e))]


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("name", oracle.LOSSES)
def test_derivatives_are_finite_differences(name, divergence):
    """Central differences of step h err by h^2 times the third derivative, and by the rounding of the losses over h."""
    h = 1e-5
    *_, d_chosen, d_rejected = _run(name, CHOSEN, REJECTED, divergence)
    for k in range(3):
        for which, derivatives in ((0, d_chosen), (1, d_rejected)):
            ends = []
            for step in (h, -h):
                moved = [list(CHOSEN), list(REJECTED)]
                moved[which][k] += step
                ends.append(math.fsum(_run(name, *moved, divergence)[0]))
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(derivatives[k], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", oracle.LOSSES)
@pytest.mark.parametrize("ratio", (1e4, -1e4))
def test_extreme_ratios_stay_finite(name, ratio):
    for chosen, rejected in ((ratio, 0.0), (0.0, ratio), (ratio, -ratio)):
        for divergence in oracle.DIVERGENCES:
            result = oracle.preference_loss(
                [chosen], [rejected], [0.0], [0.0], 0.1, name, SMOOTHED.get(name, 0.0), 0.05, [1.0], [1.0], None, divergence
            )
            assert all(math.isfinite(values[0]) for values in result)


def test_kto_by_hand():
    """Log-ratios 3 and -1 against a point of 1: beta 0.5 gives sigmoid(1) for the desirable, sigmoid(1) for the undesirable."""
    losses, rewards, slopes = oracle.kto_loss([-5.0, -9.0], [-8.0, -8.0], [True, False], 1.0, 0.5, 2.0, 1.0)
    miss = 1 / (1 + math.e)
    assert losses == [pytest.approx(2 * miss), pytest.approx(miss)] and rewards == [1.5, -0.5]
    assert slopes == [pytest.approx(-2 * 0.5 * miss * (1 - miss)), pytest.approx(0.5 * miss * (1 - miss))]
    assert oracle.kto_loss([-5.0], [-8.0], [True], -4.0, 0.5) == oracle.kto_loss([-5.0], [-8.0], [True], 0.0, 0.5)


def test_kto_s_derivatives_are_finite_differences():
    h, labels = 1e-5, [True, False, True]
    *_, slopes = oracle.kto_loss(CHOSEN, REF_CHOSEN, labels, 0.4, 0.3, 1.5, 0.5)
    for k in range(3):
        ends = [
            oracle.kto_loss([p + s * (i == k) for i, p in enumerate(CHOSEN)], REF_CHOSEN, labels, 0.4, 0.3, 1.5, 0.5)[0][k]
            for s in (h, -h)
        ]
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slopes[k], rel=1e-6)


def test_lengths_and_weights_by_hand():
    assert oracle.length_desensitized([-1.0, -2.0, -4.0], 2, 0.5) == -5.0
    assert oracle.length_desensitized([-1.0], 2, 0.5) == -1.0
    # log 0.5 - log(0.5^2 + 0.5^2) = 0, and log 0.9 - log(0.81 + 0.01)
    weight = oracle.policy_weight([math.log(0.5), math.log(0.9)], [[0.5, 0.5], [0.9, 0.1]])
    assert weight == pytest.approx(math.sqrt(0.9 / 0.82), rel=1e-15)
