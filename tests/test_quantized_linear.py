"""x W^T with W in 4 bits, and its gradients: every engine against the oracle."""

from __future__ import annotations

import importlib
from dataclasses import replace

import four_bit
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import QuantizedWeight, quantize_weight, quantized_linear
from posttrain.kernels.quantized_linear_decode import quantized_linear_decode_triton
from posttrain.kernels.quantized_linear_gemm import quantized_linear_gemm_triton
from posttrain.reference import quantized_linear as oracle

DTYPES = four_bit.DTYPES


def _oracle_weight(w: QuantizedWeight) -> torch.Tensor:
    packed, absmax, nested_absmax, nested_offset, nested_block_size = (
        t.cpu() if isinstance(t, torch.Tensor) else t for t in w.tensors()
    )
    nested = None if nested_absmax is None else (nested_absmax.numpy(), nested_offset.item(), nested_block_size)
    return torch.from_numpy(oracle.weight(packed.flatten().numpy(), absmax.numpy(), *w.shape, w.block_size, w.quant_type, nested))


def _exact(x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """float64 x W^T + bias. The oracle's loops where they are quick, else the same sum by torch.matmul in float64."""
    weight = _oracle_weight(w)
    rows = x.detach().cpu().double().reshape(-1, w.shape[1])
    bias = None if bias is None else bias.detach().cpu().double()
    if rows.shape[0] * weight.numel() < 20000:
        y = torch.from_numpy(oracle.forward(rows.numpy(), weight.numpy(), None if bias is None else bias.numpy()))
    else:
        y = rows @ weight.T + (0 if bias is None else bias)
    return y.view(*x.shape[:-1], w.shape[0])


def _check(y: torch.Tensor, x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None) -> None:
    assert y.dtype == x.dtype and y.is_contiguous()
    assert_as_accurate(y.cpu(), F.linear(x, w.dequantize(x.dtype), bias).cpu(), _exact(x, w, bias))


def _case(M, N, K, dtype, quant_type="nf4", block_size=64, double_quant=True, bias=True, device="cpu"):
    w = quantize_weight(torch.randn(N, K, device=device), quant_type, block_size, double_quant)
    return torch.randn(M, K, device=device).to(dtype), w, torch.randn(N, device=device).to(dtype) if bias else None


# ---- the engine of this machine's CPU, through the public function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", (True, False))
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 1, 1), (1, 5, 7), (3, 16, 64), (2, 33, 63), (2, 7, 65), (1, 40, 96), (40, 24, 192), (300, 12, 130), (2, 3, 4099)],
)
def test_forward(M, N, K, dtype, double_quant):
    x, w, bias = _case(M, N, K, dtype, double_quant=double_quant)
    _check(quantized_linear(x, w, bias), x, w, bias)
    _check(quantized_linear(x, w), x, w, None)


