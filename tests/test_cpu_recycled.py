"""Memory of large results: used again when the last tensor on it is gone, and never before."""

from __future__ import annotations

import sys

import pytest
import torch

from posttrain.kernels.cpu import recycled

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="large results are torch's own there")
LARGE = recycled.MAPPED_BYTES // 4  # float32 values


@pytest.fixture(autouse=True)
def nothing_kept():
    recycled._freed.clear()
    yield
    recycled._freed.clear()


def test_memory_is_used_again_when_it_is_freed():
    first = recycled.empty((4, LARGE // 4), torch.float32)
    assert first.shape == (4, LARGE // 4) and first.dtype == torch.float32 and first.is_contiguous()
    first.fill_(1)
    address = first.data_ptr()
    del first
    assert recycled.empty((2 * LARGE,), torch.bfloat16).data_ptr() == address


@pytest.mark.parametrize("holder", [lambda x: x[1:], lambda x: x.view(torch.int16), lambda x: x.untyped_storage()])
def test_memory_in_use_is_left_alone(holder):
    first = recycled.empty((LARGE,), torch.float32).fill_(1)
    kept = holder(first)
    address = first.data_ptr()
    del first
    other = recycled.empty((LARGE,), torch.float32).fill_(2)
    assert other.data_ptr() != address
    del kept
    assert recycled._freed


def test_one_mapping_is_kept_and_none_that_is_much_too_large():
    tensors = [recycled.empty((LARGE,), torch.float32) for _ in range(3)]
    tensors.clear()
    assert [len(memory) for memory in recycled._freed] == [4 * LARGE]
    del tensors
    large = recycled.empty((3 * LARGE,), torch.float32)
    address = large.data_ptr()
    del large
    small = recycled.empty((LARGE,), torch.float32)
    assert small.data_ptr() != address and not recycled._freed


def test_other_sizes_are_torch_tensors():
    for shape, dtype in (((), torch.float32), ((0,), torch.float16), ((LARGE - 1,), torch.float32)):
        x = recycled.empty(shape, dtype)
        assert x.shape == shape and x.dtype == dtype and x.untyped_storage().resizable()
