"""Rows where completions share their prompt: what each sees and is, the number of tokens, and hidden states as on their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_model

from posttrain.rl import shared_prompts
from posttrain.rl.shared_prompts import collate


def test_a_block_by_hand():
    """Prompt (5, 6), completions (7, 8) and (9): 8 and 9 are predicted and not read."""
    batch = collate([([5, 6], [7, 8]), ([5, 6], [9])])
    assert batch.input_ids.tolist() == [[5, 6, 7]] and batch.position_ids.tolist() == [[0, 1, 2]]
    assert batch.labels.tolist() == [7, 8, 9] and batch.before.tolist() == [1, 2, 1]
    assert batch.tree_mask.int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    assert batch.num_tokens == 3 and batch.lengths.tolist() == [2, 1]


def test_completions_do_not_see_each_other():
    batch = collate([([5], [7, 8]), ([5], [9, 10, 11])])
    assert batch.input_ids.tolist() == [[5, 7, 9, 10]] and batch.position_ids.tolist() == [[0, 1, 1, 2]]
    assert batch.tree_mask[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


ids = st.lists(st.integers(3, 96), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(st.sampled_from([[5], [6, 7, 8], [9, 10, 11, 12]]), ids), min_size=1, max_size=8),
    st.sampled_from([4, 9, 512]),
)
def test_every_token_s_path_is_its_completion(sequences, row):
    """Following the mask from the token that predicts a label one finds prompt and completion up to it, at positions 0, 1, ..."""
    original, shared_prompts.ROW = shared_prompts.ROW, row
    try:
        batch = collate(sequences)
    finally:
        shared_prompts.ROW = original
    T, at = batch.input_ids.shape[1], 0
    for prompt, completion in sequences:
        for t, label in enumerate(completion):
            b, column = divmod(batch.before[at].item(), T)
            seen = batch.tree_mask[b, column]
            order = batch.position_ids[b][seen].argsort()
            assert batch.input_ids[b][seen][order].tolist() == prompt + completion[:t]
            assert batch.position_ids[b][seen].sort().values.tolist() == list(range(len(prompt) + t))
            assert batch.labels[at] == label
            at += 1
    assert batch.num_tokens <= sum(len(prompt) + len(completion) - 1 for prompt, completion in sequences)


@pytest.mark.parametrize("name", ("smollm2", "mistral_sliding", "qwen3"))
def test_hidden_states_are_those_of_each_alone(name):
    model = random_model(name, dtype=torch.float64)
    sequences = [([5, 6, 7], [8, 9, 10, 11]), ([12], [13]), ([5, 6, 7], [14, 15]), ([12], [16, 17, 18, 19, 20, 21, 22, 23, 24])]
    batch = collate(sequences)
    with torch.no_grad():
        ours = model.hidden(batch.input_ids, batch.position_ids, tree_mask=batch.tree_mask).flatten(0, 1)[batch.before]
        alone = [model.hidden(torch.tensor([p + c[:-1]]))[0, len(p) - 1 :] for p, c in sequences]
    exact = torch.cat(alone)
    assert ((ours - exact).abs() <= 1024 * torch.finfo(torch.float64).eps * exact.abs().max()).all()


def test_refusals():
    for sequences in ([], [([5], [])], [([], [5])]):
        with pytest.raises(ValueError, match="expected at least one in each"):
            collate(sequences)
