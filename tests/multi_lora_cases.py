"""Batches for the tests of multi_lora_linear: mixes of adapters, ranks that differ, the plain expression and float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate

from posttrain.kernels import multi_lora_linear, quantize_weight

SHAPES = [(1, 1, 1, 1, 1), (5, 9, 7, 3, 4), (33, 63, 65, 5, 17), (40, 65, 64, 300, 8), (70, 40, 130, 2, 33), (3, 300, 1100, 4, 16)]
MIXES = ("distinct", "identical", "uniform", "zipf", "heavy and light", "base alone", "some base")


def mix(kind: str, rows: int, n: int) -> torch.Tensor:
    """Adapter ids of a batch."""
    if kind == "distinct":
        return torch.randperm(max(n, rows))[:rows] % n
    if kind == "identical":
        return torch.full((rows,), n - 1)
    if kind == "zipf":  # adapter i in proportion to (i + 1)^-1.5
        return torch.multinomial(torch.arange(1, n + 1).double() ** -1.5, rows, replacement=True)
    if kind == "heavy and light":
        return torch.where(torch.arange(rows) == rows // 2, 0, n - 1)
    if kind == "base alone":
        return torch.full((rows,), -1)
    return torch.randint(-1 if kind == "some base" else 0, n, (rows,))


class Case:
    """A layer, its adapters of mixed ranks (what lies past a rank is NaN: nobody may use it) and a batch."""

    def __init__(self, M, N, K, n, r, dtype, kind="some base", quantized=False, bias=True, ranked=True, device="cpu"):
        make = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
        self.x, self.A, self.B = make(M, K), make(n, r, K), make(n, N, r)
        self.bias, self.w = make(N) if bias else None, make(N, K)
        self.w = quantize_weight(self.w) if quantized else self.w
        self.scaling = torch.rand(n, device=device) + 0.5
        self.ranks = torch.randint(0, r + 1, (n,), dtype=torch.int32, device=device) if ranked else None
        for i in range(n if ranked else 0):
            self.A[i, self.ranks[i] :], self.B[i, :, self.ranks[i] :] = torch.nan, torch.nan
        self.ids = mix(kind, M, n).to(device)

    @property
    def dense(self) -> torch.Tensor:
        return self.w if isinstance(self.w, torch.Tensor) else self.w.dequantize(self.x.dtype)

    def run(self, rows=slice(None), ids=None) -> torch.Tensor:
        ids = self.ids[rows] if ids is None else ids
        return multi_lora_linear(self.x[rows], self.w, self.A, self.B, self.scaling, ids, self.bias, ranks=self.ranks)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the expression anybody would write, adapter by adapter; the same in float64)."""
        results = []
        for to in (lambda t: t, torch.Tensor.double):
            x, A, B = to(self.x), to(self.A), to(self.B)
            y = F.linear(x, to(self.dense), None if self.bias is None else to(self.bias))
            for i in self.ids.unique().tolist():
                if i >= 0:
                    rows, r = self.ids == i, A.shape[1] if self.ranks is None else self.ranks[i]
                    y[rows] += self.scaling[i].to(y.dtype) * (x[rows] @ A[i, :r].T) @ B[i, :, :r].T
            results.append(y.cpu())
        return results[0], results[1]

    def check(self, y: torch.Tensor) -> None:
        assert y.dtype == self.x.dtype and y.shape == (*self.x.shape[:-1], self.dense.shape[0])
        assert_as_accurate(y.cpu(), *self.expected())
