"""RMSNorm and SwiGLU at a training step's shapes, bfloat16, forward and backward, beside the plain expressions that
transformers computes (LlamaRMSNorm, silu(gate) * up) and torch's own fused F.rms_norm.

The norm's weight takes no gradient, as with an adapter on a frozen base. The limit is the bytes of the inputs and outputs:
5 reads and writes of the rows for the norm forward and backward, 8 for SwiGLU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain import kernels
from posttrain.kernels import cpu

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

EPS = 1e-5
SHAPES = ((1024, 576, 1536), (4096, 576, 1536), (1024, 4096, 14_336))  # rows, hidden size, intermediate size


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "posttrain": lambda x, weight: kernels.rms_norm(x, weight, EPS),
    "transformers' expression": plain_norm,
    "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
}
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "posttrain": kernels.swiglu,
    "transformers' expression": lambda gate, up: F.silu(gate) * up,
}


def step(function: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the gradients of those inputs that take one."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)]


def agree(candidates: dict, inputs: tuple[Tensor, Tensor], dy: Tensor) -> None:
    """Ours against float64 is no further off than twice the plain expression."""
    exact = step(candidates["transformers' expression"], tuple(_leaf(t.double(), t) for t in inputs), dy.double())
    errors = {
        name: [(a.double() - b).norm().item() for a, b in zip(step(f, inputs, dy), exact, strict=True)]
        for name, f in candidates.items()
    }
    assert all(a <= 2 * b for a, b in zip(errors["posttrain"], errors["transformers' expression"], strict=True)), errors


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(like.requires_grad)


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    rate, rows = _bench.bandwidth(options), []
    for N, D, inner in SHAPES:
        x, weight, dy = torch.randn(N, D).bfloat16().requires_grad_(), torch.rand(D).bfloat16(), torch.randn(N, D).bfloat16()
        gate, up, dh = (torch.randn(N, inner).bfloat16() for _ in range(3))
        both = gate.requires_grad_(), up.requires_grad_()
        for title, candidates, inputs, grad, limit in (
            (f"rms_norm {N} x {D}", NORMS, (x, weight), dy, 2 * 5 * N * D),
            (f"swiglu {N} x {inner}", GATES, both, dh, 2 * 8 * N * inner),
        ):
            agree(candidates, inputs, grad)
            calls = {name: lambda f=f, i=inputs, g=grad: step(f, i, g) for name, f in candidates.items()}
            rows.append(_bench.row(title, _bench.in_turn(calls, options), limit, rate))
    _bench.save("rms_norm", rows, options, cpu.describe())


if __name__ == "__main__":
    main()
