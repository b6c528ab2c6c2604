"""The Triton kernels of lora_linear: interpreted, emulated in strict mode as compiled for two GPUs, and on a GPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import four_bit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import SEED, case, check
from tolerance import assert_as_accurate

from posttrain.kernels import lora_linear, lora_linear_group
from posttrain.kernels._low_rank import LowRank
from posttrain.kernels.lora_linear_down import lora_linear_down_triton
from posttrain.kernels.lora_linear_grad import lora_linear_grad_triton
from posttrain.kernels.lora_linear_up import lora_linear_up_triton
from posttrain.kernels.quantized_linear_decode import quantized_linear_decode_triton
from posttrain.kernels.quantized_linear_gemm import quantized_linear_gemm_triton
from posttrain.reference import philox

op = importlib.import_module("posttrain.kernels.lora_linear")  # the package's attribute is the function
FUSED = (quantized_linear_decode_triton, quantized_linear_gemm_triton)


def _small_products(M, C, R, dtype, dropout, parts):
    """Each small product of a layer, forward and backward, on (M, C) and rank R."""
    c = case((M,), C, C, R, dtype, "none", bias=True, dropout=dropout)
    x, A, B, scaling = c.x, c.lora_A, c.lora_B, c.scaling
    factor = c.keep().double() / (1 - dropout) if dropout else 1.0
    dropped, rounded = x.double() * factor, (x * factor).to(dtype)
    A_, B_ = A.to(dtype), B.to(dtype)

    s = lora_linear_down_triton(x, A, scaling, dropout, SEED, parts)
    s = s if parts == 1 else s.sum(0).to(dtype)
    assert_as_accurate(s, scaling * (rounded @ A_.T), scaling * dropped @ A.double().T)
    plain, exact = scaling * (s @ B_.T) + c.bias, scaling * s.double() @ B.double().T + c.bias.double()
    assert_as_accurate(lora_linear_up_triton(s, B, scaling, c.bias), plain, exact)
    dx = lora_linear_up_triton(s, A.t(), 1.0, None, dropout, SEED)
    assert_as_accurate(dx, ((s @ A_) * factor).to(dtype), s.double() @ A.double() * factor)
    dA, none = lora_linear_grad_triton(x, s, None, 1.0, dropout, SEED, parts, transposed=True)
    assert none is None
    assert_as_accurate(dA, (s.T @ rounded).float(), s.double().T @ dropped)
    if R <= 32:
        dB, V = lora_linear_grad_triton(x, s, B, scaling, parts=parts, grad_dtype=dtype)
        assert_as_accurate(V, scaling * (x @ B_), scaling * x.double() @ B.double())
    else:
        dB, _ = lora_linear_grad_triton(x, s, None, scaling, parts=parts, grad_dtype=dtype)
    assert_as_accurate(dB, scaling * (x.T @ s), scaling * x.double().T @ s.double())


def _fused(kernel, M, N, K, R, dtype, quant_type, split_k, parts):
    c = case((M,), N, K, R, dtype, quant_type, double_quant=split_k > 1)
    s = lora_linear_down_triton(c.x, torch.cat([torch.ones(3, K), c.lora_A]), parts=parts)  # a group's second layer
    term = LowRank(s[..., 3:], c.lora_B, c.scaling)
    check([kernel(c.x, *c.base(), c.bias, *c.format(), split_k, term)], c)


# ---- interpreted


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))  # bf16 dots go wrong in the interpreter
@pytest.mark.parametrize(("M", "C", "R", "dropout", "parts"), [(5, 132, 3, 0.3, 1), (70, 65, 40, 0.5, 2)])
def test_interpreted_small_products(dtype, M, C, R, dropout, parts):
    _small_products(M, C, R, dtype, dropout, parts)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", FUSED)
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "quant_type", "split_k", "parts"), [(1, 33, 64, 16, "nf4", 1, 2), (3, 9, 1056, 35, "fp4", 2, 1)]
)
def test_interpreted_fused(kernel, M, N, K, R, quant_type, split_k, parts):
    _fused(kernel, M, N, K, R, torch.float16, quant_type, split_k, parts)


@pytest.mark.interpret
@settings(max_examples=6)
@given(M=st.integers(1, 5), K=st.integers(1, 40), dropout=st.sampled_from((0.0, 0.5)), parts=st.sampled_from((1, 2)))
def test_interpreted_any_shape(M, K, dropout, parts):
    """Small whole numbers, so that sums are exact: x' A^T and x'^T s."""
    x, A = torch.randint(-3, 4, (M, K)).float(), torch.randint(-3, 4, (2, K)).float()
    dropped = torch.where(torch.from_numpy(philox.keep((M, K), dropout, SEED)), x / (1 - dropout), 0.0)
    s = lora_linear_down_triton(x, A, 1.0, dropout, SEED, parts)
    s = s if parts == 1 else s.sum(0)
    assert torch.equal(s, dropped @ A.T)
    assert torch.equal(lora_linear_grad_triton(x, s, None, 1.0, dropout, SEED, parts, transposed=True)[0], s.T @ dropped)


def _dropout_bits(dtype, M, K):
    """With A = 1, x' A^T is x' itself, and drop'(V A) is V dropped."""
    x, eye = torch.randn(M, K).to(dtype), torch.eye(K)
    keep = torch.from_numpy(philox.keep((M, K), 0.3, SEED))
    expected = torch.where(keep, x.float() * torch.tensor(1 / 0.7, dtype=torch.float32), 0.0).to(dtype)
    assert torch.equal(lora_linear_down_triton(x, eye, 1.0, 0.3, SEED), expected)
    assert torch.equal(lora_linear_up_triton(x, eye, 1.0, None, 0.3, SEED), expected)
    ones = torch.eye(M).to(dtype)  # x'^T 1 is x' transposed
    assert torch.equal(lora_linear_grad_triton(x, ones, None, 1.0, 0.3, SEED, transposed=True, grad_dtype=dtype)[0], expected)


