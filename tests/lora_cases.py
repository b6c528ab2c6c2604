"""What the tests of lora_linear share: a layer with its inputs, its exact results (the oracle) and the plain expression's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate

from posttrain.kernels import QuantizedWeight, quantize_weight
from posttrain.kernels.cpu.pytorch_lora import philox_words
from posttrain.reference import lora_linear as oracle
from posttrain.reference import philox

SEED = 0x123456789ABCDEF
NAMES = ("y", "dx", "dA", "dB", "dbias")


@dataclass
class Case:
    x: torch.Tensor
    w: torch.Tensor | QuantizedWeight
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor
    scaling: float = 1.5
    dropout: float = 0.0

    def leaves(self, wide: torch.dtype | None = None) -> list[torch.Tensor]:
        """x, A, B and bias as fresh leaves, in `wide` where it is given."""
        kept = [t for t in (self.x, self.lora_A, self.lora_B, self.bias) if t is not None]
        return [t.detach().to(wide or t.dtype).requires_grad_() for t in kept]

    def base(self) -> tuple:
        """The weight as the ops take it."""
        return (self.w, None, None, None, 0) if isinstance(self.w, torch.Tensor) else self.w.tensors()

    def format(self) -> tuple:
        """(N, K, block_size, quant_type)"""
        return (*self.w.shape, *((0, "none") if isinstance(self.w, torch.Tensor) else (self.w.block_size, self.w.quant_type)))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.w.to(dtype) if isinstance(self.w, torch.Tensor) else self.w.dequantize(self.x.dtype).to(dtype)

    def keep(self) -> torch.Tensor:
        """bool, x's shape, row-major: the oracle's where its loops are quick, else the same words by torch."""
        if self.x.numel() < 2000:
            return torch.from_numpy(philox.keep(tuple(self.x.shape), self.dropout, SEED))
        return (philox_words(self.x.numel(), SEED) >= int(self.dropout * 2**32)).view(self.x.shape)

    def plain(self) -> list[torch.Tensor]:
        """y and the gradients of x, A, B and bias by what anybody would write, in x's dtype."""
        x, A, B, *bias = leaves = self.leaves()
        dropped = torch.where(self.keep(), x / (1 - self.dropout), 0.0) if self.dropout else x
        low_rank = F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))
        y = F.linear(x, self.dense(x.dtype), *bias) + self.scaling * low_rank
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def exact(self) -> list[torch.Tensor]:
        """The same in float64: the oracle where its loops are quick, else the same sums by torch."""
        x, A, B, *bias = self.leaves(torch.float64)
        rows, dy = x.detach().reshape(-1, x.shape[-1]), self.dy.double().reshape(-1, B.shape[0])
        keep = self.keep().view(rows.shape) if self.dropout else None
        if rows.numel() * len(B) < 20000:
            arrays = [t.detach().numpy() for t in (rows, self.dense(torch.float64), A, B)]
            mask = None if keep is None else keep.numpy()
            y = oracle.forward(*arrays, self.scaling, bias[0].detach().numpy() if bias else None, mask, self.dropout)[0]
            dx, dA, dB, dbias, _ = oracle.backward(dy.numpy(), *arrays, self.scaling, mask, self.dropout)
            found = [torch.from_numpy(t) for t in (y, dx, dA, dB, dbias)]
        else:
            W, factor = self.dense(torch.float64), 1.0 if keep is None else keep / (1 - self.dropout)
            A, B, dropped = A.detach(), B.detach(), rows * factor
            s, V = dropped @ A.T, self.scaling * dy @ B
            y = rows @ W.T + self.scaling * s @ B.T + (bias[0].detach() if bias else 0)
            found = [y, dy @ W + V @ A * factor, V.T @ dropped, self.scaling * dy.T @ s, dy.sum(0)]
        found[0], found[1] = found[0].view(self.dy.shape), found[1].view(x.shape)
        return found[: 4 + len(bias)]


def case(
    lead, N, K, r, dtype, quant_type="nf4", block_size=64, double_quant=True, bias=True, dropout=0.0, adapter=torch.float32,
    device="cpu",
) -> Case:  # fmt: skip
    """Normal numbers; quant_type "none" is a dense weight. lead: the leading dimensions of x."""
    w = torch.randn(N, K, device=device).to(dtype)
    w = w if quant_type == "none" else quantize_weight(w, quant_type, block_size, double_quant)
    x, dy = torch.randn(*lead, K, device=device).to(dtype), torch.randn(*lead, N, device=device).to(dtype)
    A, B = torch.randn(r, K, device=device).to(adapter), torch.randn(N, r, device=device).to(adapter)
    return Case(x, w, A, B, torch.randn(N, device=device).to(dtype) if bias else None, dy, dropout=dropout)


def check(found, c: Case) -> None:
    """y, dx, dA, dB and, if there is one, dbias: right shapes and dtypes, as accurate as the plain expression."""
    for name, ours, plain, exact in zip(NAMES, found, c.plain(), c.exact(), strict=False):
        assert ours.dtype == plain.dtype and ours.is_contiguous(), name
        assert_as_accurate(ours.cpu(), plain.cpu(), exact)