@given(
    M=st.integers(0, 5), N=st.integers(1, 9), K=st.integers(1, 70), block_size=st.sampled_from((32, 64, 4096)),
    quant_type=st.sampled_from(("nf4", "fp4")), dtype=st.sampled_from(DTYPES), double_quant=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_any_shape(M, N, K, block_size, quant_type, dtype, double_quant, bias):
    x, w, b = _case(M, N, K, dtype, quant_type, block_size, double_quant, bias)
    _check(quantized_linear(x, w, b), x, w, b)


@pytest.mark.parametrize("shape", [(50,), (0, 50), (2, 0, 50), (2, 3, 50), (1, 1, 1, 50)])
def test_leading_dimensions(shape):
    _, w, bias = _case(1, 6, 50, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    y = quantized_linear(x, w, bias)
    _check(y, x, w, bias)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_x_equals_its_copy():
    _, w, bias = _case(1, 9, 64, torch.float32)
    base = torch.randn(64, 128)
    for x in (base[:, ::2], base[::3, 5:69], base[:, 64:].T, base[:1, :64].expand(4, 64), base.view(8, 8, 128)[:, ::2, :64]):
        assert torch.equal(quantized_linear(x, w, bias), quantized_linear(x.contiguous(), w, bias))


def test_no_inputs_and_no_outputs():
    w = quantize_weight(torch.empty(3, 0))
    assert quantized_linear(torch.empty(2, 0), w, torch.ones(3)).tolist() == [[1.0] * 3] * 2
    w = quantize_weight(torch.empty(0, 3))
    assert quantized_linear(torch.empty(2, 3), w).shape == (2, 0)


def test_a_poisoned_block_poisons_its_rows_alone():
    weight = torch.randn(4, 64)
    weight[1, 3], weight[2, 5] = torch.nan, torch.inf
    w = quantize_weight(weight, double_quant=False)
    y = quantized_linear(torch.randn(3, 64), w)
    assert torch.equal(y.isfinite(), torch.tensor([True, False, False, True]).expand(3, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", (True, False))
@pytest.mark.parametrize(("M", "N", "K"), [(1, 5, 7), (3, 33, 65), (70, 20, 96)])
def test_gradients(M, N, K, dtype, double_quant):
    x, w, bias = _case(M, N, K, dtype, double_quant=double_quant)
    dy = torch.randn(M, N).to(dtype)
    x.requires_grad_(), bias.requires_grad_()
    quantized_linear(x, w, bias).backward(dy)
    plain_x, plain_bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    F.linear(plain_x, w.dequantize(dtype), plain_bias).backward(dy)
    dx, dbias = oracle.backward(dy.double().numpy(), _oracle_weight(w).numpy())
    assert x.grad.dtype == dtype and bias.grad.dtype == dtype
    assert_as_accurate(x.grad, plain_x.grad, dx)
    assert_as_accurate(bias.grad, plain_bias.grad, dbias)


def test_only_the_gradients_asked_for():
    x, w, bias = _case(2, 5, 64, torch.float32)
    quantized_linear(x, w, bias.requires_grad_()).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((5,), 2.0))
    quantized_linear(x.requires_grad_(), w).sum().backward()  # an expanded dy, and no bias
    assert_as_accurate(x.grad, torch.ones(2, 5) @ w.dequantize(), torch.ones(2, 5).double() @ _oracle_weight(w))


def test_gradients_of_gradients():
    """dx is linear in dy: differentiating it again is the forward product."""
    x, w, _ = _case(3, 5, 64, torch.float32, bias=False)
    dy = torch.randn(3, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(quantized_linear(x.requires_grad_(), w), x, dy, create_graph=True)
    ddx = torch.randn(3, 64)
    (ddy,) = torch.autograd.grad(dx, dy, ddx)
    _check(ddy, ddx, w, None)


# ---- registration


@pytest.mark.parametrize("double_quant", (True, False))
@pytest.mark.parametrize("bias", (True, False))
def test_opcheck(double_quant, bias):
    x, w, b = _case(3, 5, 65, torch.float32, double_quant=double_quant, bias=bias)
    b = b.requires_grad_() if bias else None
    rest = (*w.shape, w.block_size, w.quant_type)
    torch.library.opcheck(torch.ops.posttrain.quantized_linear, (x.requires_grad_(), *w.tensors(), b, *rest))
    dy = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.posttrain.quantized_linear_dx, (dy, *w.tensors(), *rest))


def test_compiles_whole():
    x, w, bias = _case(4, 24, 96, torch.float32)

    def step(x, bias):
        return quantized_linear(x.mul(2), w, bias).square().sum()

    eager = torch.autograd.grad(step(x.requires_grad_(), bias.requires_grad_()), (x, bias))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, bias), (x, bias)), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "w is a Tensor; expected a QuantizedWeight", {"w": torch.ones(5, 64)}),
        (ValueError, r"shape \(320,\); a linear layer's is \(out, in\)", {"w": quantize_weight(torch.ones(320))}),
        (ValueError, "takes 64 features", {"x": torch.ones(2, 63)}),
        (ValueError, "takes 64 features", {"x": torch.tensor(1.0)}),
        (TypeError, "x is torch.float64", {"x": torch.ones(2, 64, dtype=torch.double)}),
        (TypeError, "x is torch.int64", {"x": torch.ones(2, 64, dtype=torch.long)}),
        (ValueError, "x is on meta and the weight on cpu", {"x": torch.ones(2, 64, device="meta")}),
        (ValueError, r"bias is torch.float32 \(6,\) on cpu; expected torch.float32 \(5,\)", {"bias": torch.ones(6)}),
        (ValueError, "bias is torch.bfloat16", {"bias": torch.ones(5).bfloat16()}),
    ],
)
def test_errors(error, match, change):
    arguments = {"x": torch.ones(2, 64), "w": quantize_weight(torch.ones(5, 64)), "bias": None}
    with pytest.raises(error, match=match):
        quantized_linear(**arguments | change)


