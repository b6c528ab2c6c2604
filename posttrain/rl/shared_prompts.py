"""Completions in rows where those of one prompt share it: the prompt goes through the layers once, whatever their number.

A block is a prompt and its completions one after another; a completion's tokens see the prompt and those before them in their
own completion, at the positions they have on their own (`tree_mask` of posttrain/model/decoder.py), so that every hidden state is
the one of prompt and completion alone. A completion's last token predicts nothing and stays outside. For G completions of C
tokens of a prompt of P that is P + G (C - 1) tokens instead of G (P + C).

Scores grow with the square of a block: where a prompt's completions exceed ROW tokens they are spread over several blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.packing import best_fit_decreasing

# Per layer and token the linears of a small model take some thousand times the multiplications of a pair in attention.
ROW = 512


@dataclass(frozen=True)
class SharedBatch:
    """input_ids, position_ids int64 (B, T), tree_mask bool (B, T, T); N completions of `lengths` int64 (N,) tokens.

    labels, before int64 (tokens,): the completions' tokens, one completion after another, and of each the place, in the rows one
    after another, of the token that predicts it. num_tokens: tokens in the rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    tree_mask: Tensor
    labels: Tensor
    before: Tensor
    lengths: Tensor
    num_tokens: int

    def to(self, device: torch.device | str) -> SharedBatch:
        """The batch with its tensors on `device`."""
        tensors: dict = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


def collate(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int = 0) -> SharedBatch:
    """A batch of at least one (prompt, completion) in token ids, neither of them empty."""
    if not sequences or not all(prompt and completion for prompt, completion in sequences):
        raise ValueError("a prompt or a completion has no token; expected at least one in each")
    blocks = _blocks(sequences)
    sizes = [len(sequences[block[0]][0]) + sum(len(sequences[i][1]) - 1 for i in block) for block in blocks]
    rows = best_fit_decreasing(sizes, max(sizes))
    T = max(sum(sizes[b] for b in row) for row in rows)
    input_ids, position_ids = torch.full((len(rows), T), pad_id), torch.zeros(len(rows), T, dtype=torch.int64)
    mask = torch.eye(T, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no row of scores is empty
    before: list[Tensor] = [torch.empty(0)] * len(sequences)
    for b, row in enumerate(rows):
        start = 0
        for block in (blocks[k] for k in row):
            prompt = sequences[block[0]][0]
            P, first = len(prompt), start
            end = first + P
            _place(input_ids[b], position_ids[b], mask[b], prompt, first, 0)
            for i in block:
                seen = sequences[i][1][:-1]
                stop = end + len(seen)
                _place(input_ids[b], position_ids[b], mask[b], seen, end, P)
                mask[b, end:stop, first : first + P] = True
                before[i] = b * T + torch.tensor([first + P - 1, *range(end, stop)])
                end = stop
            start = end
    completions = [completion for _, completion in sequences]
    lengths = torch.tensor([len(completion) for completion in completions])
    labels = torch.tensor([token for completion in completions for token in completion])
    return SharedBatch(input_ids, position_ids, mask, labels, torch.cat(before), lengths, sum(sizes))


def _blocks(sequences: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Indices of sequences with the same prompt, as many as ROW tokens hold, at least one."""
    same: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (prompt, _) in enumerate(sequences):
        same[tuple(prompt)].append(i)
    blocks: list[list[int]] = []
    for ids, indices in same.items():
        block: list[int] = []
        size = len(ids)
        for i in indices:
            more = len(sequences[i][1]) - 1
            if block and size + more > ROW:
                blocks.append(block)
                block, size = [], len(ids)
            block.append(i)
            size += more
        blocks.append(block)
    return blocks


def _place(ids: Tensor, positions: Tensor, mask: Tensor, tokens: list[int], start: int, position: int) -> None:
    """Tokens that see those before them, from column `start` and position `position` on."""
    n = len(tokens)
    ids[start : start + n] = torch.tensor(tokens, dtype=torch.int64)
    positions[start : start + n] = torch.arange(position, position + n)
    mask[start : start + n, start : start + n] |= torch.ones(n, n, dtype=torch.bool).tril_()
