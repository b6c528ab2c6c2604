"""Oracle of a frozen linear layer with a low-rank update, and of its gradients. Hu et al. 2021, "LoRA", arXiv:2106.09685,
equation 3, h = W0 x + B A x, with the scaling alpha / r of the paragraph below it; over a 4-bit weight it is Dettmers et al.
2023, "QLoRA", arXiv:2305.14314, equation 5, Y = X doubleDequant(c1, c2, W) + X L1 L2 (there L1 = A^T and L2 = scaling B^T;
`reference.quantized_linear.weight` gives its W). Dropout acts on the low-rank path alone, as the authors' code has it.
"""

import numpy as np


def matmul(a, b) -> np.ndarray:
    """c_ij = sum_l a_il b_lj, in float64."""
    (rows, inner), columns = np.shape(a), np.shape(b)[1]
    c = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            for step in range(inner):
                c[i, j] += float(a[i, step]) * float(b[step, j])
    return c


def drop(x, keep, dropout: float) -> np.ndarray:
    """x'_mk = x_mk keep_mk / (1 - dropout). Linear in x, so its derivative multiplies by the same factors."""
    return np.where(keep, np.asarray(x, np.float64) / (1 - dropout), 0.0)


def forward(x, w, lora_A, lora_B, scaling: float, bias=None, keep=None, dropout: float = 0.0):
    """y_mn = sum_k w_nk x_mk + b_n + scaling sum_j B_nj s_mj with s_mj = sum_k A_jk x'_mk.

    x (M, K), w (N, K), lora_A (r, K), lora_B (N, r), bias (N,) or None, keep bool (M, K) or None.
    Returns (y (M, N), s (M, r), x' (M, K)).
    """
    dropped = np.asarray(x, np.float64) if keep is None else drop(x, keep, dropout)
    s = matmul(dropped, np.transpose(lora_A))
    y = matmul(x, np.transpose(w)) + scaling * matmul(s, np.transpose(lora_B))
    return (y if bias is None else y + np.asarray(bias, np.float64)), s, dropped


def backward(dy, x, w, lora_A, lora_B, scaling: float, keep=None, dropout: float = 0.0):
    """From E's gradient dy (M, N), with V_mj = dE/ds_mj = scaling sum_n dy_mn B_nj:

    dE/dx_mk  = sum_n dy_mn w_nk + (sum_j V_mj A_jk) keep_mk / (1 - dropout)        both paths end in x
    dE/dA_jk  = sum_m V_mj x'_mk                                                    s_mj depends on A_jk with slope x'_mk
    dE/dB_nj  = scaling sum_m dy_mn s_mj                                            y_mn on B_nj with slope scaling s_mj
    dE/db_n   = sum_m dy_mn
    Returns (dx (M, K), dA (r, K), dB (N, r), dbias (N,), V (M, r)). W is frozen.
    """
    _, s, dropped = forward(x, w, lora_A, lora_B, scaling, None, keep, dropout)
    V = scaling * matmul(dy, lora_B)
    through_A = matmul(V, lora_A)
    dx = matmul(dy, w) + (through_A if keep is None else drop(through_A, keep, dropout))
    dA = matmul(np.transpose(V), dropped)
    dB = scaling * matmul(np.transpose(dy), s)
    return dx, dA, dB, matmul(np.ones((1, len(dy))), dy)[0], V
