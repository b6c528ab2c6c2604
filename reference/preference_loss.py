"""Oracle of preference losses on sequence log-probabilities: DPO and its family, pair by pair, in float64.

For a pair of completions of one prompt, chosen w and rejected l, with lengths |w| and |l| in tokens:
    c = log pi(w) - log pi_ref(w)     j = log pi(l) - log pi_ref(l)     (0 for the reference where a loss has none)
    d = h(c) - h(j)                   h the derivative of an f-divergence (Wang et al., arXiv:2309.16240, table 1)
`LOSSES` names, for each loss, the function of a pair below; its docstring has the paper and equation. Each returns
(loss, dloss/dc, dloss/dj), the derivatives written out by hand.
"""

import math


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


# f-divergences: u = log pi / pi_ref -> (h(u), h'(u)). The exponent is held below 40, so that its square is a float32.
EXPONENT = 40.0


def _bounded_exp(x: float) -> tuple[float, float]:
    """exp(min(x, 40)) and its derivative."""
    return (math.exp(x), math.exp(x)) if x <= EXPONENT else (math.exp(EXPONENT), 0.0)


def reverse_kl(u, alpha):
    """f(t) = t log t, f' = log t + 1: the constant cancels in d."""
    return u, 1.0


def forward_kl(u, alpha):
    """f(t) = -log t, f' = -1/t, here 1 - 1/t."""
    value, slope = _bounded_exp(-u)
    return 1 - value, slope


def js_divergence(u, alpha):
    """f' = log(2 t / (1 + t))."""
    return math.log(2) + log_sigmoid(u), sigmoid(-u)


def alpha_divergence(u, alpha):
    """f' = (t^(alpha - 1) - 1) / (alpha - 1), alpha not 1."""
    value, slope = _bounded_exp((alpha - 1) * u)
    return (value - 1) / (alpha - 1), slope


DIVERGENCES = {
    "reverse_kl": reverse_kl, "forward_kl": forward_kl, "js_divergence": js_divergence, "alpha_divergence": alpha_divergence,
}  # fmt: skip


# Functions of d alone: (loss, dloss/dd), b = beta, e = label_smoothing, t = the loss's third parameter.
def dpo(d, b, e, t):
    """Rafailov et al., arXiv:2305.18290, eq. 7; e > 0: conservative DPO (Mitchell 2023)."""
    loss = -(1 - e) * log_sigmoid(b * d) - e * log_sigmoid(-b * d)
    return loss, b * (e * sigmoid(b * d) - (1 - e) * sigmoid(-b * d))


def robust(d, b, e, t):
    """Chowdhury et al., arXiv:2403.00409: unbiased under labels flipped with probability e < 1/2."""
    loss = -(1 - e) * log_sigmoid(b * d) + e * log_sigmoid(-b * d)
    slope = -b * (1 - e) * sigmoid(-b * d) - b * e * sigmoid(b * d)
    return loss / (1 - 2 * e), slope / (1 - 2 * e)


def hinge(d, b, e, t):
    """Zhao et al. (SLiC-HF), arXiv:2305.10425, normalised as in Liu et al., arXiv:2309.06657."""
    return max(0.0, 1 - b * d), (-b if b * d < 1 else 0.0)


def ipo(d, b, e, t):
    """Azar et al., arXiv:2310.12036, eq. 17; d is of scores per token."""
    return (d - 1 / (2 * b)) ** 2, 2 * (d - 1 / (2 * b))


def exo_pair(d, b, e, t):
    """Ji et al., arXiv:2402.00856, eq. 16: the reverse KL from (1-e, e) to the policy's softmax over the pair."""
    x, s = b * d, sigmoid(b * d)
    towards = log_sigmoid(x) - math.log1p(-e)
    away = log_sigmoid(-x) - math.log(e)
    return s * towards + (1 - s) * away, b * s * (1 - s) * (towards - away)


def discopop(d, b, e, t):
    """Lu et al., arXiv:2406.08414, eq. 5, temperature t: logistic loss for x < 0 fading into exponential for x > 0."""
    x, m = b * d, sigmoid(b * d / t)
    exponential = math.exp(log_sigmoid(x / t) - x)  # m exp(-x), finite at both ends
    logistic = -log_sigmoid(x) * (1 - m)
    slope = -sigmoid(-x) * (1 - m) + log_sigmoid(x) * m * (1 - m) / t + exponential * ((1 - m) / t - 1)
    return logistic + exponential, b * slope


