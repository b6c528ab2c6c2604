"""Rotary position embedding: every engine against float64, the oracle, strides, derivatives, and what the compiled kernel moves."""

from __future__ import annotations

import importlib

import four_bit
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import cpu, rope
from posttrain.kernels.cpu import pytorch_rope
from posttrain.kernels.rope import rope_triton
from posttrain.reference import rope as oracle

native = importlib.import_module("posttrain.kernels.cpu.native") if cpu.describe()["engine"] == "native" else None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (2, 6, 62, 64, 66, 80, 128, 130, 300)
OP = torch.ops.posttrain.rope


def _case(B: int, T: int, heads: int, D: int, dtype: torch.dtype, rows: int = 1):
    """(x, cos, sin, dy): x the first heads of a fused projection, dy of transposed heads. cos and sin are any numbers: the
    operation must not count on halves that mirror each other."""
    generator = torch.Generator().manual_seed(B * T * heads * D)
    x = torch.randn(B, T, heads + 2, D, generator=generator).to(dtype).narrow(2, 0, heads)
    cos, sin = (torch.randn(rows, T + 1, D, generator=generator).to(dtype)[:, 1:, None] for _ in range(2))
    dy = torch.randn(B, heads, T, D, generator=generator).to(dtype).transpose(1, 2)
    return x, cos, sin, dy


