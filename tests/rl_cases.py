"""Completions of random lengths, and comparing values by token with an oracle's lists."""

from __future__ import annotations

import torch


def rows(flat: torch.Tensor, lengths: list[int]) -> list[list[float]]:
    """Values by token as the oracles take them: a list for each completion."""
    return [part.tolist() for part in flat.split(lengths)]


def flat(nested) -> torch.Tensor:
    return torch.tensor([x for row in nested for x in row], dtype=torch.float64)


def random_values(lengths: list[int], count: int, seed: int = 0, spread: float = 1.0) -> list[torch.Tensor]:
    """`count` tensors of normal numbers by token, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(sum(lengths), generator=generator, dtype=torch.float64) for _ in range(count)]


def assert_same(actual: torch.Tensor, exact) -> None:
    """Equal to a few dozen roundings of the largest value: both compute in float64, in their own order."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    assert actual.dtype == torch.float64 and actual.shape == exact.shape
    assert ((actual.detach() - exact).abs() <= 64 * torch.finfo(torch.float64).eps * exact.abs().max()).all()


def assert_slopes(loss, gradient: list[float], point: list[float]) -> None:
    """A hand-written gradient against central differences, to the cube root of a rounding squared, their own error."""
    step = torch.finfo(torch.float64).eps ** (1 / 3)
    for i, slope in enumerate(gradient):
        up, down = list(point), list(point)
        up[i], down[i] = point[i] + step, point[i] - step
        rise = (loss(up) - loss(down)) / (2 * step)
        assert abs(rise - slope) <= 100 * step**2 * max(1.0, abs(slope))