@pytest.mark.interpret
@pytest.mark.parametrize("K", (36, 37))
def test_interpreted_dropout_is_the_oracle_bit_for_bit(K):
    _dropout_bits(torch.float16, 18, K)


# ---- emulated


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("K", (68, 37))
def test_emulated_dropout_is_the_oracle_bit_for_bit(arch, K):
    four_bit.activate(arch)
    _dropout_bits(torch.bfloat16, 18, K)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    ("M", "C", "R", "dropout", "parts"), [(16, 640, 16, 0.0, 2), (70, 260, 24, 0.1, 1), (130, 129, 72, 0.5, 2)]
)
def test_emulated_small_products(arch, M, C, R, dropout, parts):
    four_bit.activate(arch)
    _small_products(M, C, R, torch.bfloat16, dropout, parts)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    ("kernel", "M", "N", "K", "R", "quant_type", "split_k", "parts"),
    [
        (quantized_linear_decode_triton, 1, 80, 1120, 16, "nf4", 1, 4),
        (quantized_linear_decode_triton, 5, 10, 2080, 40, "fp4", 2, 1),
        (quantized_linear_gemm_triton, 13, 70, 256, 8, "nf4", 1, 8),
        (quantized_linear_gemm_triton, 70, 40, 416, 40, "fp4", 2, 1),
    ],
)
def test_emulated_fused(arch, kernel, M, N, K, R, quant_type, split_k, parts):
    four_bit.activate(arch)
    _fused(kernel, M, N, K, R, torch.bfloat16, quant_type, split_k, parts)


@pytest.mark.emulated
def test_emulated_rank_of_one():
    """One row and rank 1: strides of 1 are constants of the kernel, also that from one part of s to the next."""
    four_bit.activate(80)
    c = case((1,), 8, 64, 1, torch.bfloat16)
    s = lora_linear_down_triton(c.x, c.lora_A, parts=2)
    assert s.stride() == (1, 1, 1)
    check([quantized_linear_decode_triton(c.x, *c.base(), c.bias, *c.format(), 1, LowRank(s, c.lora_B, c.scaling))], c)


