"""The oracle of multi_lora_linear: numbers worked by hand, segments, and a row against the merged weight of its adapter."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.reference import multi_lora_linear as oracle


def test_rows_by_hand():
    """W = 1, two adapters of rank 1: A_0 = 2, B_0 = 3, c_0 = 1/2 and A_1 = -1, B_1 = 4, c_1 = 1; x = 5, 6, 7."""
    A, B = np.array([[[2.0]], [[-1.0]]]), np.array([[[3.0]], [[4.0]]])
    x, w, scaling = np.array([[5.0], [6.0], [7.0]]), np.ones((1, 1)), np.array([0.5, 1.0])
    y, s = oracle.forward(x, w, A, B, scaling, [1, -1, 0], np.array([100.0]))
    assert s.tolist() == [[-5], [0], [14]]
    assert y.tolist() == [[5 - 20 + 100], [6 + 100], [7 + 21 + 100]]


def test_segments_are_sorted_and_stable():
    order, runs = oracle.segments([3, 0, -1, 3, 1, 0, 3], 5)
    assert order.tolist() == [1, 5, 4, 0, 3, 6]
    assert runs == [(0, 0, 2), (1, 2, 1), (3, 3, 3)]
    assert oracle.segments([-1, -1], 4)[1] == []


def test_each_row_is_the_merged_weight_of_its_adapter():
    """Whole numbers, so that both orders of the sums are exact."""
    generator = np.random.default_rng(0)

    def whole(*shape):
        return generator.integers(-4, 5, shape).astype(float)

    A, B, x, w, scaling = whole(3, 4, 7), whole(3, 5, 4), whole(6, 7), whole(5, 7), np.array([1.0, 2.0, 0.5])
    ids, ranks = [2, -1, 0, 1, 1, 2], [4, 1, 0]
    y, _ = oracle.forward(x, w, A, B, scaling, ids, ranks=ranks)
    for m, i in enumerate(ids):
        merged = w if i < 0 else w + scaling[i] * B[i, :, : ranks[i]] @ A[i, : ranks[i]]
        assert (y[m] == merged @ x[m]).all()
    assert (oracle.forward(x, w, A, B, scaling, ids)[0] != y).any()


@pytest.mark.parametrize("wrong", (-2, 3))
def test_an_id_that_names_no_adapter_is_an_error(wrong):
    with pytest.raises(ValueError, match=rf"adapter_ids\[1\] is {wrong}; expected -1 to 2"):
        oracle.forward(np.ones((2, 1)), np.ones((1, 1)), np.ones((3, 1, 1)), np.ones((3, 1, 1)), np.ones(3), [0, wrong])
