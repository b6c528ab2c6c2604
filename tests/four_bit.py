"""What the tests of 4-bit kernels share: adversarial inputs, the oracle on tensors, bitwise comparison, the engines."""

from __future__ import annotations

import numpy as np
import torch

from posttrain.kernels import codebooks
from posttrain.reference import double_quant as oracle_double
from posttrain.reference import nf4 as oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANT_TYPES = ("nf4", "fp4")
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
    return torch.from_numpy(oracle_double.double_dequantize(codes.numpy(), nested_absmax.numpy(), float(offset), block_size))


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


def check_quantize(quantize, x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize`'s bytes are the oracle's."""
    packed, absmax = quantize(x, block_size, quant_type)
    expected_packed, expected_absmax = oracle_quantize(x, block_size, quant_type)
    assert_same(absmax, expected_absmax)
    assert_same(packed, expected_packed)
    return packed, absmax


def around_thresholds(quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(values: each threshold, its float32 neighbours below and above, for FP4 of both signs; the codes they must get)."""
    if quant_type == "nf4":
        at = codebooks.NF4_THRESHOLDS
        below, above = at.nextafter(torch.tensor(-2.0)), at.nextafter(torch.tensor(2.0))
        lower = torch.arange(15)
        return torch.cat([at, below, above]), torch.cat([lower, lower, lower + 1])
    at = codebooks.FP4_THRESHOLDS
    below, above = at.nextafter(torch.tensor(-2.0)), at.nextafter(torch.tensor(2.0))
    lower, upper = codebooks.FP4_MAGNITUDE_CODES[:-1], codebooks.FP4_MAGNITUDE_CODES[1:]
    values, codes = torch.cat([at, below, above]), torch.cat([lower, lower, upper])
    return torch.cat([values, -values]), torch.cat([codes, codes + 8])


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], 1).flatten().long()


def activate(arch: int, **options):
    """Send every Triton launch of this process to the emulator: compiled for sm_`arch`, every check on."""
    import gpuemu

    return gpuemu.activate(arch, strict=True, **options)