# ---- the Triton kernels: interpreted, emulated, and on a GPU


def _launch(kernel, case, split_k: int = 1) -> torch.Tensor:
    x, w, bias = case
    y = kernel(x, *w.tensors(), bias, *w.shape, w.block_size, w.quant_type, split_k)
    _check(y, *case)
    return y


INTERPRETED = [  # M, N, K, quant_type, block_size, double_quant, bias, split_k
    (1, 100, 32, "nf4", 64, True, True, 1),
    (2, 17, 96, "fp4", 64, False, False, 1),
    (3, 9, 1024 + 32, "nf4", 64, True, True, 2),
    (5, 7, 160, "nf4", 4096, True, False, 1),
]


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", (quantized_linear_decode_triton, quantized_linear_gemm_triton))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))  # bf16 dots go wrong in the interpreter
@pytest.mark.parametrize(("M", "N", "K", "quant_type", "block_size", "double_quant", "bias", "split_k"), INTERPRETED)
def test_interpreted(kernel, dtype, M, N, K, quant_type, block_size, double_quant, bias, split_k):
    _launch(kernel, _case(M, N, K, dtype, quant_type, block_size, double_quant, bias), split_k)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", (quantized_linear_decode_triton, quantized_linear_gemm_triton))
@settings(max_examples=6)
@given(M=st.integers(1, 4), N=st.integers(1, 6), chunks=st.integers(1, 5), split_k=st.sampled_from((1, 2)))
def test_interpreted_any_shape(kernel, M, N, chunks, split_k):
    _launch(kernel, _case(M, N, 32 * chunks, torch.float16), split_k)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", (quantized_linear_decode_triton, quantized_linear_gemm_triton))
def test_interpreted_rows_of_x_may_be_strided(kernel):
    _, w, bias = _case(1, 8, 64, torch.float16)
    _launch(kernel, (torch.randn(6, 200).half()[::2, 7:71], w, bias))


@pytest.mark.interpret
def test_interpreted_gemm_of_several_tiles():
    _launch(quantized_linear_gemm_triton, _case(70, 70, 288, torch.float32), 2)


EMULATED = [  # kernel, M, N, K, dtype, quant_type, double_quant, split_k
    (quantized_linear_decode_triton, 1, 80, 1024 + 96, torch.bfloat16, "nf4", True, 1),
    (quantized_linear_decode_triton, 5, 10, 2080, torch.float16, "fp4", False, 2),
    (quantized_linear_gemm_triton, 13, 64, 256, torch.bfloat16, "nf4", True, 1),
    (quantized_linear_gemm_triton, 70, 40, 416, torch.float16, "fp4", False, 2),
]


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(("kernel", "M", "N", "K", "dtype", "quant_type", "double_quant", "split_k"), EMULATED)
def test_emulated(arch, kernel, M, N, K, dtype, quant_type, double_quant, split_k):
    four_bit.activate(arch)
    _launch(kernel, _case(M, N, K, dtype, quant_type, 64, double_quant), split_k)


@pytest.mark.emulated
def test_emulated_split_k_is_deterministic():
    """Programs run in a random order each time; parts of K are added in a fixed one."""
    four_bit.activate(80)
    case = _case(1, 9, 4096, torch.bfloat16)
    first = _launch(quantized_linear_decode_triton, case, 4)
    assert all(torch.equal(_launch(quantized_linear_decode_triton, case, 4), first) for _ in range(3))


