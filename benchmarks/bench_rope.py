"""Rotary positions of a training step's queries and keys, bfloat16, forward and backward, beside transformers' apply_rotary_pos_emb
and the shortest expression in PyTorch, addcmul(x * cos, roll(x), sin).

Projections give (B, T, heads, D) and attention takes (B, heads, T, D): whoever works on one of these turns his view, and the
gradient arrives in the second. The limit is 4 reads and writes of queries and keys, and cos and sin twice. Liger's kernel is
Triton's: it has no CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from posttrain import kernels
from posttrain.kernels import cpu
from posttrain.model.rope import RopeConfig, RotaryTable

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

SHAPES = ((4, 256, 9, 3, 64), (4, 1024, 9, 3, 64), (1, 1024, 32, 8, 128))  # B, T, heads, key-value heads, head size
Rotation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # queries, keys (B, T, heads, D), cos, signed sin


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.rope(q, cos, sin).transpose(1, 2), kernels.rope(k, cos, sin).transpose(1, 2)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = q.shape[-1] // 2
    turned = (torch.addcmul(x * cos, x.roll(half, -1), sin).transpose(1, 2) for x in (q, k))
    return next(turned), next(turned)


def transformers_rotation() -> Rotation | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    apply = importlib.import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb

    def theirs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply(q.transpose(1, 2), k.transpose(1, 2), cos[:, :, 0], sin[:, :, 0])

    return theirs


def step(rotate: Rotation, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor) -> list[Tensor]:
    """Rotated queries and keys, and their gradients."""
    turned = rotate(q, k, cos, sin)
    return [*(t.detach() for t in turned), *torch.autograd.grad(turned, (q, k), (dq, dk))]


def agree(steps: dict[str, Callable[[], list[Tensor]] | None], given: tuple[Tensor, ...]) -> None:
    """Everybody against float64 is no further off than twice the plain expression."""
    q, k, cos, sin, dq, dk = (t.detach().double().requires_grad_(t.requires_grad) for t in given)
    exact = step(plain, q, k, cos, sin, dq, dk)
    errors = {
        name: [(a.double() - b).norm().item() for a, b in zip(run(), exact, strict=True)] for name, run in steps.items() if run
    }
    for name, found in errors.items():
        assert all(a <= 2 * b for a, b in zip(found, errors["addcmul of a roll"], strict=True)), (name, errors)


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    rate, rows, theirs = _bench.bandwidth(options), [], transformers_rotation()
    for B, T, heads, kv_heads, D in SHAPES:
        q, k = (torch.randn(B, T, h, D).bfloat16().requires_grad_() for h in (heads, kv_heads))
        dq, dk = (torch.randn(B, h, T, D).bfloat16() for h in (heads, kv_heads))
        cos, sin = RotaryTable(RopeConfig(), D, T).at(0, T, q.device, q.dtype)
        unsigned = torch.cat((sin[..., D // 2 :],) * 2, -1)
        given, as_theirs = (q, k, cos, sin, dq, dk), (q, k, cos, unsigned, dq, dk)
        steps = {
            "posttrain": lambda given=given: step(ours, *given),
            "transformers": theirs and (lambda given=as_theirs: step(theirs, *given)),
            "addcmul of a roll": lambda given=given: step(plain, *given),
        }
        agree(steps, given)
        limit = 2 * (4 * (q.numel() + k.numel()) + 4 * T * D)
        rows.append(_bench.row(f"{B} x {T}, {heads} + {kv_heads} heads of {D}", _bench.in_turn(steps, options), limit, rate))
    _bench.save("rope", rows, options, cpu.describe())


if __name__ == "__main__":
    main()
