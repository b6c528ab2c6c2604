"""Accuracy by choice log-probability, accuracy by generation, perplexity.

    choice_accuracy      the answer is the choice with the largest sum of log p(token | prompt, tokens before it)
    generation_accuracy  the answer is what greedy decoding writes
    perplexity           exp of the mean of -log p(token | up to window - 1 tokens before it)

What costs time is tokens through the layers, so no token goes through twice: what all prompts share (the examples of a
few-shot prompt) is computed once, and a prompt's choices continue from its cached keys and values. Prompts are sorted
by length and padded on the right, where causal attention never looks, so that no mask is needed. The head, which on a
small model costs as much as the layers, sees only the positions that are asked for.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.model.decoder import CausalLM
from posttrain.model.eval_mode import eval_mode
from posttrain.model.generate import check_ids, generate
from posttrain.model.kv_cache import KVCache
from posttrain.model.stop_ids import stop_ids
from posttrain.model.tokenizer import Tokenizer
from posttrain.statistics import wilson_interval

Progress = Callable[[int, int], None]  # called with (items done, items in all)

_MIN_SHARED = 8  # a shared prefix shorter than this is not worth a cache
_HEAD_ROWS = 128  # positions whose logits exist at once: 128 x 49,152 in float32 is 25 MB


@dataclass(frozen=True)
class ChoiceItem:
    """One question. `choices` are token ids that continue `prompt`; `answer` is the index of the right one."""

    prompt: Sequence[int]
    choices: Sequence[Sequence[int]]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """Right and wrong answers, item by item (for paired tests), and the share of right ones."""

    predictions: list[int] | list[str]
    correct: list[bool]
    logprobs: list[list[float]] | None = None  # one per choice; None when answers were generated

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(sum(self.correct), self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.3f} [{low:.3f}, {high:.3f}] ({sum(self.correct)} of {self.n})"


@dataclass(frozen=True)
class Perplexity:
    """`nll` is the sum of -log p over `tokens` scored tokens, in nats."""

    nll: float
    tokens: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} ({self.tokens} tokens, windows of {self.window}, stride {self.stride})"


@contextlib.contextmanager
def _evaluating(model: CausalLM) -> Iterator[None]:
    """Dropout off and no autograd."""
    with eval_mode(model), torch.inference_mode():
        yield


def choice_accuracy(
    model: CausalLM,
    items: Sequence[ChoiceItem],
    tokens_per_batch: int = 2048,
    progress: Progress | None = None,
) -> Accuracy:
    """Answer each item with the choice of largest summed log-probability (ties: the first).

    The sum is not divided by length; where choices differ in length and that matters, compare `logprobs` yourself.
    tokens_per_batch bounds the prompt tokens (with padding) that go through the layers together.
    ValueError for no items, an empty prompt or choice, an answer out of range, an item longer than the context, or an id
    outside the vocabulary.
    """
    _check_items(model, items)
    for i, item in enumerate(items):
        if not 0 <= item.answer < len(item.choices):
            raise ValueError(f"item {i}: answer {item.answer} is not one of its {len(item.choices)} choices")
    logprobs = choice_logprobs(model, items, tokens_per_batch, progress)
    predictions = [max(range(len(row)), key=row.__getitem__) for row in logprobs]
    correct = [guess == item.answer for guess, item in zip(predictions, items, strict=True)]
    return Accuracy(predictions, correct, logprobs)


def choice_logprobs(
    model: CausalLM,
    items: Sequence[ChoiceItem],
    tokens_per_batch: int = 2048,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Summed log-probability of every choice of every item, in the items' order (answers are not read)."""
    _check_items(model, items)
    shared = _shared_prefix([item.prompt for item in items])
    results: list[list[float]] = [[] for _ in items]
    done = 0
    with _evaluating(model):
        prefix = _prefill(model, items, shared) if shared else None
        for batch in _batches(items, shared, tokens_per_batch):
            for i, row in zip(batch, _score_batch(model, [items[i] for i in batch], shared, prefix), strict=True):
                results[i] = row
            done += len(batch)
            if progress:
                progress(done, len(items))
    return results


