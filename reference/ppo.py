"""Oracle of PPO on completions: token rewards, the clipped policy loss and the clipped value loss, token by token, in float64.

Schulman et al., arXiv:1707.06347. A token's ratio is rho = pi(token) / pi_old(token), its advantage A:
    L = -min(rho A, clip(rho, 1 - low, 1 + high) A)                          eq. 7, with its sign changed
    V = 1/2 max((v - R)^2, (clip(v, v_old - range, v_old + range) - R)^2)    not in the paper; see Engstrom et al., arXiv:2005.12729
The reward of a completion y of a prompt x is that of its last token, and each token pays for leaving the reference (Ziegler
et al., arXiv:1909.08593, section 2): r_t = -coefficient k1_t + [t is the last] score.
"""

import math


def token_rewards(scores, kls, coefficient):
    """Scores by completion, divergences by token -> rewards by token."""
    rewards = []
    for score, kl in zip(scores, kls, strict=True):
        row = [-coefficient * k for k in kl]
        row[-1] += score
        rewards.append(row)
    return rewards


def clipped_policy_token(logp, old_logp, advantage, low, high):
    """(loss, dloss/dlogp, whether the clip took the gradient away) of one token."""
    ratio = math.exp(logp - old_logp)
    clipped = min(max(ratio, 1 - low), 1 + high)
    if clipped * advantage < ratio * advantage:
        return -clipped * advantage, 0.0, True
    return -ratio * advantage, -ratio * advantage, False


def clipped_value_token(value, old_value, ret, clip_range):
    """(loss, dloss/dvalue, whether the clipped value was worse) of one token."""
    clipped = min(max(value, old_value - clip_range), old_value + clip_range)
    if (clipped - ret) ** 2 > (value - ret) ** 2:
        return 0.5 * (clipped - ret) ** 2, 0.0, True
    return 0.5 * (value - ret) ** 2, value - ret, False


def ppo_loss(logps, old_logps, advantages, values, old_values, returns, clip, clip_value, value_coefficient):
    """Everything by completion and token -> (mean loss over tokens, dloss/dlogps, dloss/dvalues)."""
    tokens = sum(len(row) for row in logps)
    loss = 0.0
    d_logps: list[list[float]] = []
    d_values: list[list[float]] = []
    for i in range(len(logps)):
        d_logps.append([])
        d_values.append([])
        for t in range(len(logps[i])):
            policy, d_policy, _ = clipped_policy_token(logps[i][t], old_logps[i][t], advantages[i][t], clip, clip)
            value, d_value, _ = clipped_value_token(values[i][t], old_values[i][t], returns[i][t], clip_value)
            loss += (policy + value_coefficient * value) / tokens
            d_logps[i].append(d_policy / tokens)
            d_values[i].append(value_coefficient * d_value / tokens)
    return loss, d_logps, d_values
