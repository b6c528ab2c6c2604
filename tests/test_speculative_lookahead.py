"""Lookahead decoding: the window by hand, its tree against the paper's mask, the pool, and that the text is plain decoding's."""

from __future__ import annotations

import pytest
import torch
from draft_cases import PROMPTS, assert_distributed_as_the_target, small_target

from posttrain.kernels import tree_attention
from posttrain.model import generate
from posttrain.speculative import engine
from posttrain.speculative.lookahead import Lookahead, Pool, Window, trie


def test_a_window_warms_up_and_moves_on():
    """N = 4 (3 levels), W = 3 columns. Level 0 loses a token for each level that is added; then the oldest level goes."""
    window, pool = Window([7], columns=3, levels=3, seed=0), Pool(5)
    window.past = [[1, 2, 3, 4]]  # W - 1 + 2 tokens
    tokens, parents, ends = window.nodes(0)
    assert (tokens, parents, ends) == ([1, 2, 3, 4], [-1, 0, 1, 2], [-1, 0, 1, 2, 3])
    window.grow(9, [10, 11, 12, 13, 14], pool)  # what the target says after the root, 1, 2, 3, 4
    assert window.past == [[2, 3, 4], [11, 12, 13, 14]]
    window.grow(9, [20, 21, 22, 23], pool)
    assert window.past == [[3, 4], [12, 13, 14], [21, 22, 23]] and not pool.after(9)
    # steady: the root 8 and columns 1, 2 of level 0 (3, 4); each column's n-gram goes to the pool
    window.grow(8, [31, 32, 33], pool)
    assert window.past == [[13, 14], [21, 22, 23], [31, 32, 33]]
    assert pool.after(8) == [(12, 21, 31)] and pool.after(3) == [(13, 22, 32)] and pool.after(4) == [(14, 23, 33)]


def test_a_window_s_tree_is_the_paper_s_mask_and_positions():
    """Row (l, i) sees the root, level 0 up to column i and (1, i) .. (l, i); its position is the root's + l + i."""
    W, levels = 4, 3
    window = Window(range(50), W, levels, seed=1)
    for step in range(levels - 1):
        window.grow(0, list(range(100 + 10 * step, 100 + 10 * step + len(window.past[0]) + 1)), Pool(3))
    assert [len(level) for level in window.past] == [W - 1, W, W]
    tokens, parents, ends = window.nodes(0)
    mask, depth = tree_attention(torch.tensor(parents))
    mask, depth = mask.reshape(len(tokens) + 1, -1), depth.flatten().tolist()
    place = {(0, 0): 0} | {(0, j): j for j in range(1, W)} | {(lv, i): W + (lv - 1) * W + i for lv in (1, 2) for i in range(W)}
    for (level, column), row in place.items():
        seen = {place[0, j] for j in range(column + 1)} | {place[above, column] for above in range(1, level + 1)}
        assert set(mask[row].nonzero().flatten().tolist()) == seen
        assert depth[row] == level + column
    assert [end + 1 for end in ends] == [place[2, i] for i in range(W)]


def test_the_pool_forgets_the_least_recent():
    pool = Pool(2)
    for rest in ((1, 1), (2, 2), (1, 1), (3, 3)):
        pool.add(5, rest)
    assert pool.after(5) == [(3, 3), (1, 1)] and pool.after(6) == []


def test_guesses_share_their_beginnings():
    assert trie([(1, 2, 3), (1, 2, 4), (5,), (1, 2, 3)]) == ([1, 2, 3, 4, 5], [-1, 0, 1, 1, -1])
    assert trie([]) == ([], [])


def test_what_the_pool_reads_are_the_text_s_own_n_grams():
    """Feeding it what was verified, instead of what was accepted, fills it with n-grams that no text has."""
    model = small_target()
    drafter = Lookahead(3, 2, 2)
    read = []

    class Recording(Pool):
        def read(self, tokens, n, start=0):
            read.append((tuple(tokens), n, start))
            before = {first: set(grams) for first, grams in self._grams.items()}
            super().read(tokens, n, start)
            for first, grams in self._grams.items():
                for gram in set(grams) - before.get(first, set()):
                    assert (first, *gram) in {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}

    begin = drafter.begin

    def with_recording(count):
        begin(count)
        drafter._pools = [Recording(4) for _ in range(count)]

    drafter.begin = with_recording
    outputs, _ = engine.generate(model, PROMPTS[:1], 16, drafter, adaptive=False)
    # every n-gram once: each reading starts where the one before could not go on
    assert read[0] == (tuple(PROMPTS[0] + outputs[0][:1]), 3, 0)
    assert all(later[2] == max(0, len(earlier[0]) - 2) for earlier, later in zip(read, read[1:], strict=False))


@pytest.mark.parametrize("from_text", [True, False])
def test_greedy_tokens_are_plain_decoding_s(from_text):
    model = small_target()
    expected = generate(model, PROMPTS, 20, stop_ids={2})
    drafter = Lookahead(4, 3, 3, pool_from_text=from_text)
    for adaptive in (False, True):
        outputs, report = engine.generate(model, PROMPTS, 20, drafter, stop_ids={2}, adaptive=adaptive)
        assert outputs == expected
        assert adaptive or report.accepted > 5


def test_sampled_sequences_are_distributed_as_the_target_s():
    model = small_target(vocab_size=3, initializer_range=0.2)
    prompt = [1, 2] * 4  # something in the pool from the start
    assert_distributed_as_the_target(model, Lookahead(3, 2, 3), count=200, length=3, prompt=prompt, beyond=4)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="ngram is 2"):
        Lookahead(2)
