"""The oracle of lora_linear: numbers worked by hand, and its gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain.reference import lora_linear as oracle

X, W = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
A, B = np.array([[1.0, 1.0, 1.0]]), np.array([[1.0], [-1.0]])


def test_a_layer_by_hand():
    """W x = (4, 4), s = A x = 6, scaling 0.5: y = (4 + 3, 4 - 3) + bias."""
    y, s, dropped = oracle.forward(X, W, A, B, 0.5, np.array([10.0, 20.0]))
    assert y.tolist() == [[17, 21]] and s.tolist() == [[6]] and dropped.tolist() == X.tolist()


def test_dropout_by_hand():
    """The middle one falls, the others double: s = 1 * 2 + 3 * 2 = 8; W x stays as it was."""
    y, s, dropped = oracle.forward(X, W, A, B, 0.5, None, np.array([[True, False, True]]), 0.5)
    assert dropped.tolist() == [[2, 0, 6]] and s.tolist() == [[8]] and y.tolist() == [[8, 0]]


def test_gradients_by_hand():
    """dy = (1, 3): V = 0.5 (1 - 3) = -1, V A = (-1, -1, -1), doubled where kept; dy W = (1, 6, 1)."""
    dx, dA, dB, dbias, V = oracle.backward(np.array([[1.0, 3.0]]), X, W, A, B, 0.5, np.array([[True, False, True]]), 0.5)
    assert V.tolist() == [[-1]] and dx.tolist() == [[1 - 2, 6, 1 - 2]]
    assert dA.tolist() == [[-2, 0, -6]] and dB.tolist() == [[4], [12]] and dbias.tolist() == [1, 3]


@pytest.mark.parametrize("dropout", (0.0, 0.25))
def test_gradients_are_the_finite_differences(dropout):
    """E = sum(c y) is linear in x, A, B and bias each on its own, so a central difference is exact but for rounding:
    eps * |E| / step, and each of E's terms rounds at most once for every product and sum in it."""
    generator = np.random.default_rng(0)
    M, N, K, r, scaling, step = 3, 4, 5, 2, 1.5, 0.5
    w, c, keep = generator.normal(size=(N, K)), generator.normal(size=(M, N)), generator.random((M, K)) >= dropout
    inputs = [generator.normal(size=shape) for shape in ((M, K), (r, K), (N, r), (N,))]

    def energy(c, x, w, lora_A, lora_B, bias):
        return float(np.sum(c * oracle.forward(x, w, lora_A, lora_B, scaling, bias, keep, dropout)[0]))

    x, lora_A, lora_B, _ = inputs
    gradients = oracle.backward(c, x, w, lora_A, lora_B, scaling, keep, dropout)[:4]
    x, lora_A, lora_B, bias = (np.abs(array) + step for array in inputs)
    terms = energy(np.abs(c), x, np.abs(w), lora_A, lora_B, bias)
    limit = (M * N + 2 * K + r + 6) * np.finfo(np.float64).eps * terms / step
    for place, gradient in enumerate(gradients):
        assert gradient.shape == inputs[place].shape
        for index in np.ndindex(gradient.shape):
            up, down = [a.copy() for a in inputs], [a.copy() for a in inputs]
            up[place][index] += step
            down[place][index] -= step
            difference = (energy(c, up[0], w, *up[1:]) - energy(c, down[0], w, *down[1:])) / (2 * step)
            assert abs(difference - gradient[index]) <= limit
