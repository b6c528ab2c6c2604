"""Oracle of what temperature, top-k and top-p leave of a row of logits, in float64 loops.

Every filter is a threshold on the logits, so equal tokens stay or go together:
    tau_k = the k-th largest logit
    tau_p = the least logit z[v] with sum over {w >= tau_k, z[w] > z[v]} of exp(z[w] / T) < top_p * sum over {w >= tau_k}   (1)
    p[v] = exp(z[v] / T - log Z) where z[v] >= tau = max(tau_k, tau_p), else 0;   Z sums what is kept                         (2)
(1) is nucleus sampling (Holtzman et al., arXiv:1904.09751, eq. 2): the token that crosses top_p is kept, and whatever equals it.
A NaN counts as -inf, +inf as the largest float32. A row without a finite logit has no distribution: p = 0 everywhere.
"""

import math

import numpy as np

LARGEST = 3.0e38


def cleaned(row) -> list[float]:
    """Logits as floats, NaN as -inf, and +-inf beyond +-3e38 as -inf and 3e38."""
    values = (float(z) for z in row)
    return [-math.inf if math.isnan(z) or z <= -LARGEST else min(z, LARGEST) for z in values]


def filter_row(row, temperature: float, top_k: int = 0, top_p: float = 1.0) -> tuple[float, float, np.ndarray]:
    """(tau, log Z, p (V,)) of one row of logits; temperature > 0. (-inf, -inf, 0) where no logit is finite."""
    z = cleaned(row)
    V, top = len(z), max(z)
    if top == -math.inf:
        return -math.inf, -math.inf, np.zeros(V)
    tau = sorted(z, reverse=True)[top_k - 1] if 0 < top_k < V else -math.inf
    weights = [math.exp((value - top) / temperature) if value >= tau else 0.0 for value in z]
    if top_p < 1:
        limit, above = top_p * sum(weights), 0.0
        for value in sorted(set(z), reverse=True):  # eq. 1: the least that has less than the limit above it
            if above >= limit or value < tau:
                break
            nucleus = value
            above += sum(w for w, other in zip(weights, z, strict=True) if other == value)
        tau = nucleus
    total = sum(w for w, value in zip(weights, z, strict=True) if value >= tau)
    p = np.array([w / total if value >= tau else 0.0 for w, value in zip(weights, z, strict=True)])  # eq. 2
    return tau, top / temperature + math.log(total), p
