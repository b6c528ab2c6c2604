"""KTO: preferences without pairs, each completion desirable or not (Ethayarajh et al., arXiv:2402.01306; kernels: kto_loss).

A completion's log-ratio is compared with the policy's divergence from the reference, estimated on each micro-batch from completions
of other prompts: the mean log-ratio of (prompt, the next example's completion), held at 0 from below, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.completion_batch import CompletionBatch, Sequences, collate_completions
from posttrain.errors import PosttrainError
from posttrain.kernels import kto_loss
from posttrain.model.decoder import CausalLM
from posttrain.model.generate import check_ids
from posttrain.token_logprobs import completion_logprobs
from posttrain.trainer import TrainConfig, TrainResult

from .data import Unpaired, digest
from .reference_logps import Progress, measure, reference_logprobs
from .training import train_against_reference

LOSSES = ("kto", "apo_zero_unpaired")


@dataclass(frozen=True)
class KtoConfig:
    """Names as in TRL's KTOConfig. "apo_zero_unpaired" (arXiv:2408.06266) compares with 0 and needs no estimate. The weights of
    desirable and undesirable completions should have their numbers' ratio inverted, up to 4/3."""

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self):
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type is {self.loss_type!r}; expected one of {', '.join(LOSSES)}")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta is {self.beta}; expected a positive number")
        weights = self.desirable_weight, self.undesirable_weight
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ValueError(
                f"desirable_weight is {weights[0]} and undesirable_weight {weights[1]}; expected finite numbers of at least 0, and "
                "one above: nothing else trains"
            )


@dataclass(frozen=True)
class KtoBatch:
    """Completions with their labels bool (B,), and the same prompts with other completions, where the loss asks for them."""

    completions: CompletionBatch
    mismatched: CompletionBatch | None
    labels: Tensor

    @property
    def num_tokens(self) -> int:
        return self.completions.num_tokens

    @property
    def normalizer(self) -> int:
        return self.completions.normalizer

    def to(self, device: torch.device | str) -> KtoBatch:
        """The batch with its tensors on `device`."""
        other = None if self.mismatched is None else self.mismatched.to(device)
        return KtoBatch(self.completions.to(device), other, self.labels.to(device))


@dataclass(frozen=True)
class _Item:
    example: Unpaired
    other: list[int] | None  # a completion of another prompt


def with_mismatched(examples: Sequence[Unpaired], max_length: int) -> list[_Item]:
    """Each example with the completion of the next one whose prompt differs, cut to `max_length` tokens beside the prompt.
    PosttrainError where all prompts are the same."""
    items, n = [], len(examples)
    for i, here in enumerate(examples):
        following = (examples[j % n] for j in range(i + 1, i + n))
        other = next((e.completion for e in following if e.prompt != here.prompt), None)
        if other is None:
            raise PosttrainError("all prompts are the same, so KTO's divergence cannot be estimated; use apo_zero_unpaired")
        items.append(_Item(here, other[: max(1, max_length - len(here.prompt))]))
    return items


def _sequences(items: Sequence[_Item]) -> tuple[Sequences, Sequences]:
    return (
        [(item.example.prompt, item.example.completion) for item in items],
        [(item.example.prompt, item.other) for item in items if item.other is not None],
    )


def collate_labelled(items: Sequence[tuple[_Item, Tensor | None]]) -> KtoBatch:
    """A batch of items, each with the reference's log-probabilities (1 or 2,) of its completions or None."""
    own, others = _sequences([item for item, _ in items])
    batches = [collate_completions(sequences, len(items)) if sequences else None for sequences in (own, others)]
    refs = [ref for _, ref in items if ref is not None]
    if refs:
        columns = torch.stack(refs).T
        batches = [batch and replace(batch, ref_logps=column) for batch, column in zip(batches, columns, strict=False)]
    labels = torch.tensor([item.example.label for item, _ in items])
    completions, mismatched = (*batches, None)[:2]
    assert completions is not None
    return KtoBatch(completions, mismatched, labels)


