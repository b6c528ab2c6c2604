"""Verification of drafted tokens in PyTorch (kernels/spec_verify.py, spec_verify_tree.py), a request at a time; no row is looked at
before it is reached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pytorch_logit_filter import cleaned, filter_rows

ACCEPT, DRAW, DRAFT = 0, 1, 2  # streams of noise
_WORD = 0xFFFFFFFF
_WEYL = 0x9E3779B97F4A7C15  # between the seeds of a batch that was given one


def request_seed(seed: int, seeds: Tensor | None, b: int) -> int:
    """Request b's own seed, unsigned 64 bits."""
    return (int(seeds[b]) if seeds is not None else seed + b * _WEYL) % 2**64


def philox(n: int, stream: int, offset: int, seed: int) -> Tensor:
    """Words 0 .. n - 1 of a request's stream, int64 (n,): word i is word i mod 4 of counter (i div 4, stream, offset)."""
    c0 = torch.arange(-(-n // 4))
    c1, c2, c3 = (torch.tensor(word) for word in (stream, offset & _WORD, offset >> 32 & _WORD))
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        # the products have 64 bits; int64 keeps them, and a shift's copies of the sign are masked off
        low_product, high_product = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c1, c3 = (high_product >> 32 & _WORD) ^ c1 ^ k0, (low_product >> 32 & _WORD) ^ c3 ^ k1
        c0, c1, c2, c3 = c1, high_product & _WORD, c3, low_product & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), 1).flatten()[:n]


def uniform_noise(n: int, offset: int, seed: int) -> Tensor:
    """u in [0, 1) of nodes 0 .. n - 1, float64 (n,) of 24 bits."""
    return (philox(n, ACCEPT, offset, seed) >> 8).double() / 2**24


def gumbel_noise(n: int, offset: int, seed: int, dtype: torch.dtype, stream: int = DRAW) -> Tensor:
    """Standard Gumbel (n,): -log(-log(1 - v)), v small where the noise is large, so that all 32 bits of v tell winners apart."""
    v = (philox(n, stream, offset, seed).to(dtype) + 0.5) / 2**32
    return -(-v.clamp(max=1 - 2**-24)).log1p().neg_().log_()


def _greedy(row: Tensor) -> int:
    """The first of the largest; -1 where no logit is finite."""
    z = cleaned(row)
    best = int(z.argmax())
    return best if z[best] > -torch.inf else -1


