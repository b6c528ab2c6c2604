"""GRPO and RLOO: advantages and losses by hand, slopes, the oracle, micro-batches, and TRL's."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from rl_cases import assert_same, assert_slopes, flat, random_values, rows
from tolerance import assert_as_accurate

from posttrain.reference import grpo as oracle
from posttrain.rl.grpo import LOSS_TYPES, SCALES, group_advantages, grpo_loss, leave_one_out_advantages

LENGTHS = [3, 1, 5, 2]
LONGEST = 6
OPTIONS = {"epsilon": 0.1, "epsilon_high": 0.3}


def test_advantages_by_hand():
    """Groups (1, 3) and (2, 2): deviations sqrt 2 and 0; of all four sqrt(2/3)."""
    rewards, small = [1.0, 3.0, 2.0, 2.0], 1e-4
    assert oracle.group_advantages(rewards, 2, "none") == [-1.0, 1.0, 0.0, 0.0]
    one = 1 / (2**0.5 + small)
    assert oracle.group_advantages(rewards, 2) == pytest.approx([-one, one, 0.0, 0.0])
    one = 1 / ((2 / 3) ** 0.5 + small)
    assert oracle.group_advantages(rewards, 2, "batch") == pytest.approx([-one, one, 0.0, 0.0])
    assert oracle.leave_one_out_advantages([1.0, 3.0, 5.0], 3) == [-3.0, 0.0, 3.0]


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_are_the_oracle_s(scale):
    rewards = torch.randn(12, dtype=torch.float64)
    assert_same(group_advantages(rewards, 4, scale), oracle.group_advantages(rewards.tolist(), 4, scale))
    assert_same(leave_one_out_advantages(rewards, 4), oracle.leave_one_out_advantages(rewards.tolist(), 4))


def test_leave_one_out_is_the_group_s_advantage_stretched():
    """r - mean of the others = (r - mean) G / (G - 1): RLOO and unscaled GRPO point the same way."""
    rewards = torch.randn(12, dtype=torch.float64)
    assert_same(leave_one_out_advantages(rewards, 4), group_advantages(rewards, 4, "none") * 4 / 3)


def test_a_group_that_agrees_teaches_nothing():
    assert group_advantages(torch.full((4,), 0.3), 4).abs().max() == 0
    for function in (group_advantages, leave_one_out_advantages):
        with pytest.raises(ValueError, match="whole groups of at least 2"):
            function(torch.ones(4), 1)
        with pytest.raises(ValueError, match="4 rewards in groups of num_generations=3"):
            function(torch.ones(4), 3)


def test_losses_by_hand():
    """On policy with advantages 1 and -1 and lengths 1 and 3 a token's loss is -1 or 1."""
    logps = [[-1.0], [-1.0] * 3]
    expected = {"grpo": 0.0, "bnpo": 2 / 4, "dapo": 2 / 4, "dr_grpo": 2 / (2 * 4), "rloo": 0.0}
    for name, value in expected.items():
        assert oracle.grpo_loss(logps, logps, None, [1.0, -1.0], 0.2, 0.2, 0.0, name, 4)[0] == pytest.approx(value)


def _case(seed=0):
    values = random_values(LENGTHS, 3, seed, spread=0.3)
    return values, torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_oracle_s_slopes(name):
    (logps, old, ref), advantages = _case(seed=6)
    beta = 0.0 if name == "rloo" else 0.04

    def run(x):
        nested = [rows(v, LENGTHS) for v in (x, old, ref)]
        return oracle.grpo_loss(*nested, advantages.tolist(), 0.1, 0.3, beta, name, LONGEST)

    gradient = flat(run(logps)[1]).tolist()
    assert_slopes(lambda x: run(torch.tensor(x, dtype=torch.float64))[0], gradient, logps.tolist())


