"""Reward models: a decoder whose `score` head reads a completion's worth off the hidden state of its last token.

Trained on pairs by Bradley-Terry's likelihood (Ouyang et al., arXiv:2203.02155, eq. 1), with LoRA on the decoder and the
head whole beside it (PEFT's modules_to_save). The adapter is one of PEFT's for sequence classification: it loads there on
a LlamaForSequenceClassification of one label, and here beside a policy's adapter on one copy of the base.
Oracle of the loss: reference/reward.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .adapters import LoraConfig, active_adapter, adapter_configs, attach, base_fingerprint, load_adapter, save_adapter
from .adapters.peft_format import read_adapter
from .completion_batch import CompletionBatch, Sequences, collate_completions
from .data import IGNORE_INDEX
from .errors import PosttrainError
from .model.decoder import CausalLM
from .model.eval_mode import eval_mode
from .model.generate import check_ids
from .preference.data import Pair, digest
from .quantized import held_as
from .statistics import format_p, mcnemar, wilson_interval
from .trainer import Loss, TrainConfig, TrainResult, train

HEAD = "score"  # the name that Hugging Face's models for sequence classification and PEFT have for it


def reward_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, center_rewards_coefficient: float | None = None
) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) + coefficient (r_chosen + r_rejected)^2 of each pair; all (B,)."""
    difference = chosen - rejected
    losses = -logsigmoid(difference if margins is None else difference - margins)
    return losses + center_rewards_coefficient * (chosen + rejected).square() if center_rewards_coefficient else losses


def add_score_head(model: CausalLM) -> None:
    """Give the model its `score` head, in float32, normal with deviation 1 / sqrt(D + 1) (Stiennon et al.,
    arXiv:2009.01325); nothing where it has one."""
    if hasattr(model, HEAD):
        return
    model.fingerprint = base_fingerprint(model)  # of what was loaded: the head is no part of it
    size = model.config.hidden_size
    head = nn.Linear(size, 1, bias=False, device=model.model.embed_tokens.weight.device)
    nn.init.normal_(head.weight, std=(size + 1) ** -0.5)
    model.add_module(HEAD, head.requires_grad_(False))


def scores(model: CausalLM, batch: CompletionBatch) -> Tensor:
    """Float32 (S,), the reward of each completion; differentiable."""
    packed = batch.segment_ids is not None
    hidden = model.hidden(batch.input_ids, batch.position_ids if packed else None, batch.segment_ids)
    last = batch.place == batch.lengths[batch.owner] - 1
    ends = hidden[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX][last]
    rewards = model.get_submodule(HEAD)(ends.float())[:, 0]
    return torch.zeros_like(rewards).index_put((batch.owner[last],), rewards)