@pytest.fixture
def cuda_engine(monkeypatch):
    """What runs on CUDA tensors, given CPU ones: op(name, *arguments). The ways it took are noted in `cuda_engine.taken`."""
    four_bit.activate(80)
    taken: list[str] = []

    def noting(name, function):
        return lambda *a, **k: (taken.append(name), function(*a, **k))[1]

    gpu = op.lora_linear_gpu
    monkeypatch.setattr(gpu, "_LAUNCHERS", {name: noting(name, f) for name, f in gpu._LAUNCHERS.items()})
    monkeypatch.setattr(gpu, "_dequantized", noting("dequantize", gpu._dequantized))
    return SimpleNamespace(taken=taken, forward=op._lora_linear_cuda, backward=op._lora_linear_backward_cuda)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("way", "lead", "N", "K", "r", "quant_type", "dropout"),
    [
        ("decode", (1,), 80, 1024 + 96, 16, "nf4", 0.0),
        ("gemm", (2, 13), 64, 256, 8, "nf4", 0.1),
        ("dequantize", (70,), 48, 65, 16, "nf4", 0.1),  # K in no whole chunks
        (None, (70,), 48, 96, 33, "none", 0.5),
    ],
)
def test_emulated_dispatch(cuda_engine, way, lead, N, K, r, quant_type, dropout):
    c = case(lead, N, K, r, torch.bfloat16, quant_type, dropout=dropout)
    rest = (c.dropout, SEED, *c.format())
    y = cuda_engine.forward(c.x, *c.base(), c.lora_A, c.lora_B, c.scaling, c.bias, *rest)
    assert cuda_engine.taken == ([way] if way else [])
    arguments = (c.dy, c.x, *c.base(), c.lora_A, c.lora_B, c.scaling, *rest)
    check([y, *cuda_engine.backward(*arguments, True, True, True)], c)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        for ours, need, exact in zip(cuda_engine.backward(*arguments, *needs), needs, c.exact()[1:4], strict=True):
            assert ours.numel() == (exact.numel() if need else 0)


@pytest.mark.emulated
def test_emulated_group(cuda_engine):
    """One product for two layers, of which the second is read with an offset into it; y and gradients are each layer's own."""
    cs = [case((20,), N, 64, r, torch.bfloat16, "nf4", dropout=0.1) for N, r in ((32, 8), (32, 8))]
    for c in cs:
        c.x = cs[0].x
    bases = [[tensors[i] for tensors in (c.base() for c in cs)] for i in range(4)]
    As, Bs, scalings = [c.lora_A for c in cs], [c.lora_B for c in cs], [c.scaling for c in cs]
    rest = (0.1, SEED, [32, 32], *cs[0].format()[1:])
    ys = op._lora_linear_group_cuda(cs[0].x, *bases, 256, As, Bs, scalings, [c.bias for c in cs], *rest)
    grads = op._lora_linear_group_backward_cuda([c.dy for c in cs], cs[0].x, *bases, 256, As, Bs, scalings, *rest, True, True, True)
    dx, dAs, dBs = grads
    for c, y, dA, dB in zip(cs, ys, dAs, dBs, strict=True):
        check([y], c)
        plain, exact = c.plain(), c.exact()
        assert_as_accurate(dA, plain[2], exact[2])
        assert_as_accurate(dB, plain[3], exact[3])
    assert_as_accurate(dx, sum(c.plain()[1] for c in cs), sum(c.exact()[1] for c in cs))


@pytest.mark.emulated
def test_emulated_nothing_to_sum(cuda_engine):
    for lead, N, K in (((0,), 5, 64), ((3,), 0, 64), ((3,), 5, 0)):
        c = case(lead, N, K, 2, torch.bfloat16, "none")
        rest = (0.0, 0, *c.format())
        y = cuda_engine.forward(c.x, *c.base(), c.lora_A, c.lora_B, 1.0, c.bias, *rest)
        assert torch.equal(y, c.bias.expand(*lead, N))
        for grad, of in zip(
            cuda_engine.backward(c.dy, c.x, *c.base(), c.lora_A, c.lora_B, 1.0, *rest, True, True, True),
            (c.x, c.lora_A, c.lora_B),
            strict=True,
        ):
            assert torch.equal(grad, torch.zeros_like(of))


@pytest.mark.emulated
def test_emulated_runs_repeat_bit_for_bit(cuda_engine):
    """Programs run in a random order each time; sums in parts are added in a fixed one."""
    c = case((200,), 64, 1024, 16, torch.bfloat16, dropout=0.1)
    rest = (c.dropout, SEED, *c.format())
    arguments = (c.dy, c.x, *c.base(), c.lora_A, c.lora_B, c.scaling, *rest, True, True, True)
    first = cuda_engine.backward(*arguments)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(cuda_engine.backward(*arguments), first, strict=True))


