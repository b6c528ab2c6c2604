"""4-bit quantization and dequantization on the CPU engine against the oracle, bit for bit.

The Triton kernels are in tests/test_nf4_triton.py.
"""

from __future__ import annotations

import pytest
import torch
from four_bit import (
    BLOCK_SIZES,
    DTYPES,
    QUANT_TYPES,
    around_thresholds,
    assert_same,
    check_quantize,
    codes_of,
    hard_values,
    oracle_dequantize,
)
from hypothesis import given
from hypothesis import strategies as st

from posttrain.kernels import codebooks, dequantize_fp4, dequantize_nf4, quantize_fp4, quantize_nf4
from posttrain.reference import nf4 as oracle

QUANTIZE = {"nf4": quantize_nf4, "fp4": quantize_fp4}
DEQUANTIZE = {"nf4": dequantize_nf4, "fp4": dequantize_fp4}
TAILS = (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 640)
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _op_quantize(x, block_size, quant_type):
    return QUANTIZE[quant_type](x, block_size)


# ---- the engine of this machine's CPU, through the public functions


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", TAILS)
def test_quantize_matches_the_oracle(quant_type, dtype, n):
    check_quantize(_op_quantize, hard_values(n, 64, dtype), 64, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(quant_type, block_size):
    x = hard_values(2 * block_size + 17, block_size, torch.float32, seed=block_size)
    packed, absmax = check_quantize(_op_quantize, x, block_size, quant_type)
    restored = DEQUANTIZE[quant_type](packed, absmax, x.shape, torch.bfloat16, block_size)
    assert_same(restored, oracle_dequantize(packed, absmax, x.shape, torch.bfloat16, block_size, quant_type))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@given(values=st.lists(st.floats(width=32), max_size=150), block_size=st.sampled_from((32, 64)))
def test_any_float32_values(quant_type, values, block_size):
    """Every float32 is fair: subnormals, signed zeros, infinities and NaN, in blocks whole and short."""
    x = torch.tensor(values, dtype=torch.float32)
    packed, absmax = check_quantize(_op_quantize, x, block_size, quant_type)
    restored = DEQUANTIZE[quant_type](packed, absmax, x.shape, torch.float32, block_size)
    assert_same(restored, oracle_dequantize(packed, absmax, x.shape, torch.float32, block_size, quant_type))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", (64, 128))
def test_ties_take_the_lower_code(quant_type, block_size):
    """absmax 1 scales by exactly 1, so the thresholds themselves are reached: 64 fills a block, 128 leaves it short."""
    values, codes = around_thresholds(quant_type)
    x = torch.ones(64)
    x[: len(values)] = values
    packed, _ = QUANTIZE[quant_type](x, block_size)
    assert torch.equal(codes_of(packed)[: len(codes)], codes)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bytes_dequantize(quant_type, dtype):
    """All 256 bytes against several absmax, infinite, NaN, zero and subnormal ones among them."""
    absmax = torch.tensor([1.0, 0.1, 3e38, 1e-41, 0.0, torch.inf, torch.nan, 65504.0])
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(absmax))
    shape = (len(absmax), 512)
    restored = DEQUANTIZE[quant_type](packed, absmax, shape, dtype, 512)
    assert_same(restored, oracle_dequantize(packed, absmax, shape, dtype, 512, quant_type))


def test_special_blocks_are_what_the_docstring_says():
    nan, inf = torch.nan, torch.inf
    for special, expected_absmax, expected in (
        ([0.0, -0.0], 0.0, [0.0, 0.0]),
        ([nan, 1.0], nan, [nan, nan]),
        ([inf, -inf], inf, [inf, -inf]),
        ([inf, 1.0], inf, [inf, nan]),
        ([-2.0, 2.0], 2.0, [-2.0, 2.0]),
    ):
        for block_size in (32, 64):  # 32: a whole block; 64: a short one
            x = torch.tensor((special * 16)[:32])
            packed, absmax = quantize_nf4(x, block_size)
            restored = dequantize_nf4(packed, absmax, x.shape, torch.float32, block_size)
            assert_same(absmax, torch.tensor([expected_absmax]))
            assert_same(restored, torch.tensor((expected * 16)[:32]))


