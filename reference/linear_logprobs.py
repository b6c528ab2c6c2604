"""Oracle of per-token log-probabilities through a linear head, in float64 loops; a row of logits is reference/logit_rows.py.

    z_t = W h_t + b                                            (1)
    dh_t = g_t (W[y_t] - sum_v p_t[v] W[v])                    (2)   g_t the gradient of log p_t
    dW = sum_t g_t (onehot(y_t) - p_t) h_t^T,  db likewise     (3)
A row whose label is `ignore_index` has log p = 0, entropy 0 and no gradient.
"""

import numpy as np

from .logit_rows import logit_row


def linear_logprobs(hidden, weight, labels, bias=None, ignore_index: int = -100, gradient=None):
    """hidden (N, H), weight (V, H), labels (N,), gradient (N,) of the log-probabilities (ones unless given)
    -> (log p (N,), entropy (N,), dhidden (N, H), dweight (V, H), dbias (V,))."""
    hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    bias = np.zeros(len(weight)) if bias is None else np.asarray(bias, np.float64)
    gradient = np.ones(len(hidden)) if gradient is None else gradient
    logprobs, entropies, dhidden = np.zeros(len(hidden)), np.zeros(len(hidden)), np.zeros(hidden.shape)
    dweight, dbias = np.zeros(weight.shape), np.zeros(len(weight))
    for t, label in enumerate(labels):
        if label == ignore_index:
            continue
        z = [float(weight[v] @ hidden[t] + bias[v]) for v in range(len(weight))]
        logprobs[t], entropies[t], dz = logit_row(z, label)
        for v in range(len(weight)):
            dhidden[t] += gradient[t] * dz[v] * weight[v]
            dweight[v] += gradient[t] * dz[v] * hidden[t]
            dbias[v] += gradient[t] * dz[v]
    return logprobs, entropies, dhidden, dweight, dbias
