"""Reward functions, called as TRL calls them; and what is told where one fails."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model

from posttrain.adapters import LoraConfig, active_adapter, attach
from posttrain.errors import PosttrainError
from posttrain.preference.data import Pair
from posttrain.reward import score, train_reward_model
from posttrain.rl.prompts import Prompt
from posttrain.rl.rewards import call_reward, exact_match, regex_match, reward_model
from posttrain.trainer import TrainConfig

PROMPTS = [Prompt([1, 2], "one", {"answer": "yes", "level": 3}), Prompt([3], "two", {"answer": 7, "level": 4})]


def test_exact_match():
    assert exact_match(completions=[" yes\n", "yes, indeed", "7"], answer=["yes", "yes", 7], prompts=[]) == [1.0, 0.0, 1.0]
    with pytest.raises(PosttrainError, match="has no such column"):
        exact_match(completions=["yes"])


def test_regex_match():
    given = {"completions": ["answer: 7", "answer: 8", "none"], "answer": [7, "7", "7"]}
    assert regex_match(r"answer: (\d+)")(**given) == [1.0, 0.0, 0.0]
    assert regex_match(r"^answer")(**given) == [1.0, 1.0, 0.0]
    assert regex_match(r"answer: 9|(\w+):")(completions=["answer: 9"], answer=["x"]) == [0.0]
    with pytest.raises(PosttrainError, match="is no regular expression"):
        regex_match("(")
    with pytest.raises(PosttrainError, match="has no such column"):
        regex_match("(a)")(completions=["a"])


def test_what_a_function_is_given():
    def check(prompts, completions, prompt_ids, completion_ids, answer, level):
        assert (prompts, completions, prompt_ids) == (["one", "two"], ["a", "b"], [[1, 2], [3]])
        assert (completion_ids, answer, level) == ([[9], [8, 7]], ["yes", 7], [3, 4])
        return torch.tensor([0.5, 1.0])

    assert call_reward(check, PROMPTS, ["a", "b"], [[9], [8, 7]], [11, 12]) == [0.5, 1.0]
    assert call_reward(lambda completions, **_: [True, 2], PROMPTS, ["a", "b"], [[9], [8]], [11, 12]) == [1.0, 2.0]


def test_the_item_is_named():
    def picky(completions, **_):
        return [1 / (text != "b") for text in completions]

    with pytest.raises(PosttrainError, match=r"ZeroDivisionError: .* on item 12 of the data \(completion 'b'\)"):
        call_reward(picky, PROMPTS, ["a", "b"], [[9], [8]], [11, 12])
    with pytest.raises(PosttrainError, match=r"returned inf for item 11 of the data \(completion 'a'\); expected a finite"):
        call_reward(lambda **_: [float("inf"), 0.0], PROMPTS, ["a", "b"], [[9], [8]], [11, 12])
    with pytest.raises(PosttrainError, match="on the 2 completions together, and on none of them alone"):
        call_reward(lambda completions, **_: [1.0][len(completions) - 1 :] or [][0], PROMPTS, ["a", "b"], [[9], [8]], [11, 12])


def test_a_reward_model_beside_the_policy(tmp_path):
    pairs = [Pair([5], [i, 7], [i, 8]) for i in range(10, 26)]
    alone = random_model(num_hidden_layers=1)
    train_reward_model(alone, pairs, TrainConfig(tmp_path, max_steps=3, learning_rate=1e-2), quiet=True)
    given = [([5, 6], [30, 7]), ([9], [31])]
    expected = score(alone.eval(), given)
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=1)
    with pytest.raises(PosttrainError, match="attach the policy's adapter before"):
        reward_model(model, tmp_path)
    attach(model, LoraConfig(r=2, init_lora_weights=False))
    reward = reward_model(model, tmp_path, any_base=True)
    prompts, completions = zip(*given, strict=True)
    assert torch.equal(reward(prompt_ids=prompts, completion_ids=completions, prompts=None), expected)
    assert active_adapter(model) == "default"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if "default" in n}
