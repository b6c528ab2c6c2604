"""Oracle of speculative verification: from drafted tokens to tokens distributed as the target's own, in float64 loops.

A chain (Leviathan, Kalman, Matias, arXiv:2211.17192, algorithm 1; Chen et al., arXiv:2302.01318, algorithm 2): the draft x ~ q is
accepted iff
    u q(x) < p(x)                                                                                   (1)
with u uniform on [0, 1); the first rejection is replaced by a draw from
    norm(max(p - q, 0))                                                                             (2)
and after the last acceptance one more token is drawn from p. So x has probability
    min(p, q)(x) + (1 - sum min(p, q)) norm(max(p - q, 0))(x) = p(x)
A tree (SpecInfer, Miao et al., arXiv:2305.09781, algorithm 2; EAGLE, Li et al., arXiv:2401.15077): the children of a node are tried
in turn by (1); a rejection changes p by (2) for the next of them, and, where they were drawn without replacement, also
    q <- norm(q with q(x) = 0)                                                                      (3)
What is left of p after the last child is drawn from. Children that were chosen, not drawn, have q one-hot at each of them: (1) is
u < p(x), (2) takes x out of p. A chain is a tree of single children.

A draw is a Gumbel race: argmax of log weight + gumbel, the first of equals. Temperature 0: a child is accepted iff it is the row's
argmax, the first of equals, and that is the draw.

What cannot have been drawn is passed over, neither accepted nor subtracted: ids outside [0, V), and x with q(x) = 0. Where (2) is
empty, which exact arithmetic excludes after a rejection, later children are rejected and p itself is drawn from. A row without a
finite logit gives no token: -1.
"""

import math

import numpy as np

from .logit_filter import cleaned, filter_row
from .philox import WORD, philox4x32

ACCEPT, DRAW, DRAFT = 0, 1, 2  # streams: what a word of noise is for


def noise_word(seed: int, offset: int, stream: int, i: int) -> int:
    """Word i of a request's noise: word i mod 4 of counter (i div 4, stream, offset's 64 bits) under its seed."""
    counter = (i // 4, stream, offset % WORD, offset // WORD % WORD)
    return philox4x32(counter, (seed % WORD, seed // WORD % WORD))[i % 4]


def uniform(seed: int, offset: int, i: int) -> float:
    """Node i's u in [0, 1): 24 bits, so that float32 holds it."""
    return (noise_word(seed, offset, ACCEPT, i) >> 8) / 2**24


def gumbel(seed: int, offset: int, i: int, stream: int = DRAW) -> float:
    """Token i's standard Gumbel noise -log(-log(1 - v)), v in (0, 1) with all 32 bits at the end that wins races."""
    return -math.log(-math.log1p(-min((noise_word(seed, offset, stream, i) + 0.5) / WORD, 1 - 2**-24)))


def race(weights, noise) -> int:
    """argmax of log weight + noise over positive weights, the first of equals; -1 where none is positive."""
    best, winner = -math.inf, -1
    for v, weight in enumerate(weights):
        if weight > 0 and (winner < 0 or math.log(weight) + noise[v] > best):
            best, winner = math.log(weight) + noise[v], v
    return winner


def greedy(row) -> int:
    """The first of the largest finite logits; -1 where there is none."""
    z = cleaned(row)
    return z.index(max(z)) if max(z) > -math.inf else -1


def verify_tree(
    tokens, parents, target_logits, draft_logits, temperature, top_k, top_p, uniforms, noise, with_replacement=True
) -> tuple[list[int], list[int]]:
    """One request: (tokens: the accepted path's and one more, path: its nodes).

    tokens, parents: N nodes, parents first, -1 the root, siblings in the order they are tried. target_logits (N + 1, V): row 0 the
    root's, row i + 1 node i's. draft_logits (N + 1, V'), V' <= V: a row is what that node's children were drawn from; None: chosen.
    uniforms (N,), one for each node; noise (V,), for the one draw.
    """
    V = len(target_logits[0])
    node = -1
    path: list[int] = []
    out: list[int] = []
    while True:
        row = target_logits[node + 1]
        children = [i for i, parent in enumerate(parents) if parent == node]
        if temperature == 0:
            best = greedy(row)
            accepted = next((i for i in children if tokens[i] == best >= 0), None)
            draw = best
        else:
            p = filter_row(row, temperature, top_k, top_p)[2]
            q = None
            if draft_logits is not None and children:
                drafted = filter_row(draft_logits[node + 1], temperature, top_k, top_p)[2]
                q = np.concatenate([drafted, np.zeros(V - len(drafted))])
            accepted, left = _try_children(children, tokens, p, q, uniforms, with_replacement)
            draw = race(left if left.sum() > 0 else p, noise)
        if accepted is None:
            return [*out, draw], path
        node = accepted
        path.append(node)
        out.append(int(tokens[node]))


def _try_children(children, tokens, p, q, uniforms, with_replacement):
    """(the accepted child or None, what is left of p)."""
    for i in children:
        x = int(tokens[i])
        drawn_from = np.eye(len(p))[x] if q is None and 0 <= x < len(p) else q
        if not 0 <= x < len(p) or drawn_from[x] == 0:
            continue  # passed over
        if uniforms[i] < p[x] / drawn_from[x]:  # eq. 1, as a ratio: 1 where p(x) = q(x), which u never reaches
            return i, p
        residual = np.array([max(a - b, 0.0) for a, b in zip(p, drawn_from, strict=True)])  # eq. 2
        p = residual / residual.sum() if residual.sum() > 0 else residual
        if q is not None and not with_replacement:  # eq. 3
            q = np.array([0.0 if v == x else b for v, b in enumerate(q)])
            q = q / q.sum() if q.sum() > 0 else q
    return None, p


def verify_chain(
    draft_tokens, draft_logits, target_logits, num_draft, temperature, top_k, top_p, uniforms, noise
) -> tuple[list[int], int]:
    """One request: (tokens: the accepted drafts and one more, how many were accepted). draft_logits (K, V') or None."""
    n = int(num_draft)
    parents = [i - 1 for i in range(n)]
    tokens, path = verify_tree(draft_tokens[:n], parents, target_logits, draft_logits, temperature, top_k, top_p, uniforms, noise)
    return tokens, len(path)


def tree_attention(parents) -> tuple[np.ndarray, np.ndarray]:
    """(mask bool (N + 1, N + 1): who sees whom, the root first; depth int64 (N + 1,)): a node sees itself and its ancestors."""
    N = len(parents)
    mask, depth = np.eye(N + 1, dtype=bool), np.zeros(N + 1, np.int64)
    for i, parent in enumerate(parents):
        mask[i + 1] |= mask[parent + 1]
        depth[i + 1] = depth[parent + 1] + 1
    return mask, depth
