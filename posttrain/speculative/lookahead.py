"""Lookahead decoding (Fu et al., arXiv:2402.02057): the target drafts for itself, by Jacobi iteration, in the pass that verifies.

A window of `window` columns and N - 1 levels holds guesses of the tokens to come: column j of level l stands for the token
j + l places after the root (column 0 of level 0 is the root). A place of level l >= 1 sees level 0 up to its column and the levels
1 .. l - 1 of its own column, so the window is a tree, as the guesses are:

    root ─ past[0][0] ─ past[0][1] ─ ...        level 0 (W - 1 tokens; column 1, 2, ...)
      │         └ past[1][1] ─ past[2][1] ─ ...      levels 1 .. N - 2 of column 1
      ├ past[1][0] ─ past[2][0] ─ ...                levels 1 .. N - 2 of column 0
      └ guesses: up to G n-grams of the pool that begin with the root, as a trie

The target's own choice after the last level of each column is the next level; the oldest level goes. What a column has been, level
after level, is an n-gram of N tokens that the target once thought plausible: into the pool, under its first token. A pass thus sees
(N - 1) (W + G) tokens: it pays only where such a pass costs little more than one of a single token.

All nodes are certain proposals, the window's too (they are tried after the guesses): lossless at any temperature.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from .interface import Proposal, Requests

NGram = tuple[int, ...]


class Pool:
    """n-grams by their first token, at most `size` of each, the least recently seen being dropped."""

    def __init__(self, size: int):
        self.size = size
        self._grams: dict[int, OrderedDict[NGram, None]] = {}

    def add(self, first: int, rest: NGram) -> None:
        """Put an n-gram in, as the most recent."""
        grams = self._grams.setdefault(first, OrderedDict())
        grams[rest] = None
        grams.move_to_end(rest)
        if len(grams) > self.size:
            grams.popitem(last=False)

    def read(self, tokens: Sequence[int], n: int, start: int = 0) -> None:
        """The n-grams of a text, from place `start` on."""
        for i in range(start, len(tokens) - n + 1):
            self.add(tokens[i], tuple(tokens[i + 1 : i + n]))

    def after(self, first: int) -> list[NGram]:
        """What may follow `first`, the most recent first."""
        return list(reversed(self._grams.get(first, ())))


class Window:
    """One request's levels. past[0] has a token less than the others: its column 0 is the root."""

    def __init__(self, tokens: Sequence[int], columns: int, levels: int, seed: int):
        self.levels = levels
        # Level 0 is drawn from the prompt and loses a token with each level that the warm-up adds.
        self.past: list[list[int]] = [random.Random(seed).choices(list(tokens), k=columns - 1 + levels - 1)]

    def nodes(self, first: int) -> tuple[list[int], list[int], list[int]]:
        """(tokens, parents, the nodes whose successors are the next level) as a tree whose own nodes begin at index `first`."""
        tokens, parents = list(self.past[0]), [first + j - 1 if j else -1 for j in range(len(self.past[0]))]
        ends = [-1, *range(first, first + len(tokens))]
        for level in self.past[1:]:
            parents += ends[: len(level)]
            ends = list(range(first + len(tokens), first + len(tokens) + len(level)))
            tokens += level
        return tokens, parents, ends

    def grow(self, root: int, following: Sequence[int], pool: Pool) -> None:
        """Take what the target says after each column's last level as the next one."""
        if len(self.past) < self.levels:  # warm-up: every column moves on by one token, so the last levels lose their first
            self.past = [level[1:] for level in self.past] + [list(following[1:])]
            return
        firsts = [root, *self.past[0]]
        for column, first in enumerate(firsts):
            pool.add(first, (*(level[column] for level in self.past[1:]), following[column]))
        self.past = [self.past[1][1:], *self.past[2:], list(following)] if self.levels > 1 else [list(following[1:])]


