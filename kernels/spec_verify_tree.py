"""Verification of a tree of drafted tokens, from logits, and the attention among its nodes; a chain is in spec_verify.py.

A node's children are tried in turn: x is accepted iff u < p(x) / q(x), and a rejection leaves norm(max(p - q, 0)) of p for the
next (SpecInfer, arXiv:2305.09781, algorithm 2), and of q, where children were drawn without replacement, norm(q with q(x) = 0).
What is left of p after the last child is drawn from. Chosen children (draft_logits None, as in EAGLE's and Medusa's trees): q is
one-hot at each.
After rejections of drawn children p is max(p_0 - a q_0, 0) / S: two numbers, of which one needs a pass over the row.

node_tokens    int64 (B, N)                nodes after the root; request b has num_nodes[b]
parents        int64 (N,) or (B, N)        node index, -1 the root; a parent comes before its children, siblings as they are tried
target_logits  float (B, N + 1, V)         row 0 the root's, row i + 1 node i's
draft_logits   float (B, N + 1, V') | None row of the parent: what its children were drawn from
num_nodes      int64 (B,)
tokens         int64 (B, D + 1)            the accepted path's, then one more, then -1
num_accepted   int64 (B,)
path           int64 (B, D)                the accepted path's nodes, then -1

Noise, greedy requests, ids that cannot have been drawn: as in spec_verify.py; u is a node's own. Oracle: reference/spec_verify.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from ._library import define
from .spec_verify import (
    _NOISE,
    _SETTING,
    check_devices,
    check_logits,
    noise_arguments,
    sampling_arguments,
)
from .spec_verify_tree_gpu import tree_attention_triton, verify_draft_tree_triton


def _fake(node_tokens, parents, target_logits, draft_logits, num_nodes, t, k, p, parameters, with_replacement, depth, *noise):
    B = len(node_tokens)
    return node_tokens.new_empty(B, depth + 1), node_tokens.new_empty(B), node_tokens.new_empty(B, depth)


define(
    "verify_draft_tree(Tensor node_tokens, Tensor parents, Tensor target_logits, Tensor? draft_logits, Tensor num_nodes, "
    f"{_SETTING}, bool with_replacement, SymInt depth, {_NOISE}) -> (Tensor, Tensor, Tensor)",
    _fake,
    CPU=lambda *given: cpu.verify_draft_tree(*given),
    CUDA=verify_draft_tree_triton,
)


def verify_draft_tree(
    tokens: Tensor,
    parents: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    num_nodes: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    *,
    with_replacement: bool = True,
    uniforms: Tensor | None = None,
    gumbel: Tensor | None = None,
    seed: int | Tensor | None = None,
    offsets: int | Tensor = 0,
    max_depth: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens int64 (B, D + 1), num_accepted int64 (B,), path int64 (B, D)), the latter two -1 behind the last, of B trees.

    tokens int64 (B, N); parents int64 (N,) or (B, N); target_logits (B, N + 1, V), row 0 the root's; draft_logits (B, N + 1, V') by
    parent, or None for children that were not drawn; num_nodes int64 (B,). D is max_depth: deeper nodes are as if not there, and
    None is N, deep enough for all. Settings, noise (uniforms (B, N)) and errors are those of `verify_draft_tokens`.
    """
    if tokens.dim() != 2 or num_nodes.shape != tokens.shape[:1] or parents.shape not in (tokens.shape, tokens.shape[1:]):
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, parents {tuple(parents.shape)}, num_nodes {tuple(num_nodes.shape)}; "
            "expected (B, N), (N,) or (B, N), and (B,)"
        )
    for name, tensor in (("tokens", tokens), ("parents", parents), ("num_nodes", num_nodes)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}; expected int64")
    B, N = tokens.shape
    check_logits(target_logits, draft_logits, (B, N), N + 1)
    device = target_logits.device
    setting = sampling_arguments(B, temperature, top_k, top_p, device)
    noise = noise_arguments(B, N, target_logits.shape[2], uniforms, gumbel, seed, offsets, device)
    check_devices(
        device, tokens=tokens, parents=parents, draft_logits=draft_logits, num_nodes=num_nodes, uniforms=uniforms, gumbel=gumbel,
        seed=seed, offsets=offsets,
    )  # fmt: skip
    depth = N if max_depth is None else min(max_depth, N)
    op = torch.ops.posttrain.verify_draft_tree
    return op(tokens, parents, target_logits, draft_logits, num_nodes, *setting, with_replacement, depth, *noise)


def _attention_fake(parents):
    B, N = parents.shape
    return parents.new_empty(B, N + 1, N + 1, dtype=torch.bool), parents.new_empty(B, N + 1)


define(
    "tree_attention(Tensor parents) -> (Tensor, Tensor)",
    _attention_fake,
    CPU=lambda parents: cpu.tree_attention(parents),
    CUDA=tree_attention_triton,
)


def tree_attention(parents: Tensor) -> tuple[Tensor, Tensor]:
    """(mask bool (N + 1, N + 1), depth int64 (N + 1,)) of a tree, the root first; of parents (B, N), with B in front of both.

    mask[i, j]: node i sees node j, itself or an ancestor. depth is what a node adds to the root's position. On parents' device.
    Raises ValueError, on a CPU, where a parent does not come before its child.
    """
    if parents.dim() not in (1, 2) or parents.dtype != torch.int64:
        raise ValueError(f"parents are {parents.dtype} {tuple(parents.shape)}; expected int64 (N,) or (B, N)")
    mask, depth = torch.ops.posttrain.tree_attention(parents if parents.dim() == 2 else parents[None])
    return (mask, depth) if parents.dim() == 2 else (mask[0], depth[0])
