"""Products over many rows of bfloat16 in AMX tiles: against float64 at tails of every dimension, in 4 bits of every kind, over
several passes of the right factor, and the same bits with any number of threads. Their low rank is tested in test_cpu_lora.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate

from posttrain.kernels import quantize_weight

native = pytest.importorskip("posttrain.kernels.cpu.native", reason="the native extension was not built")
native_many = pytest.importorskip("posttrain.kernels.cpu.native_many")
native_linear = pytest.importorskip("posttrain.kernels.cpu.native_linear")
pytestmark = pytest.mark.skipif(native.ISA != "amx", reason="this machine has no AMX")
BF16 = torch.bfloat16


def base_of(w: torch.Tensor, kind: str, block_size: int, nested: bool) -> tuple[tuple, torch.Tensor]:
    """What `Layer.base` wants of w, and the weight that it stands for."""
    if kind == "none":
        return (w, None, None, None, 0, 0, kind), w
    packed = quantize_weight(w, kind, block_size, nested)
    return (*packed.tensors(), block_size, kind), packed.dequantize()


def forward(x, base, bias, N):
    y = x.new_empty(len(x), N)
    native_many.forward(x, x, [native_many.Layer(base, bias)], [y], True)
    return y


def backward(dys, bases, K):
    dx, no = dys[0].new_empty(len(dys[0]), K), [None] * len(dys)
    native_many.backward(dys, dx, [native_many.Layer(base) for base in bases], dx, None, no, no, True)
    return dx


def check(M, N, K, kind="none", block_size=64, nested=True):
    x, w, bias, dy = (torch.randn(s).to(BF16) for s in ((M, K), (N, K), (N,), (M, N)))
    base, w = base_of(w, kind, block_size, nested)
    exact = F.linear(x.double(), w.double(), bias.double())
    assert_as_accurate(forward(x, base, bias, N), F.linear(x, w, bias), exact)
    assert_as_accurate(backward([dy], [base], K), dy @ w, dy.double() @ w.double())


KINDS = [("none", 0, False), ("nf4", 64, True), ("fp4", 32, False), ("nf4", 256, True)]


@pytest.mark.parametrize("kind, block_size, nested", KINDS)
def test_against_float64(kind, block_size, nested):
    # whole tiles; tails of one; rows, columns and depths of several pieces of 512; several passes
    for shape in ((64, 32, 32), (65, 33, 31), (100, 192, 576), (97, 530, 65), (64, 65, 1040), (96, 1300, 600), (128, 70, 3072)):
        check(*shape, kind, block_size, nested)


@given(st.integers(64, 140), st.integers(1, 100), st.integers(1, 100), st.sampled_from(KINDS))
def test_any_shape(M, N, K, kind):
    check(M, N, K, *kind)


def test_layers_that_share_x_add_up_in_one_sum():
    M, K, Ns = 90, 96, (64, 33, 32, 1)
    dys, ws = [torch.randn(M, N).to(BF16) for N in Ns], [torch.randn(N, K).to(BF16) for N in Ns]
    plain = sum(dy @ w for dy, w in zip(dys, ws, strict=True))
    exact = sum(dy.double() @ w.double() for dy, w in zip(dys, ws, strict=True))
    assert_as_accurate(backward(dys, [base_of(w, "none", 0, False)[0] for w in ws], K), plain, exact)


def test_results_do_not_depend_on_the_number_of_threads():
    M, N, K = 333, 200, 328
    x, dy, (base, _) = torch.randn(M, K).to(BF16), torch.randn(M, N).to(BF16), base_of(torch.randn(N, K), "nf4", 64, True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((forward(x, base, None, N), backward([dy], [base], K)))
    torch.set_num_threads(before)
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


def test_what_is_poisoned_stays_in_its_row():
    x, w = torch.randn(70, 64).to(BF16), torch.randn(40, 64).to(BF16)
    x[3, 5], x[66, 0] = float("nan"), float("inf")
    y = forward(x, (w, None, None, None, 0, 0, "none"), None, 40)
    assert y[3].isnan().all() and not y[66].isfinite().any() and y[[i for i in range(70) if i not in (3, 66)]].isfinite().all()


def test_which_shapes_are_multiplied_here():
    chosen = native_many.faster_than_vendor
    assert chosen(1024, [576, 192, 192], 576, False) and chosen(1024, [1536, 1536], 576, True) and chosen(257, [8], 2048, False)
    assert not chosen(256, [576], 576, False)  # too few rows
    assert not chosen(1024, [576], 4096, False) and chosen(1024, [576], 2056, True)  # depth is K forward, N backward
    assert not chosen(1024, [64, 4096], 64, True) and chosen(1024, [64, 4096], 64, False)
    assert not chosen(1024, [2048], 2048, False)  # W comes from memory
    assert chosen(1024, [], 64, False)


@pytest.mark.parametrize("M", [256, 257, 300])
def test_rows_may_be_strided_where_the_few_end(M):
    N, K = 40, 96
    x, bias, dy = torch.randn(2 * M, K).to(BF16)[::2], torch.randn(2 * N).to(BF16)[::2], torch.randn(N, M).to(BF16).t()
    *tensors, block_size, kind = base_of(torch.randn(N, K).to(BF16), "nf4", 32, True)[0]
    y = native_linear.linear_4bit(x, *tensors, bias, N, K, block_size, kind)
    assert torch.equal(y, native_linear.linear_4bit(x.contiguous(), *tensors, bias.contiguous(), N, K, block_size, kind))
    dx = native_linear.linear_4bit_dx(dy, *tensors, N, K, block_size, kind)
    assert torch.equal(dx, native_linear.linear_4bit_dx(dy.contiguous(), *tensors, N, K, block_size, kind))


_LARGE_WORKSPACES = """
import torch
from posttrain.kernels.cpu import native, native_attention, native_logprobs, native_lora
native._KEPT_BYTES = 0
x, w, labels = torch.randn(300, 64).bfloat16(), torch.randn(2000, 64).bfloat16(), torch.randint(2000, (300,))
base, A, B = (w, None, None, None, 0, 0, "none"), torch.randn(40, 64), torch.randn(2000, 40)
y = native_lora.lora_linear(x, *base[:5], A, B, 1.0, None, 0.0, 0, 2000, 64, *base[5:])
native_lora.lora_linear_backward(y, x, *base[:5], A, B, 1.0, 0.0, 0, 2000, 64, *base[5:], True, True, True)
assert native_logprobs.fused_logprobs(x, base, 2000, None, labels, -100, True, True) is not None
q = torch.randn(2, 3, 256, 64).bfloat16()
y, softmax = native_attention.forward(q, q, q)
native_attention.backward(q, q, q, y, softmax, y)
"""


def test_a_workspace_that_is_not_kept_lives_as_long_as_the_call():
    """Memory that malloc maps apart is gone once it is freed: writing there is a segmentation fault."""
    apart = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "8192"}
    done = subprocess.run([sys.executable, "-c", _LARGE_WORKSPACES], env=apart, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
