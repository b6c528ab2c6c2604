"""Rows of logits under temperature, top-k and top-p, and verification of drafted tokens, in C (kernels/cpu/row_filter.h,
row_race.h, spec_verify.c): each row is read once, and only if it is reached."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import native, pytorch_logit_filter, pytorch_spec_verify

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_SETTING: list[Any] = [_D, _L, _D, _P]  # temperature, top_k, top_p, and each row's own
native._library.logit_filter.argtypes = [_P, _I, _L, _L, _L, *_SETTING, _P, _P, _L]
native._library.spec_verify.argtypes = [
    _P, _P, _L, _P, _P, _I, _L, _L, _P, _I, _L, _L, _L, _L, _L, _L, _L, _I, *_SETTING, _P, _P, _L, _P, _P, _P, _P, _P, _L,
]  # fmt: skip
native._library.tree_attention.argtypes = [_P, _L, _L, _P, _P]


def logit_filter(logits: Tensor, temperature: float, top_k: int, top_p: float, parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `pytorch_logit_filter.logit_filter`, which also does float64."""
    if logits.dtype not in native._DTYPES:
        return pytorch_logit_filter.logit_filter(logits, temperature, top_k, top_p, parameters)
    N, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    settings = None if parameters is None else parameters.contiguous()
    threshold, log_total = torch.empty(N, dtype=torch.float32), torch.empty(N, dtype=torch.float32)
    native._check(
        native._library.logit_filter(
            logits.data_ptr(), native._DTYPES[logits.dtype], N, V, logits.stride(0), temperature, top_k, top_p,
            native._address(settings), threshold.data_ptr(), log_total.data_ptr(), native._threads(N * V),
        )
    )  # fmt: skip
    return threshold, log_total


def _takes(target: Tensor, draft: Tensor | None) -> bool:
    return target.dtype in native._DTYPES and (draft is None or draft.dtype in native._DTYPES)


def _verify(
    nodes, parents, target, draft, num, temperature, top_k, top_p, parameters, with_replacement, uniforms, gumbel, seed, seeds,
    offsets, tokens, num_accepted, path,
) -> bool:  # fmt: skip
    """Fill tokens (B, D + 1), num_accepted and path; False where something given is wrong, and then they are not filled."""
    (B, N), V = nodes.shape, target.shape[2]
    target = target if target.stride(2) == 1 else target.contiguous()
    if draft is not None and draft.stride(2) != 1:
        draft = draft.contiguous()
    draft_strides = (0, 0) if draft is None else draft.stride()[:2]
    kept = [None if t is None else t.contiguous() for t in (nodes, parents, num, parameters, seeds, offsets)]
    noise = [None if t is None else t.double().contiguous() for t in (uniforms, gumbel)]
    nodes, parents, num, parameters, seeds, offsets = map(native._address, kept)
    status = native._library.spec_verify(
        nodes, parents, N if kept[1] is not None and kept[1].dim() == 2 else 0, num,
        target.data_ptr(), native._DTYPES[target.dtype], *target.stride()[:2],
        native._address(draft), 0 if draft is None else native._DTYPES[draft.dtype], *draft_strides,
        B, N, V, V if draft is None else draft.shape[2], tokens.shape[1] - 1, with_replacement, temperature, top_k, top_p,
        parameters, native._address(noise[0]), native._address(noise[1]), seed, seeds, offsets, tokens.data_ptr(),
        num_accepted.data_ptr(), native._address(path), native._threads(B * V),
    )  # fmt: skip
    native._check(status < 0)
    return status == 0


def verify_draft_tokens(
    draft_tokens, draft_logits, target_logits, num_draft, temperature, top_k, top_p, parameters, uniforms, gumbel, seed, seeds,
    offsets,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the op; float64 in PyTorch."""
    noise = uniforms, gumbel, seed, seeds, offsets
    if not _takes(target_logits, draft_logits):
        return pytorch_spec_verify.verify_draft_tokens(
            draft_tokens, draft_logits, target_logits, num_draft, temperature, top_k, top_p, parameters, *noise
        )
    B, K = draft_tokens.shape
    tokens, num_accepted = torch.empty(B, K + 1, dtype=torch.int64), torch.empty(B, dtype=torch.int64)
    setting = temperature, top_k, top_p, parameters, True
    if not _verify(draft_tokens, None, target_logits, draft_logits, num_draft, *setting, *noise, tokens, num_accepted, None):
        pytorch_spec_verify.check_num("num_draft", num_draft, K, "the drafts that draft_tokens has room for")
        pytorch_spec_verify.check_drawn(tokens, num_accepted)
    return tokens, num_accepted


def verify_draft_tree(
    node_tokens, parents, target_logits, draft_logits, num_nodes, temperature, top_k, top_p, parameters, with_replacement, depth,
    uniforms, gumbel, seed, seeds, offsets,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the op; float64 in PyTorch."""
    setting, noise = (temperature, top_k, top_p, parameters, with_replacement), (uniforms, gumbel, seed, seeds, offsets)
    if not _takes(target_logits, draft_logits):
        return pytorch_spec_verify.verify_draft_tree(
            node_tokens, parents, target_logits, draft_logits, num_nodes, *setting, depth, *noise
        )
    B, N = node_tokens.shape
    tokens, path = torch.empty(B, depth + 1, dtype=torch.int64), torch.empty(B, depth, dtype=torch.int64)
    num_accepted = torch.empty(B, dtype=torch.int64)
    if not _verify(node_tokens, parents, target_logits, draft_logits, num_nodes, *setting, *noise, tokens, num_accepted, path):
        pytorch_spec_verify.check_num("num_nodes", num_nodes, N, "the nodes that node_tokens has room for")
        pytorch_spec_verify.check_parents(parents.expand(B, N), torch.arange(N) < num_nodes[:, None])
        pytorch_spec_verify.check_drawn(tokens, num_accepted)
    return tokens, num_accepted, path


def tree_attention(parents: Tensor) -> tuple[Tensor, Tensor]:
    """As the op."""
    parents = parents.contiguous()
    B, N = parents.shape
    mask, depth = torch.zeros(B, N + 1, N + 1, dtype=torch.bool), torch.empty(B, N + 1, dtype=torch.int64)
    if native._library.tree_attention(parents.data_ptr(), B, N, mask.data_ptr(), depth.data_ptr()):
        pytorch_spec_verify.check_parents(parents)
    return mask, depth
