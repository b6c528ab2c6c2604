"""Trees by hand: nodes and parents from index paths, the greedy search against every tree there is, EAGLE-2's growth."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.kernels import tree_attention
from posttrain.speculative.tree import FixedTree, GrowingTree, chain, search_tree


def test_nodes_of_index_paths():
    # the root's children 0 and 1; of the first the children 0 and 2; of (0, 2) the child 0
    tree = FixedTree.of([(0, 2), (1,), (0,), (0, 2, 0), (0, 0)])
    assert tree.paths == ((0,), (1,), (0, 0), (0, 2), (0, 2, 0))
    assert tree.parents == [-1, -1, 0, 0, 3]
    assert tree.depths == [1, 1, 2, 2, 3] and tree.ranks == [0, 1, 0, 2, 0]
    assert tree.levels() == [range(0, 2), range(2, 4), range(4, 5)] and tree.depth == 3 and len(tree) == 5


def test_attention_of_a_tree_by_hand():
    tree = FixedTree.of([(0,), (1,), (0, 0), (0, 2), (0, 2, 0)])
    mask, depth = tree_attention(torch.tensor(tree.parents))
    rows = ["100000", "110000", "101000", "110100", "110010", "110011"]  # root, (0), (1), (0,0), (0,2), (0,2,0)
    assert torch.equal(mask.reshape(6, 6).long(), torch.tensor([[int(c) for c in row] for row in rows]))
    assert depth.flatten().tolist() == [0, *tree.depths]


def test_a_chain_and_the_empty_tree():
    assert chain(3).paths == ((0,), (0, 0), (0, 0, 0)) and chain(3).parents == [-1, 0, 1]
    assert len(chain(0)) == 0 and chain(0).parents == [] and chain(0).levels() == [] and chain(0).depth == 0


@pytest.mark.parametrize(
    ("paths", "said"),
    [([(0,), (1, 0)], "parent"), ([()], "at least one"), ([(0,), (0,)], "twice"), ([(-1,)], "ranks from 0")],
)
def test_paths_that_are_no_tree(paths, said):
    with pytest.raises(ValueError, match=said):
        FixedTree.of(paths)


def test_the_search_by_hand():
    # 0.5, then 0.5 * 0.6 = 0.3, then 0.2, then 0.5 * 0.6 * 0 ... and 0.5 * 0.1 = 0.05, 0.2 * 0.6 = 0.12
    tree, values = search_tree([[0.5, 0.2], [0.6, 0.1]], 5)
    assert values == [0.5, 0.5 * 0.6, 0.2, 0.2 * 0.6, 0.5 * 0.1]
    assert tree.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0))
    assert search_tree([[0.5, 0.2], [0.6, 0.1]], 99, max_children=1)[0].paths == ((0,), (0, 0))
    assert len(search_tree([], 3)[0]) == 0 and len(search_tree([[0.5]], 0)[0]) == 0


falling = st.lists(st.integers(1, 30), min_size=3, max_size=3).map(lambda steps: sorted((s / 100 for s in steps), reverse=True))


@given(st.lists(falling, min_size=2, max_size=2), st.integers(1, 6))
def test_no_other_tree_of_as_many_nodes_is_expected_to_accept_more(accuracy, count):
    _, values = search_tree(accuracy, count)
    every = [(i,) for i in range(3)] + [(i, j) for i in range(3) for j in range(3)]

    def value(path):
        return math.prod(accuracy[d][rank] for d, rank in enumerate(path))

    trees = (some for some in itertools.combinations(every, count) if all(p[:-1] in ((), *some) for p in some))
    assert math.isclose(sum(values), max(sum(map(value, some)) for some in trees))


def test_a_tree_has_at_least_no_node():
    with pytest.raises(ValueError, match="num_nodes"):
        search_tree([[0.5]], -1)


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_a_tree_grows_by_hand():
    # Root: 0.6, 0.3 (tokens 2, 0). After 2: 0.5 (token 1), 0.4 (3): 0.30, 0.24. After 0: 0.9 (3), 0.05 (2): 0.27, 0.015
    tree = GrowingTree(logs([0.3, 0.06, 0.6, 0.04]), top_k=2)
    assert tree.tokens.tolist() == [[2, 0]] and tree.parent_in_beam.tolist() == [[-1, -1]]
    tree.grow(logs([[0.06, 0.5, 0.04, 0.4], [0.03, 0.02, 0.05, 0.9]]))
    assert tree.tokens.tolist() == [[1, 3]] and tree.parent_in_beam.tolist() == [[0, 1]]  # 0.30 after 2, and 0.27 after 0
    tree.grow(logs([[0.7, 0.1, 0.1, 0.1], [0.2, 0.4, 0.3, 0.1]]))  # 0.21, 0.03; 0.108, 0.081
    # of all: 2 (.6), 0 (.3), 2-1 (.3), 0-3 (.27), 2-3 (.24), 2-1-0 (.21), 0-3-1 (.108), ...
    tokens, parents = tree.select(6)
    assert tokens.tolist() == [[2, 0, 1, 3, 3, 0]]
    assert parents.tolist() == [[-1, -1, 0, 0, 1, 2]]
    # without 2-3 places move, and parents with them
    tokens, parents = tree.select(4)
    assert tokens.tolist() == [[2, 0, 1, 3]] and parents.tolist() == [[-1, -1, 0, 1]]


def test_a_sure_child_does_not_go_before_its_parent():
    """Log-probability 0: child and parent have one score, and the parent must be kept first."""
    sure = torch.tensor([[-math.inf, 0.0, -math.inf]])
    tree = GrowingTree(sure, top_k=3)
    for _ in range(3):
        tree.grow(sure.expand(1, 3, 3))
    tokens, parents = tree.select(4)
    assert tokens.tolist() == [[1] * 4] and parents.tolist() == [[-1, 0, 1, 2]]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_what_grows_is_a_tree_of_the_best_candidates(seed, top_k, depth, total):
    generator = torch.Generator().manual_seed(seed)

    def logprobs(*shape):
        return torch.randn(*shape, 5, generator=generator, dtype=torch.float64).log_softmax(-1)

    tree = GrowingTree(logprobs(2), top_k)
    for _ in range(depth - 1):
        tree.grow(logprobs(2, tree.beam.shape[1]))
    tokens, parents = tree.select(total)
    scores = torch.cat(tree._scores, 1)
    assert tokens.shape == parents.shape == (2, min(total, scores.shape[1]))
    assert (parents < torch.arange(parents.shape[1])).all() and (parents >= -1).all()
    for row in range(2):  # siblings differ, and lie by falling probability
        assert len(set(zip(parents[row].tolist(), tokens[row].tolist(), strict=True))) == tokens.shape[1]
