"""Oracle of rotary position embedding: Su et al., 2021, arXiv:2104.09864, eq. 34, in float64 loops.

h = D/2, and x[k] makes a pair with x[(k + h) mod D], as Hugging Face lays them out (the paper: with its neighbour)

y[k] = x[k] cos[k] + x[(k + h) mod D] sin[k]          (34)  sin signed: sin[k] = -sin(m theta_k) for k < h, sin(m theta_k) beyond
dL/dx[k] = dy[k] cos[k] + dy[j] sin[j],  j = (k + h) mod D    (1)  since x[k] stands in y[k] and, times sin[j], in y[j]
"""

import math

import numpy as np


def table(positions, frequencies) -> tuple[np.ndarray, np.ndarray]:
    """cos and signed sin (T, D) of positions (T,) and frequencies (D/2,): of the angles position times frequency."""
    T, h = len(positions), len(frequencies)
    cos, sin = np.zeros((T, 2 * h)), np.zeros((T, 2 * h))
    for t, m in enumerate(positions):
        for k, theta in enumerate(frequencies):
            cos[t, k] = cos[t, k + h] = math.cos(float(m) * float(theta))
            sin[t, k + h] = math.sin(float(m) * float(theta))
            sin[t, k] = -sin[t, k + h]
    return cos, sin


def rope(x, cos, sin) -> np.ndarray:
    """x (T, heads, D), cos and signed sin (T, D) -> y (T, heads, D), by equation 34."""
    x, cos, sin = (np.asarray(t, np.float64) for t in (x, cos, sin))
    y, D = np.zeros_like(x), x.shape[-1]
    for t in range(x.shape[0]):
        for head in range(x.shape[1]):
            for k in range(D):
                y[t, head, k] = x[t, head, k] * cos[t, k] + x[t, head, (k + D // 2) % D] * sin[t, k]
    return y


def rope_backward(dy, cos, sin) -> np.ndarray:
    """dx (T, heads, D), by equation 1."""
    dy, cos, sin = (np.asarray(t, np.float64) for t in (dy, cos, sin))
    dx, D = np.zeros_like(dy), dy.shape[-1]
    for t in range(dy.shape[0]):
        for head in range(dy.shape[1]):
            for k in range(D):
                j = (k + D // 2) % D
                dx[t, head, k] = dy[t, head, k] * cos[t, k] + dy[t, head, j] * sin[t, j]
    return dx
