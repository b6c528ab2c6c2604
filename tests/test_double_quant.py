"""Double quantization of absmax: every engine against the oracle, the guard against negative absmax, bitsandbytes' reading."""

from __future__ import annotations

import four_bit
import pytest
import torch
from four_bit import assert_same, oracle_double_dequantize
from hypothesis import given
from hypothesis import strategies as st

from posttrain.kernels import DoubleQuantized, double_dequantize, double_quant, double_quantize, quantize_nf4
from posttrain.reference import double_quant as oracle

LENGTHS = (1, 2, 255, 256, 257, 700)


def _samples(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(n, generator=generator)
    return {
        "weights": 2.5 + 0.3 * normal.abs(),
        "heavy": (3 * normal).exp(),
        "equal": torch.full((n,), 0.7),
        "zeros": torch.zeros(n),
        "huge": normal.abs() * 1e35,
        "tiny": normal.abs() * 1e-39,
    }


def _check(quantize, dequantize, absmax: torch.Tensor, block_size: int = 256) -> None:
    codes, nested, offset = quantize(absmax, block_size)
    expected_codes, expected_nested = oracle.double_quantize(absmax.numpy(), offset.item(), block_size)
    assert_same(nested, torch.from_numpy(expected_nested))
    assert_same(codes, torch.from_numpy(expected_codes))
    restored = dequantize(codes, nested, offset, block_size)
    assert_same(restored, oracle_double_dequantize(codes, nested, offset, block_size))
    assert (restored >= 0).all()


_quantize_op, _dequantize_op = torch.ops.posttrain.double_quantize, torch.ops.posttrain.double_dequantize


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", _samples(1))
def test_matches_the_oracle(n, kind):
    absmax = _samples(n)[kind]
    _check(_quantize_op, _dequantize_op, absmax)
    assert_same(double_quantize(absmax).offset, absmax.mean())


@pytest.mark.parametrize("block_size", (1, 64, 100))
def test_other_block_sizes(block_size):
    _check(_quantize_op, _dequantize_op, _samples(257)["heavy"], block_size)


@given(st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=60))
def test_any_absmax(values):
    _check(_quantize_op, _dequantize_op, torch.tensor(values, dtype=torch.float32))


@given(st.integers(0, 2**31), st.floats(0, 6))
def test_no_absmax_comes_back_negative_however_heavy_the_tail(seed, sigma):
    absmax = (sigma * torch.randn(512, generator=torch.Generator().manual_seed(seed))).exp()
    assert (double_dequantize(double_quantize(absmax)) >= 0).all()


def test_ordinary_weights_lose_less_than_the_map_s_widest_gap():
    """Normal weights: |error| <= nested absmax * (half the widest gap), plus three float32 roundings at absmax's size."""
    _, absmax = quantize_nf4(torch.randn(512, 512))
    dq = double_quantize(absmax)
    gap = torch.tensor(oracle.MAP, dtype=torch.float64).diff().max()
    bound = dq.absmax.double().repeat_interleave(256) * gap / 2 + 3 * absmax.double().max() * 2.0**-24
    assert ((double_dequantize(dq).double() - absmax.double()).abs() <= bound).all()


def test_empty():
    dq = double_quantize(torch.empty(0))
    assert dq.codes.shape == (0,) and dq.absmax.shape == (0,) and dq.offset.shape == ()
    assert double_dequantize(dq).shape == (0,)


def test_strided_and_shaped_absmax():
    absmax = torch.rand(40, 2)
    for x in (absmax, absmax[:, 0], absmax.T):
        flat = double_quantize(x.clone(memory_format=torch.contiguous_format).view(-1))
        for a, b in zip(double_quantize(x), flat, strict=True):
            assert a == b if isinstance(a, int) else torch.equal(a, b)


@pytest.mark.parametrize("n", (0, 1, 300))
def test_opcheck(n):
    absmax = torch.rand(n)
    torch.library.opcheck(_quantize_op, (absmax, 256))
    codes, nested, offset = _quantize_op(absmax, 256)
    torch.library.opcheck(_dequantize_op, (codes, nested, offset, 256))


def test_compiles_whole():
    def round_trip(absmax):
        return double_dequantize(double_quantize(absmax))

    absmax = torch.rand(300)
    assert torch.equal(torch.compile(round_trip, fullgraph=True, backend="aot_eager")(absmax), round_trip(absmax))


