"""Typical acceptance by hand: the threshold falls with the entropy, the deepest path wins, padding is never accepted."""

from __future__ import annotations

import pytest
import torch

from posttrain.speculative.typical import accept_typical

SURE = [0.97, 0.01, 0.01, 0.01]  # min(0.3, 0.09 exp(-H)) = 0.076: token 0 alone is typical
EVEN = [0.25, 0.25, 0.25, 0.25]  # 0.09 exp(-log 4) = 0.0225: every token is
LAST = [0.0, 0.0, 0.0, 1.0]


def accept(tokens, parents, rows, num=None, **arguments):
    logits = torch.tensor([rows]).log()
    num = torch.tensor([len(tokens) if num is None else num])
    said, count, path = accept_typical(torch.tensor([tokens]), torch.tensor(parents), logits, num, **arguments)
    return said[0].tolist(), int(count), path[0].tolist()


def test_the_threshold_follows_the_entropy():
    assert accept([1], [-1], [SURE, LAST])[1] == 0  # p = 0.01
    assert accept([0], [-1], [SURE, LAST]) == ([0, 3], 1, [0])
    assert accept([2], [-1], [EVEN, LAST]) == ([2, 3], 1, [0])  # 0.25 < 0.3, and above what so even a choice asks for
    assert accept([2], [-1], [EVEN, LAST], alpha=1.0, epsilon=0.26)[1] == 0  # exp(-H) = 0.25 is not below the token's own p
    # what sampling leaves out is not typical, however likely
    assert accept([1], [-1], [[0.4, 0.35, 0.2, 0.05], LAST])[1] == 1
    assert accept([1], [-1], [[0.4, 0.35, 0.2, 0.05], LAST], top_k=1)[1] == 0


def test_the_deepest_path_and_then_the_likelier_one():
    # two children of the root; the second one's child is accepted too
    rows = [EVEN, SURE, SURE, LAST]
    assert accept([1, 2, 0], [-1, -1, 1], rows) == ([2, 0, 3], 2, [1, 2])
    # equally deep: the larger sum of log p
    uneven = [0.2, 0.3, 0.4, 0.1]
    said, count, path = accept([1, 2], [-1, -1], [uneven, LAST, LAST])
    assert (said, count, path) == ([2, 3], 1, [1])
    # behind a refused node nothing is
    assert accept([1, 0], [-1, 0], [SURE, LAST, LAST])[1] == 0


def test_rows_end_at_their_own_number_of_nodes():
    logits = torch.tensor([[EVEN, LAST, LAST], [EVEN, LAST, LAST]]).log()
    tokens, parents = torch.tensor([[0, 3], [0, -1]]), torch.tensor([-1, 0])
    said, count, path = accept_typical(tokens, parents, logits, torch.tensor([2, 1]))
    assert said.tolist() == [[0, 3, 3], [0, 3, -1]] and count.tolist() == [2, 1] and path.tolist() == [[0, 1], [0, -1]]


def test_it_is_lossy():
    """A draft that always says token 2 makes token 2 the text: the exact verification would keep it a quarter of the time."""
    logits, count = torch.tensor([[EVEN, EVEN]]).log().repeat(50, 1, 1), torch.ones(50, dtype=torch.int64)
    said, accepted, _ = accept_typical(torch.full((50, 1), 2), torch.tensor([-1]), logits, count)
    assert (said[:, 0] == 2).all() and (accepted == 1).all()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="above 0, given 0"):
        accept([0], [-1], [SURE, LAST], temperature=0.0)
    with pytest.raises(ValueError, match="epsilon is 0"):
        accept([0], [-1], [SURE, LAST], epsilon=0)
