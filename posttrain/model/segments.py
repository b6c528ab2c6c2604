"""Attention within the sequences of one packed row, as if each were alone.

    row of N tokens      aaaaabbcccc          the rest of the model computes these and nothing else
    S rows of L tokens   aaaaa  bb...  cccc.  attention alone sees padding, after each sequence: causal, so that no mask is needed

It costs S L^2 scores instead of the row's N^2, and no (N, N) mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Segments:
    """Which tokens of a row (1, N) are of which of its S sequences, each contiguous."""

    def __init__(self, places: Tensor, count: int, longest: int):
        """places int64 (N,): of each token in (count, longest), flattened."""
        self.places, self.count, self.longest = places, count, longest

    @classmethod
    def of(cls, segment_ids: Tensor, window: int | None) -> Segments | None:
        """Of segment_ids (B, T); None where there is more than one row, a sequence longer than the window, or where sequences
        differ so much in length that the row's own scores are fewer."""
        if len(segment_ids) != 1:
            return None
        _, owner, counts = torch.unique_consecutive(segment_ids[0], return_inverse=True, return_counts=True)
        longest, N = int(counts.max()), len(owner)
        if len(counts) * longest**2 > N * N or (window is not None and longest > window):
            return None
        starts = counts.cumsum(0) - counts
        return cls(owner * longest + torch.arange(N, device=owner.device) - starts[owner], len(counts), longest)

    def apart(self, x: Tensor) -> Tensor:
        """(1, heads, N, head_dim) -> (S, heads, L, head_dim), zeros where there is no token."""
        rows = x.new_zeros(self.count * self.longest, *x.shape[1::2])
        return rows.index_copy(0, self.places, x[0].transpose(0, 1)).unflatten(0, (self.count, self.longest)).transpose(1, 2)

    def together(self, y: Tensor) -> Tensor:
        """(S, heads, L, head_dim) -> (1, heads, N, head_dim)."""
        return _Select.apply(y.transpose(1, 2).flatten(0, 1), self.places).transpose(0, 1)[None]


class _Select(torch.autograd.Function):
    """x[index] for an index without repetition: the backward pass writes rows, where PyTorch's adds them one by one."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return dy.new_zeros(ctx.rows, *dy.shape[1:]).index_copy_(0, index, dy), None
