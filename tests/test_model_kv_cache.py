"""The cache by itself: growth, going back, rows. (What it does to logits is in test_model_decoder.py.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import hf_config

from posttrain.model import KVCache, ModelConfig

CONFIG = ModelConfig.from_hf(hf_config("smollm2"))  # 3 layers, 2 key-value heads of 16


def write(cache: KVCache, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Append `count` positions whose every value is their number; what the last layer then sees."""
    cache.reserve(count)
    values = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None].expand(cache.batch_size, 2, count, 16)
    for layer in range(3):
        seen = cache.write(layer, values, -values)
    cache.advance(count)
    return seen


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=8))
def test_appending_and_going_back(steps):
    """Against a Python list: append some numbers, drop some from the end, again and again."""
    cache, expected, number = KVCache(CONFIG, 2, 1, torch.float32), [], 0
    for count, back in steps:
        expected += range(number, number + count)
        keys, values = write(cache, number, count)
        number += count
        assert keys.shape == values.shape == (2, 2, len(expected), 16)
        assert keys[1, 1, :, 7].tolist() == expected and (values == -keys).all()
        cache.length = max(0, cache.length - back)
        del expected[cache.length :]
    assert cache.length == len(expected) <= cache.capacity


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), unique=True), st.lists(st.integers(0, 3), unique=True), st.booleans())))
def test_keeping_some_of_the_last(steps):
    """Against Python lists: of four new tokens each row keeps some, in some order; now and then the holes are closed."""
    cache, expected, number = KVCache(CONFIG, 2, 1, torch.float32), [[], []], 0
    for *kept, compact in steps:
        start = cache.length
        write(cache, number, 4)
        longest = max(map(len, kept))
        cache.keep(start, torch.tensor([row + [-1] * (longest - len(row)) for row in kept], dtype=torch.int64))
        for row, indices in zip(expected, kept, strict=True):
            row += [number + i for i in indices]
        number += 4
        if compact:
            cache.compact()
            assert cache.length == max(map(len, expected))
        keys, values = cache._keys[2][:, 1, : cache.length, 3], cache._values[2][:, 0, : cache.length, 3]
        for i, row in enumerate(expected):
            valid = slice(None) if cache.valid is None else cache.valid[i, : cache.length]
            assert keys[i][valid].tolist() == row and (values[i][valid] == -keys[i][valid]).all()


def test_growth_doubles_and_keeps():
    cache = KVCache(CONFIG, 1, 4, torch.bfloat16)
    assert cache.nbytes == 3 * 2 * 2 * 4 * 16 * 2
    capacities = set()
    for i in range(100):
        write(cache, i, 1)
        capacities.add(cache.capacity)
    assert capacities == {4, 8, 16, 32, 64, 128}


def test_going_forward_is_refused():
    cache = KVCache(CONFIG, 1, 4, torch.float32)
    write(cache, 0, 3)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="only go back"):
            cache.length = wrong
    cache.length = 3
    with pytest.raises(ValueError, match="at least 1"):
        KVCache(CONFIG, 0, 4, torch.float32)


def test_select_keeps_rows_and_their_padding():
    cache = KVCache(CONFIG, 3, 4, torch.float32)
    mask = torch.tensor([[True, True], [False, True], [True, True]])
    cache.mark(2, mask)
    rows = torch.arange(3.0)[:, None, None, None].expand(3, 2, 2, 16)
    for layer in range(3):
        cache.write(layer, rows, rows)
    cache.advance(2)
    cache.select(torch.tensor([2, 1]))
    assert cache.batch_size == 2 and torch.equal(cache.valid[:, :2], mask[[2, 1]])
    keys, _ = cache.write(0, rows[:2, :, :1], rows[:2, :, :1])
    assert keys[:, 0, :, 0].tolist() == [[2, 2, 0], [1, 1, 1]]


def test_padding_is_remembered_across_growth():
    cache = KVCache(CONFIG, 2, 2, torch.float32)
    cache.reserve(2)
    cache.mark(2, torch.tensor([[False, True], [True, True]]))
    cache.advance(2)
    cache.reserve(5)
    cache.mark(5, None)
    assert cache.valid[:, :7].tolist() == [[False] + [True] * 6, [True] * 7]
