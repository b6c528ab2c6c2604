"""Oracle of one row of logits: softmax regression's likelihood of a label, in float64 loops.

log p = z[y] - log sum_v exp z[v]             (1)
H = -sum_v p[v] log p[v]                      (2)   entropy of p = softmax(z)
dlog p / dz = onehot(y) - p                   (3)
"""

import numpy as np


def softmax(z) -> tuple[np.ndarray, float]:
    """(softmax(z), log sum exp z), by the largest logit so that no exponential overflows."""
    top = max(float(v) for v in z)
    total = sum(np.exp(float(v) - top) for v in z)
    return np.array([np.exp(float(v) - top) / total for v in z]), top + float(np.log(total))


def logit_row(z, label: int) -> tuple[float, float, np.ndarray]:
    """(log p, entropy, gradient (V,)) of one row, by equations 1 to 3. A logit of -inf counts nothing."""
    p, lse = softmax(z)
    entropy = -sum(share * (float(z[v]) - lse) for v, share in enumerate(p) if share > 0)
    gradient = np.array([(v == label) - share for v, share in enumerate(p)])
    return float(z[label]) - lse, entropy, gradient
