"""Medusa's typical acceptance (arXiv:2401.10774, section 2.3.1): LOSSY, and so never chosen unless it is named.

    node x is accepted iff p(x) > min(epsilon, alpha exp(-H(p)))        p the target's distribution after its parent, H its entropy

and its parent was. The deepest accepted node wins, of equally deep ones that of the largest sum of log p. The token after it is
drawn from p there. What comes out is plausible text by the target, and not distributed as the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.model.sampling import filter_logits


def accept_typical(
    tokens: Tensor,
    parents: Tensor,
    target_logits: Tensor,
    num_nodes: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    epsilon: float = 0.3,
    alpha: float = 0.09,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, num_accepted, path) as `kernels.verify_draft_tree` returns them, of tokens (B, N), parents (N,) or (B, N),
    target_logits (B, N + 1, V) and num_nodes (B,). ValueError at temperature 0, where typical tokens are not defined (verification
    is exact then), and for epsilon or alpha outside (0, 1]."""
    if temperature <= 0:
        raise ValueError(f"typical acceptance needs a temperature above 0, given {temperature}; at 0 use the exact verification")
    if not (0 < epsilon <= 1 and 0 < alpha <= 1):
        raise ValueError(f"epsilon is {epsilon} and alpha {alpha}; expected numbers in (0, 1]")
    B, N = tokens.shape
    parents = parents.expand(B, N)
    log_p = filter_logits(target_logits, temperature, top_k, top_p).log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    bar = torch.minimum(torch.full_like(entropy, epsilon), alpha * (-entropy).exp())
    above = parents + 1  # the row of logits that judges each node
    node_log_p = log_p.gather(1, above[..., None].expand(-1, -1, log_p.shape[2])).gather(2, tokens.clamp_min(0)[..., None])[..., 0]
    good = (node_log_p.exp() > bar.gather(1, above)) & (tokens >= 0) & (torch.arange(N, device=tokens.device) < num_nodes[:, None])
    results = []
    for b in range(B):
        best: tuple[int, float, int] = (0, 0.0, -1)
        reached: dict[int, tuple[int, float]] = {-1: (0, 0.0)}
        for i in range(N):  # parents come first
            parent = int(parents[b, i])
            if bool(good[b, i]) and parent in reached:
                depth, total = reached[parent]
                reached[i] = depth + 1, total + float(node_log_p[b, i])
                if (depth + 1, reached[i][1]) > best[:2]:
                    best = (*reached[i], i)
        path: list[int] = []
        node = best[2]
        while node >= 0:
            path.insert(0, node)
            node = int(parents[b, node])
        last = torch.multinomial(p[b, best[2] + 1], 1, generator=generator)
        results.append((path, [int(tokens[b, i]) for i in path] + [int(last)]))
    deepest = max(len(path) for path, _ in results)

    def padded(rows: list[list[int]], width: int) -> Tensor:
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=tokens.device).view(B, width)

    num_accepted = torch.tensor([len(path) for path, _ in results], device=tokens.device)
    return padded([said for _, said in results], deepest + 1), num_accepted, padded([path for path, _ in results], deepest)