def simpo(d, b, e, t):
    """Meng et al., arXiv:2405.14734, eq. 6: no reference, log-probabilities per token, target margin t.

    With the alpha-divergence, alpha = 1 - a, this is AlphaPO (Gupta et al., arXiv:2501.03884): rewards b (1 - p^-a) / a.
    """
    loss = -(1 - e) * log_sigmoid(b * d - t) - e * log_sigmoid(t - b * d)
    return loss, b * (e * sigmoid(b * d - t) - (1 - e) * sigmoid(t - b * d))


# Functions of c and j: (loss, dloss/dc, dloss/dj).
def nca_pair(c, j, b, e, t):
    """Chen et al., arXiv:2402.05369, for a pair."""
    loss = -log_sigmoid(b * c) - 0.5 * log_sigmoid(-b * c) - 0.5 * log_sigmoid(-b * j)
    return loss, b * (0.5 * sigmoid(b * c) - sigmoid(-b * c)), 0.5 * b * sigmoid(b * j)


def bco_pair(c, j, b, e, t):
    """Jung et al., arXiv:2404.04656, without the running mean of rewards."""
    return -log_sigmoid(b * c) - log_sigmoid(-b * j), -b * sigmoid(-b * c), b * sigmoid(b * j)


def sppo_hard(c, j, b, e, t):
    """Wu et al., arXiv:2405.00675, eq. 4.7 with win probabilities 1 and 0."""
    return (c - 0.5 / b) ** 2 + (j + 0.5 / b) ** 2, 2 * (c - 0.5 / b), 2 * (j + 0.5 / b)


def apo_zero(c, j, b, e, t):
    """D'Oosterlinck et al., arXiv:2408.06266, eq. 7."""
    slope_c, slope_j = sigmoid(b * c) * sigmoid(-b * c), sigmoid(b * j) * sigmoid(-b * j)
    return sigmoid(-b * c) + sigmoid(b * j), -b * slope_c, b * slope_j


def apo_down(c, j, b, e, t):
    """D'Oosterlinck et al., arXiv:2408.06266, eq. 8."""
    x = b * (c - j)
    slope_c, slope_x = sigmoid(b * c) * sigmoid(-b * c), sigmoid(x) * sigmoid(-x)
    return sigmoid(b * c) + sigmoid(-x), b * (slope_c - slope_x), b * slope_x


def orpo(c, j, b, e, t):
    """Hong et al., arXiv:2403.07691, the odds-ratio term times b: no reference; c, j per token, below 0."""
    log_odds = [min(x, -1e-6) - math.log(-math.expm1(min(x, -1e-6))) for x in (c, j)]
    slopes = [1 / -math.expm1(x) if x < -1e-6 else 0.0 for x in (c, j)]
    d = log_odds[0] - log_odds[1]
    return -b * log_sigmoid(d), -b * sigmoid(-d) * slopes[0], b * sigmoid(-d) * slopes[1]


def sft(c, j, b, e, t):
    """The negative log-likelihood of the chosen completion (per token); weights make the mean over pairs one over tokens."""
    return -c, -1.0, 0.0


OF_DIFFERENCE = {
    "sigmoid": dpo, "hinge": hinge, "ipo": ipo, "exo_pair": exo_pair, "robust": robust, "aot": dpo, "aot_unpaired": dpo,
    "discopop": discopop, "sigmoid_norm": dpo, "simpo": simpo,
}  # fmt: skip
OF_BOTH = {
    "nca_pair": nca_pair, "bco_pair": bco_pair, "sppo_hard": sppo_hard, "apo_zero": apo_zero, "apo_down": apo_down,
    "orpo": orpo, "sft": sft,
}  # fmt: skip
LOSSES = (*OF_DIFFERENCE, *OF_BOTH)
SCORES_PER_TOKEN = ("ipo", "sigmoid_norm")  # h(c) and h(j) are divided by the lengths
LOGPS_PER_TOKEN = ("simpo", "orpo", "sft")  # c and j themselves are
NO_REFERENCE = ("simpo", "orpo", "sft")


def pair_loss(name, c, j, len_c, len_j, beta, smoothing, third, divergence, alpha):
    """One pair: (loss, dloss/dlog pi(w), dloss/dlog pi(l))."""
    wc = wj = 1.0
    if name in LOGPS_PER_TOKEN:
        wc, wj = 1 / len_c, 1 / len_j
        c, j = c * wc, j * wj
    if name in OF_BOTH:
        loss, dc, dj = OF_BOTH[name](c, j, beta, smoothing, third)
        return loss, dc * wc, dj * wj
    (hc, slope_c), (hj, slope_j) = DIVERGENCES[divergence](c, alpha), DIVERGENCES[divergence](j, alpha)
    if name in SCORES_PER_TOKEN:
        hc, hj, slope_c, slope_j = hc / len_c, hj / len_j, slope_c / len_c, slope_j / len_j
    loss, dd = OF_DIFFERENCE[name](hc - hj, beta, smoothing, third)
    return loss, dd * slope_c * wc, -dd * slope_j * wj