def _plain(x, cos, sin, dy):
    """(y, dx) by PyTorch's operations and autograd."""
    x = x.clone().requires_grad_()
    y = x * cos + x.roll(x.shape[-1] // 2, -1) * sin
    y.backward(dy)
    return y.detach(), x.grad


def _check(function, *shape, dtype: torch.dtype, rows: int = 1) -> None:
    x, cos, sin, dy = _case(*shape, dtype, rows)
    results = function(x, cos, sin, False), function(dy, cos, sin, True)
    exact = _plain(*(t.double() for t in (x, cos, sin, dy)))
    for ours, plain, right in zip(results, _plain(x, cos, sin, dy), exact, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        assert_as_accurate(ours, plain, right)


def test_the_oracle():
    """A quarter turn takes 1 + 2i to -2 + i, half a turn to -1 - 2i; and the gradient by central differences."""
    cos, sin = oracle.table([1, 2], [np.pi / 2])
    y = oracle.rope([[[1.0, 2.0]], [[1.0, 2.0]]], cos, sin)
    assert y[:, 0] == pytest.approx(np.array([[-2.0, 1.0], [-1.0, -2.0]]))
    x, cos, sin, dy = (t.double().squeeze(0).numpy() for t in _case(1, 2, 2, 6, torch.float32))
    dx, h = oracle.rope_backward(dy, cos[:, 0], sin[:, 0]), 1e-6
    for place in np.ndindex(x.shape):
        ends = []
        for step in (h, -h):
            moved = x.copy()
            moved[place] += step
            ends.append((oracle.rope(moved, cos[:, 0], sin[:, 0]) * dy).sum())
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(dx[place], abs=1e-8)


@pytest.mark.parametrize("function", (pytorch_rope.rope, OP))
def test_float64_is_the_oracle_s(function):
    x, cos, sin, dy = (t.double() for t in _case(1, 3, 2, 10, torch.float32))
    table = cos[0, :, 0], sin[0, :, 0]
    exact = oracle.rope(x[0], *table), oracle.rope_backward(dy[0], *table)
    for ours, right in zip((function(x, cos, sin, False), function(dy, cos, sin, True)), map(torch.from_numpy, exact), strict=True):
        assert (ours[0] - right).abs().max() <= 2 * torch.finfo(torch.float64).eps * right.abs().max()


@pytest.mark.parametrize("engine", native.levels() if native else ["pytorch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_cpu(engine, dtype, D):
    if native is None:
        return _check(pytorch_rope.rope, 3, 5, 3, D, dtype=dtype)
    before = native.ISA
    native.set_isa(engine)
    try:
        for rows in (1, 3):
            _check(OP, 3, 5, 3, D, dtype=dtype, rows=rows)
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_however_many_threads(dtype):
    x, cos, sin, _ = _case(2, 150, 5, 80, dtype)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(OP(x, cos, sin, False))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (1, 3))
def test_the_engine_without_a_compiler(dtype, rows):
    _check(pytorch_rope.rope, 3, 5, 3, 64, dtype=dtype, rows=rows)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 40), st.booleans())
def test_a_rotation_and_its_transpose_are_inverses(B, T, heads, half, transposed):
    """cos^2 + sin^2 = 1 and mirrored halves: turned there and back, x is x, and its length stays."""
    angles = torch.rand(T, half, dtype=torch.float64) * 6
    cos, sin = (torch.cat(parts, -1)[None, :, None] for parts in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
    x = torch.randn(B, T, heads, 2 * half, dtype=torch.float64)
    turned = OP(x, cos, sin, transposed)
    eps = torch.finfo(torch.float64).eps
    assert (OP(turned, cos, sin, not transposed) - x).abs().max() <= 8 * eps * x.abs().max()
    assert (turned.norm(dim=-1) - x.norm(dim=-1)).abs().max() <= 8 * eps * x.norm(dim=-1).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Heads of a fused projection, of transposed heads, a gradient that is one number for all, a table and an x with D apart."""
    x, cos, sin, dy = _case(2, 7, 4, 32, dtype)
    for view in (x, dy, x.narrow(1, 2, 5), torch.ones((), dtype=dtype).expand(2, 7, 4, 32)):
        table = [t[:, -view.shape[1] :] for t in (cos, sin)]
        assert torch.equal(rope(view, *table), rope(view.contiguous(), *table))
    apart = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (x, cos, sin)]
    assert apart[0].stride(3) != 1 and torch.equal(rope(*apart), rope(x, cos, sin))
    every = [t.expand(2, -1, -1, -1) for t in (cos, sin)]
    assert torch.equal(rope(x, *every), rope(x, cos, sin))
    assert torch.equal(rope(x, every[0].contiguous(), every[1]), rope(x, cos, sin))


def test_derivatives_of_any_order():
    x, cos, sin, dy = (t.double() for t in _case(2, 3, 2, 6, torch.float32, rows=2))
    x, dy = x.requires_grad_(), dy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rope(x, cos, sin), (x,), (dy,))


def test_extremes():
    x, cos, sin, _ = _case(2, 3, 4, 8, torch.float32)
    x = x.clone()
    x[0, 1, 2, 3] = torch.nan
    nan = rope(x, cos, sin).isnan()
    assert nan.nonzero().tolist() == [[0, 1, 2, 3], [0, 1, 2, 7]]
    for shape in ((0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        y = rope(empty, cos[:, : shape[1], :, : shape[3]], sin[:, : shape[1], :, : shape[3]])
        y.sum().backward()
        assert y.shape == empty.grad.shape == shape


def test_errors():
    x, cos, sin, _ = _case(2, 3, 4, 8, torch.float32, rows=2)
    for wrong in (cos[:, :2], cos[:, :, 0], cos[..., :4], cos.expand(2, 3, 4, 8), torch.cat((cos, cos))):
        with pytest.raises(ValueError, match=r"x \(2, 3, 4, 8\), cos .*; expected \(B, T, heads, D\) and twice"):
            rope(x, wrong, wrong)
    with pytest.raises(ValueError, match="expected .B, T, heads, D."):
        rope(x, cos, sin[:1])
    with pytest.raises(ValueError, match="expected .B, T, heads, D."):
        rope(x[0], cos, sin)
    with pytest.raises(ValueError, match="D is 7; expected an even number"):
        rope(x[..., :7], cos[..., :7], sin[..., :7])
    with pytest.raises(TypeError, match="cos torch.bfloat16 and sin torch.float32; cast"):
        rope(x, cos.bfloat16(), sin)
    with pytest.raises(ValueError, match="cos on meta"):
        rope(x, cos.to("meta"), sin)
    learned = cos.clone().requires_grad_()
    with pytest.raises(ValueError, match="no gradient for cos and sin: detach"):
        rope(x, learned, sin)
    with torch.no_grad():
        assert torch.equal(rope(x, learned, sin), rope(x, cos, sin))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck_and_compile(dtype):
    x, cos, sin, dy = _case(2, 5, 3, 10, dtype)
    for transposed in (False, True):
        torch.library.opcheck(OP, (x.clone().requires_grad_(), cos, sin, transposed))
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    results = []
    for function in (rope, compiled):
        leaf = x.clone().requires_grad_()
        y = function(leaf, cos, sin)
        y.backward(dy)
        results.append((y, leaf.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 6), (3, 2, 4, 64), (2, 2, 3, 130), (1, 2, 70, 128)])
def test_interpreted(dtype, shape):
    for rows in {1, shape[0]}:
        _check(rope_triton, *shape, dtype=dtype, rows=rows)


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (2, 3, 12, 64)),
        (torch.bfloat16, (2, 3, 3, 66)),
        (torch.float16, (1, 2, 40, 128)),
        (torch.float32, (3, 2, 5, 80)),
    ],
)
def test_emulated(arch, dtype, shape):
    four_bit.activate(arch)
    for rows in {1, shape[0]}:
        _check(rope_triton, *shape, dtype=dtype, rows=rows)


@pytest.mark.emulated
@pytest.mark.parametrize("heads", (12, 32))
def test_emulated_work(heads):
    """Heads are read once and written once, cos and sin once a position."""
    from gpuemu import counters

    counters.start(80)
    B, T, D = 2, 16, 64
    x, cos, sin, dy = (t.contiguous() for t in _case(B, T, heads, D, torch.bfloat16))
    with counters.record() as recorded:
        rope_triton(x, cos, sin, False)
        rope_triton(dy, cos, sin, True)
    for launch in recorded.launches:
        assert launch["dram"] <= 2 * 2 * x.numel() + 2 * 2 * T * D and launch["spill"] == 0
        assert launch["occ"]["A100"][2] >= 0.5


@pytest.mark.aot
@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100", "gfx942"))
def test_halves_are_read_128_bits_wide(target):
    from posttrain.kernels import _aot

    width = 64 if target == "gfx942" else 128  # a wavefront of 64 needs fewer bits a lane
    for variant in _aot.variants():
        if variant.name.startswith("rope_bf16") and not variant.name.endswith("_unaligned"):
            found = _aot.report(variant, target)
            assert min(max(found.loads), max(found.stores)) >= width and found.spills == 0, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 66), (3, 7, 12, 64), (2, 5, 40, 128), (1, 2, 2, 4100)])
def test_on_a_gpu(dtype, shape):
    def there(*tensors_and_transposed):
        *tensors, transposed = tensors_and_transposed
        return OP(*(t.cuda() for t in tensors), transposed).cpu()

    _check(there, *shape, dtype=dtype, rows=shape[0])
