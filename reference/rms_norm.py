"""Oracle of RMSNorm: Zhang and Sennrich, 2019, arXiv:1910.07467, in float64 loops.

r = (mean_k x[k]^2 + eps)^-1/2        y[k] = w[k] n[k],  n[k] = x[k] r              (eq. 4, with Hugging Face's eps)
dL/dw[k] = sum over rows of dy[k] n[k]                                              (1)
dL/dx[k] = r (w[k] dy[k] - n[k] mean_j w[j] dy[j] n[j])                             (2)  since dr/dx[k] = -r^3 x[k] / D
"""

import numpy as np


def rms_norm(x, weight, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """x (N, D), weight (D,) -> (y (N, D), r (N,)), by equation 4."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    y, rstd = np.zeros_like(x), np.zeros(len(x))
    for i, row in enumerate(x):
        square = sum(float(v) ** 2 for v in row) / len(row)
        rstd[i] = (square + eps) ** -0.5
        for k, v in enumerate(row):
            y[i, k] = weight[k] * (v * rstd[i])
    return y, rstd


def rms_norm_backward(dy, x, weight, rstd) -> tuple[np.ndarray, np.ndarray]:
    """(dx (N, D), dweight (D,)), by equations 1 and 2."""
    dy, x, weight = (np.asarray(t, np.float64) for t in (dy, x, weight))
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    for i in range(len(x)):
        n = x[i] * rstd[i]
        mean = sum(weight[k] * dy[i, k] * n[k] for k in range(len(n))) / len(n)
        for k in range(len(n)):
            dweight[k] += dy[i, k] * n[k]
            dx[i, k] = rstd[i] * (weight[k] * dy[i, k] - n[k] * mean)
    return dx, dweight