def generation_accuracy(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str],
    max_new_tokens: int = 16,
    match: str = "exact",
    batch_size: int = 16,
    progress: Progress | None = None,
    folder: str | os.PathLike | None = None,
) -> Accuracy:
    """Decode greedily after each prompt and compare with the answer; case and outer white space do not count.

    match: "exact", or "prefix" (the text starts with the answer), or "contains". Generation stops where the
    tokenizer, the model's configuration and, where its `folder` is given, generation_config.json say that a text ends.
    """
    matches: dict[str, Callable[[str, str], bool]] = {"exact": str.__eq__, "prefix": str.startswith, "contains": str.__contains__}
    if match not in matches:
        raise ValueError(f"match is one of {', '.join(matches)}, given {match!r}")
    if len(prompts) != len(answers) or not prompts:
        raise ValueError(f"expected one answer per prompt and at least one, given {len(prompts)} and {len(answers)}")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    ends = stop_ids(tokenizer, model.config, folder)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            outputs = generate(model, [list(prompts[i]) for i in batch], max_new_tokens, stop_ids=ends)
            for i, ids in zip(batch, outputs, strict=True):
                texts[i] = tokenizer.decode(ids).strip()
            if progress:
                progress(start + len(batch), len(order))
    correct = [matches[match](text.casefold(), answer.strip().casefold()) for text, answer in zip(texts, answers, strict=True)]
    return Accuracy(texts, correct)


def perplexity(
    model: CausalLM,
    input_ids: Sequence[int],
    window: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of one text (T,) read through windows of `window` tokens that move by `stride`.

    Every token but the first is scored exactly once, given at least window - stride tokens before it (fewer only in
    the first window). stride = window - 1 is cheapest; a smaller one gives more context and a lower figure: state both.
    Defaults: window min(1024, context), stride window // 2. ValueError outside 2 <= window <= context and
    1 <= stride < window, for a text of fewer than 2 tokens, or for an id outside the vocabulary.
    """
    context = model.context_length
    window = min(1024, context) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= context:
        raise ValueError(f"window must lie between 2 and the model's context of {context} tokens, given {window}")
    if not 1 <= stride < window:
        raise ValueError(f"stride must be at least 1 and less than the window ({window}), given {stride}")
    if len(input_ids) < 2:
        raise ValueError(f"perplexity needs a text of at least 2 tokens, given {len(input_ids)}")
    ids = torch.as_tensor(input_ids, device=_device(model))
    check_ids(model, [ids.tolist()], "text")
    nll, scored, end = 0.0, 1, min(len(ids), window)
    with _evaluating(model):
        while scored < len(ids):
            begin = max(0, end - window)
            hidden = model.hidden(ids[None, begin : end - 1])[0, scored - 1 - begin :]
            nll -= math.fsum(_token_logprobs(model, hidden, ids[scored:end]))
            scored, end = end, min(len(ids), end + stride)
            if progress:
                progress(scored, len(ids))
    return Perplexity(nll, len(ids) - 1, window, stride)


def _check_items(model: CausalLM, items: Sequence[ChoiceItem]) -> None:
    if not items:
        raise ValueError("nothing to evaluate: the list of items is empty")
    context = model.context_length
    for i, item in enumerate(items):
        if not item.prompt or not item.choices or not all(item.choices):
            raise ValueError(f"item {i}: a prompt and each of its choices need at least one token")
        longest = len(item.prompt) + max(map(len, item.choices)) - 1
        if longest > context:
            raise ValueError(f"item {i} takes {longest} tokens, longer than the model's context of {context}; shorten the prompt")
    check_ids(model, ([*item.prompt, *itertools.chain(*item.choices)] for item in items), "item")


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving at least one token to each; 0 where a cache does not pay."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in dictionary order: what these two share, all share
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    return shared if shared >= _MIN_SHARED else 0


def _batches(items: Sequence[ChoiceItem], shared: int, tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices, shortest prompts first, such that rows x longest <= tokens_per_batch.

    With a shared prefix, rows of cached keys and values are what takes memory: they get four times as many tokens.
    Where a choice has several tokens, a batch holds one prompt length only: its choices continue from the cache, and
    padding would lie between the prompt and them.
    """
    continues = any(len(choice) > 1 for item in items for choice in item.choices)
    batch: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: len(items[i].prompt)):
        length = len(items[i].prompt)
        rows = len(batch) + 1
        full = rows * (length - shared) > tokens_per_batch or (shared and rows * length > 4 * tokens_per_batch)
        if batch and (full or (continues and length != len(items[batch[0]].prompt))):
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _prefill(model: CausalLM, items: Sequence[ChoiceItem], shared: int) -> KVCache:
    """A cache of one row with the shared prefix, and room for the longest item after it."""
    capacity = max(len(item.prompt) + max(map(len, item.choices)) for item in items)
    cache = KVCache(model.config, 1, capacity, _dtype(model), _device(model))
    model.hidden(torch.tensor([list(items[0].prompt[:shared])], device=_device(model)), cache=cache)
    return cache