@torch.no_grad()
def score(
    model: CausalLM, sequences: Sequences, batch_size: int = 16, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Float32 (N,) on the CPU: the rewards of (prompt, completion) in token ids, by the adapter that acts."""
    check_ids(model, ([*prompt, *completion] for prompt, completion in sequences), "sequence")
    with eval_mode(model):
        device = next(model.parameters()).device
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
        rewards = torch.empty(len(sequences))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rewards[part] = scores(model, collate_completions([sequences[i] for i in part]).to(device)).cpu()
            if progress:
                progress(start + len(part), len(order))
    return rewards


@dataclass(frozen=True)
class RewardBatch:
    """B pairs: completions holds the chosen ones and then the rejected ones. margins: float32 (B,) or None."""

    completions: CompletionBatch
    margins: Tensor | None
    normalizer: int

    @property
    def num_tokens(self) -> int:
        return self.completions.num_tokens

    def to(self, device: torch.device | str) -> RewardBatch:
        """The batch with its tensors on `device`."""
        margins = None if self.margins is None else self.margins.to(device)
        return replace(self, completions=self.completions.to(device), margins=margins)


def collate(pairs: Sequence[Pair], use_margins: bool = False, pad_id: int = 0) -> RewardBatch:
    """Pairs as a batch. use_margins: a pair without one has margin 0."""
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    margins = torch.tensor([p.margin or 0.0 for p in pairs]) if use_margins else None
    return RewardBatch(collate_completions(sequences, pad_id=pad_id), margins, len(pairs))


def loss_sum(model: CausalLM, batch: RewardBatch, center_rewards_coefficient: float | None = None) -> Loss:
    """The pairs' losses summed, and what TRL shows of them under its names."""
    chosen, rejected = (rewards := scores(model, batch.completions)).chunk(2)
    losses = reward_loss(chosen, rejected, batch.margins, center_rewards_coefficient)
    B = len(losses)
    return losses.sum(), {
        "accuracy": ((chosen > rejected).float().sum(), B),
        "margin": ((chosen - rejected).sum(), B),
        "min_reward": (rewards.min(), 1),
        "mean_reward": (rewards.sum(), 2 * B),
        "max_reward": (rewards.max(), 1),
    }


def train_reward_model(
    model: CausalLM,
    pairs: Sequence[Pair],
    config: TrainConfig,
    adapter: LoraConfig | None = None,
    *,
    center_rewards_coefficient: float | None = None,
    use_margins: bool = True,
    pad_id: int = 0,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Make a reward model of `model` (a CausalLM, dense or quantized) from pairs (posttrain.preference.data.load_preferences).

    adapter: LoRA's configuration (default r=8 on all linear layers); the head joins its modules_to_save. A batch is of pairs.
    use_margins: by the pairs' margins, where they have them. The adapter is saved in config.output_dir in PEFT's format,
    beside metrics.jsonl, loss.svg and checkpoints. PosttrainError as `train`, and for a model that has an adapter already.
    """
    if not pairs:
        raise PosttrainError("the training data holds no pairs")
    if center_rewards_coefficient is not None and not 0 <= center_rewards_coefficient < float("inf"):
        raise ValueError(f"center_rewards_coefficient is {center_rewards_coefficient}; expected 0 or a positive number")
    if (present := active_adapter(model)) is not None:
        raise PosttrainError(f"the model has the adapter {present!r} already; merge it into the base, or load the base without it")
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    if longest > model.context_length:
        raise PosttrainError(
            f"the longest pair has {longest} tokens and the model's context {model.context_length}; load pairs with a max_length"
        )
    check_ids(model, ([*pair.prompt, *pair.chosen, *pair.rejected] for pair in pairs), "pair")
    torch.manual_seed(config.seed)
    add_score_head(model)
    lora = adapter or LoraConfig()
    attach(model, replace(lora, modules_to_save=[*(lora.modules_to_save or ()), HEAD]))
    margins = use_margins and any(p.margin is not None for p in pairs)
    name = active_adapter(model)
    identity = {
        "data": digest(pairs),
        "margins": margins,
        "center_rewards_coefficient": center_rewards_coefficient,
        "adapter": asdict(adapter_configs(model)[name]) if name else None,
        "base": base_fingerprint(model),
        "held": held_as(model),
    }
    result = train(
        model,
        pairs,
        partial(collate, use_margins=margins, pad_id=pad_id),
        partial(loss_sum, center_rewards_coefficient=center_rewards_coefficient),
        config,
        resume=resume,
        identity=identity,
        quiet=quiet,
        on_step=on_step,
        unit="nats per pair",
    )
    save_adapter(model, config.output_dir)
    return result


def load_reward_model(model: CausalLM, path: str | os.PathLike, name: str = "reward", *, any_base: bool = False) -> None:
    """Attach the reward model in the folder `path` (ours or PEFT's) as the active adapter. PosttrainError as `load_adapter`,
    and where the adapter has no score head."""
    if HEAD not in (read_adapter(path)[0].get("modules_to_save") or ()):
        raise PosttrainError(f"the adapter in {path} has no {HEAD} head, so it is no reward model; train one with posttrain reward")
    bare = not hasattr(model, HEAD)
    add_score_head(model)
    try:
        load_adapter(model, path, name, any_base=any_base)
    except BaseException:
        if bare:
            delattr(model, HEAD)
        raise


@dataclass(frozen=True)
class ScoreAccuracy:
    """chosen, rejected: scores float32 (pairs,)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def correct(self) -> list[bool]:
        """Pair by pair, whether the chosen completion scores higher."""
        return (self.chosen > self.rejected).tolist()

    @property
    def p_value(self) -> float:
        """Two-sided exact p of as many right by chance alone, each pair with one half."""
        right = sum(self.correct)
        return mcnemar(right, len(self.correct) - right)[0]

    def __str__(self) -> str:
        right, n = sum(self.correct), len(self.correct)
        low, high = wilson_interval(right, n)
        return f"{right / n:.3f} [{low:.3f}, {high:.3f}] of {n} pairs (chance 0.5, p {format_p(self.p_value)})"


def score_accuracy(
    model: CausalLM, pairs: Sequence[Pair], batch_size: int = 16, progress: Callable[[int, int], None] | None = None
) -> ScoreAccuracy:
    """How often the reward model that acts scores the chosen completion higher. ValueError for no pairs."""
    if not pairs:
        raise ValueError("no pairs to measure on")
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    return ScoreAccuracy(*score(model, sequences, batch_size, progress).chunk(2))
