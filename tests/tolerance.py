"""The tolerance rule for sums and products (docs/tolerances.md): no literal tolerance appears in a test."""

from __future__ import annotations

import torch


def error(actual, exact) -> tuple[float, float]:
    """(largest, root mean square) absolute error of `actual` against the float64 `exact`."""
    difference = torch.as_tensor(actual).detach().double() - torch.as_tensor(exact).detach().double()
    if not difference.numel():
        return 0.0, 0.0
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def assert_as_accurate(actual, plain, exact, factor: float = 2.0) -> None:
    """`actual`'s error against float64 is at most twice that of `plain`, the obvious PyTorch expression in the same dtype.

    Where the plain expression happens to be exact, one rounding of the largest result is allowed: half a unit in its last place.
    """
    actual = torch.as_tensor(actual)
    assert actual.shape == torch.as_tensor(exact).shape, (actual.shape, torch.as_tensor(exact).shape)
    assert torch.isfinite(actual).all(), "the result holds NaN or infinity"
    unit = torch.finfo(actual.dtype).eps / 2 * torch.as_tensor(exact).abs().max().item() if actual.numel() else 0.0
    for kind, ours, theirs in zip(("largest", "rms"), error(actual, exact), error(plain, exact), strict=True):
        limit = max(factor * theirs, unit)
        assert ours <= limit, f"{kind} error {ours:.3e} against float64; the plain expression has {theirs:.3e}, limit {limit:.3e}"