@pytest.mark.emulated
@pytest.mark.parametrize(("kernel", "M", "instructions"), [(FUSED[0], 1, 0.20), (FUSED[1], 16, 0.25), (FUSED[1], 64, 0.33)])
def test_emulated_work_of_the_fused_kernels(kernel, M, instructions):
    """With the term of rank 16 they move each byte once, and still take fewer instructions a weight than the 0.219, 0.274 and
    0.387 of bitsandbytes' CUDA kernels without one."""
    from gpuemu import counters

    counters.start(80)
    c = case((M,), 64, 4096, 16, torch.bfloat16)
    s = lora_linear_down_triton(c.x, c.lora_A, parts=8)
    with counters.record() as recorded:
        y = kernel(c.x, *c.base(), c.bias, *c.format(), low_rank=LowRank(s, c.lora_B, c.scaling))
    check([y], c)
    (work,) = recorded.launches
    n, blocks = c.w.packed.numel() * 2, c.w.absmax.codes.numel()
    floor = n / 2 + blocks + 4 * c.w.absmax.absmax.numel() + 2 * (c.x.numel() + 64 + M * 64) + 4 * (s.numel() + c.lora_B.numel())
    assert work["dram"] <= 1.1 * floor
    assert work["warp_instr_nomov"] / n <= instructions
    assert work["spill"] == 0


@pytest.mark.emulated
def test_emulated_bytes_of_the_small_products():
    """Each moves what its docstring says, each byte once."""
    from gpuemu import counters

    counters.start(80)
    M, C, R = 128, 512, 16
    x, A, B = torch.randn(M, C).bfloat16(), torch.randn(R, C), torch.randn(C, R)
    with counters.record() as recorded:
        s = lora_linear_down_triton(x, A, 1.0, 0.1, SEED)
        y = lora_linear_up_triton(s, B)
        lora_linear_grad_triton(y, s, B, parts=2)
        lora_linear_grad_triton(x, s, None, 1.0, 0.1, SEED, parts=2, transposed=True)
    down, up, both, add_dB, add_V, dA, _ = (work["dram"] for work in recorded.launches)
    assert down <= 1.1 * (2 * (M * C + M * R) + 4 * R * C)
    assert up <= 1.1 * (2 * (M * C + M * R) + 4 * R * C)
    assert both <= 1.1 * (2 * (M * C + M * R) + 4 * R * C + 4 * R * (2 * C + 2 * M))
    assert add_dB <= 1.1 * 4 * R * C * 3 and add_V <= 1.1 * R * M * (4 * 2 + 2)
    assert dA <= 1.1 * (2 * (M * C + M * R) + 4 * R * C * 2)


# ---- compiled


@pytest.mark.aot
@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
def test_machine_code_streams_and_multiplies(target):
    """Of each kernel in bfloat16 with rank 16: 128-bit global loads, tensor-core dots, no local memory."""
    from posttrain.kernels import _aot

    names = (
        "lora_linear_down_bf16_32_16",
        "lora_linear_up_bf16_16",
        "lora_linear_grad_bf16_16_v",
        "lora_linear_grad_bf16_16_drop2",
    )
    found = {v.name: v for v in _aot.variants() if v.name in names and _aot.applies(v, target)}
    assert set(found) == set(names)
    for variant in found.values():
        r = _aot.report(variant, target)
        assert r.spills == 0 and max(r.loads) == 128 and r.mma, r
    for name in ("lora_linear_up_bf16_16", "lora_linear_grad_bf16_16_v"):
        assert max(_aot.report(found[name], target).stores) == 128


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", four_bit.DTYPES)
@pytest.mark.parametrize("quant_type", ("nf4", "none"))
@pytest.mark.parametrize(
    ("M", "N", "K", "r"), [(1, 4096, 4096, 16), (3, 100, 96, 8), (16, 576, 576, 64), (70, 200, 1056, 33), (2000, 96, 130, 16)]
)
def test_gpu(dtype, quant_type, M, N, K, r):
    c = case((M,), N, K, r, dtype, quant_type, dropout=0.1, device="cuda")
    x, A, B, bias = leaves = c.leaves()
    y = lora_linear(x, c.w, A, B, c.scaling, bias, dropout=0.1, seed=SEED)
    (grouped,) = lora_linear_group(x, [(c.w, A, B, c.scaling, bias)], dropout=0.1, seed=SEED)
    assert torch.equal(y, grouped)
    y.backward(c.dy)
    c.x, c.w, c.lora_A, c.lora_B, c.bias, c.dy = (t.cpu() for t in (x, c.dense(dtype), A, B, bias, c.dy))
    check([y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)], c)
