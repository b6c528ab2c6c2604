"""How often a model is on the side of the chosen completion, before and after preference training, on pairs it has not seen.

by likelihood     log pi(chosen) > log pi(rejected), of the reference and of the policy: the same question to two models,
                  compared by McNemar's test
by reward         log pi / pi_ref of the chosen exceeds that of the rejected (TRL's rewards/accuracies): what training moves;
                  the reference itself has no reward, and chance is one half
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from posttrain.model.decoder import CausalLM
from posttrain.statistics import Comparison, compare, format_p, mcnemar, wilson_interval

from .data import Pair
from .paired import pair_logps
from .reference_logps import Progress, reference_of


@dataclass(frozen=True)
class PairAccuracy:
    """policy, reference: log-probabilities float32 (pairs, 2), chosen first."""

    policy: Tensor
    reference: Tensor

    @property
    def by_reward(self) -> list[bool]:
        """Pair by pair, whether the chosen completion has the larger implicit reward."""
        rewards = self.policy - self.reference
        return (rewards[:, 0] > rewards[:, 1]).tolist()

    @property
    def by_likelihood(self) -> Comparison:
        """The reference's and the policy's choices by likelihood, compared."""
        reference, policy = ((logps[:, 0] > logps[:, 1]).tolist() for logps in (self.reference, self.policy))
        return compare(reference, policy, "reference", "policy")

    @property
    def reward_p_value(self) -> float:
        """Two-sided exact p of as many right by chance alone, each pair with one half."""
        right = sum(self.by_reward)
        return mcnemar(right, len(self.policy) - right)[0]

    def __str__(self) -> str:
        right, n = sum(self.by_reward), len(self.policy)
        low, high = wilson_interval(right, n)
        share = f"{right / n:.3f} [{low:.3f}, {high:.3f}] of {n} held-out pairs"
        return f"by reward: {share} (chance 0.5, p {format_p(self.reward_p_value)})\nby likelihood: {self.by_likelihood}"


def pair_accuracy(
    model: CausalLM, pairs: Sequence[Pair], reference: Tensor | None = None, *, progress: Progress | None = None
) -> PairAccuracy:
    """Of the model as it is against `reference` (pairs, 2), by default its base: the model with its adapter off."""
    if not pairs:
        raise ValueError("no pairs to measure on")
    if reference is None:
        with reference_of(model, None) as base:
            reference = pair_logps(base, pairs)
    with reference_of(model, model):
        return PairAccuracy(pair_logps(model, pairs, progress=progress), reference)
