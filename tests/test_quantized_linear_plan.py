"""The rule that chooses a kernel: what it must never do, and where its crossings lie."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.kernels.quantized_linear_plan import A100, B200, H100, MI300X, plan

TARGETS = (A100, H100, B200, MI300X)
ROWS = sorted({round(2 ** (i / 4)) for i in range(53)})  # 1 .. 8192


def _kernels(N: int, K: int, dtype: torch.dtype, target) -> list[str]:
    return [plan(M, N, K, dtype, target).kernel for M in ROWS]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_few_rows_are_fused_and_many_are_not(target, dtype):
    kernels = _kernels(4096, 4096, dtype, target)
    assert kernels[0] == "decode" and kernels[-1] == "dequantize"
    assert "gemm" in kernels if dtype != torch.float32 else "gemm" not in kernels
    order = ["decode", "gemm", "dequantize"]
    assert kernels == sorted(kernels, key=order.index)  # no kernel comes back once another has taken over


@pytest.mark.parametrize("target", TARGETS)
def test_crossing_is_of_the_order_that_peers_measured(target):
    """bitsandbytes gives up its fused kernels at M = 256 (AMD) to 1536 (NVIDIA), earlier on a B200; one tile is 64 rows."""
    kernels = _kernels(4096, 4096, torch.bfloat16, target)
    assert 64 < ROWS[kernels.index("dequantize")] <= 1536


def test_few_programs_split_k_and_many_do_not():
    assert plan(16, 4096, 4096, torch.bfloat16, A100) == ("gemm", 4)  # 64 programs on 108 SMs
    assert plan(16, 65536, 4096, torch.bfloat16, A100) == ("gemm", 1)
    assert plan(1, 4096, 4096, torch.bfloat16, A100) == ("decode", 1)
    assert plan(1, 256, 16384, torch.bfloat16, A100).split_k > 1


@given(
    M=st.integers(1, 5000), N=st.integers(1, 200000), K=st.integers(1, 200000), target=st.sampled_from(TARGETS),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
)  # fmt: skip
def test_a_plan_can_always_be_launched(M, N, K, target, dtype):
    kernel, split_k = plan(M, N, K, dtype, target)
    assert kernel in ("decode", "gemm", "dequantize")
    if K % 32 or N * K >= 2**36:
        assert kernel == "dequantize"
    assert split_k in (1, 2, 4, 8, 16)
    if split_k > 1:  # no part is shorter than a program's step, nor empty
        assert kernel != "dequantize" and K >= split_k * {"decode": 1024, "gemm": 256}[kernel]
        assert 8 * M * split_k <= 0.516 * K  # partial sums move no more bytes than the weight


def test_crossings_are_those_the_docstring_states():
    def crossing(dtype, target):
        return next(M for M in range(1, 4096) if plan(M, 4096, 4096, dtype, target).kernel == "dequantize")

    assert [crossing(torch.bfloat16, target) for target in TARGETS] == [461, 497, 171, 743]
    assert [crossing(torch.float32, target) for target in TARGETS] == [30, 18, 9, 33]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("rank", (0, 16, 64))
def test_no_grid_is_larger_than_a_gpu_takes(target, dtype, rank):
    """Narrow layers with a low-rank term are fused at any number of rows, since what is added to y is most of the bytes; a grid's
    second axis, the tiles of rows, ends at 65,535."""
    tile = {"decode": 4, "gemm": 64}
    for K, M in itertools.product((32, 64, 128, 256, 512, 1024), (262_141, 4_194_240, 4_194_241, 2**31 - 1)):
        chosen = plan(M, 4096, K, dtype, target, rank)
        assert chosen.kernel == "dequantize" or math.ceil(M / tile[chosen.kernel]) <= 65_535