@pytest.mark.emulated
def test_emulated_dispatch(monkeypatch):
    """What runs on CUDA tensors, given CPU ones: each way that `plan` chooses, misaligned and empty tensors, and dX."""
    ql = importlib.import_module("posttrain.kernels.quantized_linear")  # the package's attribute is the function
    four_bit.activate(80)
    taken = []
    monkeypatch.setattr(ql, "_LAUNCHERS", {name: _noting(taken, name, f) for name, f in ql._LAUNCHERS.items()})
    monkeypatch.setattr(ql, "_dequantized", _noting(taken, "dequantize", ql._dequantized))

    def check(way: str | None, M, N, K, misaligned=False):
        x, w, bias = _case(M, N, K, torch.bfloat16)
        if misaligned:
            w = replace(w, packed=torch.cat([w.packed[:1], w.packed])[1:])
        taken.clear()
        _check(ql._linear_cuda(x, *w.tensors(), bias, N, K, 64, "nf4"), x, w, bias)
        assert taken == ([way] if way else [])
        dy = torch.randn(M, N).bfloat16()
        dx = ql._linear_dx_cuda(dy, *w.tensors(), N, K, 64, "nf4")
        assert_as_accurate(dx, dy @ w.dequantize(dy.dtype), dy.double() @ _oracle_weight(w))

    check("decode", 1, 80, 1024 + 96)
    check("gemm", 13, 64, 256)
    check("dequantize", 700, 16, 64)
    check("dequantize", 2, 5, 65)
    check("dequantize", 1, 8, 64, misaligned=True)
    check(None, 0, 8, 64)


@pytest.mark.emulated
def test_emulated_dequantized_weights_share_no_memory():
    """Two threads on one stream: one's product may be launched after the other's dequantization."""
    ql = importlib.import_module("posttrain.kernels.quantized_linear")
    four_bit.activate(80)
    _, w, _ = _case(1, 8, 64, torch.bfloat16)
    first, second = (ql._dequantized(torch.bfloat16, *w.tensors(), 8, 64, 64, "nf4") for _ in range(2))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def _noting(taken: list[str], name: str, function):
    def noted(*arguments):
        taken.append(name)
        return function(*arguments)

    return noted


WORK = [  # kernel, M, warp instructions a weight and A100 occupancy of bitsandbytes' CUDA kernel, measured the same way
    (quantized_linear_decode_triton, 1, 0.20, 1.0),
    (quantized_linear_gemm_triton, 16, 0.25, 0.38),
    (quantized_linear_gemm_triton, 64, 0.33, 0.5),
]


@pytest.mark.emulated
@pytest.mark.parametrize(("kernel", "M", "instructions", "occupancy"), WORK)
def test_emulated_work(kernel, M, instructions, occupancy):
    """Each byte is moved once, no shared-memory access conflicts, and instructions a weight are fewer than the peer's
    0.219, 0.274 and 0.387, at no less than its occupancy."""
    from gpuemu import counters

    counters.start(80)
    x, w, _ = case = _case(M, 64, 4096, torch.bfloat16)
    with counters.record() as recorded:
        _launch(kernel, case)
    (work,) = recorded.launches
    n, blocks = w.packed.numel() * 2, w.absmax.codes.numel()
    floor = n / 2 + blocks + 4 * w.absmax.absmax.numel() + 2 * (x.numel() + 64 + M * 64)
    assert work["dram"] <= 1.1 * floor
    assert work["warp_instr_nomov"] / n <= instructions
    assert (work["conflict"] or 1.0) < 1.1
    assert work["spill"] == 0 and work["occ"]["A100"][2] >= occupancy - 0.005


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(0, 8, 64), (1, 4096, 4096), (3, 100, 96), (16, 576, 576), (70, 200, 1056), (2000, 96, 130)]
)
def test_gpu(dtype, M, N, K):
    x, w, bias = _case(M, N, K, dtype, device="cuda")
    x.requires_grad_()
    y = quantized_linear(x, w, bias)
    _check(y.detach(), x.detach(), w, bias)
    assert torch.equal(y, quantized_linear(x, w, bias))
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = dy.cpu().double() @ _oracle_weight(w)
    assert_as_accurate(x.grad.cpu(), (dy @ w.dequantize(dtype)).cpu(), exact)


@pytest.mark.gpu
def test_gpu_dequantized_weights_are_per_stream():
    """Two weights dequantized on two streams at once: neither's memory becomes the other's while it is read."""
    cases = [_case(2048, 512, 512, torch.bfloat16, device="cuda") for _ in range(2)]
    expected = [quantized_linear(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                results.append(quantized_linear(*case))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
