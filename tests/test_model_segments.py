"""Sequences of one row apart and together again: each as it is alone, with no mask and no padding outside attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_model
from tolerance import assert_as_accurate

from posttrain.data import Example
from posttrain.model.segments import Segments
from posttrain.packing import collate


def row(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_apart_and_together(lengths):
    segments = Segments.of(row(lengths), None)
    if len(lengths) * max(lengths) ** 2 > sum(lengths) ** 2:
        assert segments is None
        return
    x = torch.randn(1, 2, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    apart = segments.apart(x)
    assert apart.shape == (len(lengths), 2, max(lengths), 3)
    for one, part, length in zip(apart, x[0].split(lengths, 1), lengths, strict=True):
        assert torch.equal(one[:, :length], part)
    assert torch.equal(segments.together(apart), x)
    weight = torch.randn_like(apart)
    (gradient,) = torch.autograd.grad((segments.together(apart * weight)).sum(), x)
    assert torch.equal(gradient, segments.together(weight))
    mask = segments.mask()
    ids = row(lengths)[0]
    assert torch.equal(mask, ((ids[:, None] == ids) & torch.ones_like(mask).tril()))


def test_a_shared_beginning():
    """Tokens 0, 1 begin the rows of 2, 3 and of 4; token 5 stands alone."""
    segments = Segments.of_rows([[0, 1, 2, 3], [0, 1, 4], [5]])
    x = torch.randn(1, 2, 6, 3, dtype=torch.float64, requires_grad=True)
    apart = segments.apart(x)
    assert torch.equal(apart[1, :, :3], x[0][:, [0, 1, 4]]) and torch.equal(segments.together(apart), x)
    weight = torch.randn_like(apart)
    weight[1, :, 3:] = weight[2, :, 1:] = 0  # nothing reads padding
    (gradient,) = torch.autograd.grad((apart * weight).sum(), x)
    assert torch.equal(gradient[0, :, 1], weight[0, :, 1] + weight[1, :, 1]) and torch.equal(gradient[0, :, 4], weight[1, :, 2])
    sees = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5]]
    assert [mask.nonzero().flatten().tolist() for mask in segments.mask()] == sees


def test_where_a_mask_serves_better():
    assert Segments.of(row([3, 3]).expand(2, 6), None) is None  # two rows
    assert Segments.of(row([5, 5]), 4) is None and Segments.of(row([5, 5]), 5) is not None
    assert Segments.of(row([9, 1, 1, 1]), None) is None  # 4 x 9^2 scores against 12^2


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "mistral_sliding"])
def test_hidden_states_and_gradients_are_those_of_each_alone(name):
    lengths, found = (9, 4, 12, 7), {}
    ids = [torch.randint(3, 97, (length,)).tolist() for length in lengths]
    for dtype in (torch.float64, torch.float32):
        for packed in (True, False):
            torch.manual_seed(1)
            model = random_model(name, dtype)
            if packed:
                batch = collate([[Example(one, one) for one in ids]])
                hidden = model.hidden(batch.input_ids, batch.position_ids, batch.segment_ids)[0]
            else:
                hidden = torch.cat([model.hidden(torch.tensor([one]))[0] for one in ids])
            hidden.square().sum().backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found[dtype, packed] = torch.cat([hidden.detach().flatten(), *gradients])
    assert_as_accurate(found[torch.float32, True], found[torch.float32, False], found[torch.float64, False])
    # In float64 as far apart as sums of about a thousand terms in another order.
    apart = (found[torch.float64, True] - found[torch.float64, False]).norm() / found[torch.float64, False].norm()
    assert apart < 1000 * torch.finfo(torch.float64).eps
