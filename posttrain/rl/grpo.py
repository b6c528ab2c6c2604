"""Group-relative policy optimisation and leave-one-out REINFORCE: no value function, a group of completions instead.

GRPO: Shao et al., arXiv:2402.03300; DAPO: Yu et al., arXiv:2503.14476; Dr. GRPO: Liu et al., arXiv:2503.20783; RLOO:
Ahmadian et al., arXiv:2402.14740. The variants differ only in what a token weighs. Oracle: reference/grpo.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kl import kl_estimate
from .ppo import clipped_policy_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "rloo")
SCALES = ("group", "batch", "none")
EPSILON = 1e-4  # added to the deviation


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Tensor:
    """Rewards (N,), groups of num_generations one after another, less their group's mean, over a deviation: the group's
    own, that of the whole batch, or none. ValueError for a group of one, or for N that is no multiple of it."""
    groups = _groups(rewards, num_generations)
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards is {scale_rewards!r}; expected one of {', '.join(SCALES)}")
    centred = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (groups.std(1, keepdim=True) + EPSILON)
    elif scale_rewards == "batch":
        centred = centred / (rewards.std() + EPSILON)
    return centred.flatten()


def leave_one_out_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Rewards (N,), groups of num_generations one after another, less the mean of their group's others. ValueError as
    `group_advantages`."""
    groups = _groups(rewards, num_generations)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).flatten()


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    if num_generations < 2 or len(rewards) % num_generations:
        raise ValueError(
            f"{len(rewards)} rewards in groups of num_generations={num_generations}; expected whole groups of at least 2, since "
            "a completion is compared with the others of its prompt"
        )
    return rewards.view(-1, num_generations)


def completion_weights(lengths: Tensor, loss_type: str, step_tokens: int, step_completions: int, longest: int) -> Tensor:
    """What each token of a completion weighs (N,), such that the weighted losses of all tokens of a step, summed and
    divided by step_completions, are the step's loss.

    lengths int64 (N,): of the completions that go through the model together. longest: most tokens a completion may have.
    """
    ones = torch.ones(len(lengths), device=lengths.device)
    if loss_type == "grpo":
        return 1 / lengths
    if loss_type == "bnpo":
        return ones * (len(lengths) / lengths.sum())
    if loss_type == "dapo":
        return ones * (step_completions / step_tokens)
    if loss_type == "dr_grpo":
        return ones / longest
    raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(LOSS_TYPES)}")


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    step_tokens: int | None = None,
    step_completions: int | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of a batch's losses (), to be divided by the step's completions, and where clipping took the gradient away.

    logps, old_logps and, where beta is not 0, ref_logps (tokens,); advantages (N,); lengths int64 (N,). epsilon_high:
    epsilon unless given. step_tokens, step_completions: those of the whole step (default: of this batch). longest: the
    most tokens a completion may have, for "dr_grpo". Loss types as TRL names them; "rloo" takes a completion as one action
    (N,), and its divergence belongs into the reward.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "rloo":
        sizes = lengths.tolist()
        whole, old = (torch.stack([part.sum() for part in x.split(sizes)]) for x in (logps, old_logps))
        losses, clipped = clipped_policy_loss(whole, old, advantages, epsilon, high)
        return losses.sum(), clipped
    if loss_type == "dr_grpo" and longest is None:
        raise ValueError("loss_type='dr_grpo' divides by a constant length: give longest, the most tokens a completion may have")
    losses, clipped = clipped_policy_loss(logps, old_logps, advantages.repeat_interleave(lengths), epsilon, high)
    if beta:
        if ref_logps is None:
            raise ValueError(f"beta is {beta}: give ref_logps, the reference's log-probabilities")
        losses = losses + beta * kl_estimate(logps, ref_logps, "k3")
    tokens, completions = step_tokens or int(lengths.sum()), step_completions or len(lengths)
    weights = completion_weights(lengths, loss_type, tokens, completions, longest or 1)
    return (losses * weights.to(losses.dtype).repeat_interleave(lengths)).sum(), clipped
