"""Oracle of the product with a 4-bit weight, y = x W^T + b, and of its gradients. Dettmers, Pagnoni, Holtzman, Zettlemoyer
2023, "QLoRA", arXiv:2305.14314, equation 5 without its adapter: Y = X doubleDequant(c1, c2, W), and section 3's remark that
only dE/dX is needed, "which proceeds via" the same dequantization.
"""

import numpy as np

from . import double_quant, nf4


def weight(packed, absmax, N: int, K: int, block_size: int, quant_type: str, nested=None) -> np.ndarray:
    """W float64 (N, K). nested: None, or (nested_absmax, offset, nested_block_size) when `absmax` holds 8-bit codes."""
    if nested is not None:
        nested_absmax, offset, nested_block_size = nested
        absmax = double_quant.double_dequantize(absmax, nested_absmax, offset, nested_block_size)
    return nf4.dequantize(packed, absmax, N * K, block_size, quant_type).reshape(N, K)


def forward(x, w, bias=None) -> np.ndarray:
    """y_mn = sum_k x_mk w_nk + b_n. x (M, K), w (N, K), bias (N,) or None; y float64 (M, N)."""
    M, (N, K) = len(x), w.shape
    y = np.zeros((M, N))
    for m in range(M):
        for n in range(N):
            for k in range(K):
                y[m, n] += float(x[m, k]) * float(w[n, k])
            if bias is not None:
                y[m, n] += float(bias[n])
    return y


def backward(dy, w) -> tuple[np.ndarray, np.ndarray]:
    """From E's gradient dy (M, N): dx_mk = dE/dx_mk = sum_n dy_mn w_nk (M, K), and dbias_n = dE/db_n = sum_m dy_mn (N,).

    y_mn depends on x_mk through the one term x_mk w_nk, for every n, and on b_n with slope 1, for every m. W is frozen.
    """
    M, (N, K) = len(dy), w.shape
    dx, dbias = np.zeros((M, K)), np.zeros(N)
    for m in range(M):
        for n in range(N):
            dbias[n] += float(dy[m, n])
            for k in range(K):
                dx[m, k] += float(dy[m, n]) * float(w[n, k])
    return dx, dbias
