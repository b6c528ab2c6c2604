"""Oracle of causal attention: Vaswani et al., 2017, arXiv:1706.03762, eq. 1, in float64 loops.

s_ti = q_t . k_i / sqrt(D) for i <= t              (1)
p_ti = exp(s_ti) / sum over j <= t of exp(s_tj)    (2)
y_t  = sum over i <= t of p_ti v_i                 (3)
delta_t = dy_t . y_t                               (4)  since sum over i of p_ti dy_t . v_i = dy_t . y_t
ds_ti = p_ti (dy_t . v_i - delta_t)                (5)
dq_t = sum over i of ds_ti k_i / sqrt(D),  dk_i = sum over t of ds_ti q_t / sqrt(D),  dv_i = sum over t of p_ti dy_t    (6)

Heads: query head h reads the keys and values of head h // (heads / kv heads), whose gradients are the sums over its readers.
"""

import math

import numpy as np


def attend(q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """One head: q, k, v (T, D) -> y (T, D) and p (T, T), by equations 1 to 3; the largest score is taken off first."""
    T, D = q.shape
    y, p = np.zeros((T, D)), np.zeros((T, T))
    for t in range(T):
        scores = [float(np.dot(q[t], k[i])) / math.sqrt(D) for i in range(t + 1)]
        weights = [math.exp(s - max(scores)) for s in scores]
        for i, w in enumerate(weights):
            p[t, i] = w / sum(weights)
            y[t] += p[t, i] * v[i]
    return y, p


def attend_backward(dy, q, k, v, y, p) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head: (dq, dk, dv) (T, D), by equations 4 to 6."""
    T, D = q.shape
    dq, dk, dv = np.zeros((T, D)), np.zeros((T, D)), np.zeros((T, D))
    for t in range(T):
        delta = float(np.dot(dy[t], y[t]))
        for i in range(t + 1):
            ds = p[t, i] * (float(np.dot(dy[t], v[i])) - delta) / math.sqrt(D)
            dq[t] += ds * k[i]
            dk[i] += ds * q[t]
            dv[i] += p[t, i] * dy[t]
    return dq, dk, dv


def causal_attention(q, k, v) -> np.ndarray:
    """q (B, heads, T, D), k and v (B, kv heads, T, D) -> y as q."""
    y = np.zeros(q.shape)
    shared = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            y[b, h], _ = attend(q[b, h], k[b, h // shared], v[b, h // shared])
    return y


def causal_attention_backward(dy, q, k, v) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dq as q, dk, dv as k)."""
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    shared = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            one = q[b, h], k[b, h // shared], v[b, h // shared]
            parts = attend_backward(dy[b, h], *one, *attend(*one))
            dq[b, h] = parts[0]
            dk[b, h // shared] += parts[1]
            dv[b, h // shared] += parts[2]
    return dq, dk, dv
