"""Drafting with Medusa's heads: one product from the target's last hidden state gives a whole tree's tokens.

The root is certain (the target drew it); the tree's node at depth d is the candidate of head d that its index path names. Head and
target are asked once a step, whatever the tree. Verification is lossless unless the engine is told otherwise (typical.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import FINAL, Proposal, Requests
from .medusa_heads import MedusaHeads
from .tree import FixedTree


class Medusa:
    """A drafter (interface.py). tree: at most as deep as there are heads. ValueError where it is deeper."""

    features: tuple[int, ...] = (FINAL,)
    prompt_cost = 0.0

    def __init__(self, heads: MedusaHeads, tree: FixedTree):
        if tree.depth > heads.num_heads:
            raise ValueError(f"the tree is {tree.depth} deep and there are {heads.num_heads} heads; train more, or prune the tree")
        if (rank := max(tree.ranks, default=0)) >= len(heads.draft_ids):
            raise ValueError(f"the tree asks for candidate {rank} of a draft vocabulary of {len(heads.draft_ids)}")
        self.heads, self.tree = heads, tree
        device = heads.draft_ids.device
        self._head = torch.tensor(tree.depths, dtype=torch.int64, device=device) - 1
        self._rank = torch.tensor(tree.ranks, dtype=torch.int64, device=device)
        self._parents = torch.tensor(tree.parents, dtype=torch.int64, device=device)
        self._hidden: Tensor | None = None

    def begin(self, count: int) -> None:
        self._hidden = None

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        assert features is not None
        self._hidden = last_features(tokens, features)

    def propose(self, requests: Requests, limit: int) -> Proposal:
        assert self._hidden is not None, "nothing was observed"
        caps = [min(cap, limit) for cap in requests.cap]
        N = nodes_within(self.tree, max(caps, default=0))
        num = torch.tensor([nodes_within(self.tree, cap) for cap in caps], device=requests.device)
        if N == 0:
            return Proposal(self._head.new_empty(len(caps), 0), num)
        depth, ranks = self.tree.depths[N - 1], max(self.tree.ranks[:N]) + 1
        best = self.heads.logits(self._hidden, depth).topk(ranks, dim=-1).indices  # (depth, B, ranks)
        tokens = self.heads.draft_ids[best[self._head[:N], :, self._rank[:N]]].t()
        return Proposal(cut(tokens, num), num, None, self._parents[:N])

    def select(self, rows: Tensor) -> None:
        if self._hidden is not None:
            self._hidden = self._hidden[rows]


def last_features(tokens: Tensor, features: Tensor) -> Tensor:
    """(B, F): of each row the features of its last token that is not -1."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(tokens >= 0, places, -1).amax(1)
    return features[torch.arange(len(tokens), device=tokens.device), last]


def nodes_within(tree: FixedTree, depth: int) -> int:
    """How many of the tree's nodes, which lie by depth, are at most `depth` deep."""
    return sum(d <= depth for d in tree.depths)


def cut(tokens: Tensor, num: Tensor) -> Tensor:
    """tokens (B, N) with -1 behind each row's num."""
    return tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) >= num[:, None], -1)
