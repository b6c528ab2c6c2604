"""Attention within the sequences of one packed row, as if each were alone; sequences that begin alike share that beginning.

    row of N tokens      ppaaabbb|qqqccd      prompts p, q with two completions each: what the rest of the model computes
    S rows of L tokens   ppaaa. ppbbb. qqqcc. qqqd..    what attention alone sees: each prompt once a completion, padding after it

Each row is causal, so that no mask is needed. A shared token's keys and values serve all its rows; its output is the first's, and
they are equal, since nothing after it is seen. The cost is S L^2 scores instead of the row's N^2, and no (N, N) mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Segments:
    """index int64 (S L,): which of the N tokens each place shows (any, on padding). own int64 (N,): the first place of each token.
    again: for the second, third, ... row that a token is in, (places, tokens) int64, no token twice. longest: L."""

    def __init__(self, index: Tensor, own: Tensor, again: Sequence[tuple[Tensor, Tensor]], longest: int):
        self.index, self.own, self.again, self.longest = index, own, again, longest

    @classmethod
    def of(cls, segment_ids: Tensor, window: int | None) -> Segments | None:
        """Of contiguous sequences, segment_ids (B, T); None where there is more than one row, or `fits` says no."""
        if len(segment_ids) != 1:
            return None
        _, owner, counts = torch.unique_consecutive(segment_ids[0], return_inverse=True, return_counts=True)
        longest, starts = int(counts.max()), counts.cumsum(0) - counts
        tokens = torch.arange(len(owner), device=owner.device)
        places = torch.arange(longest, device=owner.device)
        index = starts[:, None] + torch.minimum(places, counts[:, None] - 1)
        made = cls(index.flatten(), owner * longest + tokens - starts[owner], (), longest)
        return made if made.fits(window) else None

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]]) -> Segments:
        """rows: of each sequence the numbers of its tokens, in order. Every token is in one of them."""
        longest = max(map(len, rows))
        index = [token for row in rows for token in (*row, *[row[0]] * (longest - len(row)))]
        own: dict[int, int] = {}
        again: list[dict[int, int]] = []
        times: dict[int, int] = {}
        for s, row in enumerate(rows):
            for place, token in enumerate(row, s * longest):
                seen = times[token] = times.get(token, -1) + 1
                if seen > len(again):
                    again.append({})
                (again[seen - 1] if seen else own)[token] = place
        later = [(torch.tensor([*found.values()]), torch.tensor([*found])) for found in again]
        return cls(torch.tensor(index), torch.tensor([own[token] for token in range(len(own))]), later, longest)

    def fits(self, window: int | None) -> bool:
        """Whether no window cuts a sequence, and the sequences are not so unlike in length that the row has fewer scores."""
        return (window is None or self.longest <= window) and len(self.index) * self.longest <= len(self.own) ** 2

    def to(self, device: torch.device | str) -> Segments:
        again = [(places.to(device), tokens.to(device)) for places, tokens in self.again]
        return Segments(self.index.to(device), self.own.to(device), again, self.longest)

    def mask(self) -> Tensor:
        """bool (N, N): whether the row's token sees another, where a mask must say it."""
        N = len(self.own)
        sees = torch.zeros(N, N, dtype=torch.bool, device=self.own.device)
        real = torch.zeros(len(self.index), dtype=torch.bool, device=self.own.device)
        for places in (self.own, *(places for places, _ in self.again)):
            real[places] = True
        for tokens, there in zip(self.index.view(-1, self.longest), real.view(-1, self.longest), strict=True):
            row = tokens[there]
            sees[row[:, None], row] = torch.ones(len(row), len(row), dtype=torch.bool, device=row.device).tril_()
        return sees

    def apart(self, x: Tensor) -> Tensor:
        """(1, heads, N, head_dim) -> (S, heads, L, head_dim)."""
        return _Apart.apply(x[0].transpose(0, 1), self).unflatten(0, (-1, self.longest)).transpose(1, 2)

    def together(self, y: Tensor) -> Tensor:
        """(S, heads, L, head_dim) -> (1, heads, N, head_dim)."""
        return _Together.apply(y.transpose(1, 2).flatten(0, 1), self.own).transpose(0, 1)[None]


class _Apart(torch.autograd.Function):
    """x[index]; a token's gradient is the sum over its places, in their order."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: Segments) -> Tensor:  # type: ignore[override]
        ctx.segments = segments
        return x.index_select(0, segments.index)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        dx = dy.index_select(0, ctx.segments.own)
        for places, tokens in ctx.segments.again:
            dx.index_add_(0, tokens, dy.index_select(0, places))
        return dx, None


class _Together(torch.autograd.Function):
    """y[own], no place twice: the backward pass writes rows, where PyTorch's would add them."""

    @staticmethod
    def forward(ctx, y: Tensor, own: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(own)
        ctx.rows = len(y)
        return y.index_select(0, own)

    @staticmethod
    def backward(ctx, dx: Tensor):  # type: ignore[override]
        (own,) = ctx.saved_tensors
        return dx.new_zeros(ctx.rows, *dx.shape[1:]).index_copy_(0, own, dx), None