class Lookahead:
    """A drafter (interface.py) that is also shown the target's logits (`see`).

    ngram: N, the length of the pool's n-grams (levels of the window and one). window: W columns. guesses: G n-grams verified at
    once, and kept of each first token. pool_from_text: the n-grams of the prompt and of what was generated go into the pool too.
    As they are, window and root are 12 rows of a pass, and four guessed tokens fit a matrix unit's tile of 16 besides.
    """

    features: tuple[int, ...] = ()
    prompt_cost = 0.0

    def __init__(self, ngram: int = 4, window: int = 4, guesses: int = 5, pool_from_text: bool = True):
        if ngram < 3 or window < 2 or guesses < 1:
            raise ValueError(f"ngram is {ngram}, window {window} and guesses {guesses}; expected at least 3, 2 and 1")
        self.ngram, self.window, self.guesses, self.pool_from_text = ngram, window, guesses, pool_from_text
        self.begin(0)

    def begin(self, count: int) -> None:
        self._pools = [Pool(self.guesses) for _ in range(count)]
        self._windows: list[Window | None] = [None] * count
        self._read = [0] * count  # tokens of each row whose n-grams are in its pool
        self._ends: list[list[int]] = []
        self._roots: list[int] = []

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        self._pools, self._windows = [self._pools[i] for i in chosen], [self._windows[i] for i in chosen]
        self._read = [self._read[i] for i in chosen]
        self._ends, self._roots = [], []

    def propose(self, requests: Requests, limit: int) -> Proposal:
        self._ends, self._roots = [], []
        rows: list[tuple[list[int], list[int]]] = []
        for i, tokens in enumerate(requests.tokens):
            if self.pool_from_text:
                self._pools[i].read(tokens, self.ngram, max(0, self._read[i] - self.ngram + 1))
                self._read[i] = len(tokens)
            cap = min(requests.cap[i], limit)
            nodes, parents = trie([gram[:cap] for gram in self._pools[i].after(tokens[-1])])
            if self._windows[i] is None:
                self._windows[i] = Window(tokens, self.window, self.ngram - 1, int(requests.seeds[i]))
            ends: list[int] = []
            if requests.cap[i] >= self.window + self.ngram:  # else the text ends before the window's guesses could be of use
                more, above, ends = self._windows[i].nodes(len(nodes))  # type: ignore[union-attr]
                nodes, parents = nodes + more, parents + above
            rows.append((nodes, parents))
            self._ends.append(ends)
            self._roots.append(tokens[-1])
        N = max(len(nodes) for nodes, _ in rows)
        num = torch.tensor([len(nodes) for nodes, _ in rows], device=requests.device)
        drafted = torch.tensor([nodes + [-1] * (N - len(nodes)) for nodes, _ in rows], device=requests.device).view(len(rows), N)
        above = torch.tensor([up + [-1] * (N - len(up)) for _, up in rows], device=requests.device).view(len(rows), N)
        return Proposal(drafted, num, None, above)

    def see(self, logits: Tensor) -> None:
        """The target's logits (B, N + 1, V) of the last proposal: row 0 the root's, row i + 1 node i's."""
        for i, ends in enumerate(self._ends):
            window = self._windows[i]
            if ends and window is not None:
                following = logits[i, torch.tensor(ends, device=logits.device) + 1].argmax(-1).tolist()
                window.grow(self._roots[i], following, self._pools[i])
        self._ends = []


def trie(grams: Sequence[NGram]) -> tuple[list[int], list[int]]:
    """(tokens, parents) of the root's continuations `grams` with their common beginnings shared, the first ones tried first."""
    tokens: list[int] = []
    parents: list[int] = []
    node: dict[NGram, int] = {(): -1}
    for gram in grams:
        for end in range(1, len(gram) + 1):
            if gram[:end] not in node:
                node[gram[:end]] = len(tokens)
                tokens.append(gram[end - 1])
                parents.append(node[gram[: end - 1]])
    return tokens, parents
