"""Oracle of the pairwise reward loss, pair by pair, in float64.

A reward model gives r_w to the chosen and r_l to the rejected completion of a prompt. Bradley-Terry:
    p(w beats l) = sigmoid(r_w - r_l - m)
    loss = -log sigmoid(r_w - r_l - m) + centre (r_w + r_l)^2
Ouyang et al., arXiv:2203.02155, eq. 1; the margin m is Touvron et al.'s, arXiv:2307.09288, section 3.2.2; the second term,
which says where the scale that only differences fix has its zero, Eisenstein et al.'s, arXiv:2312.09244.
"""

import math


def reward_loss(chosen, rejected, margins=None, centre=0.0):
    """Lists of B floats -> (mean loss, dloss/dchosen, dloss/drejected)."""
    B = len(chosen)
    total, d_chosen, d_rejected = 0.0, [], []
    for i in range(B):
        x = chosen[i] - rejected[i] - (margins[i] if margins else 0.0)
        both = chosen[i] + rejected[i]
        loss = max(-x, 0.0) + math.log1p(math.exp(-abs(x)))  # -log sigmoid(x)
        wrong = math.exp(min(-x, 0.0)) / (1 + math.exp(-abs(x)))  # sigmoid(-x), minus the derivative of the loss
        total += (loss + centre * both**2) / B
        d_chosen.append((-wrong + 2 * centre * both) / B)
        d_rejected.append((wrong + 2 * centre * both) / B)
    return total, d_chosen, d_rejected
