"""Batches for training drafts: a target's continuations beside what the target computed at each of their tokens.

The target is frozen, so its hidden states are computed once, for all epochs and all kinds of draft: 2 D bytes a token in bfloat16
(69 MB for 60,000 tokens of SmolLM2-135M).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.data import IGNORE_INDEX, Example
from posttrain.model.decoder import CausalLM
from posttrain.model.eval_mode import eval_mode
from posttrain.packing import collate as collate_rows

# oneDNN keeps about half a MiB for each shape that it has ever multiplied: batches of every width would grow into gigabytes.
WIDTH = 32


@dataclass(frozen=True)
class Item:
    """One sequence of T tokens. hidden (T, D): the target's after its final norm. features (T, F): what the draft starts from,
    `hidden` itself or several layers' inputs side by side."""

    example: Example
    hidden: Tensor
    features: Tensor


@dataclass(frozen=True)
class DraftBatch:
    """B rows, padded on the right: input_ids, labels int64 (B, T) (not shifted, -100: none), hidden (B, T, D), features (B, T, F).

    horizon: a position counts when the token `horizon` places after it has a label.
    """

    input_ids: Tensor
    labels: Tensor
    hidden: Tensor
    features: Tensor
    num_tokens: int
    horizon: int

    @property
    def normalizer(self) -> int:
        """Positions that count."""
        return int(self.learned().sum())

    def learned(self, ahead: int | None = None) -> Tensor:
        """bool (B, T): the token `ahead` places further (`horizon` by default) has a label."""
        ahead = self.horizon if ahead is None else ahead
        return shifted(self.labels, ahead, IGNORE_INDEX) != IGNORE_INDEX

    def to(self, device: torch.device | str) -> DraftBatch:
        """The batch with its tensors on `device`."""
        tensors: dict = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def shifted(x: Tensor, by: int, fill: int = 0) -> Tensor:
    """x (B, T, ...) moved to the left: place t has what was at t + by, and `fill` where nothing was."""
    moved = torch.full_like(x, fill)
    if by < x.shape[1]:
        moved[:, : x.shape[1] - by] = x[:, by:]
    return moved


def _padded(ids: Tensor, fill: int = 0) -> Tensor:
    """(B, T) on to a multiple of WIDTH, on the right."""
    return F.pad(ids, (0, -ids.shape[1] % WIDTH), value=fill)


@torch.no_grad()
def compute_items(
    model: CausalLM, examples: Sequence[Example], layers: Sequence[int] | None = None, batch_size: int = 16
) -> list[Item]:
    """Each example with the target's hidden states; features are those entering `layers` side by side where they are given.

    The target runs as it is (an attached adapter acts), in batches of like lengths.
    """
    items: dict[int, Item] = {}
    taken: dict[int, Tensor] = {}
    hooks = [
        model.model.layers[layer].register_forward_pre_hook(lambda module, inputs, layer=layer: taken.__setitem__(layer, inputs[0]))
        for layer in layers or ()
    ]
    device = model.model.embed_tokens.weight.device
    try:
        with eval_mode(model):
            order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
            for start in range(0, len(order), batch_size):
                ours = order[start : start + batch_size]
                hidden = model.hidden(_padded(collate_rows([[examples[i]] for i in ours]).input_ids).to(device))
                features = torch.cat([taken[layer] for layer in layers], -1) if layers else hidden
                for row, i in enumerate(ours):
                    length = len(examples[i].input_ids)
                    own = hidden[row, :length].clone()
                    items[i] = Item(examples[i], own, features[row, :length].clone() if layers else own)
    finally:
        for hook in hooks:
            hook.remove()
    return [items[i] for i in range(len(examples))]


def collate(items: Sequence[Item], horizon: int) -> DraftBatch:
    """Items as tensors, padded on the right to the longest and on to a multiple of WIDTH."""
    rows = collate_rows([[item.example] for item in items])
    input_ids, labels = _padded(rows.input_ids), _padded(rows.labels, IGNORE_INDEX)
    width = input_ids.shape[1]

    def padded(parts: list[Tensor]) -> Tensor:
        whole = parts[0].new_zeros((len(parts), width, parts[0].shape[1]))
        for row, part in enumerate(parts):
            whole[row, : len(part)] = part
        return whole

    hidden = padded([item.hidden for item in items])
    same = all(item.features is item.hidden for item in items)
    features = hidden if same else padded([item.features for item in items])
    return DraftBatch(input_ids, labels, hidden, features, rows.num_tokens, horizon)


def split(items: Sequence, share: float, seed: int) -> tuple[list, list]:
    """(to train on, held out): `share` of the items, at least one, chosen by the seed."""
    held = max(1, round(share * len(items)))
    if held >= len(items):
        raise ValueError(f"{len(items)} continuations cannot be split into training and held-out ones; give more prompts")
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    out = set(order[:held])
    return [item for i, item in enumerate(items) if i not in out], [item for i, item in enumerate(items) if i in out]
