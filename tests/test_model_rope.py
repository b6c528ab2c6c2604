"""Rotary frequencies and the rotation itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import CASES, hf_config
from tolerance import assert_as_accurate

from posttrain.model import ModelConfig
from posttrain.model.functional import FEW
from posttrain.model.rope import ROPE_TYPES, RopeConfig, RotaryTable, apply_rope, rope_frequencies


@pytest.mark.peers
@pytest.mark.parametrize("length", [0, 16, 40, 200])
@pytest.mark.parametrize("name", [n for n, (_, rest) in CASES.items() if "rope_parameters" in rest])
def test_frequencies_equal_transformers(name, length):
    """To a few roundings: both evaluate the same float32 formulas, in orders that may differ."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = ModelConfig.from_hf(hf_config(name))
    theirs = getattr(transformers, CASES[name][0].replace("ForCausalLM", "Config"))(**hf_config(name))
    kind = config.rope.rope_type
    ours, factor = rope_frequencies(config.rope, config.head_dim, config.max_position_embeddings, length)
    if kind == "default":
        expected, their_factor = (
            1 / config.rope.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim),
            1.0,
        )
    else:
        expected, their_factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length or None)
    assert factor == their_factor
    ulp = torch.nextafter(expected, torch.tensor(math.inf)) - expected
    assert ((ours - expected).abs() <= 4 * ulp).all()


def test_every_type_is_covered_above():
    covered = {rest["rope_parameters"]["rope_type"] for _, rest in CASES.values() if "rope_parameters" in rest}
    assert covered == set(ROPE_TYPES)


@given(st.integers(1, 4), st.integers(0, 3000), st.integers(1, 7), st.sampled_from([2, 4, 6, 16, 64]))
def test_rotation_is_the_complex_product(heads, start, count, head_dim):
    """Pair (x[i], x[i + d/2]) as a complex number, times exp(i * position * frequency)."""
    table = RotaryTable(RopeConfig(), head_dim, 4096)
    x = torch.randn(2, count, heads, head_dim, dtype=torch.float64)
    rotated = apply_rope(x, *table.at(start, count, x.device, x.dtype))
    frequencies = rope_frequencies(RopeConfig(), head_dim, 4096)[0].double()
    angles = torch.arange(start, start + count)[:, None].double() * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    product = torch.complex(*x.chunk(2, -1)) * turn
    expected = torch.cat((product.real, product.imag), -1)
    # A few float64 roundings of numbers at most |x| sqrt(2) large.
    assert (rotated - expected).abs().max() <= 8 * torch.finfo(torch.float64).eps * x.abs().max()


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_gathered_rows_equal_ranges(rope_type):
    """Rows with positions of their own equal those rows alone; dynamic scaling goes by the row's own length."""
    table = RotaryTable(RopeConfig(rope_type, factor=4.0), 16, 8)
    starts = (0, 30)
    positions = torch.stack([torch.arange(s, s + 5) for s in starts])
    for kind, gathered in enumerate(table.gather(positions, torch.float32)):
        for row, start in zip(gathered, starts, strict=True):
            assert torch.equal(row, table.at(start, 5, positions.device, torch.float32)[kind][0])


def test_a_table_grown_while_generating_serves_training():
    table = RotaryTable(RopeConfig(), 16, 4096)
    with torch.inference_mode():
        table.at(0, 3, torch.device("cpu"), torch.float32)
        table.at(1000, 3, torch.device("cpu"), torch.float32)
    x = torch.randn(1, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = table.at(998, 3, torch.device("cpu"), torch.float32)
    apply_rope(x, cos.double(), sin.double()).square().sum().backward()
    # A rotation keeps lengths, so the gradient of the squared length is 2x, but for the table's float32 roundings.
    assert (x.grad - 2 * x.detach()).abs().max() <= 4 * torch.finfo(torch.float32).eps * x.detach().abs().max() * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, FEW // 64 + 1])
def test_few_tokens_and_many_are_as_accurate(count, dtype):
    """With a gradient and without, on either side of where the fused operation begins to pay."""
    cos, sin = RotaryTable(RopeConfig(), 16, 4096).at(3, count, torch.device("cpu"), dtype)
    x = torch.randn(1, count, 4, 16).to(dtype).requires_grad_()
    plain, exact = (t * c + t.roll(8, -1) * s for t, c, s in ((x, cos, sin), (x.double(), cos.double(), sin.double())))
    with torch.inference_mode():
        assert_as_accurate(apply_rope(x, cos, sin), plain, exact)
    assert_as_accurate(apply_rope(x, cos, sin), plain, exact)
