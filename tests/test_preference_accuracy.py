"""Held-out accuracy by hand-made log-probabilities: whose question each number answers."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from preference_run import pairs

from posttrain.adapters import LoraConfig, attach
from posttrain.preference.accuracy import PairAccuracy, pair_accuracy


def test_by_reward_and_by_likelihood():
    reference = torch.tensor([[-5.0, -4.0], [-3.0, -6.0], [-9.0, -8.0], [-2.0, -2.0]])
    policy = torch.tensor([[-4.0, -4.5], [-3.5, -6.0], [-8.5, -8.0], [-2.0, -2.0]])
    measured = PairAccuracy(policy, reference)
    assert measured.by_reward == [True, False, True, False]  # a tie is not right
    likelihood = measured.by_likelihood
    assert (likelihood.a_correct, likelihood.b_correct, likelihood.only_b) == (1, 2, 1)
    assert measured.reward_p_value == 1.0
    assert str(measured).startswith("by reward: 0.500 [") and "by likelihood: no difference can be claimed" in str(measured)


def test_all_right_is_significant():
    reference, better = torch.zeros(12, 2), torch.tensor([[0.0, -1.0]]).repeat(12, 1)
    measured = PairAccuracy(better, reference)
    assert measured.reward_p_value == 2 / 2**12 and measured.by_likelihood.significant


def test_the_base_is_the_reference_unless_another_is_given():
    torch.manual_seed(0)
    model = random_model(dtype=torch.float64, num_hidden_layers=1)
    attach(model, LoraConfig(r=2, init_lora_weights=False))
    model.train()
    measured = pair_accuracy(model, pairs(3))
    assert model.training and not torch.equal(measured.policy, measured.reference)
    again = pair_accuracy(model, pairs(3), measured.policy)
    assert torch.equal(again.policy, again.reference) and not any(again.by_reward)
    with pytest.raises(ValueError, match="no pairs"):
        pair_accuracy(model, [])
