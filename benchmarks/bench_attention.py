"""Causal attention of the decoder in bfloat16, forward and backward, and forward alone, beside PyTorch's
scaled_dot_product_attention, which is what transformers computes with (attn_implementation "sdpa").

q, k and v lie as a linear layer leaves them: the heads of a position side by side. The limit is the bytes of the inputs and
outputs, each once; below it stands the products' time at the rate of a large one here: 7 of T^2 / 2 by head_dim for each head with
the backward pass, 2 without.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels import cpu
from posttrain.model.attention import attention

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench
from bench_sft import matmul_rate

SHAPES = ((4, 256, 9, 3, 64), (1, 1024, 9, 3, 64), (1, 512, 32, 8, 128))  # B, T, heads, kv heads, head_dim


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


CANDIDATES = {"posttrain": attention, "PyTorch's SDPA": sdpa}


def step(function, inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def forward(function, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return function(*inputs)


def agree(inputs: tuple[Tensor, ...], dy: Tensor) -> None:
    """y and the gradients, against float64, are no further off than twice SDPA's."""
    exact = step(sdpa, tuple(t.detach().double().requires_grad_() for t in inputs), dy.double())
    ours, theirs = ([(a - b).norm().item() for a, b in zip(step(f, inputs, dy), exact, strict=True)] for f in CANDIDATES.values())
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    rate, flops, rows = _bench.bandwidth(options), matmul_rate(), []
    for B, T, heads, kv_heads, D in SHAPES:
        inputs = tuple(torch.randn(B, T, h, D).bfloat16().transpose(1, 2).requires_grad_() for h in (heads, kv_heads, kv_heads))
        dy = torch.randn(B, T, heads, D).bfloat16().transpose(1, 2)
        agree(inputs, dy)
        elements, product = B * T * (heads + kv_heads) * D, B * heads * T * T * D
        both = functools.partial(step, dy=dy)
        for title, call, tensors, products in (("forward, backward", both, 5, 7), ("forward", forward, 2, 2)):
            calls = {name: functools.partial(call, f, inputs) for name, f in CANDIDATES.items()}
            title = f"{title} {B} x {T}, {heads}/{kv_heads} x {D}"
            rows.append(_bench.row(title, _bench.in_turn(calls, options), 2 * tensors * elements, rate))
            print(f"{'':34} products alone {products * product / flops * 1e3:.2f} ms")
    _bench.save("attention", rows, options, cpu.describe())


if __name__ == "__main__":
    main()