def _reference(model: CausalLM, batch: CompletionBatch, ref_model: CausalLM | None) -> Tensor:
    return batch.sums(reference_logprobs(model, batch, ref_model)) if batch.ref_logps is None else batch.ref_logps


def labelled_loss(model: CausalLM, batch: KtoBatch, config: KtoConfig, ref_model: CausalLM | None = None):
    """(the losses of the batch's completions summed (), what TRL shows as sums and counts)."""
    own, kl = batch.completions, None
    if batch.mismatched is not None:
        other = batch.mismatched
        with torch.no_grad():
            kl = (other.sums(completion_logprobs(model, other)) - _reference(model, other, ref_model)).mean()
    ref = _reference(model, own, ref_model)
    logprobs, entropy = completion_logprobs(model, own, return_entropy=True)
    policy = own.sums(logprobs)
    losses, rewards = kto_loss(
        policy, ref.to(policy.dtype), batch.labels, kl, config.beta,
        desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight,
    )  # fmt: skip
    shown = {"entropy": (entropy.sum(), entropy.numel())}
    for name, mine in (("chosen", batch.labels), ("rejected", ~batch.labels)):
        shown[f"rewards/{name}"] = rewards[mine].sum(), int(mine.sum())
        shown[f"logps/{name}"] = policy.detach()[mine].sum(), int(mine.sum())
    if kl is not None:
        shown["kl"] = kl.clamp(min=0), 1
    return losses.sum(), shown


def labelled_logps(
    model: CausalLM, items: Sequence[_Item], *, tokens_per_batch: int = 4096, progress: Progress | None = None
) -> Tensor:
    """Log-probabilities of each item's completion, and of the other where it has one: float32 (items, 1 or 2)."""
    device = model.model.embed_tokens.weight.device

    def sums_of(indices: list[int]) -> Tensor:
        own, others = _sequences([items[i] for i in indices])
        batch = collate_completions([*own, *others]).to(device)
        return batch.sums(completion_logprobs(model, batch)).view(-1, len(indices)).T

    lengths = [sum(len(prompt) + len(ids) for one in _sequences([item]) for prompt, ids in one) for item in items]
    return measure(lengths, sums_of, tokens_per_batch, progress)


def kto(
    model: CausalLM,
    examples: Sequence[Unpaired],
    config: TrainConfig,
    adapter: Any = None,
    preference: KtoConfig | None = None,
    *,
    ref_model: CausalLM | None = None,
    precompute_ref: bool = False,
    ref_cache: str | Path | None = None,
    max_length: int | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train `model` on labelled completions (data.load_unpaired). A batch is of completions; larger ones estimate the divergence
    better. Arguments, what is saved and errors as in posttrain.preference.dpo."""
    preference = preference or KtoConfig()
    if not examples:
        raise PosttrainError("the training data holds no completions")
    check_ids(model, ([*example.prompt, *example.completion] for example in examples), "completion")
    longest = max(len(e.prompt) + len(e.completion) for e in examples)
    if preference.loss_type == "kto":
        items = with_mismatched(examples, longest)
        longest = max(longest, *(len(item.example.prompt) + 1 for item in items))
    else:
        items = [_Item(example, None) for example in examples]
    return train_against_reference(
        model,
        items,
        config,
        adapter,
        {"preference": asdict(preference)},
        collate=collate_labelled,
        loss=partial(labelled_loss, config=preference, ref_model=ref_model),
        measure=partial(labelled_logps, items=items),
        about={"data": digest(examples), "loss_type": preference.loss_type},
        longest=longest,
        max_length=max_length,
        needs_reference=True,
        ref_model=ref_model,
        precompute_ref=precompute_ref,
        ref_cache=ref_cache,
        resume=resume,
        quiet=quiet,
        on_step=on_step,
    )
