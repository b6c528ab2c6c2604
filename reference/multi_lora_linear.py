"""Oracle of a linear layer where every row has an adapter of its own, or none. Chen et al. 2023, "Punica: Multi-Tenant LoRA
Serving", arXiv:2310.18547, section 4 (their SGMV: rows grouped into segments of one adapter); Sheng et al. 2023, "S-LoRA",
arXiv:2311.03285, section 5, for ranks that differ. Of one row it is Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

import numpy as np

BASE = -1  # the id of a row that no adapter touches


def check(adapter_ids, n: int) -> None:
    """ValueError for an id that names no adapter."""
    for m, i in enumerate(adapter_ids):
        if not BASE <= i < n:
            raise ValueError(f"adapter_ids[{m}] is {i}; expected {BASE} to {n - 1}")


def segments(adapter_ids, n: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """(order, [(adapter, start, count)]): the rows that have an adapter, sorted by it and within it as they came, and the
    runs of one adapter among them, ascending. Rows of the base alone are in neither."""
    order: list[int] = []
    runs = []
    for i in range(n):
        rows = [m for m, given in enumerate(adapter_ids) if given == i]
        if rows:
            runs.append((i, len(order), len(rows)))
            order += rows
    return np.array(order, dtype=np.int64), runs


def forward(x, w, lora_A, lora_B, scaling, adapter_ids, bias=None, ranks=None) -> tuple[np.ndarray, np.ndarray]:
    """y_mn = sum_k x_mk w_nk + b_n + c_i sum_j s_mj B_inj, s_mj = sum_k x_mk A_ijk, i = adapter_ids[m], j < ranks[i].

    x (M, K), w (N, K), lora_A (n, r, K), lora_B (n, N, r), scaling c (n,), adapter_ids (M,), bias (N,) or None, ranks (n,) or
    None for r everywhere. Returns y float64 (M, N) and s (M, r), zero where there is nothing to sum.
    """
    n, r, _ = np.shape(lora_A)
    M, (N, K) = len(x), w.shape
    check(adapter_ids, n)
    y, s = np.zeros((M, N)), np.zeros((M, r))
    for m in range(M):
        i = adapter_ids[m]
        rank = 0 if i == BASE else r if ranks is None else ranks[i]
        for j in range(rank):
            for k in range(K):
                s[m, j] += float(x[m, k]) * float(lora_A[i, j, k])
        for o in range(N):
            for k in range(K):
                y[m, o] += float(x[m, k]) * float(w[o, k])
            for j in range(rank):
                y[m, o] += float(scaling[i]) * s[m, j] * float(lora_B[i, o, j])
            if bias is not None:
                y[m, o] += float(bias[o])
    return y, s
