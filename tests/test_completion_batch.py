"""Completions in packed rows, and the log-probabilities of their tokens: those of each sequence on its own."""

from __future__ import annotations

import pytest
import torch
from model_cases import random_model
from preference_run import sequences
from tolerance import assert_as_accurate

from posttrain.adapters import PrefixTuningConfig, attach
from posttrain.completion_batch import collate_completions, collate_shared
from posttrain.token_logprobs import collision_logprobs, completion_logprobs, labelled_hidden


def alone(model, prompt, completion):
    """(log-probabilities, entropies, log sum p^2) of one completion's tokens, through whole logits."""
    logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].double()
    whole = logits.log_softmax(-1)
    picked = whole.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return picked, -(whole.exp() * whole).sum(1), (2 * whole).logsumexp(1)


def test_no_padding_between():
    some = sequences(9)
    batch = collate_completions(some)
    assert batch.input_ids.shape == (1, batch.num_tokens) and batch.normalizer == len(some)
    assert batch.num_tokens == sum(len(p) + len(c) for p, c in some)
    assert batch.lengths.tolist() == [len(c) for _, c in some]
    labels = batch.labels[:, 1:]
    ids = batch.padded(labels[labels != -100].double())
    for row, (_, completion) in zip(ids, some, strict=True):
        assert row[: len(completion)].tolist() == completion and not row[len(completion) :].any()


def groups(count=5, seed=3):
    """Prompts with two completions each, and one completion of a single token."""
    both = sequences(2 * count, seed)
    return [(both[2 * i][0], (both[2 * i][1], both[2 * i + 1][1][: 1 if i == 1 else None])) for i in range(count)]


def test_prompts_once_and_nothing_that_is_not_read():
    some = groups()
    batch = collate_shared(some)
    computed = sum(len(prompt) + sum(len(c) - 1 for c in completions) for prompt, completions in some)
    assert batch.input_ids.shape == (1, computed) and batch.num_tokens == computed
    assert batch.lengths.tolist() == [len(c[j]) for j in range(2) for _, c in some]
    first, second = batch.padded(batch.targets.double()).chunk(2)
    for rows, j in ((first, 0), (second, 1)):
        for row, (_, completions) in zip(rows, some, strict=True):
            assert row[: len(completions[j])].tolist() == completions[j]


@pytest.mark.parametrize("adapter", [None, PrefixTuningConfig(num_virtual_tokens=3)], ids=["plain", "prefix"])
@pytest.mark.parametrize("name", ["smollm2", "mistral_sliding"])
def test_shared_prompts_change_nothing(name, adapter):
    """Sums and their gradient by the embeddings (or the prefix): as with every prompt before each of its completions."""
    some = groups()
    apart = [(prompt, completions[j]) for j in range(2) for prompt, completions in some]
    weight, found = torch.randn(len(apart), dtype=torch.float64), {}
    for dtype in (torch.float64, torch.float32):
        for shared in (True, False):
            torch.manual_seed(0)
            model = random_model(name, dtype)
            if adapter is not None:
                attach(model, adapter, dtype=dtype)
            batch = collate_shared(some) if shared else collate_completions(apart)
            sums = batch.sums(completion_logprobs(model, batch))
            (sums * weight.to(sums.dtype)).sum().backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found[dtype, shared] = sums.detach(), torch.cat(gradients)
    for ours, plain, exact in zip(
        found[torch.float32, True], found[torch.float32, False], found[torch.float64, False], strict=True
    ):
        assert_as_accurate(ours, plain, exact)
    for ours, exact in zip(found[torch.float64, True], found[torch.float64, False], strict=True):
        # In float64 as far apart as sums of about a thousand terms in another order.
        assert (ours - exact).norm() < 1000 * torch.finfo(torch.float64).eps * exact.norm()


@pytest.mark.parametrize("name", ["smollm2", "llama2", "mistral_sliding"])
def test_sums_are_those_of_each_sequence_on_its_own(name):
    some, results = sequences(), {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = random_model(name, dtype)
        batch = collate_completions(some)
        with torch.no_grad():
            logps, entropy = completion_logprobs(model, batch, return_entropy=True)
            collisions = collision_logprobs(model, labelled_hidden(model, batch)[0])
            ours = torch.stack([batch.sums(t) for t in (logps, entropy, collisions)])
            plain = torch.stack([torch.stack([t.sum() for t in alone(model, *one)]) for one in some], 1)
        results[dtype] = ours, plain
    assert_as_accurate(results[torch.float32][0], results[torch.float32][1].float(), results[torch.float64][1])


def test_a_batch_of_equal_lengths_needs_no_segments():
    batch = collate_completions([([5, 6], [7, 8, 9])] * 4)
    assert batch.segment_ids is None and batch.input_ids.shape == (4, 5)


def test_empty_sequences_are_refused():
    for one in (([], [3]), ([3], [])):
        with pytest.raises(ValueError, match="expected at least one in each"):
            collate_completions([([3], [4]), one])
        with pytest.raises(ValueError, match="expected at least one in each"):
            collate_shared([([3], ([4], [5])), (one[0], (one[1], [4]))])
