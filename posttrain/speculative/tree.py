"""Trees of draft tokens: fixed ones from index paths or searched from measured accuracy, and EAGLE-2's, grown as it drafts.

A tree's nodes come after its root (the last token that is certain), parents before children and siblings in the order in which
they are tried. parents[i] is node i's parent, -1 for a child of the root: what `kernels.verify_draft_tree` reads.

A fixed tree is a set of index paths (Medusa, arXiv:2401.10774, section 2.3.3): (2, 0) is the most probable continuation, by what
predicts two tokens ahead, of the third most probable next token.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Path = tuple[int, ...]


@dataclass(frozen=True)
class FixedTree:
    """Index paths in the order of their nodes: by length, then by rank."""

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> FixedTree:
        """The tree of these paths in any order. ValueError where one is empty, negative or twice there, or lacks its parent."""
        given = [tuple(path) for path in paths]
        known = set(given)
        for path in given:
            if not path or min(path) < 0:
                raise ValueError(f"the tree holds the path {path}; expected ranks from 0 on, at least one")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(f"the tree holds {path} and not its parent {path[:-1]}; a node needs all nodes above it")
        if len(known) != len(given):
            raise ValueError(f"the tree holds {len(given) - len(known)} paths twice")
        return cls(tuple(sorted(given, key=lambda path: (len(path), path))))

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def parents(self) -> list[int]:
        place = {path: i for i, path in enumerate(self.paths)} | {(): -1}
        return [place[path[:-1]] for path in self.paths]

    @cached_property
    def depths(self) -> list[int]:
        """Of each node, the root's children being 1."""
        return [len(path) for path in self.paths]

    @cached_property
    def ranks(self) -> list[int]:
        return [path[-1] for path in self.paths]

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    def levels(self) -> list[range]:
        """The nodes of each depth, from 1 on."""
        ends = [0, *(sum(d <= depth for d in self.depths) for depth in range(1, self.depth + 1))]
        return [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def chain(length: int) -> FixedTree:
    """One candidate at each depth."""
    return FixedTree(tuple((0,) * (depth + 1) for depth in range(length)))


def search_tree(accuracy: Sequence[Sequence[float]], num_nodes: int, max_children: int = 10) -> tuple[FixedTree, list[float]]:
    """The tree of `num_nodes` nodes that is expected to have the longest accepted path (fewer where there are no more).

    accuracy[d][r]: the share of tokens where the r-th candidate of depth d + 1 is right, measured on held-out text. A node's value
    is the product of those along its path, the probability that it is accepted if depths are independent. From the first child of
    the root on, the most valuable of all next siblings and first children is added (Medusa's gen_results.py): no choice of as many
    nodes has a larger sum while accuracy falls with the rank. Returns the tree and the values in the order of being added: their
    running sum plus 1 is the expected number of tokens that a pass of the target yields for each size.
    """
    depth = len(accuracy)
    if num_nodes < 0 or max_children < 1:
        raise ValueError(f"num_nodes is {num_nodes} and max_children {max_children}; expected at least 0 and 1")
    chosen: list[Path] = []
    values: list[float] = []
    frontier: list[tuple[float, Path]] = []

    def consider(before: float, path: Path) -> None:
        ranks = accuracy[len(path) - 1] if len(path) <= depth else ()
        if path[-1] < min(max_children, len(ranks)):
            heapq.heappush(frontier, (-before * ranks[path[-1]], path))

    value: dict[Path, float] = {(): 1.0}
    consider(1.0, (0,))
    while frontier and len(chosen) < num_nodes:
        negative, path = heapq.heappop(frontier)
        chosen.append(path)
        values.append(-negative)
        value[path] = -negative
        consider(-negative, (*path, 0))
        consider(value[path[:-1]], (*path[:-1], path[-1] + 1))
    return FixedTree.of(chosen), values


class GrowingTree:
    """EAGLE-2's tree (arXiv:2406.16858, section 4): B requests, each grown by what its draft thinks probable.

    A node's score is the sum of the draft's log-probabilities along its path. From each of the `top_k` nodes of the beam the draft
    proposes top_k children, all of which stay candidates; the best top_k of these top_k^2 are the next beam. In the end the
    `total` best of all candidates are the tree: since no score exceeds its parent's, it is one.
    """

    def __init__(self, logprobs: Tensor, top_k: int):
        """logprobs (B, V): the draft's for what follows the root."""
        self.top_k = top_k
        scores, tokens = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1)
        self._scores, self._tokens = [scores], [tokens]
        self._parents = [torch.full_like(tokens, -1)]
        # of the beam's nodes (B, k): scores, places among the candidates, and of each one's parent the place in the beam before
        self.scores, self.beam = scores, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        self.parent_in_beam = torch.full_like(tokens, -1)

    @property
    def tokens(self) -> Tensor:
        """(B, k) the beam's tokens: what the draft reads next."""
        return torch.cat(self._tokens, 1).gather(1, self.beam)

    def grow(self, logprobs: Tensor) -> None:
        """One depth more, by the draft's logprobs (B, k, V) after each node of the beam."""
        B, width, V = logprobs.shape
        best, tokens = logprobs.topk(min(self.top_k, V), dim=-1)
        k = best.shape[-1]
        scores = (self.scores[..., None] + best).reshape(B, -1)
        first = sum(part.shape[1] for part in self._tokens)
        self._parents.append(self.beam.repeat_interleave(k, dim=1))
        self._scores.append(scores)
        self._tokens.append(tokens.reshape(B, -1))
        self.scores, place = _largest(scores, self.top_k)
        self.parent_in_beam = place // k
        self.beam = place + first

    def select(self, total: int) -> tuple[Tensor, Tensor]:
        """(tokens, parents) int64 (B, total) of the best candidates (fewer where there are not as many), ready to be verified."""
        scores, tokens, parents = (torch.cat(parts, 1) for parts in (self._scores, self._tokens, self._parents))
        kept = _largest(scores, total)[1].sort(1).values
        place = torch.full_like(tokens, -1).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
        above = parents.gather(1, kept)
        return tokens.gather(1, kept), torch.where(above < 0, above, place.gather(1, above.clamp_min(0)))


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row; of equal ones the first, so that no node goes before a parent of its own score."""
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], order[:, :count]
