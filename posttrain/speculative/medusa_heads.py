"""Medusa's heads (Cai et al., arXiv:2401.10774): several tokens ahead from one hidden state of the target.

    h_k = h + SiLU(W_k h + b_k)        logits_k = h_k head_k^T        k = 0 .. K-1: head k at position t predicts token t + 2 + k

h is the target's hidden state after its final norm, of which its own head predicts token t + 1. W_k = 0 and b_k = 0 at the start,
where every head says what the target says. Loss over positions with a label: sum_k 0.8^k CE_k (equation 1; the target is frozen).

head_k: the target's own head, shared and frozen, by default. Heads of their own (`own_heads`, the paper's) start from its weight;
at V = 49,152 and D = 576 each would be 28 million parameters, six times the work of a training step, 57 MB of bfloat16 a head in
the file and to be read at every drafting step, where W_k has a third of a million and can already turn h into any direction of
the target's own output space.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.data import IGNORE_INDEX
from posttrain.errors import PosttrainError
from posttrain.kernels import linear_logprobs
from posttrain.model.decoder import CausalLM
from posttrain.model.few_rows import few_rows_linear

from .draft_data import DraftBatch, shifted
from .heads import head_rows, places, put_tensors, read_heads, save_heads

KIND, DECAY = "medusa", 0.8


class MedusaHeads(nn.Module):
    """K heads over a draft vocabulary of V' tokens. weight (K, D, D), bias (K, D); with own_heads head_weight (K, V', D).

    draft_ids int64 (V',): the target's id of each; head (V', D): the target's rows for these, frozen.
    """

    head: Tensor
    draft_ids: Tensor
    places: Tensor

    def __init__(self, base: CausalLM, num_heads: int, draft_ids: Tensor, own_heads: bool = False):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads is {num_heads}; expected at least 1")
        D, head = base.config.hidden_size, head_rows(base, draft_ids)
        self.num_heads, self.own_heads = num_heads, own_heads
        self.weight = nn.Parameter(torch.zeros(num_heads, D, D, device=head.device))
        self.bias = nn.Parameter(torch.zeros(num_heads, D, device=head.device))
        self.head_weight = nn.Parameter(head.float().repeat(num_heads, 1, 1)) if own_heads else None
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("draft_ids", draft_ids.to(head.device), persistent=False)
        self.register_buffer("places", places(self.draft_ids, base.config.vocab_size), persistent=False)

    def forward(self, hidden: Tensor, count: int | None = None) -> Tensor:
        """Hidden states (K, N, D) of the heads (of the first `count`) for the target's hidden (N, D)."""
        K, D = self.num_heads if count is None else count, hidden.shape[-1]
        turned = few_rows_linear(hidden, self.weight[:K].view(K * D, D).to(hidden.dtype), self.bias[:K].view(-1).to(hidden.dtype))
        return (hidden[:, None] + F.silu(turned).view(-1, K, D)).transpose(0, 1)

    def logits(self, hidden: Tensor, count: int | None = None) -> Tensor:
        """(K, N, V') over the draft vocabulary."""
        states = self(hidden, count)
        if self.head_weight is None:  # as rows: of what the transposition left, PyTorch makes K products (20 times as slow)
            return few_rows_linear(states.reshape(-1, states.shape[2]), self.head).view(*states.shape[:2], -1)
        return torch.bmm(states, self.head_weight[: len(states)].to(states.dtype).transpose(1, 2))

    def targets(self, batch: DraftBatch) -> tuple[Tensor, Tensor]:
        """(hidden (N, D), places int64 (K, N)) of the positions that count: what head k is to say there, -100 where nothing."""
        learned = batch.learned()
        ahead = [self.places[shifted(batch.labels, 2 + k, IGNORE_INDEX)[learned].clamp_min(0)] for k in range(self.num_heads)]
        known = [batch.learned(2 + k)[learned] for k in range(self.num_heads)]
        return batch.hidden[learned], torch.stack(ahead).masked_fill(~torch.stack(known), IGNORE_INDEX)


HORIZON = 2  # a position counts when the first head has a label there


def loss_sum(heads: MedusaHeads, batch: DraftBatch) -> tuple[Tensor, dict[str, tuple[Tensor, float]]]:
    """Sum over positions of sum_k 0.8^k CE_k, and each head's own mean loss to show."""
    hidden, labels = heads.targets(batch)
    states, total = heads(hidden), hidden.new_zeros((), dtype=torch.float32)
    shown: dict[str, tuple[Tensor, float]] = {}
    for k in range(heads.num_heads):
        rows = labels[k] != IGNORE_INDEX
        weight = heads.head if heads.head_weight is None else heads.head_weight[k].to(states.dtype)
        loss = -linear_logprobs(states[k][rows], weight, labels[k][rows]).sum()
        total = total + DECAY**k * loss
        shown[f"loss_{k + 1}"] = loss, int(rows.sum())
    return total, shown


@torch.no_grad()
def accuracy(heads: MedusaHeads, batches: list[DraftBatch], ranks: int = 10) -> list[list[float]]:
    """[k][r]: the share of labelled tokens that head k has at rank r. A token outside the draft vocabulary is at none."""
    hits, count = torch.zeros(heads.num_heads, ranks), torch.zeros(heads.num_heads)
    for batch in batches:
        hidden, labels = heads.targets(batch)
        learned = batch.learned()
        for k, logits in enumerate(heads.logits(hidden)):
            top = logits.topk(min(ranks, logits.shape[-1]), dim=-1).indices
            hits[k, : top.shape[1]] += (top == labels[k][:, None]).sum(0).cpu()
            count[k] += batch.learned(2 + k)[learned].sum().cpu()
    return (hits / count.clamp_min(1)[:, None]).tolist()


def save_medusa(path: str | os.PathLike, heads: MedusaHeads, base: CausalLM, measured: dict[str, Any]) -> None:
    """Write the heads' folder; `measured`: what goes into its config.json besides."""
    config = {"num_heads": heads.num_heads, "own_heads": heads.own_heads, **measured}
    save_heads(path, KIND, heads, heads.draft_ids, config, base)


def load_medusa(path: str | os.PathLike, base: CausalLM, any_base: bool = False) -> tuple[MedusaHeads, dict[str, Any]]:
    """(heads in the base's dtype, config). PosttrainError for another kind of folder, or heads of another base."""
    config, tensors = read_heads(path, KIND, base, any_base)
    try:
        heads = MedusaHeads(base, config["num_heads"], tensors["draft_ids"].long(), config["own_heads"])
    except (KeyError, TypeError, IndexError) as error:
        raise PosttrainError(f"{path} is damaged ({error!r}); train the heads again") from error
    put_tensors(heads, tensors, path)
    return heads.to(base.model.embed_tokens.weight.dtype).requires_grad_(False).eval(), config
