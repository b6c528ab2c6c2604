"""What the engine and a drafter say to each other: propose, verify in one pass of the target, take what was accepted.

A row of the batch is a request. Its sequence ends in the *root*: the one token that is chosen and that the target has not yet
seen. A drafter proposes continuations of the root, a chain or a tree; the target sees root and draft in one pass; the
accepted path and one token more are appended, and that one token is the next root (engine.py).

A drafter is anything with the attributes and methods of `Drafter`. It keeps what it likes between steps (a cache of its own, the
target's features); nothing tells it to roll back but what it reads off `Requests` and is told by `observe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from posttrain.model.sampling import filter_logits

FINAL = -1  # the hidden state after the final norm, which the head reads; layer i >= 0: the hidden state that enters layer i


@dataclass
class Proposal:
    """Continuations of every row's root.

    tokens   int64 (B, N)          the nodes; behind a row's own num, -1
    num      int64 (B,)            nodes of each row, 0 .. N; 0: the row takes a plain step
    logits   (B, N, V) or, of a tree, (B, N + 1, V); None: every token is proposed for certain (n-gram, top-k children).
             A chain's row i is what token i was drawn from (raw: under the requests' temperature, top_k and top_p, as
             `Requests.draw` draws). A tree's row 0 is what the root's children were drawn from, row i + 1 node i's.
    parents  int64 (N,) or (B, N)  node indices, -1 the root; a parent comes before its children and siblings lie in the order
                                   in which they are tried. None: a chain, each token the next one's parent
    with_replacement               whether siblings were drawn independently from `logits`, or without replacement
    """

    tokens: Tensor
    num: Tensor
    logits: Tensor | None = None
    parents: Tensor | None = None
    with_replacement: bool = True


@dataclass
class Requests:
    """The rows that are still running: what a drafter may read, and nothing that it may change.

    tokens: per row the prompt and what has been generated, the root last. cap: per row the deepest draft of which all can
    still be used (max_new_tokens leave room for it and the token after it).
    """

    tokens: list[list[int]]
    cap: list[int]
    seeds: Tensor  # int64 (B,)
    generated: Tensor  # int64 (B,): tokens generated so far, the root among them
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def roots(self) -> Tensor:
        """int64 (B,)"""
        return torch.tensor([row[-1] for row in self.tokens], device=self.device)

    def draw(self, logits: Tensor, depth: int) -> Tensor:
        """Tokens int64 (B,) from logits (B, V), `depth` >= 0 tokens after the root, under the requests' sampling parameters.

        The noise depends on a request's seed and the token's place alone, so a request is drafted the same alone and in any
        batch. It is no noise of the verification's. (A place is drafted again only where the tokens before it were refused,
        and then its first draft was never looked at.)
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = filter_logits(logits, self.temperature, self.top_k, self.top_p)
        noise = torch.empty_like(logits)
        for row, (seed, place) in enumerate(zip(self.seeds.tolist(), (self.generated + depth).tolist(), strict=True)):
            mixed = (seed * 0x9E3779B97F4A7C15 + place * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64 >> 32
            noise[row].exponential_(generator=torch.Generator(logits.device).manual_seed(mixed))
        return (logits - noise.log()).argmax(-1)


class Drafter(Protocol):
    """What proposes.

    features: which of the target's hidden states it is told, concatenated in this order; () none.
    prompt_cost: about what its taking in of the prompts costs, over the target's pass over them (0: nothing; a model of a fifth
    of the target's layers: 0.2). Where that could not be won back, the engine never asks for a draft.

    A drafter that also has a method see(logits) is shown the target's logits (B, 1 + N, V) at the root and every node of what it
    proposed, before `observe` (lookahead.py).
    """

    features: tuple[int, ...]
    prompt_cost: float

    def begin(self, count: int) -> None:
        """Forget everything: `count` new requests."""

    def propose(self, requests: Requests, limit: int) -> Proposal:
        """Continuations of the roots, no row's deeper than its cap nor than `limit` >= 1 (a tree: its depth).

        No row may have more nodes than it can use; where a drafter has nothing to say, num is 0. N may be 0 if all are.
        """

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        """What the target has seen and said since the last call: after the prompts, and after every step.

        tokens int64 (B, n), features (B, n, F): features[:, j] are the target's where tokens[:, j] is the next token; -1 where a
        row has fewer (a prompt's padding in front, a shorter path behind). After a prompt p_0 .. p_{T-1} and the first new
        token t: p_1 .. p_{T-1}, t. After a step: the accepted tokens and the one more, with the features of the root and of
        the accepted nodes. Rows and order are those of the proposal; `select` comes later. features are in the target's dtype,
        None where the drafter wants none.
        """

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (int64 indices): the others are finished."""
