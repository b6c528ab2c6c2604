"""Several sequences in a row without one seeing another, and rows to tensors.

Rows are filled by best-fit decreasing: longest sequence first, each into the row where it leaves least room (at most
11/9 of the fewest rows possible, plus four; Johnson et al., 1974). Positions start again with each sequence,
`segment_ids` keeps attention inside it, and its first token, which nothing before it predicts, has no label: the loss
equals that of the sequences on their own.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .data import IGNORE_INDEX, Example

PADDING_SEGMENT = -1


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, all int64 (B, T). labels[b, t] is input_ids[b, t] or -100 (not shifted).

    segment_ids: number of the sequence within its row, -1 on padding; None where every row holds one sequence, padded
    on the right if at all: causal attention needs no more.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor | None
    num_tokens: int

    @property
    def normalizer(self) -> int:
        """Tokens with a label: the sum of losses is divided by these."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        tensors: dict = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sums are at most `capacity`. ValueError where one alone is longer.

    O(n log n + n d) for d distinct amounts of room left (at most `capacity`). Equal lengths keep their order.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # distinct amounts of room left, ascending
    rows_with: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        if not 0 < length <= capacity:
            raise ValueError(f"sequence {i} has {length} tokens; expected 1 to {capacity}")
        at = bisect.bisect_left(room, length)
        if at == len(room):
            row, left = len(rows), capacity
            rows.append([])
        else:
            left = room[at]
            row = rows_with[left].pop()
            if not rows_with[left]:
                del room[at]
        rows[row].append(i)
        left -= length
        if not rows_with[left]:
            bisect.insort(room, left)
        rows_with[left].append(row)
    return rows


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """The examples in rows of at most `max_length` tokens."""
    rows = best_fit_decreasing([len(e.input_ids) for e in examples], max_length)
    return [[examples[i] for i in row] for row in rows]


def collate(rows: Sequence[Sequence[Example]], pad_id: int = 0) -> Batch:
    """Rows of examples as tensors, padded on the right to the longest row."""
    lengths = [sum(len(e.input_ids) for e in row) for row in rows]
    shape = len(rows), max(lengths)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE_INDEX)
    position_ids, segment_ids = torch.zeros(shape, dtype=torch.int64), torch.full(shape, PADDING_SEGMENT)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row):
            end = start + len(example.input_ids)
            input_ids[b, start:end] = torch.tensor(example.input_ids)
            labels[b, start:end] = torch.tensor(example.labels)
            labels[b, start] = IGNORE_INDEX
            position_ids[b, start:end] = torch.arange(end - start)
            segment_ids[b, start:end] = segment
            start = end
    packed = any(len(row) > 1 for row in rows)
    return Batch(input_ids, labels, position_ids, segment_ids if packed else None, sum(lengths))