def _probabilities(row: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(V,), zeros where no logit is finite."""
    z = cleaned(row)
    threshold, log_total = filter_rows(z[None], temperature, top_k, top_p)
    p = (z / temperature - log_total).exp_()
    return p.masked_fill_((z < threshold) | (z == -torch.inf), 0)


def verify_request(
    tokens: list[int], children: dict[int, list[int]], target: Tensor, draft: Tensor | None, setting: tuple[float, int, float],
    uniforms, gumbel, with_replacement: bool = True,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """(tokens: accepted and one more, path: nodes). `children` of each node, the root being -1; target (N + 1, V), draft rows
    likewise by parent or None; uniforms(i) and gumbel() give the noise when it is wanted."""
    temperature, top_k, top_p = setting
    node, out, path = -1, [], []
    while True:
        row = target[node + 1]
        if temperature == 0:
            draw = _greedy(row)
            accepted = next((i for i in children.get(node, ()) if tokens[i] == draw >= 0), None)
        else:
            p = _probabilities(row, *setting)
            q = _probabilities(draft[node + 1], *setting) if draft is not None and node in children else None
            accepted, left = _try_children(children.get(node, ()), tokens, p, q, uniforms, with_replacement)
            draw = -1
            if accepted is None and bool(p.any()):
                draw = int(((left if bool(left.any()) else p).log() + gumbel()).argmax())
        if accepted is None:
            return [*out, draw], path
        node = accepted
        path.append(node)
        out.append(tokens[node])


def _try_children(children, tokens, p: Tensor, q: Tensor | None, uniforms, with_replacement: bool):
    """(the accepted child or None, what is left of p, not normalised).

    After rejections p is max(p0 - a q0, 0) / S, with S its sum: to subtract q0 / rest, rest being q0's mass on what may still be
    drawn, adds S / rest to a. So p0 and q0 stay as they are.
    """
    p0, a, S = p, 0.0, 1.0
    left, rest = q, 1.0  # of q without replacement
    for i in children:
        x = tokens[i]
        drawn_from = 1.0 if left is None else float(left[x]) if 0 <= x < len(left) else 0.0
        if not 0 <= x < len(p0) or drawn_from == 0:
            continue  # it cannot have been drawn: passed over
        if uniforms(i) < (float(p[x]) / S if S > 0 else 0.0) / (drawn_from / rest):  # Leviathan et al., algorithm 1
            return i, p
        if q is None or left is None:
            p = p.index_fill(0, torch.tensor(x), 0)
        else:
            a += S / rest
            p = p0.clone()
            p[: len(q)] = (p0[: len(q)] - a * q).clamp_(min=0)
            if not with_replacement:
                left = left.index_fill(0, torch.tensor(x), 0)
                rest = float(left.sum())
        S = float(p.sum())
    return None, p


def verify_draft_tokens(
    draft_tokens, draft_logits, target_logits, num_draft, temperature, top_k, top_p, parameters, uniforms, gumbel, seed, seeds,
    offsets,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the op (kernels/spec_verify.py)."""
    B, K = draft_tokens.shape
    tokens = torch.full((B, K + 1), -1)
    num_accepted = torch.zeros(B, dtype=torch.int64)
    noise = _noise(target_logits, uniforms, gumbel, seed, seeds, offsets, K)
    for b, (drafted, n) in enumerate(zip(draft_tokens.tolist(), num_draft.tolist(), strict=True)):
        rows = None if draft_logits is None else draft_logits[b]
        kept, path = verify_request(
            drafted, {i - 1: [i] for i in range(n)}, target_logits[b], rows, _setting(b, temperature, top_k, top_p, parameters),
            *noise(b),
        )  # fmt: skip
        tokens[b, : len(kept)] = torch.tensor(kept)
        num_accepted[b] = len(path)
    return tokens, num_accepted


def _setting(b: int, temperature: float, top_k: int, top_p: float, parameters: Tensor | None) -> tuple[float, int, float]:
    if parameters is None:
        return temperature, top_k, top_p
    temperature, k, top_p = parameters[b].tolist()
    return temperature, int(k), top_p


def _noise(logits, uniforms, gumbel, seed, seeds, offsets, N):
    """b -> (uniforms(i), gumbel()), passed or made when asked for."""
    V, dtype = logits.shape[-1], torch.promote_types(logits.dtype, torch.float32)

    def of_request(b: int):
        offset, own = 0 if offsets is None else int(offsets[b]), request_seed(seed, seeds, b)
        us: list[float] = [] if uniforms is None else uniforms[b].tolist()

        def uniform(i: int) -> float:
            if not us:
                us.extend(uniform_noise(N, offset, own).tolist())
            return us[i]

        return uniform, lambda: gumbel_noise(V, offset, own, dtype) if gumbel is None else gumbel[b].to(dtype)

    return of_request


def verify_draft_tree(
    node_tokens, parents, target_logits, draft_logits, num_nodes, temperature, top_k, top_p, parameters, with_replacement, depth,
    uniforms, gumbel, seed, seeds, offsets,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op (kernels/spec_verify_tree.py)."""
    B, N = node_tokens.shape
    tokens, paths = torch.full((B, depth + 1), -1), torch.full((B, depth), -1)
    num_accepted = torch.zeros(B, dtype=torch.int64)
    noise = _noise(target_logits, uniforms, gumbel, seed, seeds, offsets, N)
    for b, (drafted, n) in enumerate(zip(node_tokens.tolist(), num_nodes.tolist(), strict=True)):
        children: dict[int, list[int]] = {}
        level = {-1: 0}
        for i, parent in enumerate((parents if parents.dim() == 1 else parents[b])[:n].tolist()):
            level[i] = level[parent] + 1
            if level[i] <= depth:
                children.setdefault(parent, []).append(i)
        rows = None if draft_logits is None else draft_logits[b]
        setting = _setting(b, temperature, top_k, top_p, parameters)
        kept, path = verify_request(drafted, children, target_logits[b], rows, setting, *noise(b), with_replacement)
        tokens[b, : len(kept)], paths[b, : len(path)] = torch.tensor(kept), torch.tensor(path, dtype=torch.int64)
        num_accepted[b] = len(path)
    return tokens, num_accepted, paths


def tree_attention(parents: Tensor) -> tuple[Tensor, Tensor]:
    """As the op: parents (B, N) -> (mask bool (B, N + 1, N + 1), depth int64 (B, N + 1))."""
    B, N = parents.shape
    mask, depth = torch.eye(N + 1, dtype=torch.bool).repeat(B, 1, 1), torch.zeros(B, N + 1, dtype=torch.int64)
    rows = torch.arange(B)
    for i in range(N):
        above = parents[:, i] + 1
        mask[:, i + 1] |= mask[rows, above]
        depth[:, i + 1] = depth[rows, above] + 1
    return mask, depth
