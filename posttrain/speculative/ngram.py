"""Drafts by looking up what followed the last tokens when they stood in the text before (prompt lookup; no training).

The longest suffix of `longest` .. `shortest` tokens that occurred earlier is continued as it was then, at its most recent place
(Saxena's prompt lookup decoding, 2023, takes the leftmost); the more tokens agreed, the further: n tokens for 2^n. The draft is
deterministic: a token of it is accepted with the target's probability of it.
An index from n-grams to where they ended grows with the text, so a look-up does not read the text again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import Proposal, Requests


class NgramDrafter:
    """longest, shortest: n-grams that are looked up, the longest first."""

    features: tuple[int, ...] = ()
    prompt_cost = 0.0

    def __init__(self, longest: int = 4, shortest: int = 1):
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens; expected 1 <= shortest <= longest")
        self.sizes = range(longest, shortest - 1, -1)
        self.begin(0)

    def begin(self, count: int) -> None:
        # Per row: where each n-gram ended last, and how many of the text's tokens have been read.
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(count)]
        self._read = [0] * count

    def propose(self, requests: Requests, limit: int) -> Proposal:
        """What followed the suffix, 2^n of it at most; past the text's end it goes on repeating itself."""
        drafts = []
        for row, text in enumerate(requests.tokens):
            start, n = self._look_up(row, text)
            draft: list[int] = []
            for at in range(start, start + min(limit, requests.cap[row], 1 << n if n > 0 else 0)):
                draft.append(text[at] if at < len(text) else draft[at - len(text)])
            drafts.append(draft)
        num = torch.tensor([len(draft) for draft in drafts])
        longest = max(map(len, drafts), default=0)
        tokens = torch.tensor([draft + [-1] * (longest - len(draft)) for draft in drafts], dtype=torch.int64)
        return Proposal(tokens.view(len(drafts), longest).to(requests.device), num.to(requests.device))

    def _look_up(self, row: int, text: list[int]) -> tuple[int, int]:
        """The place after the last occurrence of a suffix before the end, and the suffix's length (none: the end and nothing). The
        index takes in the text up to its last token."""
        ends = self._ends[row]
        for end in range(self._read[row], len(text)):  # n-grams that have a token after them: they end before the last
            for n in self.sizes:
                if n <= end:
                    ends[tuple(text[end - n : end])] = end
        self._read[row] = len(text)
        for n in self.sizes:
            if n < len(text) and (found := ends.get(tuple(text[-n:]))) is not None:
                return found, n
        return len(text), 0

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        kept = rows.tolist()
        self._ends, self._read = [self._ends[i] for i in kept], [self._read[i] for i in kept]
