"""The loop: what is drawn and measured, learning, resuming to the same bits, the reference, and what stops it."""

from __future__ import annotations

import math

import pytest
import torch
from model_cases import random_model
from rl_run import METHODS, PROMPTS, SAMPLING, Words, low_tokens, practised

from posttrain.adapters import LoraConfig, adapter_parameters, attach, disabled
from posttrain.checkpoint import checkpoints
from posttrain.errors import PosttrainError
from posttrain.rl.kl import adaptive_kl_coefficient
from posttrain.rl.loop import Sampling, check_prompts, collect
from posttrain.rl.prompts import Prompt

SHOWN = {"reward", "reward_std", "kl", "entropy", "clip_ratio/region_mean", "completions/mean_length", "frac_reward_zero_std"}


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_leaves_the_base_alone(tmp_path, name):
    model = random_model(num_hidden_layers=1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids)
    fast = {"learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    _, result = practised(tmp_path, name, model=model, max_steps=12, save_steps=0, **fast)
    entries = result.metrics
    assert SHOWN <= entries[-1].keys() and all(math.isfinite(value) for entry in entries for value in entry.values())
    first, last = (torch.tensor([e["reward"] for e in part]).mean() for part in (entries[:3], entries[-3:]))
    assert last > first + 0.2  # of 48 completions each, whose share of 3 tokens has a deviation of at most 0.5: 0.07
    assert entries[-1]["kl"] > entries[0]["kl"]
    if name != "rloo":  # which learns twice from its first draw; the others' policy was then still the reference
        assert abs(entries[0]["kl"]) <= 64 * torch.finfo(torch.float32).eps
    with torch.no_grad(), disabled(model):
        assert torch.equal(model(ids), before)
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "reward.svg").is_file()
    assert not hasattr(model, "value_head")


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run of each method: (the adapter's parameters, entries)."""
    runs = {}
    for name in METHODS:
        model, result = practised(tmp_path_factory.mktemp(name), name)
        runs[name] = {key: p.detach().clone() for key, p in adapter_parameters(model).items()}, result.metrics
    return runs


@pytest.mark.parametrize("name", METHODS)
def test_resumed_it_ends_in_the_same_bits(tmp_path, whole, name):
    def stop(entry):
        if entry["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        practised(tmp_path, name, on_step=stop)
    again, resumed = practised(tmp_path, name, resume=True)
    for key, parameter in whole[name][0].items():
        assert torch.equal(parameter, adapter_parameters(again)[key]), key
    timed = ("seconds", "tokens_per_second", "peak_memory")
    for one, other in zip(whole[name][1], resumed.metrics, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_the_penalty_s_weight_is_adapted(whole):
    weights, divergences = ([e[key] for e in whole["ppo"][1]] for key in ("kl_coef", "kl"))
    assert weights[0] == METHODS["ppo"].kl_coef
    for before, kl, after in zip(weights, divergences, weights[1:], strict=False):
        assert after == adaptive_kl_coefficient(before, kl, 2.0)


def test_what_is_drawn_and_that_on_policy_nothing_is_clipped(whole):
    model = random_model(num_hidden_layers=1)
    attach(model, LoraConfig(r=2))
    rollouts = collect(model, Words(), PROMPTS, [0, 0, 0, 0, 5, 5, 5, 5], low_tokens, SAMPLING, 2, seed=1)
    lengths = [len(completion) for _, completion in rollouts.sequences]
    assert rollouts.lengths.tolist() == lengths and max(lengths) <= 3
    for (prompt, completion), ended in zip(rollouts.sequences, rollouts.ended.tolist(), strict=True):
        assert prompt in (PROMPTS[0].ids, PROMPTS[5].ids)
        assert (completion[-1] == 2) == ended and 2 not in completion[:-1]
    again = collect(model, Words(), PROMPTS, [0, 0, 0, 0, 5, 5, 5, 5], low_tokens, SAMPLING, 2, seed=1)
    assert again.sequences == rollouts.sequences
    assert whole["grpo"][1][0]["clip_ratio/region_mean"] == 0.0


@pytest.mark.parametrize(
    ("reward", "message"),
    (
        (lambda completion_ids, **_: [math.nan if i == 5 else 0.0 for i in range(len(completion_ids))], "returned nan for item"),
        (lambda **_: 1 / 0, "raised ZeroDivisionError: division by zero on item"),
        (lambda **_: [0.0], "returned 1 rewards for 16 completions"),
        (lambda completion_ids, **_: [None] * len(completion_ids), "returned None for item"),
    ),
)
def test_a_reward_that_cannot_be_had_stops_it(tmp_path, whole, reward, message):
    """Named, with nothing half written: the checkpoint of the step before is whole and the run goes on from it."""
    calls = []

    def sometimes(**given):
        calls.append(len(given["completions"]))
        return reward(**given) if len(calls) > 2 else low_tokens(**given)

    with pytest.raises(PosttrainError, match=message):
        practised(tmp_path, "grpo", reward=sometimes)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    if message.startswith("returned nan"):
        again, _ = practised(tmp_path, "grpo", resume=True)
        assert all(torch.equal(p, whole["grpo"][0][key]) for key, p in adapter_parameters(again).items())


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    huge = 3e38
    with pytest.raises(PosttrainError, match="step 1, update 1: the loss is .* stopped before that update, and no checkpoint"):
        practised(tmp_path, "ppo", reward=lambda completions, **_: [huge * (-1) ** i for i in range(len(completions))])


def test_another_run_is_not_resumed(tmp_path):
    practised(tmp_path, "grpo", max_steps=2)
    with pytest.raises(PosttrainError, match=r"belongs to another run: method\."):
        practised(tmp_path, "rloo", max_steps=2, resume=True)
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=1).bfloat16()
    with pytest.raises(PosttrainError, match=r"another run: held\.dtype was 'float32' and is 'bfloat16'"):
        practised(tmp_path, "grpo", max_steps=2, resume=True, model=model)
    with pytest.raises(PosttrainError, match="holds checkpoint-2 of an earlier run"):
        practised(tmp_path, "grpo", max_steps=2)


def test_prompts_that_cannot_be_continued():
    model = random_model()
    with pytest.raises(PosttrainError, match="holds no prompts"):
        check_prompts(model, [], SAMPLING)
    with pytest.raises(PosttrainError, match="item 1 has 62 tokens, which with max_completion_length=3 exceed"):
        check_prompts(model, [PROMPTS[0], Prompt([5] * 62, "x", {})], SAMPLING)
    with pytest.raises(ValueError, match="item 1 holds token ids from 5 to 97; the vocabulary has 0 to 96"):
        check_prompts(model, [PROMPTS[0], Prompt([5, 97], "x", {})], SAMPLING)


def test_sampling_that_is_refused():
    with pytest.raises(ValueError, match="expected a positive number"):
        Sampling(temperature=0.0)
    with pytest.raises(ValueError, match="expected at least 1"):
        Sampling(num_generations=0)
    with pytest.raises(PosttrainError, match="'7 8', which is 2 tokens"):
        Sampling(stop="7 8").stop_id(Words())
    assert Sampling(stop="7").stop_id(Words()) == 7 and Sampling().stop_id(Words()) == 2
