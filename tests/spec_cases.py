"""What the tests of speculative verification share: cases, the oracle on tensors, statistics of many draws, wrong verifiers."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from posttrain.kernels import logit_filter
from posttrain.reference import logit_filter as filter_oracle
from posttrain.reference import spec_verify as oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def noise(B: int, K: int, V: int, dtype=torch.float64, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    return {
        "uniforms": torch.rand(B, K, dtype=dtype, generator=generator),
        "gumbel": -torch.empty(B, V, dtype=dtype).exponential_(generator=generator).log(),
    }


def draw(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, generator=None) -> Tensor:
    """Tokens (...) drawn from logits (..., V), as a drafter draws them."""
    threshold, log_total = logit_filter(logits, temperature, top_k, top_p)
    p = (logits.double() / temperature - log_total[..., None]).exp().masked_fill(logits < threshold[..., None], 0)
    return torch.multinomial(p.view(-1, p.shape[-1]), 1, generator=generator).view(p.shape[:-1])


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0) -> Tensor:
    """The oracle's, float64 (V,)."""
    return torch.from_numpy(filter_oracle.filter_row(logits.double().tolist(), temperature, top_k, top_p)[2])


def chain_by_oracle(drafted, draft, target, num, setting, uniforms, gumbel) -> tuple[Tensor, Tensor]:
    """(tokens, num_accepted) of a batch; `setting` is (temperature, top_k, top_p), each a number or a list by request."""
    B, K = drafted.shape
    tokens, accepted = torch.full((B, K + 1), -1), torch.zeros(B, dtype=torch.int64)
    for b in range(B):
        own = [value[b] if isinstance(value, list) else value for value in setting]
        rows = None if draft is None else draft[b].double().numpy()
        emitted, accepted[b] = oracle.verify_chain(
            drafted[b].tolist(), rows, target[b].double().numpy(), num[b], *own, uniforms[b].tolist(), gumbel[b].tolist()
        )
        tokens[b, : len(emitted)] = torch.tensor(emitted)
    return tokens, accepted


def ragged_case(seed: int, dtype=torch.float64):
    """(drafted, draft | None, target, num, (temperature, top_k, top_p)) of every kind, from one seed: ragged, few words and many,
    a narrower draft vocabulary, drawn and chosen drafts, ids that are none, dead words, one request or several."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    B, K, V = r.choice((1, 2, 5)), r.randint(0, 4), r.choice((1, 2, 7, 33))
    target = (2 * torch.randn(B, K + 1, V, generator=generator)).to(dtype)
    narrow = max(1, V - r.choice((0, 0, 1, 3)))
    draft = (target[:, :K, :narrow].double() + torch.randn(B, K, narrow, generator=generator)).to(dtype)
    if r.random() < 0.3 and V > 2:
        target[..., r.randrange(V)] = r.choice((-torch.inf, torch.nan))
    setting = (r.choice((0.0, 0.7, 1.0, 1.3)), r.choice((0, 0, 1, 5)), r.choice((1.0, 1.0, 0.9, 0.5)))
    if r.random() < 0.5 and K:
        drafted = draw(draft, setting[0] or 1.0, *setting[1:], generator)
    else:
        drafted = torch.randint(-1, V + 1, (B, K), generator=generator)
    num = torch.randint(0, K + 1, (B,), generator=generator)
    return drafted, draft if r.random() < 0.6 else None, target, num, setting


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, float]:
    """(Pearson's statistic, what it stays below but once in 10,000): bins that expect fewer than 5 are one bin; the limit is Wilson
    and Hilferty's cube of a normal quantile (1931)."""
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    if expected[-1] == 0:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    df = len(expected) - 1
    limit = df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3 if df else 0.0
    return ((counts - expected) ** 2 / expected).sum().item(), limit
