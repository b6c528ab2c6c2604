"""The oracle of quantized_linear: numbers worked by hand, and its gradients against finite differences."""

from __future__ import annotations

import numpy as np

from posttrain.reference import quantized_linear as oracle


def test_a_product_by_hand():
    """Two blocks of four over W (2, 4) in NF4: codes 15, 0, 7, 7 (1, -1, 0, 0) by absmax 2 and 7, 7, 15, 15 by absmax 3."""
    packed = np.array([0xF0, 0x77, 0x77, 0xFF], np.uint8)
    w = oracle.weight(packed, np.array([2.0, 3.0]), 2, 4, 4, "nf4")
    assert w.tolist() == [[2, -2, 0, 0], [0, 0, 3, 3]]
    y = oracle.forward(np.array([[1.0, 2.0, 3.0, 4.0]]), w, np.array([10.0, 20.0]))
    assert y.tolist() == [[2 - 4 + 10, 9 + 12 + 20]]
    dx, dbias = oracle.backward(np.array([[1.0, 2.0]]), w)
    assert dx.tolist() == [[2, -2, 6, 6]] and dbias.tolist() == [1, 2]


def test_nested_absmax_by_hand():
    """Codes 255 and 127 of the dynamic map are 1 and 0: absmax 1 * 0.5 + 1.5 = 2 and 0 * 0.5 + 1.5 = 1.5."""
    packed = np.array([0xF0, 0xF0], np.uint8)
    nested = (np.array([0.5], np.float32), 1.5, 256)
    w = oracle.weight(packed, np.array([255, 127], np.uint8), 2, 2, 2, "nf4", nested)
    assert w.tolist() == [[2, -2], [1.5, -1.5]]


def test_blocks_straddle_rows():
    packed = np.array([0xFF] * 3, np.uint8)
    w = oracle.weight(packed, np.array([1.0, 2.0]), 2, 3, 4, "nf4")
    assert w.tolist() == [[1, 1, 1], [1, 2, 2]]


def test_gradients_are_the_finite_differences():
    """E = sum(c y) is linear in x and bias, so a central difference is exact but for rounding: eps * |E| / step, and each of
    E's terms rounds at most once for every product and sum in it."""
    generator = np.random.default_rng(0)
    x, w, c = generator.normal(size=(3, 5)), generator.normal(size=(4, 5)), generator.normal(size=(3, 4))
    bias, step = generator.normal(size=4), 0.5

    def energy(x, bias):
        return float(np.sum(c * oracle.forward(x, w, bias)))

    dx, dbias = oracle.backward(c, w)
    terms = np.sum(np.abs(c) * oracle.forward(np.abs(x) + step, np.abs(w), np.abs(bias) + step))
    limit = (3 * 4 + 5 + 2) * np.finfo(np.float64).eps * terms / step
    for array, gradient, place in ((x, dx, 0), (bias, dbias, 1)):
        for index in np.ndindex(array.shape):
            up, down = [x.copy(), bias.copy()], [x.copy(), bias.copy()]
            up[place][index] += step
            down[place][index] -= step
            difference = (energy(*up) - energy(*down)) / (2 * step)
            assert abs(difference - gradient[index]) <= limit
