"""What the tests of 4-bit kernels share: adversarial inputs, the oracle on tensors, bitwise comparison, the engines."""
from __future__ import annotations

import numpy as np
import torch

from posttrain.reference import double_quant as oracle_double
from posttrain.reference import nf4 as oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same shape, dtype and bits; NaN equals NaN whatever its payload, and the signs of zeros count."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (actual.dtype, expected.dtype, actual.shape)
    if actual.dtype.is_floating_point:
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.nan_to_num(0.0, torch.inf, -torch.inf), expected.nan_to_num(0.0, torch.inf, -torch.inf)
        assert torch.equal(actual.signbit(), expected.signbit())
    assert torch.equal(actual, expected)


def oracle_quantize(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    packed, absmax = oracle.quantize(x.double().numpy(), block_size, quant_type)
    return torch.from_numpy(packed), torch.from_numpy(absmax)


def oracle_dequantize(packed, absmax, shape, dtype, block_size: int, quant_type: str) -> torch.Tensor:
    n = int(np.prod(shape))
    with np.errstate(invalid="ignore"):
        exact = oracle.dequantize(packed.numpy(), absmax.numpy(), n, block_size, quant_type)
    return torch.from_numpy(exact).float().to(dtype).view(tuple(shape))


def oracle_double_dequantize(codes, nested_absmax, offset, block_size: int = 256) -> torch.Tensor:
    return torch.from_numpy(
        oracle_double.double_dequantize(codes.numpy(), nested_absmax.numpy(), float(offset), block_size)
    )


def hard_values(n: int, block_size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """n normal values with, where there is room: a zero block, blocks with a NaN, +inf, -inf and both, a subnormal block,
    a block of float16's smallest normals, one constant block, and an infinity in the last, perhaps short, block."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    blocks = list(x.split(block_size))
    edits = [
        lambda b: b.zero_(),
        lambda b: b[:1].fill_(torch.nan),
        lambda b: b[-1:].fill_(torch.inf),
        lambda b: b[:1].fill_(-torch.inf),
        lambda b: (b[:1].fill_(-torch.inf), b[1:2].fill_(torch.inf), b[2:3].fill_(torch.nan)),
        lambda b: b.mul_(1e-40 if dtype != torch.float16 else 1e-7),
        lambda b: b.mul_(6e-5),
        lambda b: b.fill_(-0.75),
    ]
    for block, edit in zip(blocks[1:], edits, strict=False):
        edit(block)
    if len(blocks) > len(edits) + 1:
        blocks[-1][-1] = -torch.inf
    return x


def activate(arch: int, **options):
    """Send every Triton launch of this process to the emulator: compiled for sm_`arch`, every check on."""
    import gpuemu

    return gpuemu.activate(arch, strict=True, **options)
