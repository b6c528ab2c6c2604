"""Completions in packed rows: what preference losses and policies need of each is the log-probabilities of its own tokens.

Each prompt with its completion is one segment (posttrain/packing.py). All stand in one row without a token of padding, or, where
they have one length, in a row each; none sees another, and the sums are those of each on its own. Beside the rows stands which
completion each labelled token is of.

`collate_shared` computes what completions of one prompt share, the prompt, once (posttrain/model/segments.py), and no token whose
output nothing is read from: of a completion's n tokens the last predicts none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .data import IGNORE_INDEX, Example
from .model.segments import Segments
from .packing import collate

Sequences = Sequence[tuple[list[int], list[int]]]  # (prompt, completion) in token ids


@dataclass(frozen=True)
class CompletionBatch:
    """input_ids, labels, position_ids, segment_ids (B, T) as posttrain.packing.Batch has them, of S completions.

    owner, place int64 (N,): of each labelled token, row by row, its completion and its place there. lengths int64 (S,): tokens
    of each completion. normalizer: what the sum of the losses is divided by. ref_logps float32 (S,): the reference's sums, where
    they were computed before. predictors, targets int64 (N,): of each labelled token the position that predicts it (in the one row)
    and its id, where it is not the next one's label.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor | Segments | None
    owner: Tensor
    place: Tensor
    lengths: Tensor
    num_tokens: int
    normalizer: int
    ref_logps: Tensor | None = None
    predictors: Tensor | None = None
    targets: Tensor | None = None

    def to(self, device: torch.device | str) -> CompletionBatch:
        """The batch with its tensors on `device`."""
        tensors: dict = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | Segments)}
        return replace(self, **tensors)

    def padded(self, values: Tensor) -> Tensor:
        """One value a labelled token (N,) as (S, longest completion), zeros after each one's last."""
        rows = values.new_zeros(len(self.lengths), int(self.lengths.max()))
        return rows.index_put((self.owner, self.place), values)

    def sums(self, values: Tensor) -> Tensor:
        """One value a labelled token (N,), summed over each completion (S,), in an order that does not change."""
        return self.padded(values).sum(1)


def collate_completions(sequences: Sequences, normalizer: int | None = None, pad_id: int = 0) -> CompletionBatch:
    """A batch of at least one (prompt, completion), neither of them empty."""
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    if not all(prompt and completion for prompt, completion in sequences):
        raise ValueError("a prompt or a completion has no token; expected at least one in each")
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # one row, however they were given
    rows = [[i] for i in range(len(lengths))] if len(set(lengths)) == 1 else [longest_first]
    examples = [Example(prompt + completion, [IGNORE_INDEX] * len(prompt) + completion) for prompt, completion in sequences]
    batch = collate([[examples[i] for i in row] for row in rows], pad_id)
    order = [i for row in rows for i in row]
    tokens = torch.tensor([len(completion) for _, completion in sequences])
    owner = torch.tensor(order).repeat_interleave(tokens[order])
    place = torch.cat([torch.arange(len(sequences[i][1])) for i in order])
    fields = batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids
    return CompletionBatch(*fields, owner, place, tokens, batch.num_tokens, normalizer or len(sequences))


def collate_shared(groups: Sequence[tuple[list[int], Sequence[list[int]]]], normalizer: int | None = None) -> CompletionBatch:
    """A batch of prompts, each with as many completions, none empty: in one row, each prompt once.

    Completion j of prompt i is number j len(groups) + i: all first ones, then all second ones.
    """
    if not all(prompt and all(completions) for prompt, completions in groups):
        raise ValueError("a prompt or a completion has no token; expected at least one in each")
    ids: list[int] = []
    positions: list[int] = []
    owner: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    rows: list[list[int]] = []
    for i, (prompt, completions) in enumerate(groups):
        shared = range(len(ids), len(ids) + len(prompt))
        ids += prompt
        positions += range(len(prompt))
        for j, completion in enumerate(completions):
            inputs = range(len(ids), len(ids) + len(completion) - 1)
            ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(inputs))
            owner += [j * len(groups) + i] * len(completion)
            predictors += [shared[-1], *inputs]
            targets += completion
            rows.append([*shared, *inputs])
    lengths = [len(completion) for j in range(len(groups[0][1])) for completion in (completions[j] for _, completions in groups)]
    place = torch.cat([torch.arange(len(completion)) for _, completions in groups for completion in completions])
    row = torch.tensor([ids])
    return CompletionBatch(
        row, torch.full_like(row, IGNORE_INDEX), torch.tensor([positions]), Segments.of_rows(rows), torch.tensor(owner), place,
        torch.tensor(lengths), len(ids), normalizer or len(lengths), None, torch.tensor(predictors), torch.tensor(targets),
    )  # fmt: skip
