"""Preference optimization: DPO and its family on pairs of completions (losses: kernels/preference_losses.py).

One forward pass over a batch's pairs in one row, each prompt once and no padding, the head on the completions alone; the reference
is the same model with its adapter off, so that one copy of the base serves both, in 4 bits too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.completion_batch import CompletionBatch, collate_shared
from posttrain.errors import PosttrainError
from posttrain.kernels import preference_loss
from posttrain.kernels.preference_loss import check_options
from posttrain.kernels.preference_losses import LOSSES
from posttrain.model.decoder import CausalLM
from posttrain.model.generate import check_ids
from posttrain.token_logprobs import collision_logprobs, completion_logprobs, head_logprobs, labelled_hidden
from posttrain.trainer import TrainConfig, TrainResult

from .data import Pair, digest
from .reference_logps import Progress, measure, reference_logprobs
from .training import train_against_reference
from .weights import completion_logps, wpo_weights

# Methods whose papers add the chosen completion's likelihood to a loss, and have no reference.
PAPERS = {"cpo": ("sigmoid", "sft"), "orpo": ("orpo", "sft")}


@dataclass(frozen=True)
class PreferenceConfig:
    """What is learned from a pair; names as in TRL's DPOConfig.

    loss_type: a name of kernels/preference_losses.py, several with loss_weights (MPO, arXiv:2411.10442; 1 each by default), or
    "cpo" (arXiv:2401.08417) or "orpo" (arXiv:2403.07691), whole as their papers have them. label_smoothing goes to those that
    have one. ld_alpha: weight of tokens beyond the shorter completion's length (LD-DPO); None sums all alike. use_weighting:
    WPO's weights. AlphaPO (arXiv:2501.03884) is "simpo" with f_divergence_type "alpha_divergence" and the coefficient 1 - alpha.
    reference_free: log-ratios to nothing. ValueError where these do not go together.
    """

    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    use_weighting: bool = False
    reference_free: bool = False

    def __post_init__(self):
        terms = self.terms
        weights = [1.0] * len(terms) if self.loss_weights is None else self.loss_weights
        if len(weights) != len(terms) or not terms:
            raise ValueError(f"loss_weights are {len(weights)} and the losses {', '.join(terms) or 'none'}; expected one a loss")
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise ValueError(f"loss_weights are {', '.join(map(str, weights))}; expected finite numbers, one at least other than 0")
        for name in terms:
            check_options(
                name, self._divergence(name), self.beta, self._smoothing(name), self.f_alpha_divergence_coef,
                self.simpo_gamma, self.discopop_tau,
            )  # fmt: skip
        if self.label_smoothing and not any(map(self._smoothing, terms)):
            raise ValueError(f"label_smoothing is {self.label_smoothing}, and {', '.join(terms)} has none; expected 0")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha is {self.ld_alpha}; expected 0 (shared length alone) to 1 (every token), or None")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(terms):
            raise ValueError("use_weighting is of pairs, and aot compares sorted margins of the batch; use another loss")

    @property
    def terms(self) -> tuple[str, ...]:
        """The losses that are summed."""
        if isinstance(self.loss_type, str):
            return PAPERS.get(self.loss_type, (self.loss_type,))
        return tuple(self.loss_type)

    @property
    def needs_reference(self) -> bool:
        """Whether any loss compares with a reference model."""
        of_a_paper = isinstance(self.loss_type, str) and self.loss_type in PAPERS
        return not self.reference_free and not of_a_paper and any(LOSSES[name].reference for name in self.terms)

    def _smoothing(self, name: str) -> float:
        return self.label_smoothing if name not in LOSSES or LOSSES[name].smoothing[1] else 0.0

    def _divergence(self, name: str) -> str:
        """Likelihood has no divergence to choose."""
        return "reverse_kl" if name == "sft" else self.f_divergence_type

    def losses(self, policy: Tensor, ref: Tensor | None, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
        """The weighted sum of the losses (pairs,); policy, ref, lengths (2 pairs,): chosen first."""
        total = policy.new_zeros(len(policy) // 2)
        chosen, rejected = policy.chunk(2)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        for name, weight in zip(self.terms, self.loss_weights or [1.0] * len(self.terms), strict=True):
            ref_chosen, ref_rejected = ref.chunk(2) if ref is not None and LOSSES[name].reference else (None, None)
            losses, _, _ = preference_loss(
                chosen, rejected, ref_chosen, ref_rejected, self.beta, name, self._smoothing(name),
                f_divergence=self._divergence(name), alpha=self.f_alpha_divergence_coef, simpo_gamma=self.simpo_gamma,
                discopop_tau=self.discopop_tau, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, weights=weights,
            )  # fmt: skip
            total = total + weight * losses
        return total


def pair_sequences(pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every chosen one, then of every rejected one."""
    return [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]


