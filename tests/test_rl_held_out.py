"""Held-out prompts: base and policy draw from one seed, the comparison claims what the items carry, nothing is changed."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from rl_run import PROMPTS, SAMPLING, Words, low_tokens, practised

from posttrain.adapters import LoraConfig, active_adapter, attach
from posttrain.rl.held_out import HeldOut, held_out


def test_an_adapter_that_does_nothing_changes_nothing():
    model = random_model(num_hidden_layers=1)
    attach(model, LoraConfig(r=2))  # B is zero
    found = held_out(model, Words(), PROMPTS, low_tokens, SAMPLING, batch_size=3)
    assert found.before == found.after and set(found.log_ratios) == {0.0} and found.rose == (0, 0, 1.0)


def test_what_was_learned_shows(tmp_path):
    fast = {"max_steps": 10, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "save_steps": 0}
    model, _ = practised(tmp_path, "grpo", **fast)
    found = held_out(model, Words(), PROMPTS * 4, low_tokens, SAMPLING)
    up, down, p = found.rose
    assert sum(found.after) > sum(found.before) and up > down and p < 0.05
    assert sum(found.log_ratios) > 0 and active_adapter(model) == "default"
    assert "mean reward" in str(found) and "KL to the base" in str(found)
    again = held_out(model, Words(), PROMPTS * 4, low_tokens, SAMPLING)
    assert again == found


def test_right_and_wrong_answers_are_compared_by_mcnemar():
    text = str(HeldOut([0.0] * 10 + [1.0], [1.0] * 10 + [1.0], [0.5] * 11))
    assert text.startswith("policy is better than base (policy 1.000, base 0.091") and "McNemar p = 0.002" in text
    assert "KL to the base 0.500 [0.500, 0.500] nats a completion" in text
    assert "no difference can be claimed" in str(HeldOut([0.0, 1.0], [1.0, 1.0], [0.0, 0.0]))


def test_a_sign_test_by_hand():
    """Three rose, one fell: 2 (1 + 4) / 16; ties do not count."""
    found = HeldOut([0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.3, 0.5], [0.0] * 5)
    assert found.rose == (3, 1, pytest.approx(0.625))
    assert torch.tensor(found.after).mean() > torch.tensor(found.before).mean()