def test_subnormal_blocks_are_scaled_as_if_absmax_were_1e38th():
    x = torch.full((64,), 1e-40)
    packed, absmax = quantize_nf4(x)
    assert absmax.item() == x[0].item()
    assert set(codes_of(packed).tolist()) == {7}  # 1e-40 / 1e-38 = 0.01 rounds to 0


def test_odd_lengths_are_padded_with_the_code_of_zero():
    assert quantize_nf4(torch.tensor([-1.0]))[0].tolist() == [0x07]
    assert quantize_fp4(torch.tensor([-1.0]))[0].tolist() == [0xB0]
    assert quantize_nf4(torch.tensor([torch.nan]))[0].tolist() == [0x07]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 1), (3, 7, 11), (65, 64)])
def test_shapes(shape):
    x = torch.randn(shape)
    packed, absmax = check_quantize(_op_quantize, x, 64, "nf4")
    restored = dequantize_nf4(packed, absmax, shape, torch.float16)
    assert restored.shape == x.shape
    assert_same(restored, oracle_dequantize(packed, absmax, shape, torch.float16, 64, "nf4"))


def test_strided_input_equals_its_copy():
    base = torch.randn(48, 96)
    for x in (base.T, base[::2, 1:], base[:, ::3], torch.randn(64)[None].expand(3, 64)):
        for a, b in zip(quantize_nf4(x), quantize_nf4(x.clone(memory_format=torch.contiguous_format)), strict=True):
            assert torch.equal(a, b)


def test_packed_and_absmax_may_be_views():
    x = torch.randn(4, 128)
    packed, absmax = quantize_nf4(x)
    spread, shifted = torch.zeros(256, 2, dtype=torch.uint8), torch.zeros(257, dtype=torch.uint8)
    spread[:, 0], shifted[1:] = packed, packed
    expected = dequantize_nf4(packed, absmax, x.shape, torch.bfloat16)
    for view in (spread[:, 0], shifted[1:], packed.view(256, 1)):
        assert torch.equal(dequantize_nf4(view, absmax.repeat_interleave(2)[::2], x.shape, torch.bfloat16), expected)


@given(st.lists(finite32, min_size=1, max_size=130), st.sampled_from(QUANT_TYPES))
def test_error_is_at_most_half_a_gap(values, quant_type):
    """|x - x~| <= absmax * (half the widest gap of the table), plus the roundings of scaling, product and table."""
    x = torch.tensor(values, dtype=torch.float32)
    packed, absmax = QUANTIZE[quant_type](x)
    restored = DEQUANTIZE[quant_type](packed, absmax, x.shape, torch.float32)
    gap = codebooks.CODEBOOKS[quant_type].double().sort().values.diff().max()
    scale = absmax.double().clamp(min=1e-38).repeat_interleave(64)[: len(values)]
    roundings = 4 * 2.0**-24  # reciprocal, product, threshold, reconstruction: half a unit each, at a magnitude of at most 1
    assert ((x.double() - restored.double()).abs() <= scale * (gap / 2 + roundings) + 2.0**-149).all()


# mean |x - x~| of N(0, 1) values per block size, as bitsandbytes' own tests state it for 1024 x 1024 samples
MAE = {
    "nf4": (0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547),
    "fp4": (0.088925, 0.096543, 0.102969, 0.108684, 0.114115, 0.119333, 0.124556, 0.129536),
}


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_mean_error_is_the_published_one(quant_type, block_size):
    """Two-sided: the difference of two sample means has standard error sqrt(2) s / sqrt(blocks), s the spread of block
    means (blocks are independent, values in one are not). Five of them: sixteen such tests fail by chance once in 10^5."""
    x = torch.randn(1024, 1024)
    packed, absmax = QUANTIZE[quant_type](x, block_size)
    error = (x - DEQUANTIZE[quant_type](packed, absmax, x.shape, torch.float32, block_size)).abs()
    block_means = error.double().view(-1, block_size).mean(1)
    standard_error = 2**0.5 * block_means.std() / len(block_means) ** 0.5
    assert abs(block_means.mean() - MAE[quant_type][BLOCK_SIZES.index(block_size)]) < 5 * standard_error


# ---- registration


