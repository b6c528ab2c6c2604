"""Verification of drafted tokens in PyTorch (kernels/spec_verify.py, spec_verify_tree.py): chains batch by batch, as many rows at
a time as stay in the cache; trees a request at a time, no row looked at before it is reached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pytorch_logit_filter import cleaned, filter_rows

ACCEPT, DRAW, DRAFT = 0, 1, 2  # streams of noise
_WORD = 0xFFFFFFFF
_WEYL = 0x9E3779B97F4A7C15  # between the seeds of a batch that was given one
_LOGITS = 2**20  # at a time


def request_seeds(B: int, seed: int, seeds: Tensor | None) -> Tensor:
    """Each request's own seed, int64 (B,)."""
    return seeds if seeds is not None else torch.arange(B) * (_WEYL - 2**64) + seed


def philox(n: int, stream: int, offsets: Tensor, seeds: Tensor) -> Tensor:
    """Words 0 .. n - 1 of each request's stream, int64 (B, n): word i is word i mod 4 of counter (i div 4, stream, offset)."""
    words = _rounds(torch.arange(-(-n // 4)), stream, offsets[:, None], seeds[:, None])
    return torch.stack(torch.broadcast_tensors(*words), 2).flatten(1)[:, :n]


def _rounds(counters: Tensor, stream: int, offsets: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    """The four words of each counter (counters, stream, offsets), which broadcast, under `seeds`."""
    c0, c1, c2, c3 = counters, torch.tensor(stream), offsets & _WORD, offsets >> 32 & _WORD
    k0, k1 = seeds & _WORD, seeds >> 32 & _WORD
    for _ in range(10):
        # the products have 64 bits; int64 keeps them, and a shift's copies of the sign are masked off
        low_product, high_product = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c1, c3 = (high_product >> 32 & _WORD) ^ c1 ^ k0, (low_product >> 32 & _WORD) ^ c3 ^ k1
        c0, c1, c2, c3 = c1, high_product & _WORD, c3, low_product & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def uniform_noise(n: int, offsets: Tensor, seeds: Tensor) -> Tensor:
    """u in [0, 1) of nodes 0 .. n - 1, float64 (B, n) of 24 bits."""
    return (philox(n, ACCEPT, offsets, seeds) >> 8).double() / 2**24


def gumbel_noise(n: int, offsets: Tensor, seeds: Tensor, dtype: torch.dtype, stream: int = DRAW) -> Tensor:
    """Standard Gumbel (B, n) of tokens 0 .. n - 1."""
    return gumbel_of(philox(n, stream, offsets, seeds), dtype)


def gumbel_of(words: Tensor, dtype: torch.dtype) -> Tensor:
    """-log(-log(1 - v)) of words v 2^32: v is small where the noise is large, so that all 32 bits tell winners apart."""
    v = (words.to(dtype) + 0.5) / 2**32
    return -(-v.clamp(max=1 - 2**-24)).log1p().neg_().log_()


def _probabilities_of(tokens: Tensor, logits: Tensor, setting: tuple[float, int, float]) -> Tensor:
    """p(token) of each row, (N,): tokens (N,), logits (N, V); 0 where a token is no word of the row's."""
    V = logits.shape[1]
    found = []
    for x, rows in zip(tokens.split(_rows(V)), logits.split(_rows(V)), strict=True):
        z = cleaned(rows)
        threshold, log_total = filter_rows(z, *setting)
        zx = z.gather(1, x.clamp(0, V - 1)[:, None])[:, 0]
        kept = (x >= 0) & (x < V) & (zx >= threshold) & (zx > -torch.inf)
        found.append((zx / setting[0] - log_total).exp().where(kept, 0))
    return torch.cat(found)


def _rows(V: int) -> int:
    return max(1, _LOGITS // V)


def check_num(name: str, num: Tensor, most: int, why: str) -> None:
    """ValueError unless 0 <= num <= most, for every request."""
    if bool(((num < 0) | (num > most)).any()):
        raise ValueError(f"{name} is {num.tolist()}; expected 0 to {most}, {why}")


def check_parents(parents: Tensor, used: Tensor | None = None) -> None:
    """ValueError unless every (used) node's parent is -1 or an earlier node."""
    wrong = (parents < -1) | (parents >= torch.arange(parents.shape[-1]))
    if used is not None:
        wrong &= used
    if bool(wrong.any()):
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the parent of node {i} of request {b} is {int(parents[b, i])}; expected -1 (the root) or a node before it"
        )


def check_drawn(tokens: Tensor, num_accepted: Tensor) -> None:
    """ValueError where a request stopped at a row from which nothing can be drawn."""
    none = (tokens.gather(1, num_accepted[:, None])[:, 0] < 0).nonzero()
    if len(none):
        b = int(none[0])
        raise ValueError(
            f"target_logits of request {b} hold no finite number after {int(num_accepted[b])} accepted tokens, all NaN or -inf: "
            "no token can be drawn"
        )


def verify_draft_tokens(
    draft_tokens, draft_logits, target_logits, num_draft, temperature, top_k, top_p, parameters, uniforms, gumbel, seed, seeds,
    offsets,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the op (kernels/spec_verify.py)."""
    B, K = draft_tokens.shape
    check_num("num_draft", num_draft, K, "the drafts that draft_tokens has room for")
    tokens, num_accepted = torch.full((B, K + 1), -1), torch.zeros(B, dtype=torch.int64)
    seeds = request_seeds(B, seed, seeds)
    offsets = torch.zeros(B, dtype=torch.int64) if offsets is None else offsets
    for setting, mine in _by_setting(B, temperature, top_k, top_p, parameters):
        for some in mine.split(_rows(target_logits.shape[2] * (K + 1))):
            draft = None if draft_logits is None else draft_logits[some]
            drafted, target, num = draft_tokens[some], target_logits[some], num_draft[some]
            if setting[0] == 0:
                best = cleaned(target).argmax(2)
                accepted = drafted == best[:, :K]
                n = _leading(accepted, num)
                token = best.gather(1, n[:, None])[:, 0]
                row = target[torch.arange(len(some)), n]
                token = token.where(cleaned(row).amax(1) > -torch.inf, -1)
            else:
                u = uniform_noise(K, offsets[some], seeds[some]) if uniforms is None else uniforms[some]
                n, q_rows, without = _accept(drafted, draft, target, num, setting, u)
                row = target[torch.arange(len(some)), n]
                g = None if gumbel is None else gumbel[some]
                token = _draw(row, q_rows, without, setting, g, offsets[some], seeds[some])
            kept = drafted.new_full((len(some), K + 1), -1)
            kept[:, :K] = drafted.where(torch.arange(K) < n[:, None], -1)
            tokens[some] = kept.scatter_(1, n[:, None], token[:, None])
            num_accepted[some] = n
    check_drawn(tokens, num_accepted)
    return tokens, num_accepted


def _by_setting(B: int, temperature, top_k, top_p, parameters):
    """((temperature, top_k, top_p), the requests under it), one after another."""
    if parameters is None:
        yield (temperature, top_k, top_p), torch.arange(B)
        return
    settings, which = parameters.unique(dim=0, return_inverse=True)
    for i, (t, k, p) in enumerate(settings.tolist()):
        yield (t, int(k), p), (which == i).nonzero()[:, 0]


def _leading(accepted: Tensor, num: Tensor) -> Tensor:
    """How many of the first num are accepted before one is not."""
    return (accepted & (torch.arange(accepted.shape[1]) < num[:, None])).long().cumprod(1).sum(1)


def _accept(drafted, draft, target, num, setting, u):
    """(accepted drafts (B,); q of the refused row (B, V') or None; the chosen word that was refused (B,), or -1)."""
    (B, K), V = drafted.shape, target.shape[2]
    inside = (drafted >= 0) & (drafted < V)
    px = _probabilities_of(drafted.flatten(), target[:, :K].reshape(B * K, V), setting).view(B, K) if B * K else u
    if draft is None:
        qx = inside.to(px.dtype)
    else:
        qx = _probabilities_of(drafted.flatten(), draft.reshape(B * K, -1), setting).view(B, K) if B * K else u
    drawable = inside & (qx > 0)
    n = _leading(drawable & (u < px / qx), num)  # Leviathan et al., algorithm 1
    at = n.clamp(max=K - 1)[:, None]
    if K == 0:
        return n, None, torch.full((B,), -1)
    subtract = (n < num) & drawable.gather(1, at)[:, 0]
    if draft is None:
        return n, None, drafted.gather(1, at)[:, 0].where(subtract, -1)
    z = cleaned(draft[torch.arange(B), at[:, 0]])
    threshold, log_total = filter_rows(z, *setting)
    q = (z / setting[0] - log_total[:, None]).exp_()
    return n, q.masked_fill_((z < threshold[:, None]) | (z == -torch.inf) | ~subtract[:, None], 0), torch.full((B,), -1)


def _draw(row: Tensor, q: Tensor | None, without: Tensor, setting, gumbel, offsets: Tensor, seeds: Tensor) -> Tensor:
    """Tokens (B,) by max(p - q, 0), or p where that is nothing; -1 where p is nothing."""
    z = cleaned(row)
    threshold, log_total = filter_rows(z, *setting)
    p = (z / setting[0] - log_total[:, None]).exp_().masked_fill_((z < threshold[:, None]) | (z == -torch.inf), 0)
    left = p
    if q is not None:
        left = p.clone()
        left[:, : q.shape[1]].sub_(q).clamp_(min=0)
    elif bool((without >= 0).any()):
        left = p.scatter(
            1, without.clamp(min=0)[:, None], p.gather(1, without.clamp(min=0)[:, None]).where(without[:, None] < 0, 0)
        )
    left = left.where(left.any(1, keepdim=True), p)
    return _race(left, gumbel, offsets, seeds).where(p.any(1), -1)


def _race(weights: Tensor, gumbel: Tensor | None, offsets: Tensor, seeds: Tensor) -> Tensor:
    """argmax of log weight + noise (B,), the noise of words that have no weight not made where these are most."""
    scores = weights.log()
    if gumbel is not None:
        return (scores + gumbel.to(weights.dtype)).argmax(1)
    b, v = weights.nonzero(as_tuple=True)
    if 16 * len(v) > weights.numel():
        return (scores + gumbel_noise(weights.shape[1], offsets, seeds, weights.dtype)).argmax(1)
    words = torch.stack(_rounds(v >> 2, DRAW, offsets[b], seeds[b])).gather(0, (v & 3)[None])[0]
    scores[b, v] += gumbel_of(words, weights.dtype)
    return scores.argmax(1)


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
    node = -1
    out: list[int] = []
    path: list[int] = []
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


def _setting(b: int, temperature: float, top_k: int, top_p: float, parameters: Tensor | None) -> tuple[float, int, float]:
    if parameters is None:
        return temperature, top_k, top_p
    temperature, k, top_p = parameters[b].tolist()
    return temperature, int(k), top_p


def _noise(logits, uniforms, gumbel, seed, seeds, offsets, N):
    """b -> (uniforms(i), gumbel()), passed or made when asked for."""
    B, V, dtype = len(logits), logits.shape[-1], torch.promote_types(logits.dtype, torch.float32)
    seeds = request_seeds(B, seed, seeds)
    offsets = torch.zeros(B, dtype=torch.int64) if offsets is None else offsets

    def of_request(b: int):
        own = offsets[b : b + 1], seeds[b : b + 1]
        us: list[float] = [] if uniforms is None else uniforms[b].tolist()

        def uniform(i: int) -> float:
            if not us:
                us.extend(uniform_noise(N, *own)[0].tolist())
            return us[i]

        return uniform, lambda: gumbel_noise(V, *own, dtype)[0] if gumbel is None else gumbel[b].to(dtype)

    return of_request


def verify_draft_tree(
    node_tokens, parents, target_logits, draft_logits, num_nodes, temperature, top_k, top_p, parameters, with_replacement, depth,
    uniforms, gumbel, seed, seeds, offsets,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op (kernels/spec_verify_tree.py)."""
    B, N = node_tokens.shape
    check_num("num_nodes", num_nodes, N, "the nodes that node_tokens has room for")
    check_parents(parents.expand(B, N), torch.arange(N) < num_nodes[:, None])
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
        uniform, race = noise(b)
        kept, path = verify_request(drafted, children, target_logits[b], rows, setting, uniform, race, with_replacement)
        tokens[b, : len(kept)], paths[b, : len(path)] = torch.tensor(kept), torch.tensor(path, dtype=torch.int64)
        num_accepted[b] = len(path)
    check_drawn(tokens, num_accepted)
    return tokens, num_accepted, paths


def tree_attention(parents: Tensor) -> tuple[Tensor, Tensor]:
    """As the op: parents (B, N) -> (mask bool (B, N + 1, N + 1), depth int64 (B, N + 1))."""
    check_parents(parents)
    B, N = parents.shape
    mask, depth = torch.eye(N + 1, dtype=torch.bool).repeat(B, 1, 1), torch.zeros(B, N + 1, dtype=torch.int64)
    rows = torch.arange(B)
    for i in range(N):
        above = parents[:, i] + 1
        mask[:, i + 1] |= mask[rows, above]
        depth[:, i + 1] = depth[rows, above] + 1
    return mask, depth
