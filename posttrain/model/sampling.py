"""From logits to a token: the one definition of temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError unless temperature >= 0 and finite, top_k >= 0 (0: off) and 0 < top_p <= 1 (1: off)."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a positive number")
    if top_k < 0 or int(top_k) != top_k:
        raise ValueError(f"top_k is {top_k}; expected 0 (off) or a positive integer")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number in (0, 1], 1 being off")


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., V) divided by the temperature (> 0) in at least float32, and -inf on the tokens that the filters
    exclude.

    top_k keeps the k largest and whatever equals the k-th. top_p then keeps the fewest most probable tokens whose
    probabilities, over what top_k kept, reach top_p (nucleus sampling, arXiv:1904.09751); the token that crosses is
    kept.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    V = logits.shape[-1]
    if 0 < top_k < V:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        excluded = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids int64 (N,) drawn from logits (N, V); the most probable (the first of equals) when temperature is 0."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
