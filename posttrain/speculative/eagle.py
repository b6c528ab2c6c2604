"""Drafting with EAGLE's head: one decoder layer goes on with the target's features, a depth of the tree at a time.

The draft's cache holds a row for every pair (feature of position t, token t + 1) that the target has seen. A step first puts the
accepted pairs there, with the target's own features; then the tree's nodes come behind them, each seeing the certain rows and its
ancestors, and are forgotten by not being counted: the next step writes over them.

The tree is fixed (EAGLE-1: index paths, as Medusa's) or grows by what the draft finds probable (EAGLE-2, tree.py). Children are the
draft's most probable tokens, none drawn: verification treats them as certain proposals, tried in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.model.few_rows import dense_few_rows, few_rows_linear

from .eagle_head import EagleHead
from .interface import FINAL, Proposal, Requests
from .medusa import cut, nodes_within
from .tree import FixedTree, GrowingTree


class DraftCache:
    """Keys and values (B, kv heads, capacity, head_dim) of one layer; rows of the batch have lengths of their own.

    `place`, then `write` through the layer: T new entries a row from its `start` on. What lies behind is overwritten.
    """

    def __init__(self, head: EagleHead, count: int):
        config, weight = head.config, head.head
        self.lengths = [0] * count  # what is masked must be finite all the same, hence zeros
        self._data = weight.new_zeros((2, count, config.num_key_value_heads, 256, config.head_dim))
        self._start: list[int] = self.lengths

    def place(self, ahead: int, count: int) -> int:
        """The next `write` is of `count` entries, `ahead` behind each row's length. Returns the entries then seen (S)."""
        self._start = [length + ahead for length in self.lengths]
        end = max(self._start) + count
        capacity = self._data.shape[3]
        if end > capacity:
            grown = self._data.new_zeros((*self._data.shape[:3], max(end, 2 * capacity), self._data.shape[4]))
            grown[:, :, :, :capacity] = self._data
            self._data = grown
        return end

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values (B, kv heads, T, head_dim) -> all of them (B, kv heads, S, head_dim)."""
        T, first = keys.shape[2], self._start[0]
        k, v = self._data
        if all(start == first for start in self._start):
            k[:, :, first : first + T], v[:, :, first : first + T] = keys, values
        else:
            for row, start in enumerate(self._start):
                k[row, :, start : start + T], v[row, :, start : start + T] = keys[row], values[row]
        S = max(self._start) + T
        return k[:, :, :S], v[:, :, :S]

    def select(self, rows: Tensor) -> None:
        self._data = self._data[:, rows.to(self._data.device)]
        self.lengths = [self.lengths[i] for i in rows.tolist()]


class Eagle:
    """A drafter (interface.py). tree: a fixed one, or None for EAGLE-2's: `top_k` children and nodes a depth, `depth` deep, of
    which the `total` best are proposed."""

    def __init__(self, head: EagleHead, tree: FixedTree | None = None, *, top_k: int = 6, depth: int = 5, total: int = 20):
        if tree is None and not (1 <= top_k <= len(head.draft_ids) and depth >= 1 and total >= 1):
            raise ValueError(f"top_k is {top_k}, depth {depth} and total {total}; expected at least 1 and top_k in the vocabulary")
        if tree is not None and (rank := max(tree.ranks, default=0)) >= len(head.draft_ids):
            raise ValueError(f"the tree asks for candidate {rank} of a draft vocabulary of {len(head.draft_ids)}")
        self.head, self.tree, self.top_k, self.depth, self.total = head, tree, top_k, depth, total
        self.features: tuple[int, ...] = (FINAL,) if head.layers is None else head.layers
        # the prompts go through one layer (and fc, a fifth of one) where the target has all of its own
        self.prompt_cost = 1.2 / head.base_layers
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._cache = DraftCache(head, 0)
        self._root: tuple[Tensor, Tensor] | None = None

    def begin(self, count: int) -> None:
        self._pending, self._root = [], None
        self._cache = DraftCache(self.head, count)

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        assert features is not None
        self._pending.append((tokens, features))

    def select(self, rows: Tensor) -> None:
        self._cache.select(rows)
        self._pending = [(tokens[rows], features[rows]) for tokens, features in self._pending]
        self._root = None if self._root is None else (self._root[0][rows], self._root[1][rows])

    def propose(self, requests: Requests, limit: int) -> Proposal:
        caps = [min(cap, limit) for cap in requests.cap]
        if max(caps, default=0) == 0:
            return Proposal(torch.empty(len(caps), 0, dtype=torch.int64, device=requests.device), torch.zeros_like(requests.roots))
        with dense_few_rows(self.head):
            state, hidden = self._catch_up()
            return self._grow(state, hidden, caps) if self.tree is None else self._fill(self.tree, state, hidden, caps)

    def _catch_up(self) -> tuple[Tensor, Tensor]:
        """The layer's (state, hidden) (B, 1, D) after each row's root, once all pairs observed are in the cache."""
        if self._pending:
            tokens = torch.cat([t for t, _ in self._pending], 1)
            features = torch.cat([f for _, f in self._pending], 1)
            self._pending = []
            known = tokens >= 0
            counts = known.sum(1)
            n = int(counts.max())
            if n != tokens.shape[1] or int(counts.min()) != n:  # each row's own to the front, in order
                order = known.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n]
                tokens = tokens.gather(1, order).clamp_min(0)
                features = features.gather(1, order[..., None].expand(-1, -1, features.shape[2]))
            causal = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril_()
            state, hidden = self._step(self.head.start(features), tokens, causal[None], 0, 0)
            rows, last = torch.arange(len(tokens), device=tokens.device), counts - 1
            self._root = state[rows, last][:, None], hidden[rows, last][:, None]
            self._cache.lengths = [a + b for a, b in zip(self._cache.lengths, counts.tolist(), strict=True)]
        assert self._root is not None, "nothing was observed"
        return self._root

    def _step(self, state: Tensor, tokens: Tensor, sees: Tensor, ahead: int, depth: int) -> tuple[Tensor, Tensor]:
        """One pass of the layer over m entries a row that lie `ahead` behind the certain ones, all at `depth` (entry by entry
        further where `sees` is the catching up's causal one, depth 0). sees bool (B or 1, m, ahead + m): among them."""
        m, device = tokens.shape[1], tokens.device
        lengths = torch.tensor(self._cache.lengths, device=device)
        S = self._cache.place(ahead, m)
        positions = lengths[:, None] + (torch.arange(m, device=device) if depth == 0 else depth - 1)
        rope = self.head.rope.gather(positions.expand(-1, m), state.dtype)
        away = torch.arange(S, device=device) - lengths[:, None]  # (B, S): columns, counted from the row's length
        among = sees.expand(len(lengths), -1, -1).gather(2, away.clamp(0, ahead + m - 1)[:, None].expand(-1, m, -1))
        allowed = (away < 0)[:, None] | (among & (away < ahead + m)[:, None])
        mask = torch.zeros(allowed.shape, dtype=state.dtype, device=device).masked_fill_(~allowed, -torch.inf)[:, None]
        return self.head.step(state, tokens, rope, mask, self._cache)

    def _fill(self, tree: FixedTree, state: Tensor, hidden: Tensor, caps: list[int]) -> Proposal:
        """A fixed tree's tokens, a depth at a time: only nodes that have children go through the layer."""
        levels = tree.levels()[: max(caps)]
        parents, ranks, ids = tree.parents, tree.ranks, self.head.draft_ids
        place = {-1: 0}  # of each node that went through the layer at the depth above: its row in `hidden`
        sees = torch.zeros(0, 0, dtype=torch.bool, device=ids.device)
        slots: dict[int, int] = {}
        found: list[Tensor] = []
        for level, nodes in enumerate(levels):
            best = ids[few_rows_linear(hidden, self.head.head).topk(max(ranks[i] for i in nodes) + 1, dim=-1).indices]
            found.append(best[:, [place[parents[i]] for i in nodes], [ranks[i] for i in nodes]])
            if level + 1 == len(levels):
                break
            above = {parents[i] for i in levels[level + 1]}
            fed = [i for i in nodes if i in above]
            first, count = len(sees), len(fed)
            grown = sees.new_zeros(first + count, first + count)
            grown[:first, :first] = sees
            for j, i in enumerate(fed):
                if parents[i] >= 0:
                    grown[first + j, :first] = sees[slots[parents[i]]]
                grown[first + j, first + j] = True
                slots[i] = first + j
            sees = grown
            tokens = found[-1][:, [i - nodes.start for i in fed]]
            state = state[:, [place[parents[i]] for i in fed]]
            place = {i: j for j, i in enumerate(fed)}
            state, hidden = self._step(state, tokens, sees[None, first:], first, level + 1)
        tokens = torch.cat(found, 1)
        num = torch.tensor([nodes_within(tree, cap) for cap in caps], device=tokens.device)
        return Proposal(cut(tokens, num), num, None, torch.tensor(parents[: tokens.shape[1]], device=tokens.device))

    def _grow(self, state: Tensor, hidden: Tensor, caps: list[int]) -> Proposal:
        """EAGLE-2's tree."""
        ids, depth = self.head.draft_ids, min(self.depth, max(caps))
        grown = GrowingTree(self._logprobs(hidden)[:, 0], self.top_k)
        k = grown.beam.shape[1]
        own = torch.eye(k, dtype=torch.bool, device=ids.device).expand(len(caps), -1, -1)
        sees, above = own, torch.zeros_like(grown.beam)
        for level in range(1, depth):
            state = state.gather(1, above[..., None].expand(-1, -1, state.shape[2]))
            state, hidden = self._step(state, ids[grown.tokens], sees, (level - 1) * k, level)
            grown.grow(self._logprobs(hidden))
            above = grown.parent_in_beam
            sees = torch.cat((sees.gather(1, above[..., None].expand(-1, -1, sees.shape[2])), own), 2)
        places, parents = grown.select(self.total)
        depths = torch.ones_like(parents)
        for i in range(parents.shape[1]):  # parents come first
            depths[:, i] = torch.where(parents[:, i] < 0, 1, 1 + depths.gather(1, parents[:, i : i + 1].clamp_min(0))[:, 0])
        num = (depths <= torch.tensor(caps, device=depths.device)[:, None]).sum(1)
        return Proposal(cut(ids[places], num), num, None, parents)

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return few_rows_linear(hidden, self.head.head).float().log_softmax(-1)
