"""What is done to log-probabilities of tokens before a preference loss sees a completion's: sums, LD-DPO, WPO.

values: one a labelled token (N,), of a batch whose first half of completions is chosen and whose second half rejected, pair by
pair. Oracles: reference/preference_loss.py, length_desensitized and policy_weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.completion_batch import CompletionBatch


def completion_logps(batch: CompletionBatch, logprobs: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Sums over each completion (S,). With ld_alpha, tokens beyond the length of the shorter of the pair count ld_alpha times
    (LD-DPO, Liu et al., arXiv:2409.06411): a longer text is not more or less likely for its length."""
    if ld_alpha is None:
        return batch.sums(logprobs)
    shared = torch.minimum(*batch.lengths.chunk(2)).repeat(2)
    return batch.sums(torch.where(batch.place < shared[batch.owner], logprobs, ld_alpha * logprobs))


@torch.no_grad()
def wpo_weights(batch: CompletionBatch, logprobs: Tensor, collisions: Tensor) -> Tensor:
    """(pairs,): exp of the mean over a completion's tokens of log p[y_t] - log sum_v p_t[v]^2, times the same of the other
    completion (WPO, Zhou et al., arXiv:2406.11827, eq. 2): pairs that the policy would itself write weigh most.

    collisions: log sum_v p_t[v]^2 (N,), float32.
    """
    mean = batch.sums(logprobs - collisions) / batch.lengths
    chosen, rejected = mean.chunk(2)
    return (chosen + rejected).exp()
