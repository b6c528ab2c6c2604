"""Prompt lookup: against searching the text again, limits, and what the index costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.speculative.interface import Requests
from posttrain.speculative.ngram import NgramDrafter


def requests(*texts: list[int], cap: int = 100) -> Requests:
    return Requests([list(text) for text in texts], [cap] * len(texts), torch.zeros(len(texts)), torch.zeros(len(texts)))


def searched(text: list[int], limit: int, longest: int = 4, shortest: int = 1) -> list[int]:
    """The obvious search, from the end."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                repeated = list(text)
                while len(repeated) < end + limit:
                    repeated.append(repeated[len(repeated) - (len(text) - end)])
                return repeated[end : end + min(limit, 2**n)]
    return []


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 5))
def test_growing_texts_against_the_search(pieces, limit):
    drafter = NgramDrafter()
    drafter.begin(1)
    text: list[int] = []
    for piece in pieces:
        text += piece
        proposal = drafter.propose(requests(text), limit)
        expected = searched(text, limit)
        assert proposal.tokens[0, : proposal.num[0]].tolist() == expected and proposal.parents is None is proposal.logits


def test_known_case_and_limits():
    drafter = NgramDrafter(longest=3, shortest=2)
    drafter.begin(3)
    proposal = drafter.propose(requests([1, 2, 3, 4, 2, 3], [1, 2, 3], [5, 6, 5, 6]), 3)
    assert proposal.tokens.tolist() == [[4, 2, 3], [-1, -1, -1], [5, 6, 5]] and proposal.num.tolist() == [3, 0, 3]
    drafter.select(torch.tensor([2, 0]))
    proposal = drafter.propose(requests([5, 6, 5, 6, 5], [1, 2, 3, 4, 2, 3], cap=1), 3)
    assert proposal.tokens.tolist() == [[6], [4]]
    drafter.begin(1)  # nothing is left of the texts before
    assert drafter.propose(requests([2, 3]), 3).tokens.shape == (1, 0)
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        NgramDrafter(2, 3)
