"""lora_linear of the CPU engine in plain PyTorch: what runs where no C compiler built the native one.

    y = x W^T + bias + scaling x' A^T B^T           x' = drop(x)
    V = scaling dY B      dX = dY W + drop'(V A)      dA = V^T x'      dB = scaling dY^T (x' A^T)

Which elements dropout keeps is a function of the seed and the element's index alone, so no mask is stored: element i
of x (flattened) is kept iff word i % 4 of Philox4x32-10 at counter i // 4 reaches floor(dropout 2^32) (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). Kept values are multiplied by 1 / (1 - dropout) in fp32 and rounded
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pytorch

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a b. int64 wraps around where the product passes 2^63; its bits stay right."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox_words(count: int, seed: int) -> Tensor:
    """The first `count` 32-bit words of the stream of `seed`, int64 (count,): four to a counter of Philox4x32-10."""
    counter = torch.arange(-(-count // 4), dtype=torch.int64)
    c0, c1 = counter & _LOW, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(_MULTIPLIERS[0], c0), _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), 1).flatten()[:count]


def dropout(x: Tensor, dropout: float, seed: int) -> Tensor:
    """x with each element either 0 or, with probability 1 - dropout, divided by that. Same shape and dtype."""
    if dropout == 0.0:
        return x
    kept = (philox_words(x.numel(), seed) >= int(dropout * 2**32)).view(x.shape)
    return torch.where(kept, x.to(torch.promote_types(x.dtype, torch.float32)) * (1.0 / (1.0 - dropout)), 0.0).to(x.dtype)


def base_product(engine, x, base, bias, N, K) -> Tensor:
    """x W^T + bias where `engine` has linear_4bit and dense_linear."""
    *tensors, block_size, quant_type = base
    if quant_type == "none":
        return engine.dense_linear(x, tensors[0], bias)
    return engine.linear_4bit(x, *tensors, bias, N, K, block_size, quant_type)


def base_dx(engine, dys, bases, K) -> Tensor:
    """The sum of dY W over layers that read the same x: (M, K)."""
    dx = dys[0].new_empty(0)
    for i, (dy, (*tensors, block_size, quant_type)) in enumerate(zip(dys, bases, strict=True)):
        if quant_type == "none":
            dx = dx.addmm_(dy, tensors[0]) if i else dy @ tensors[0]
        else:
            part = engine.linear_4bit_dx(dy, *tensors, dy.shape[1], K, block_size, quant_type)
            dx = dx.add_(part) if i else part
    return dx


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling a b, rounded once: a scaled factor would be rounded too, or overflow."""
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=scaling)


def lora_linear_on(engine, x, base, lora_A, lora_B, scaling, bias, p, seed, N, K) -> Tensor:
    """lora_linear where `engine` has linear_4bit."""
    y = base_product(engine, x, base, bias, N, K)
    s = dropout(x, p, seed) @ lora_A.to(x.dtype).t()
    return y.addmm_(s, lora_B.to(x.dtype).t(), alpha=scaling)


def lora_linear_backward_on(
    engine, dy, x, base, lora_A, lora_B, scaling, p, seed, N, K, need_x, need_A, need_B
) -> tuple[Tensor, Tensor, Tensor]:
    """lora_linear_backward where `engine` has linear_4bit_dx."""
    dx, dA, dB = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    if need_x or need_A:
        V = _scaled_product(dy, B, scaling)
    if need_A or need_B:
        dropped = dropout(x, p, seed)
    if need_A:
        dA = (V.t() @ dropped).to(lora_A.dtype)
    if need_B:
        dB = _scaled_product((dropped @ A.t()).t(), dy, scaling).t().to(lora_B.dtype)
    if need_x:
        dx = base_dx(engine, [dy], [base], K)
        dx = dx.addmm_(V, A) if p == 0.0 else dx.add_(dropout(V @ A, p, seed))
    return dx, dA, dB


def lora_linear_group_on(engine, x, bases, lora_As, lora_Bs, scalings, biases, p, seed, Ns, K) -> list[Tensor]:
    """lora_linear_group where `engine` has linear_4bit: layer by layer."""
    layers = zip(bases, lora_As, lora_Bs, scalings, biases, Ns, strict=True)
    return [lora_linear_on(engine, x, base, A, B, scaling, bias, p, seed, N, K) for base, A, B, scaling, bias, N in layers]


def lora_linear_group_backward_on(
    engine, dys, x, bases, lora_As, lora_Bs, scalings, p, seed, Ns, K, need_x, need_A, need_B
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """lora_linear_group_backward where `engine` has linear_4bit_dx: layer by layer."""
    dx = x.new_empty(0)
    dAs: list[Tensor] = []
    dBs: list[Tensor] = []
    for dy, base, A, B, scaling, N in zip(dys, bases, lora_As, lora_Bs, scalings, Ns, strict=True):
        needs = (need_x, need_A, need_B)
        through, dA, dB = lora_linear_backward_on(engine, dy, x, base, A, B, scaling, p, seed, N, K, *needs)
        dx = through if not dAs or not need_x else dx.add_(through)
        dAs.append(dA)
        dBs.append(dB)
    return dx, dAs, dBs


def lora_linear(
    x, weight, absmax, nested_absmax, nested_offset, nested_block_size, lora_A, lora_B, scaling, bias, p, seed, N, K,
    block_size, quant_type,
) -> Tensor:  # fmt: skip
    """x (M, K), W (N, K) dense or packed ("none": dense), lora_A (r, K), lora_B (N, r), bias (N,) or None: (M, N)."""
    base = (weight, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type)
    return lora_linear_on(pytorch, x, base, lora_A, lora_B, scaling, bias, p, seed, N, K)


def lora_linear_backward(
    dy, x, weight, absmax, nested_absmax, nested_offset, nested_block_size, lora_A, lora_B, scaling, p, seed, N, K,
    block_size, quant_type, need_x, need_A, need_B,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX (M, K), dA (r, K), dB (N, r)) of dy (M, N); empty (0,) where not needed. dA, dB in their factors' dtypes."""
    base = (weight, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type)
    return lora_linear_backward_on(pytorch, dy, x, base, lora_A, lora_B, scaling, p, seed, N, K, need_x, need_A, need_B)


def lora_linear_group(x, bases, lora_As, lora_Bs, scalings, biases, p, seed, Ns, K) -> list[Tensor]:
    """[lora_linear(x, ...)] of layers that share x and the dropout: lists of what each takes, `bases` of the weight's tensors,
    nested_block_size, block_size and quant_type."""
    return lora_linear_group_on(pytorch, x, bases, lora_As, lora_Bs, scalings, biases, p, seed, Ns, K)


def lora_linear_group_backward(
    dys, x, bases, lora_As, lora_Bs, scalings, p, seed, Ns, K, need_x, need_A, need_B
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dX (M, K), [dA], [dB]) of [dy (M, N)]; empty (0,) where not needed."""
    return lora_linear_group_backward_on(pytorch, dys, x, bases, lora_As, lora_Bs, scalings, p, seed, Ns, K, need_x, need_A, need_B)
