"""How far the sums of a low-rank layer are cut up, and the row count at which its fused kernels give way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.kernels.lora_linear_grad import grad_tile, one_pass
from posttrain.kernels.lora_linear_plan import down_parts, grad_parts
from posttrain.kernels.quantized_linear_plan import A100, B200, H100, MI300X, plan

TARGETS = ((A100, "cuda", 80), (H100, "cuda", 90), (B200, "cuda", 100), (MI300X, "hip", "gfx942"))
sizes = st.integers(1, 200000)


def test_crossings_are_those_the_docstring_states():
    def crossing(rank, target):
        return next(M for M in range(1, 4096) if plan(M, 4096, 4096, torch.bfloat16, target, rank).kernel == "dequantize")

    assert [crossing(16, target) for target, *_ in TARGETS] == [514, 559, 178, 888]
    assert all(crossing(16, target) > crossing(0, target) for target, *_ in TARGETS)


@given(M=sizes, R=st.integers(1, 300), K=sizes, half=st.booleans(), dropout=st.booleans(), target=st.sampled_from(TARGETS))
def test_parts_can_be_launched_and_weigh_less_than_what_they_save(M, R, K, half, dropout, target):
    itemsize, (target, backend_name, arch) = 2 if half else 4, target
    parts = down_parts(M, R, K, itemsize, dropout, target)
    assert parts in (1, 2, 4, 8)
    if parts > 1:
        assert K // parts >= 256 and 8 * M * R * parts <= itemsize * K * (M + R)
    for with_v in (False, one_pass(R, torch.float16 if half else torch.float32)):
        parts = grad_parts(M, K, R, itemsize, dropout and not with_v, with_v, backend_name, arch, target)
        assert parts in (1, 2, 4, 8, 16)
        if parts > 1:
            tile = grad_tile(R, itemsize, dropout and not with_v, with_v, backend_name, arch)
            assert M >= parts * tile["BLOCK_M"] and 8 * R * K * parts <= itemsize * M * K


@pytest.mark.parametrize(("target", "backend_name", "arch"), TARGETS)
def test_few_rows_are_cut_and_many_are_not(target, backend_name, arch):
    assert down_parts(1, 16, 4096, 2, False, target) > 1
    assert down_parts(2**17, 16, 4096, 2, False, target) == 1
    assert grad_parts(4096, 1024, 16, 2, False, True, backend_name, arch, target) > 1
    assert grad_parts(4096, 2**17, 16, 2, False, True, backend_name, arch, target) == 1


@pytest.mark.parametrize("R", (8, 16, 32, 64, 128))
@pytest.mark.parametrize(("target", "backend_name", "arch"), TARGETS)
def test_one_pass_where_its_partial_sums_are_fewer_bytes_than_a_second_reading(R, target, backend_name, arch):
    tile = grad_tile(min(R, 32), 2, False, True, backend_name, arch)
    assert one_pass(R, torch.bfloat16) == (R <= 32)
    if one_pass(R, torch.bfloat16):
        assert 8 * R / tile["BLOCK_C"] <= 2
    assert not one_pass(R, torch.float32)
