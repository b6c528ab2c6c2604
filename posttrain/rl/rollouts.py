"""Completions that the policy draws by our own `generate`, and the log-probabilities it gave their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.model.decoder import CausalLM
from posttrain.model.generate import generate
from posttrain.token_logprobs import head_logprobs

from .shared_prompts import SharedBatch, collate


@dataclass(frozen=True)
class Rollouts:
    """N completions and what was measured of them.

    sequences: (prompt, completion) in token ids, the stop token included where one ended it. ended: bool (N,), whether one did.
    lengths: int64 (N,), tokens of each completion. by_token: name -> (tokens,), one completion after another.
    by_completion: name -> (N,).
    """

    sequences: list[tuple[list[int], list[int]]]
    ended: Tensor
    lengths: Tensor
    by_token: dict[str, Tensor]
    by_completion: dict[str, Tensor]

    def part(self, indices: Sequence[int], pad_id: int = 0) -> RolloutBatch:
        """Some of them, in that order, as a batch to learn from."""
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        places = torch.cat([torch.arange(starts[i], starts[i] + int(self.lengths[i])) for i in indices])
        return RolloutBatch(
            collate([self.sequences[i] for i in indices], pad_id),
            {name: values[places] for name, values in self.by_token.items()},
            {name: values[list(indices)] for name, values in self.by_completion.items()},
            len(indices),
        )


@dataclass(frozen=True)
class RolloutBatch:
    """Completions that go through the model together, with their part of what was measured."""

    completions: SharedBatch
    by_token: dict[str, Tensor]
    by_completion: dict[str, Tensor]
    normalizer: int

    @property
    def num_tokens(self) -> int:
        return self.completions.num_tokens

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The batch with its tensors on `device`."""
        by_token = {name: values.to(device) for name, values in self.by_token.items()}
        by_completion = {name: values.to(device) for name, values in self.by_completion.items()}
        return RolloutBatch(self.completions.to(device), by_token, by_completion, self.normalizer)


def draw(
    model: CausalLM, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, stop_id: int | None, seed: int
) -> Rollouts:
    """One completion of each prompt (repeat a prompt to get several), of at most max_new_tokens tokens, the stop token being
    one. Draws depend on the seed alone."""
    stop = () if stop_id is None else (stop_id,)
    drawn = generate(model, prompts, max_new_tokens, temperature, stop_ids=stop, seed=seed)
    ended = [stop_id is not None and len(ids) < max_new_tokens for ids in drawn]
    completions = [ids + [stop_id] if done and stop_id is not None else ids for ids, done in zip(drawn, ended, strict=True)]
    sequences = list(zip(map(list, prompts), completions, strict=True))
    return Rollouts(sequences, torch.tensor(ended), torch.tensor([len(ids) for ids in completions]), {}, {})


def policy(
    model: CausalLM, batch: SharedBatch, temperature: float = 1.0, value_head: nn.Linear | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log-probabilities, entropies, values or None) of the completions' tokens, float32 (tokens,), one completion after another.

    Log-probabilities are of the distribution that was drawn from, softmax(logits / temperature); the value of a token is read
    off the hidden state that its distribution is.
    """
    hidden = model.hidden(batch.input_ids, batch.position_ids, tree_mask=batch.tree_mask).flatten(0, 1)[batch.before]
    scaled = hidden if temperature == 1 else hidden / temperature
    logps, entropy = head_logprobs(model, scaled, batch.labels, return_entropy=True)
    return logps, entropy, None if value_head is None else value_head(hidden.float())[:, 0]
