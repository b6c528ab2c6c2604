"""Verification of drafted tokens on this CPU, V = 49,152 in bfloat16: ours from logits, beside the plain expression (softmax of all
rows, masked copies for top-k and top-p, ratio, remainder, multinomial) and, at batch 1 without filters, transformers' function.

All draw their own noise. First the agreement: with the same u and Gumbel noise, ours and the plain expression emit the same.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from posttrain.kernels import cpu, verify_draft_tokens
from posttrain.model.sampling import filter_logits

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

V, K = 49_152, 4


def plain(drafted, draft, target, temperature, top_k, top_p, u=None, gumbel=None):
    """Whole probabilities of every row, in float32."""
    p, q = (_masked(logits, temperature, top_k, top_p).softmax(-1) for logits in (target, draft))
    px, qx = p[:, :K].gather(2, drafted[..., None])[..., 0], q.gather(2, drafted[..., None])[..., 0]
    u = torch.rand_like(px) if u is None else u
    n = (u < px / qx).long().cumprod(1).sum(1)
    rows = torch.arange(len(n))
    remainder = (p[:, :K] - q).clamp(min=0)
    weights = torch.cat([remainder, p[:, K:]], 1)[rows, n]
    token = torch.multinomial(weights, 1)[:, 0] if gumbel is None else (weights.log() + gumbel).argmax(1)
    tokens = torch.cat([drafted, token[:, None]], 1).where(torch.arange(K + 1) < n[:, None], -1)
    return tokens.scatter(1, n[:, None], token[:, None]), n


def _masked(logits, temperature, top_k, top_p):
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        largest, order = logits.sort(descending=True)
        probabilities = largest.softmax(-1)
        excluded = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter_(-1, order, excluded), -torch.inf)
    return logits


def transformers_sampling(drafted, draft, target):
    from transformers.generation.utils import _speculative_sampling

    return _speculative_sampling(drafted, draft.float(), K, target.float(), False)


def case(B: int, setting):
    torch.manual_seed(0)
    target = (4 * torch.randn(B, K + 1, V)).bfloat16()
    draft = (target[:, :K].float() + torch.randn(B, K, V)).bfloat16()
    noise = -torch.empty(B, K, V).exponential_().log()
    return (filter_logits(draft, *setting) + noise).argmax(2), draft, target


def compare(B: int, setting, options) -> dict:
    given = case(B, setting)
    num = torch.full((B,), K)
    u, gumbel = torch.rand(B, K), -torch.empty(B, V).exponential_().log()
    ours = verify_draft_tokens(*given, num, *setting, uniforms=u, gumbel=gumbel)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain(*given, *setting, u, gumbel), strict=True))
    peer = importlib.util.find_spec("transformers") and B == 1 and setting == (1.0, 0, 1.0)
    candidates = {
        "posttrain": lambda: verify_draft_tokens(*given, num, *setting, seed=1),
        "plain": lambda: plain(*given, *setting),
        "transformers": (lambda: transformers_sampling(*given)) if peer else None,
    }
    name = f"B={B} K={K} T={setting[0]} k={setting[1]} p={setting[2]}"
    times = _bench.in_turn(candidates, options)
    return _bench.row(name, times, 2 * V * B * (2 * K + 2), _bench.bandwidth(options))


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    cases = (1, (1.0, 0, 1.0)), (8, (1.0, 0, 1.0)), (1, (0.8, 50, 0.95)), (8, (0.8, 50, 0.95))
    rows = [compare(B, setting, options) for B, setting in cases]
    _bench.save("spec_verify", rows, options, {"V": V, "K": K, **cpu.describe()})


if __name__ == "__main__":
    main()
