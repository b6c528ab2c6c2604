"""Rows of several sequences: none longer than allowed, none seeing another."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_model
from tolerance import assert_as_accurate

from posttrain.data import Example
from posttrain.packing import best_fit_decreasing, collate, pack


def example(length, prompt=1, start=3):
    ids = [(start + 7 * i) % 90 + 3 for i in range(length)]
    return Example(ids, [-100] * prompt + ids[prompt:])


@given(st.lists(st.integers(1, 10), max_size=40))
def test_every_sequence_once_and_no_row_too_long(lengths):
    rows = best_fit_decreasing(lengths, 10)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 10 for row in rows)
    # Best fit opens a row only where nothing else had room: any two rows together overflow one.
    totals = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > 10


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_rows_are_within_the_proven_bound(lengths):
    def fewest(rest, rooms):
        if not rest:
            return len(rooms)
        length, *rest = rest
        options = {room for room in rooms if room >= length}
        filled = [fewest(rest, sorted([*_without(rooms, room), room - length])) for room in options]
        return min([*filled, fewest(rest, sorted([*rooms, 6 - length]))])

    assert len(best_fit_decreasing(lengths, 6)) <= 11 / 9 * fewest(sorted(lengths, reverse=True), []) + 4


def _without(rooms, room):
    rooms = list(rooms)
    rooms.remove(room)
    return rooms


def test_the_best_fit_is_chosen():
    # 7 and 6 open rows with 3 and 4 left; the 3 goes where nothing is left over, the 4 into the other.
    assert best_fit_decreasing([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("length", [0, 11])
def test_a_sequence_that_cannot_fit(length):
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens; expected 1 to 10"):
        best_fit_decreasing([3, length], 10)


def test_collate():
    a, b, c = example(3), example(2, 0), example(4, 2)
    batch = collate([[a, b], [c]], pad_id=9)
    assert batch.input_ids.tolist() == [a.input_ids + b.input_ids, [*c.input_ids, 9]]
    assert batch.labels.tolist() == [[-100, *a.labels[1:], -100, b.labels[1]], [-100, -100, *c.labels[2:], -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]
    assert (batch.num_tokens, batch.normalizer) == (9, a.num_labels + b.num_labels + c.num_labels)
    assert collate([[a], [c]]).segment_ids is None
    assert batch.to("meta").labels.device.type == "meta"


@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding", "qwen3"])
def test_packed_logits_are_those_of_the_sequences_alone(name):
    model = random_model(name)
    examples = [example(n, start=n) for n in (9, 5, 14, 1, 2, 20)]
    rows = pack(examples, 24)
    assert len(rows) < len(examples)
    batch = collate(rows, pad_id=0)
    wide = copy.deepcopy(model).double()
    alone = [torch.tensor([one.input_ids]) for row in rows for one in row]
    with torch.no_grad():
        packed = model(batch.input_ids, batch.position_ids, batch.segment_ids)[batch.segment_ids >= 0]
        plain, exact = (torch.cat([m(ids)[0] for ids in alone]) for m in (model, wide))
        exactly_packed = wide(batch.input_ids, batch.position_ids, batch.segment_ids)[batch.segment_ids >= 0]
    assert_as_accurate(packed, plain, exact)
    # In float64 what is left is far below what fp32 rounds away: no term of another sequence, however small, is in it.
    assert (exactly_packed - exact).abs().max() < (plain - exact).abs().max() / 2**20


def test_a_sequence_does_not_depend_on_its_neighbours_at_all():
    model = random_model()
    first, rows = example(8), []
    for start in (1, 50):
        batch = collate([[first, example(9, start=start)]])
        with torch.no_grad():
            rows.append(model(batch.input_ids, batch.position_ids, batch.segment_ids)[0, :8])
    assert torch.equal(*rows)
