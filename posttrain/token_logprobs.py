"""Log-probabilities of a batch's labelled tokens: the head sees their positions alone, and its logits never exist whole."""

from __future__ import annotations

from typing import Literal, Protocol, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .completion_batch import CompletionBatch
from .data import IGNORE_INDEX
from .kernels import QuantizedWeight, linear_logprobs
from .model.decoder import CausalLM
from .model.segments import Segments
from .quantized import QuantizedLinear

# Logits at once through a head that is more than a weight.
CHUNK = 256


class Labelled(Protocol):
    """What is needed of a batch (posttrain/packing.py, posttrain/completion_batch.py): int64 (B, T) each."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def segment_ids(self) -> Tensor | Segments | None: ...


def plain_head(model: CausalLM) -> tuple[Tensor | QuantizedWeight, Tensor | None] | None:
    """The head's weight (V, D), dense or in 4 bits, and bias (V,), where these are all it is: no adapter."""
    if model.config.tie_word_embeddings:
        return model.model.embed_tokens.weight, None
    head = model.lm_head
    return (head.weight, head.bias) if type(head) in (nn.Linear, QuantizedLinear) else None


def labelled_hidden(model: CausalLM, batch: Labelled) -> tuple[Tensor, Tensor]:
    """(hidden states (N, D) that predict the N labelled tokens, their ids int64 (N,)), row by row."""
    packed = batch.segment_ids is not None
    hidden = model.hidden(batch.input_ids, batch.position_ids if packed else None, batch.segment_ids)
    if isinstance(batch, CompletionBatch) and batch.predictors is not None and batch.targets is not None:
        return hidden[0][batch.predictors], batch.targets
    labels = batch.labels[:, 1:]
    learned = labels != IGNORE_INDEX
    return hidden[:, :-1][learned], labels[learned]


@overload
def completion_logprobs(model: CausalLM, batch: Labelled, return_entropy: Literal[False] = False) -> Tensor: ...
@overload
def completion_logprobs(model: CausalLM, batch: Labelled, return_entropy: Literal[True]) -> tuple[Tensor, Tensor]: ...
def completion_logprobs(model: CausalLM, batch: Labelled, return_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """log p of each labelled token given those before it: float32 (N,), row by row, differentiable; with return_entropy also
    the entropies (N,) of the distributions it was drawn from, without gradient."""
    return head_logprobs(model, *labelled_hidden(model, batch), return_entropy)


def head_logprobs(model: CausalLM, hidden: Tensor, labels: Tensor, return_entropy: bool = False):
    """`completion_logprobs` from hidden states (N, D) and labels (N,)."""
    head = plain_head(model)
    if head is not None:
        weight, bias = head
        if return_entropy:
            return linear_logprobs(hidden, weight, labels, bias, return_entropy=True)
        return linear_logprobs(hidden, weight, labels, bias)
    # Chunks through whatever the head is; logits are computed again in the backward pass rather than kept.
    parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    both = [checkpoint(_through_head, model, h, y, return_entropy, use_reentrant=False) for h, y in parts]
    logprobs, entropy = (torch.cat(chunks) for chunks in zip(*both, strict=True))
    return (logprobs, entropy) if return_entropy else logprobs


def _through_head(model: CausalLM, hidden: Tensor, labels: Tensor, measure: bool) -> tuple[Tensor, Tensor]:
    whole = _wide(model.head(hidden)).log_softmax(-1)
    with torch.no_grad():
        entropy = -(whole.exp() * whole).sum(-1) if measure else whole.new_zeros(len(whole))
    return whole.gather(1, labels[:, None])[:, 0], entropy


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def collision_logprobs(model: CausalLM, hidden: Tensor) -> Tensor:
    """log sum_v p[v]^2 (N,) of the distributions after hidden states (N, D), in float32 without gradient: the expected probability
    of a token drawn from the policy itself (WPO, arXiv:2406.11827)."""
    parts = []
    for chunk in hidden.detach().split(CHUNK):
        logits = _wide(model.head(chunk))
        parts.append((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