def collate_pairs(items: Sequence[tuple[Pair, Tensor | None]]) -> CompletionBatch:
    """A batch of pairs, each with the reference's log-probabilities (2,) of its completions or None."""
    batch = collate_shared([(pair.prompt, (pair.chosen, pair.rejected)) for pair, _ in items], len(items))
    refs = [ref for _, ref in items if ref is not None]
    return replace(batch, ref_logps=torch.stack(refs, 1).flatten()) if refs else batch


Told = dict[str, tuple[Tensor, float]]


def pair_loss(
    model: CausalLM, batch: CompletionBatch, preference: PreferenceConfig, ref_model: CausalLM | None = None
) -> tuple[Tensor, Told]:
    """(the losses of the batch's pairs summed (), what TRL shows as sums and counts)."""
    ref = batch.ref_logps
    if ref is None and preference.needs_reference:
        ref = completion_logps(batch, reference_logprobs(model, batch, ref_model), preference.ld_alpha)
    hidden, labels = labelled_hidden(model, batch)
    logprobs, entropy = head_logprobs(model, hidden, labels, return_entropy=True)
    policy = completion_logps(batch, logprobs, preference.ld_alpha)
    ref = None if ref is None else ref.to(policy.dtype)
    weights = wpo_weights(batch, logprobs, collision_logprobs(model, hidden)) if preference.use_weighting else None
    losses = preference.losses(policy, ref, batch.lengths, weights)
    chosen, rejected = policy.detach().chunk(2)
    rewards = preference.beta * (policy.detach() if ref is None else policy.detach() - ref)
    better, worse = rewards.chunk(2)
    shown = {
        "rewards/chosen": better, "rewards/rejected": worse, "rewards/accuracies": (better > worse).float(),
        "rewards/margins": better - worse, "logps/chosen": chosen, "logps/rejected": rejected, "entropy": entropy,
    }  # fmt: skip
    return losses.sum(), {name: (values.sum(), values.numel()) for name, values in shown.items()}


def pair_logps(
    model: CausalLM,
    pairs: Sequence[Pair],
    ld_alpha: float | None = None,
    *,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
) -> Tensor:
    """Log-probabilities of the chosen and the rejected completion of each pair under the model as it is: float32 (pairs, 2)."""
    device = model.model.embed_tokens.weight.device

    def sums_of(indices: list[int]) -> Tensor:
        batch = collate_pairs([(pairs[i], None) for i in indices]).to(device)
        return completion_logps(batch, completion_logprobs(model, batch), ld_alpha).view(2, -1).T

    _check_ids(model, pairs)
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    return measure(lengths, sums_of, tokens_per_batch, progress)


def dpo(
    model: CausalLM,
    pairs: Sequence[Pair],
    config: TrainConfig,
    adapter: Any = None,
    preference: PreferenceConfig | None = None,
    *,
    ref_model: CausalLM | None = None,
    precompute_ref: bool = False,
    ref_cache: str | Path | None = None,
    max_length: int | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train `model` (a posttrain.model CausalLM, dense or quantized) to prefer the chosen of `pairs` (data.py).

    adapter: as in posttrain.sft.sft; a batch is of pairs. The reference is ref_model where one is given; else the base, which
    is the model with the new adapter off; else, where the model came with an adapter or all its weights train, the model as it
    is now, whose log-probabilities are computed before the first step. precompute_ref computes them so in every case: the
    steps are a third cheaper from then on. They are kept in ref_cache (by default in config.output_dir), and read again
    where that file is of the same data and reference.

    Losses that depend on the batch ("aot", "aot_unpaired", "sft" and what holds it) do so on each micro-batch. Saved is what
    `sft` saves. PosttrainError as `sft`, and for a ref_cache of other data or another reference.
    """
    preference = preference or PreferenceConfig()
    if not pairs:
        raise PosttrainError("the training data holds no pairs")
    _check_ids(model, pairs)
    return train_against_reference(
        model,
        pairs,
        config,
        adapter,
        {"preference": asdict(preference)},
        collate=collate_pairs,
        loss=partial(pair_loss, preference=preference, ref_model=ref_model),
        measure=partial(pair_logps, pairs=pairs, ld_alpha=preference.ld_alpha),
        about={"data": digest(pairs), "ld_alpha": str(preference.ld_alpha)},
        longest=max(len(prompt) + len(completion) for prompt, completion in pair_sequences(pairs)),
        max_length=max_length,
        needs_reference=preference.needs_reference,
        ref_model=ref_model,
        precompute_ref=precompute_ref,
        ref_cache=ref_cache,
        resume=resume,
        quiet=quiet,
        on_step=on_step,
    )


def _check_ids(model: CausalLM, pairs: Sequence[Pair]) -> None:
    check_ids(model, ([*pair.prompt, *pair.chosen, *pair.rejected] for pair in pairs), "pair")