def _score_batch(model: CausalLM, items: Sequence[ChoiceItem], shared: int, prefix: KVCache | None) -> list[list[float]]:
    """log-probabilities (rows, choices). First tokens are read off the prompts' last positions, the rest continue."""
    device, rows = _device(model), len(items)
    lengths = torch.tensor([len(item.prompt) - shared for item in items], device=device)
    longest = int(lengths.max())
    extra = max(len(choice) for item in items for choice in item.choices) - 1
    cache = None
    if prefix is not None:
        cache = copy.copy(prefix)  # a shallow copy: `select` gives it rows of its own, and `prefix` keeps its one
        cache.select(torch.zeros(rows, dtype=torch.int64, device=device))
    elif extra:
        cache = KVCache(model.config, rows, longest + extra, _dtype(model), device)
    input_ids = _right_padded([item.prompt[shared:] for item in items], device)
    hidden = model.hidden(input_ids, cache=cache)
    last = hidden[torch.arange(rows, device=device), lengths - 1]

    owners = [row for row, item in enumerate(items) for _ in item.choices]
    firsts = [choice[0] for item in items for choice in item.choices]
    flat = iter(_token_logprobs(model, last, firsts, owners))
    scores = [[next(flat) for _ in item.choices] for item in items]
    for j in range(max(len(item.choices) for item in items) if extra else 0):
        tails = [item.choices[j] if j < len(item.choices) else () for item in items]
        wanted = [(row, t) for row, tail in enumerate(tails) for t in range(len(tail) - 1)]
        if wanted:
            assert cache is not None  # there is one where any choice has a second token
            cache.length = shared + longest
            hidden = model.hidden(_right_padded([tail[:-1] for tail in tails], device), cache=cache)
            picked = hidden[tuple(torch.tensor(wanted, device=device).T)]
            logprobs = _token_logprobs(model, picked, [tails[row][t + 1] for row, t in wanted])
            for (row, _), logprob in zip(wanted, logprobs, strict=True):
                scores[row][j] += logprob
    return scores


def _token_logprobs(
    model: CausalLM, hidden: Tensor, labels: Sequence[int] | Tensor, owners: Sequence[int] | None = None
) -> list[float]:
    """log p(labels[i] | hidden[owners[i]]); hidden (M, D), owners non-decreasing, default 0..M-1.

    Softmax in float32 over the logits of _HEAD_ROWS positions at a time. ValueError where it has no value.
    """
    wanted = torch.as_tensor(labels, device=hidden.device)
    owner = torch.as_tensor(range(len(labels)) if owners is None else owners, device=hidden.device)
    parts = []
    for start in range(0, len(hidden), _HEAD_ROWS):
        logits = model.head(hidden[start : start + _HEAD_ROWS]).float()
        mine = (owner >= start) & (owner < start + _HEAD_ROWS)
        rows = owner[mine] - start
        parts.append(logits[rows, wanted[mine]].double() - logits.logsumexp(-1)[rows].double())
    logprobs = torch.cat(parts)
    if logprobs.isnan().any():
        raise ValueError(
            "the model's log-probabilities are not numbers (NaN), so nothing can be measured. Load it in bf16 or fp32 if that was "
            "fp16; otherwise its weights or its adapter are damaged"
        )
    return logprobs.tolist()


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 (len(rows), longest). The padding id is 0: causal attention never shows it to a real token."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _device(model: CausalLM) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: CausalLM) -> torch.dtype:
    return model.model.embed_tokens.weight.dtype
