"""Oracle of group-relative policy optimisation and of leave-one-out REINFORCE: advantages and losses, in float64.

Rewards come in groups: G completions of one prompt after another.
    GRPO   A_i = (r_i - mean of the group) / deviation           Shao et al., arXiv:2402.03300, section 4.1.2
    RLOO   A_i = r_i - mean of the group's others                Kool et al. 2019; Ahmadian et al., arXiv:2402.14740
    token  l = -min(rho A, clip(rho, 1 - low, 1 + high) A) + beta k3       arXiv:2402.03300, eq. 3 and 4; high > low:
                                                                           Yu et al. (DAPO), arXiv:2503.14476
The losses differ in how tokens are averaged, o_i being the i-th completion of N:
    grpo      1/N sum_i 1/|o_i| sum_t l
    bnpo      sum_i sum_t l / sum_i |o_i|, of the completions that go through the model together
    dapo      the same, of all completions of a step             arXiv:2503.14476, eq. 8
    dr_grpo   1/(N longest) sum_i sum_t l, longest a constant    Liu et al., arXiv:2503.20783
    rloo      1/N sum_i l, the whole completion being one action of ratio prod_t rho
"""

import math

from .kl import k3
from .ppo import clipped_policy_token

EPSILON = 1e-4  # added to the deviation


def _mean(values):
    return sum(values) / len(values)


def _deviation(values):
    """Divides by one less than their number."""
    mean = _mean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def group_advantages(rewards, num_generations, scale="group"):
    """List of N rewards, groups one after another -> N advantages. scale: "group", "batch" (deviation of all N), "none"."""
    advantages = []
    for i in range(len(rewards)):
        start = i - i % num_generations
        group = rewards[start : start + num_generations]
        centred = rewards[i] - _mean(group)
        if scale != "none":
            centred /= _deviation(group if scale == "group" else rewards) + EPSILON
        advantages.append(centred)
    return advantages


def leave_one_out_advantages(rewards, num_generations):
    advantages = []
    for i in range(len(rewards)):
        start = i - i % num_generations
        others = [rewards[j] for j in range(start, start + num_generations) if j != i]
        advantages.append(rewards[i] - _mean(others))
    return advantages


def grpo_loss(logps, old_logps, ref_logps, advantages, low, high, beta, loss_type, longest, chunks=None):
    """Log-probabilities by completion and token, advantages by completion -> (loss, dloss/dlogps).

    chunks: the numbers of completions that go through the model together, for "bnpo"; default: all at once.
    """
    N = len(logps)
    tokens = sum(len(row) for row in logps)
    beside = []  # for each completion: how many completions, and tokens, go through the model together with it
    start = 0
    for size in chunks or [N]:
        beside += [(size, sum(len(row) for row in logps[start : start + size]))] * size
        start += size
    loss, gradient = 0.0, []
    for i in range(N):
        if loss_type == "rloo":
            value, slope, _ = clipped_policy_token(sum(logps[i]), sum(old_logps[i]), advantages[i], low, high)
            loss += value / N
            gradient.append([slope / N for _ in logps[i]])
            continue
        weight = {
            "grpo": 1 / (N * len(logps[i])),
            "bnpo": beside[i][0] / beside[i][1] / N,
            "dapo": 1 / tokens,
            "dr_grpo": 1 / (N * longest),
        }[loss_type]
        gradient.append([])
        for t in range(len(logps[i])):
            value, slope, _ = clipped_policy_token(logps[i][t], old_logps[i][t], advantages[i], low, high)
            if beta:
                kl, d_kl = k3(logps[i][t], ref_logps[i][t])
                value, slope = value + beta * kl, slope + beta * d_kl
            loss += weight * value
            gradient[i].append(weight * slope)
    return loss, gradient
