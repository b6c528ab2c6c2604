"""Continue prompts: greedy or sampled, one or a batch, token by token."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, SupportsIndex

import torch

from .decoder import CausalLM
from .eval_mode import eval_mode
from .fused import fused_projections
from .kv_cache import KVCache
from .sampling import check_sampling, sample


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    adapter_ids: Sequence[str | None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in order, without the stop token that ended it.

    prompts: token ids, tensors and arrays of them too, as stop_ids; of unequal length they are padded on the left and run
    together. One that is given several times goes through the layers once, and is continued as often. on_token(row, token) is
    called for every token as it is chosen, stop tokens excepted. seed fixes the draws (of the whole batch); None draws from
    torch's own generator.

    adapter_ids: for each prompt the name of a served adapter (posttrain/adapters/serving.py), or None for the base
    alone; without them all prompts go through the base and the adapter that is attached, if any.

    Raises ValueError for an empty prompt, an id outside the vocabulary, or a prompt that with max_new_tokens exceeds
    the context, or a name that no served adapter has, or a seed of more than 64 bits; TypeError for ids or a max_new_tokens
    that are no whole numbers.
    """
    check_sampling(temperature, top_k, top_p)
    check_seed(seed)
    prompts, stop = given_ids(prompts, stop_ids)
    check_prompts(model, prompts, max_new_tokens)
    outputs: list[list[int]] = [[] for _ in prompts]
    weight = model.model.embed_tokens.weight
    if not prompts or max_new_tokens == 0:
        with request_adapters(model, adapter_ids, len(prompts), weight.device):  # an unknown name is an error here too
            return outputs
    longest = max(map(len, prompts))
    # Each row's adapter is its own, so with adapter_ids every prompt goes its own way.
    read = prompts if adapter_ids is not None else list(dict.fromkeys(map(tuple, prompts)))
    cache = KVCache(model.config, len(read), longest + max_new_tokens - 1, weight.dtype, weight.device)
    input_ids, attention_mask = left_pad(read, longest, weight.device)
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    running = [True] * len(rows)
    adapters = request_adapters(model, adapter_ids, len(prompts), weight.device)
    with eval_mode(model), adapters as batch, fused_projections(model):
        on_token = outside_requests(on_token, batch)
        for step in range(max_new_tokens):
            hidden = model.hidden(input_ids, attention_mask=attention_mask, cache=cache)
            if step == 0 and len(read) < len(prompts):
                place = {ids: i for i, ids in enumerate(read)}
                owners = torch.tensor([place[tuple(ids)] for ids in prompts], device=weight.device)
                cache.select(owners)
                hidden = hidden[owners]
            chosen = sample(model.head(hidden[:, -1]), temperature, top_k, top_p, generator)
            for i, token in enumerate(chosen.tolist()):
                if not running[i]:
                    continue
                if token in stop:
                    running[i] = False
                    continue
                outputs[rows[i]].append(token)
                if on_token is not None:
                    on_token(rows[i], token)
            if not any(running) or step == max_new_tokens - 1:
                break
            if 2 * sum(running) <= len(rows):
                # Finished rows cost as much as running ones: drop them once they are half of the batch.
                kept = torch.tensor([i for i, going in enumerate(running) if going], device=weight.device)
                cache.select(kept)
                chosen = chosen[kept]
                if batch is not None:
                    batch.select(kept)
                rows = [rows[i] for i in kept.tolist()]
                running = [True] * len(rows)
            input_ids, attention_mask = chosen[:, None], None
    return outputs


def request_adapters(model: CausalLM, adapter_ids: Sequence[str | None] | None, count: int, device: torch.device):
    """A context in which each prompt goes through its own adapter, without adapter_ids all through the base, whatever requests this
    thread has under way; it gives the batch that says which, None where the model serves nothing."""
    served = model.__dict__.get("served_adapters")
    if adapter_ids is None:
        return nullcontext() if served is None else served.batch.using(None)
    if served is None:
        raise ValueError("adapter_ids are given and the model serves no adapters; load them with posttrain.adapters.serving.load")
    return served.rows(adapter_ids, count, device)


def outside_requests(on_token: Callable[[int, int], None] | None, batch) -> Callable[[int, int], None] | None:
    """on_token as the caller's own code, which is no part of the batch: a forward in it goes through the base."""
    if on_token is None or batch is None:
        return on_token

    def call(row: int, token: int) -> None:
        with batch.using(None):
            on_token(row, token)

    return call


def given_ids(prompts: Iterable[Iterable[int]], stop_ids: Iterable[int]) -> tuple[list[list[int]], frozenset[int]]:
    """Prompts and stop ids as Python's numbers. TypeError naming what holds something else: a text, a list too few, fractions."""
    return [_ids(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)], frozenset(_ids(stop_ids, "stop_ids"))


def _ids(given: Any, what: str) -> list[int]:
    try:
        return [operator.index(i) for i in (given.tolist() if hasattr(given, "tolist") else given)]
    except TypeError:
        raise TypeError(f"{what} is {given!r}; expected a list of token ids, as a tokenizer's encode gives them") from None


def check_seed(seed: int | None) -> None:
    """ValueError for one that torch's generators do not hold."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; expected a whole number of 64 bits, from -2^63 to 2^64 - 1")


def check_prompts(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ValueError unless the prompts are the model's tokens, at least one each, and fit its context with what is to come; TypeError
    for a max_new_tokens that is no whole number."""
    if not isinstance(max_new_tokens, SupportsIndex):
        raise TypeError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    context = model.context_length
    virtual = model.config.context_length - context
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; a model needs at least one token to continue (its bos token, say)")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} exceed the model's "
                f"context of {context}{f' (beside {virtual} virtual tokens)' if virtual else ''}; shorten the prompt or ask "
                "for fewer tokens"
            )
    check_ids(model, prompts, "prompt")


def check_ids(model: CausalLM, sequences: Iterable[Sequence[int]], what: str) -> None:
    """ValueError unless every id is one of the model's tokens. what: of which each sequence holds the ids, as the error has it."""
    vocab_size = model.config.vocab_size
    for i, ids in enumerate(sequences):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"{what} {i} holds token ids from {min(ids)} to {max(ids)}; the vocabulary has 0 to "
                f"{vocab_size - 1}. Is this the model's own tokenizer?"
            )


def left_pad(prompts: Sequence[Sequence[int]], longest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """input_ids int64 (B, longest) and attention_mask bool (B, longest), None when no prompt needs padding."""
    input_ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(p) == longest for p in prompts):
        return input_ids, None
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return input_ids, torch.arange(longest, device=device) >= longest - lengths[:, None]