@pytest.mark.parametrize("chunks", ([4], [2, 2], [1, 3]))
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_losses_are_the_oracle_s(name, chunks):
    """In value and gradient, whole and added up over the parts that go through the model one after another."""
    (logps, old, ref), advantages = _case()
    beta = 0.0 if name == "rloo" else 0.04
    nested = [rows(x, LENGTHS) for x in (logps, old, ref)]
    exact, gradient = oracle.grpo_loss(*nested, advantages.tolist(), 0.1, 0.3, beta, name, LONGEST, chunks)
    logps.requires_grad_()
    total, lengths, first = 0.0, torch.tensor(LENGTHS), 0
    for size in chunks:
        here = slice(first, first + size)
        tokens = slice(sum(LENGTHS[:first]), sum(LENGTHS[: first + size]))
        loss, _ = grpo_loss(
            logps[tokens], old[tokens], advantages[here], lengths[here], loss_type=name, ref_logps=ref[tokens], beta=beta,
            step_tokens=sum(LENGTHS), step_completions=len(LENGTHS), longest=LONGEST, **OPTIONS,
        )  # fmt: skip
        total = total + loss / len(LENGTHS)
        first += size
    # Weights are float32, as lengths have no dtype of a loss: their rounding is allowed.
    unit = torch.finfo(torch.float32).eps
    (ours,) = torch.autograd.grad(total, logps)
    assert abs(total.item() - exact) <= unit * (flat(gradient).abs().sum().item() + abs(exact))
    assert ((ours - flat(gradient)).abs() <= unit * flat(gradient).abs()).all()


def test_what_is_clipped():
    """Ratios 1.5 and 0.5, advantages of either sign: only moves that went too far already."""
    logps, old = torch.tensor([1.5, 0.5, 1.5, 0.5]).log(), torch.zeros(4)
    _, clipped = grpo_loss(logps, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4, dtype=torch.int64))
    assert clipped.tolist() == [True, False, False, True]
    _, clipped = grpo_loss(logps, old, torch.ones(4), torch.ones(4, dtype=torch.int64), epsilon_high=0.6)
    assert not clipped.any()


def test_refusals():
    logps, lengths = torch.zeros(3), torch.tensor([3])
    with pytest.raises(ValueError, match="expected one of grpo, bnpo"):
        grpo_loss(logps, logps, torch.ones(1), lengths, loss_type="ppo")
    with pytest.raises(ValueError, match="give ref_logps"):
        grpo_loss(logps, logps, torch.ones(1), lengths, beta=0.1)
    with pytest.raises(ValueError, match="give longest"):
        grpo_loss(logps, logps, torch.ones(1), lengths, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="expected one of group, batch, none"):
        group_advantages(torch.ones(4), 2, "std")


def _trl_loss(name, logps, old, ref, mask, advantages, beta):
    """TRL's own loss code on these log-probabilities (N, T); everything around it is a stand-in."""
    trl = pytest.importorskip("trl")
    trainer = trl.RLOOTrainer if name == "rloo" else trl.GRPOTrainer
    gather = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda t: t, reduce=lambda t, reduction: t, num_processes=1, sync_gradients=True
    )
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, top_entropy_quantile=1.0, loss_type=name,
        off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta, epsilon_low=0.1, epsilon_high=0.3,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), use_vllm=False,
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
    )  # fmt: skip
    ids = torch.ones(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref, "old_logps": (old * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trainer._compute_loss(stand_in, None, inputs), stand_in._metrics["train"]


@pytest.mark.peers
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_trl_agrees(name):
    """Losses of 64 batches and the share of clipped ratios, both in float32, against float64."""
    ours, theirs, exact = [], [], []
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    beta = 0.0 if name == "rloo" else 0.04
    for seed in range(64):
        values, advantages = _case(seed)
        padded = []
        for v in values:
            padded.append(torch.zeros(mask.shape))
            padded[-1][mask] = v.float()
        loss, metrics = _trl_loss(name, *padded, mask, advantages.float(), beta)
        theirs.append(loss)
        for dtype, losses in ((torch.float32, ours), (torch.float64, exact)):
            logps, old, ref = (v.float().to(dtype) for v in values)
            loss, clipped = grpo_loss(
                logps, old, advantages.float().to(dtype), torch.tensor(LENGTHS), loss_type=name, ref_logps=ref, beta=beta,
                longest=LONGEST, **OPTIONS,
            )  # fmt: skip
            losses.append(loss / len(LENGTHS))
        assert metrics["clip_ratio/region_mean"] == [pytest.approx(clipped.float().mean().item())]
    assert_as_accurate(torch.stack(ours), torch.stack(theirs), torch.stack(exact))
