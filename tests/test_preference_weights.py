"""LD-DPO's sums and WPO's weights are the oracle's, token by token."""

from __future__ import annotations

import pytest
import torch

from posttrain.completion_batch import collate_shared
from posttrain.preference.weights import completion_logps, wpo_weights
from posttrain.reference import preference_loss as oracle

LENGTHS = [(4, 7), (5, 5), (6, 1)]  # chosen, rejected


def batch_and_probs():
    """A batch of three pairs and a distribution over 11 tokens for each of their labelled tokens, in the batch's order."""
    groups = [([1, 2], ([3] * chosen, [4] * rejected)) for chosen, rejected in LENGTHS]
    batch = collate_shared(groups)
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(len(batch.owner), 11, generator=generator, dtype=torch.float64).softmax(1)
    return batch, probs, probs[:, 5].log()


def of(batch, values, s):
    """The values of completion s in order."""
    return values[batch.owner == s].tolist()


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3, 1.0])
def test_sums(ld_alpha):
    batch, _, logprobs = batch_and_probs()
    ours = completion_logps(batch, logprobs, ld_alpha)
    for s in range(6):
        other = LENGTHS[s % 3][s < 3]
        exact = oracle.length_desensitized(of(batch, logprobs, s), other, 1.0 if ld_alpha is None else ld_alpha)
        assert ours[s].item() == pytest.approx(exact, rel=64 * torch.finfo(torch.float64).eps)


def test_weights():
    batch, probs, logprobs = batch_and_probs()
    logprobs.requires_grad_()
    ours = wpo_weights(batch, logprobs, probs.square().sum(1).log())
    assert not ours.requires_grad
    for pair in range(3):
        exact = 1.0
        for s in (pair, pair + 3):
            exact *= oracle.policy_weight(of(batch, logprobs.detach(), s), probs[batch.owner == s].tolist())
        assert ours[pair].item() == pytest.approx(exact, rel=64 * torch.finfo(torch.float64).eps)