@pytest.mark.parametrize("n", [0, 63, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(n, dtype):
    x = torch.randn(n).to(dtype)
    torch.library.opcheck(torch.ops.posttrain.quantize_4bit, (x, 64, "nf4"))
    packed, absmax = quantize_nf4(x)
    args = (packed, absmax, None, None, 256, [n], dtype, 64, "nf4")
    torch.library.opcheck(torch.ops.posttrain.dequantize_4bit, args)


def test_compiles_whole():
    def round_trip(x):
        packed, absmax = quantize_nf4(x)
        return dequantize_nf4(packed, absmax, x.shape, x.dtype)

    x = torch.randn(3, 100)
    assert torch.equal(torch.compile(round_trip, fullgraph=True, backend="aot_eager")(x), round_trip(x))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "block_size is 48; expected a power of two", lambda: quantize_nf4(torch.ones(4), 48)),
        (ValueError, "block_size is 16", lambda: quantize_fp4(torch.ones(4), 16)),
        (TypeError, "x is torch.int64; expected float32", lambda: quantize_nf4(torch.ones(4, dtype=torch.long))),
        (TypeError, "x is torch.float64", lambda: quantize_nf4(torch.ones(4, dtype=torch.double))),
    ],
)
def test_quantize_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "dtype is torch.float64", {"dtype": torch.float64}),
        (TypeError, "packed is torch.int8", {"packed": torch.zeros(64, dtype=torch.int8)}),
        (TypeError, "double_dequantize", {"absmax": torch.zeros(2, dtype=torch.uint8)}),
        (ValueError, "needs 64 packed bytes and 2 absmax; given 63 and 2", {"packed": torch.zeros(63, dtype=torch.uint8)}),
        (ValueError, "given 64 and 3", {"absmax": torch.zeros(3)}),
        (ValueError, "block_size is 65", {"block_size": 65}),
        (ValueError, "absmax on meta", {"absmax": torch.zeros(2, device="meta")}),
    ],
)
def test_dequantize_errors(error, match, change):
    arguments = {"packed": torch.zeros(64, dtype=torch.uint8), "absmax": torch.zeros(2), "shape": (128,), "dtype": torch.float32}
    with pytest.raises(error, match=match):
        dequantize_nf4(**arguments | change)


# ---- the same bytes as bitsandbytes


@pytest.mark.peers
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (3, 5), (7, 192), (129,)])
def test_bytes_equal_bitsandbytes(quant_type, dtype, shape):
    """Its CPU functions, on finite input. FP4 zeros differ in sign, about which its own engines disagree."""
    functional = pytest.importorskip("bitsandbytes").functional
    x = torch.randn(shape).to(dtype)
    x.view(-1)[:64] = 0 if x.numel() > 128 else x.view(-1)[:64]
    with torch.compiler.set_stance("force_eager"):  # it would compile its fallbacks anew for every shape
        theirs, state = functional.quantize_4bit(x, blocksize=64, quant_type=quant_type)
        theirs_restored = functional.dequantize_4bit(theirs, state)
    packed, absmax = QUANTIZE[quant_type](x)
    assert torch.equal(absmax, state.absmax)
    if quant_type == "nf4":
        assert torch.equal(packed, theirs.flatten())
    ours, others = (codebooks.CODEBOOKS[quant_type][codes_of(p)[: x.numel()]] for p in (packed, theirs.flatten()))
    differing = ours != others
    scaled = x.flatten().float() * absmax.reciprocal().repeat_interleave(64)[: x.numel()]
    # negative FP4 ties: its CPU engine takes the larger magnitude, its CUDA kernel and we the smaller
    assert torch.isin(scaled[differing], -codebooks.FP4_THRESHOLDS).all() and not (quant_type == "nf4" and differing.any())
    # its dequantization is right where rows hold whole blocks or are not a multiple of 16
    if shape[-1] % 64 == 0 or (shape[-1] % 16 and len(shape) > 1):
        restored = DEQUANTIZE[quant_type](theirs.flatten(), absmax, shape, dtype)
        assert torch.equal(restored, theirs_restored)


def test_the_oracle_is_not_the_engine():
    """The oracle must not share code with what it checks: it imports numpy alone."""
    assert "torch" not in vars(oracle)
