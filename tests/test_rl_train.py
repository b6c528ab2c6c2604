"""PPO and GRPO as the loop runs them: advantages and losses put together as the oracles do, however the step is cut; settings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from model_cases import random_model
from rl_cases import assert_same, flat, random_values, rows
from rl_run import SAMPLING

from posttrain.adapters import LoraConfig, attach
from posttrain.checkpoint import trainable
from posttrain.reference import gae as gae_oracle
from posttrain.reference import grpo as grpo_oracle
from posttrain.reference import kl as kl_oracle
from posttrain.reference import ppo as ppo_oracle
from posttrain.rl.loop import Update, add_value_head
from posttrain.rl.rollouts import Rollouts, policy
from posttrain.rl.train import GRPOConfig, PPOConfig, grpo, grpo_advantages, ppo, ppo_advantages
from posttrain.trainer import accumulate

LENGTHS = [2, 3, 1, 3]
SEQUENCES = [([5, 6], [7, 8]), ([5, 6], [9, 10, 11]), ([12], [13]), ([12], [14, 15, 16])]


def _rollouts(dtype=torch.float64, ended=(True, False, True, True)):
    names = ("logps", "ref_logps", "values", "entropy")
    by_token = dict(zip(names, (x.to(dtype) for x in random_values(LENGTHS, 4, spread=0.3)), strict=True))
    rewards = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=dtype)
    return Rollouts(SEQUENCES, torch.tensor(ended), torch.tensor(LENGTHS), by_token, {"rewards": rewards})


@pytest.mark.parametrize("estimator", ("k1", "k3"))
@pytest.mark.parametrize(("whitened", "penalty"), ((False, None), (True, 0.7)))
def test_ppo_s_advantages(estimator, whitened, penalty):
    rollouts = _rollouts()
    settings = PPOConfig(kl_estimator=estimator, whiten_rewards=whitened, missing_eos_penalty=penalty, gamma=0.9, lam=0.8)
    found, measured = ppo_advantages(settings, rollouts, kl_coef=0.3)
    logps, ref, values = (rows(rollouts.by_token[name], LENGTHS) for name in ("logps", "ref_logps", "values"))
    scores = [1.0, -0.5 - (penalty or 0.0), 0.25, 2.0]
    estimate = getattr(kl_oracle, estimator)
    kls = [[estimate(p, r)[0] for p, r in zip(*row, strict=True)] for row in zip(logps, ref, strict=True)]
    rewards = ppo_oracle.token_rewards(scores, kls, 0.3)
    if whitened:
        rewards = gae_oracle.whiten(rewards, shift_mean=False)
    advantages, returns = zip(*(gae_oracle.gae(r, v, 0.9, 0.8) for r, v in zip(rewards, values, strict=True)), strict=True)
    assert_same(found.by_token["advantages"], flat(gae_oracle.whiten(advantages)))
    assert_same(found.by_token["returns"], flat(returns))
    assert measured["kl"] == pytest.approx((flat(logps) - flat(ref)).sum().item() / 4) and measured["kl_coef"] == 0.3


def test_rloo_s_penalty_is_part_of_the_reward():
    rollouts = _rollouts()
    settings = GRPOConfig(advantages="rloo", loss_type="rloo", beta=0.5)
    found, _ = grpo_advantages(settings, replace(SAMPLING, num_generations=2), rollouts, 0.0)
    divergence = [sum(row) for row in rows(rollouts.by_token["logps"] - rollouts.by_token["ref_logps"], LENGTHS)]
    rewards = [r - 0.5 * d for r, d in zip((1.0, -0.5, 0.25, 2.0), divergence, strict=True)]
    assert_same(found.by_completion["advantages"], grpo_oracle.leave_one_out_advantages(rewards, 2))


def _method(name):
    if name == "ppo":
        return ppo(PPOConfig(cliprange=0.1, cliprange_value=0.1), SAMPLING)
    beta = 0.0 if name == "rloo" else 0.04
    return grpo(GRPOConfig(loss_type=name, epsilon=0.1, epsilon_high=0.3, beta=beta, num_iterations=2), SAMPLING)


def _prepared(name):
    """A policy with an adapter that acts, and rollouts near it, ready to learn from."""
    model = random_model(num_hidden_layers=1)
    attach(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    head = add_value_head(model)
    torch.nn.init.normal_(head.weight, std=0.1)
    rollouts = _rollouts(torch.float32)
    with torch.no_grad():
        logps, entropy, values = policy(model, rollouts.part(range(4)).completions, 1.0, head)
    near = {"logps": logps, "values": values, "ref_logps": logps}
    by_token = {n: v + rollouts.by_token[n] for n, v in near.items()} | {"entropy": entropy}
    method = _method(name)
    if name == "ppo":
        rollouts, _ = ppo_advantages(method.settings, replace(rollouts, by_token=by_token), 0.1)
    else:
        rollouts = replace(rollouts, by_token=by_token)
        rollouts, _ = grpo_advantages(method.settings, replace(SAMPLING, num_generations=2), rollouts, 0.0)
    return model, head, method, rollouts


@pytest.mark.parametrize("name", ("ppo", "grpo", "bnpo", "dapo", "dr_grpo", "rloo"))
@pytest.mark.parametrize("parts", ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [0, 2, 1]]))
def test_a_step_s_loss_is_the_oracle_s_however_it_is_cut(name, parts):
    model, head, method, rollouts = _prepared(name)
    update = Update(4, sum(LENGTHS))
    batches = [rollouts.part(part) for part in parts]
    parameters = list(trainable(model).values())
    losses, norm, told = accumulate(
        model, batches, lambda m, b: method.loss_sum(m, b, update=update), parameters, 0.0, torch.device("cpu")
    )
    with torch.no_grad():
        logps, _, values = policy(model, rollouts.part(range(4)).completions, 1.0, head)
    by_token = {key: rows(value.double(), LENGTHS) for key, value in rollouts.by_token.items()}
    now, worth = rows(logps.double(), LENGTHS), rows(values.double(), LENGTHS)
    if name == "ppo":
        names = (by_token["advantages"], worth, by_token["values"], by_token["returns"])
        exact, _, _ = ppo_oracle.ppo_loss(now, by_token["logps"], *names, 0.1, 0.1, method.settings.vf_coef)
    else:
        order = [i for part in parts for i in part]
        advantages = rollouts.by_completion["advantages"].double().tolist()
        given = [[rows_[i] for i in order] for rows_ in (now, by_token["logps"], by_token["ref_logps"])]
        exact, _ = grpo_oracle.grpo_loss(
            *given, [advantages[i] for i in order], 0.1, 0.3, method.settings.beta, name, SAMPLING.max_completion_length,
            [len(part) for part in parts],
        )  # fmt: skip
    scale = max(1.0, rollouts.by_token["logps"].abs().max().item())
    assert math.fsum(losses) == pytest.approx(exact, abs=64 * torch.finfo(torch.float32).eps * scale)
    assert norm > 0 and (name == "rloo" or 0 < told["clip_ratio/region_mean"] < 1)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    (
        (PPOConfig, {"num_ppo_epochs": 0}, "num_ppo_epochs is 0; expected a finite number of at least 1"),
        (PPOConfig, {"kl_coef": math.nan}, "kl_coef is nan"),
        (PPOConfig, {"lam": 1.1}, "expected 0 to 1"),
        (PPOConfig, {"kl_estimator": "k4"}, "expected one of k1, k2, k3"),
        (PPOConfig, {"kl_target": 0.0}, "expected a positive number of nats"),
        (PPOConfig, {"missing_eos_penalty": math.nan}, "missing_eos_penalty is nan; expected a finite number"),
        (GRPOConfig, {"beta": -0.1}, "beta is -0.1"),
        (GRPOConfig, {"epsilon_high": -1.0}, "epsilon_high is -1.0"),
        (GRPOConfig, {"advantages": "gae"}, "expected one of group, rloo"),
        (GRPOConfig, {"loss_type": "sapo"}, "expected one of grpo, bnpo"),
        (GRPOConfig, {"scale_rewards": "std"}, "expected one of group, batch, none"),
    ),
)
def test_settings_that_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="a group needs at least 2"):
        grpo(GRPOConfig(), replace(SAMPLING, num_generations=1))