@pytest.mark.parametrize(
    ("error", "match", "absmax"),
    [
        (TypeError, "absmax is torch.float16; expected float32", torch.ones(4).half()),
        (ValueError, "finite values from 0 up", torch.tensor([1.0, torch.inf])),
        (ValueError, "finite values from 0 up", torch.tensor([1.0, torch.nan])),
        (ValueError, "ranges from -1.0 to 2.0", torch.tensor([-1.0, 2.0])),
        (ValueError, "sums to inf in float32", torch.full((4,), 3e38)),
    ],
)
def test_quantize_errors(error, match, absmax):
    with pytest.raises(error, match=match):
        double_quantize(absmax)


def test_dequantize_errors():
    good = double_quantize(torch.rand(300))
    with pytest.raises(ValueError, match="block_size is 0"):
        double_quantize(torch.rand(3), 0)
    with pytest.raises(ValueError, match="300 codes in blocks of 256 need 2 absmax and one offset; given 1 and 1"):
        double_dequantize(good._replace(absmax=good.absmax[:1]))
    with pytest.raises(TypeError, match="codes are torch.int64"):
        double_dequantize(good._replace(codes=good.codes.long()))


@pytest.mark.peers
@pytest.mark.parametrize("kind", _samples(1))
def test_bitsandbytes_reads_what_we_write(kind):
    """Its own dequantization of our codes gives our absmax, bit for bit."""
    functional = pytest.importorskip("bitsandbytes").functional
    absmax = _samples(700)[kind]
    dq = double_quantize(absmax)
    code = functional.create_dynamic_map().float()
    state = functional.QuantState(absmax=dq.absmax, code=code, blocksize=256, dtype=torch.float32)
    with torch.compiler.set_stance("force_eager"):
        theirs = functional.dequantize_blockwise(dq.codes, state) + dq.offset
    assert torch.equal(theirs, double_dequantize(dq))


@pytest.mark.peers
def test_where_bitsandbytes_turns_absmax_negative_we_do_not():
    """Lognormal absmax (sigma 3): its reconstruction flips the sign of whole blocks. Elsewhere the codes are its own."""
    functional = pytest.importorskip("bitsandbytes").functional
    absmax = _samples(700)["heavy"]
    dq = double_quantize(absmax)
    code = functional.create_dynamic_map().float()
    with torch.compiler.set_stance("force_eager"):
        theirs, state = functional.quantize_blockwise(absmax - dq.offset, code=code, blocksize=256)
        restored = functional.dequantize_blockwise(theirs, state) + dq.offset
    assert (restored < 0).any() and (double_dequantize(dq) >= 0).all()
    assert torch.equal(state.absmax, dq.absmax)
    # its x86 quantizer looks codes up in 65,536 bins, so compare what is not at a bin's edge: it errs by 3 codes at most
    kept = restored >= 0
    assert ((theirs.flatten().int() - dq.codes.int()).abs()[kept] <= 3).all()


def test_the_named_tuple_is_what_the_ops_return():
    dq = double_quantize(torch.rand(10))
    assert isinstance(dq, DoubleQuantized)
    assert (dq.codes.dtype, dq.absmax.dtype, dq.offset.dtype, dq.block_size) == (torch.uint8, torch.float32, torch.float32, 256)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", _samples(1))
def test_interpreted(kind):
    for n in LENGTHS:
        _check(double_quant.double_quantize_triton, double_quant.double_dequantize_triton, _samples(n)[kind])
    _check(double_quant.double_quantize_triton, double_quant.double_dequantize_triton, _samples(257)[kind], 100)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
def test_emulated(arch):
    """One thread for the mean, so that the emulated launch and the oracle centre by the same offset."""
    four_bit.activate(arch)
    for absmax in _samples(700).values():
        _check(double_quant.double_quantize_triton, double_quant.double_dequantize_triton, absmax)
    _check(double_quant.double_quantize_triton, double_quant.double_dequantize_triton, torch.ones(1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", _samples(1))
def test_gpu(kind):
    def quantize(absmax, block_size):
        return tuple(t.cpu() for t in _quantize_op(absmax.cuda(), block_size))

    def dequantize(codes, nested, offset, block_size):
        return _dequantize_op(codes.cuda(), nested.cuda(), offset.cuda(), block_size).cpu()

    for n in LENGTHS:
        _check(quantize, dequantize, _samples(n)[kind])