def _order(values) -> list[int]:
    return sorted(range(len(values)), key=lambda i: values[i])


def preference_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, name, smoothing=0.0, third=0.0,
    chosen_lengths=None, rejected_lengths=None, weights=None, divergence="reverse_kl", alpha=0.5,
):  # fmt: skip
    """Lists of B floats -> (losses, chosen rewards, rejected rewards, dlosses/dpolicy_chosen, dlosses/dpolicy_rejected).

    The gradients are of the sum of the losses. AOT (Melnyk et al., arXiv:2406.05882, section 4) pairs sorted values: "aot"
    the k-th smallest margin of the policy with the k-th of the reference, "aot_unpaired" the k-th c with the k-th j; its k-th
    loss is of the k-th pair of these.
    """
    B = len(policy_chosen)
    if name in NO_REFERENCE:
        ref_chosen = ref_rejected = [0.0] * B
    c = [p - r for p, r in zip(policy_chosen, ref_chosen, strict=True)]
    j = [p - r for p, r in zip(policy_rejected, ref_rejected, strict=True)]
    chosen_lengths, rejected_lengths = chosen_lengths or [1.0] * B, rejected_lengths or [1.0] * B
    weights = weights or [1.0] * B
    rewards = [beta * x for x in c], [beta * x for x in j]
    first, second = list(range(B)), list(range(B))  # which pair gives c, and which j, of the k-th loss
    if name == "aot":
        margin = [a - b for a, b in zip(policy_chosen, policy_rejected, strict=True)]
        ref_margin = [a - b for a, b in zip(ref_chosen, ref_rejected, strict=True)]
        first, second = _order(margin), _order(ref_margin)
        c = margin
        j = ref_margin
    if name == "aot_unpaired":
        first, second = _order(c), _order(j)
    if name == "sft":
        weights = [w * length * B / sum(chosen_lengths) for w, length in zip(weights, chosen_lengths, strict=True)]
    losses, d_chosen, d_rejected = [], [0.0] * B, [0.0] * B
    for k in range(B):
        m, n = first[k], second[k]
        loss, dc, dj = pair_loss(
            name, c[m], j[n], chosen_lengths[m], rejected_lengths[n], beta, smoothing, third, divergence, alpha
        )
        losses.append(weights[k] * loss)
        d_chosen[m] += weights[k] * dc
        d_rejected[m if name == "aot" else n] += weights[k] * (-dc if name == "aot" else dj)
    return losses, *rewards, d_chosen, d_rejected


def kto_loss(policy, ref, labels, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """Ethayarajh et al. (KTO), arXiv:2402.01306, a completion at a time: (losses, rewards, dlosses/dpolicy).

    value(y) = sigmoid(b (r - z)) where y is desirable, sigmoid(b (z - r)) where not; loss = weight (1 - value). z is `kl` held at
    0 from below, a constant. z = 0 throughout: D'Oosterlinck et al., arXiv:2408.06266, APO-zero without pairs.
    """
    losses, rewards, slopes = [], [], []
    point = max(kl, 0.0)
    for log_pi, log_ref, desirable in zip(policy, ref, labels, strict=True):
        r = log_pi - log_ref
        x = beta * (r - point) if desirable else beta * (point - r)
        weight, sign = (desirable_weight, 1.0) if desirable else (undesirable_weight, -1.0)
        losses.append(weight * sigmoid(-x))  # 1 - sigmoid(x)
        slopes.append(-weight * sign * beta * sigmoid(x) * sigmoid(-x))
        rewards.append(beta * r)
    return losses, rewards, slopes


def length_desensitized(token_logps, other_length, ld_alpha):
    """Liu et al. (LD-DPO), arXiv:2409.06411: tokens past the other completion's length count ld_alpha times."""
    total = 0.0
    for t, logp in enumerate(token_logps):
        total += logp if t < other_length else ld_alpha * logp
    return total


def policy_weight(token_logps, probs):
    """Zhou et al. (WPO), arXiv:2406.11827, eq. 2, with its alignment by sampled likelihood: exp of the mean over a completion's
    tokens of log p[y_t] - log sum_v p_t[v]^2. A pair weighs the product of its two."""
    total = 0.0
    for logp, distribution in zip(token_logps, probs, strict=True):
        total += logp - math.log(math.fsum(p * p for p in distribution))
    return math.exp(total / len(token_logps))
