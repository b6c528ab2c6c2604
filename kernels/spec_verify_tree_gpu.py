"""Triton kernels of spec_verify_tree.py, one launch each.

A request's program walks from the root: it reads a row of the target (and of the draft) where it stands, tries the children by a
few numbers each, steps to the accepted one or draws. So a request reads num_accepted + 1 rows of its N + 1. Only a refusal of a
drawn child needs the row again, for what is left of p, and the draw; these reads come from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ._row_filter import LARGEST, load_clean, row_filter
from ._rows import contiguous
from ._spec_noise import request_noise, uniforms
from ._triton import backend, tl, triton
from ._variant import Variant
from .logit_filter import compiler_options, tile
from .nf4 import DTYPES
from .spec_verify_gpu import _variants, first_largest, race, request_setting, same_rows


@triton.jit
def _probability(row_ptr, x, V, c, threshold, top, total):
    """p(x), 0 where x is no index."""
    inside = (x >= 0) & (x < V)
    z = load_clean(row_ptr, tl.where(inside, x, V), V)
    return tl.where(inside & (z >= threshold) & (z > -LARGEST), tl.exp2((z - top) * c) / total, 0.0)


@triton.jit
def _remainder(
    row_ptr, V, c, threshold, top, total, draft_row_ptr, V_draft, draft_threshold, draft_top, draft_total, factor,
    refused_ptr, count, TILE: tl.constexpr,
):  # fmt: skip
    """Sums of max(p - factor q, 0), and of q over all but `count` refused words: 1 less what these had would be rounding's alone
    where one of them had nearly all."""
    lanes = tl.arange(0, TILE)
    sums, rest = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        z = load_clean(row_ptr, start + lanes, V)
        zq = load_clean(draft_row_ptr, start + lanes, V_draft)
        p = tl.where((z >= threshold) & (z > -LARGEST), tl.exp2((z - top) * c) / total, 0.0)
        q = tl.where((zq >= draft_threshold) & (zq > -LARGEST), tl.exp2((zq - draft_top) * c) / draft_total, 0.0)
        sums += tl.maximum(p - factor * q, 0.0)
        for j in range(0, count):
            q = tl.where(start + lanes == tl.load(refused_ptr + j), 0.0, q)
        rest += q
    return tl.sum(sums, axis=0), tl.sum(rest, axis=0)


@triton.jit(do_not_specialize=["stride_tokens", "stride_parents", "N", "depth", "top_k", "seed"])
def _spec_tree_kernel(
    tokens_ptr, parents_ptr, draft_ptr, target_ptr, num_nodes_ptr, parameters_ptr, gathered_ptr, refused_ptr, uniforms_ptr,
    gumbel_ptr, seeds_ptr, offsets_ptr, out_ptr, num_accepted_ptr, path_ptr,
    stride_tokens, stride_parents, stride_db, stride_dk, stride_tb, stride_tk, N, V, V_draft, depth, temperature, top_k, top_p,
    seed, OWN: tl.constexpr, DRAFT: tl.constexpr, FILTER: tl.constexpr, REPLACED: tl.constexpr, UNIFORMS: tl.constexpr,
    GUMBEL: tl.constexpr, SEEDS: tl.constexpr, OFFSETS: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # One program owns a request.
    b = tl.program_id(0).to(tl.int64)
    t, k, p = request_setting(parameters_ptr, temperature, top_k, top_p, b, OWN)
    seed, offset = request_noise(seeds_ptr, offsets_ptr, seed, b, SEEDS, OFFSETS)
    places = tl.arange(0, PLACES)
    mine = places < tl.minimum(tl.maximum(tl.load(num_nodes_ptr + b), 0), N)
    tokens = tl.load(tokens_ptr + b * stride_tokens + places, mask=mine, other=-1)
    parents = tl.load(parents_ptr + b * stride_parents + places, mask=mine, other=-2)
    if UNIFORMS:
        us = tl.load(uniforms_ptr + b * N + places, mask=mine, other=1.0).to(tl.float32)
    else:
        us = uniforms(seed, offset, places)
    if GUMBEL:
        gumbel_ptr += b * V
    refused_ptr += b * N
    gathered_ptr += b * TILE
    emitted, path = tl.full((PLACES,), -1, tl.int64), tl.full((PLACES,), -1, tl.int64)
    c = 1.4426950408889634 / tl.where(t > 0.0, t, 1.0)
    node, num_accepted, winner = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
    walking = True
    while walking:
        row_ptr = target_ptr + b * stride_tb + (node + 1).to(tl.int64) * stride_tk
        children = mine & (parents == node) & (num_accepted < depth)
        child = tl.full((), PLACES, tl.int32)
        if t <= 0.0:
            _, winner = first_largest(row_ptr, V, TILE)
            child = tl.min(tl.where(children & (tokens == winner) & (winner >= 0), places, PLACES), axis=0)
        else:
            threshold, top, total = row_filter(row_ptr, V, c, k, p, gathered_ptr, FILTER, TILE)
            draft_threshold, draft_top, draft_total = -LARGEST, 0.0, 1.0
            draft_row_ptr = draft_ptr
            i = tl.min(tl.where(children, places, PLACES), axis=0)
            if DRAFT:
                draft_row_ptr = draft_ptr + b * stride_db + (node + 1).to(tl.int64) * stride_dk
                if i < PLACES:
                    draft_threshold, draft_top, draft_total = row_filter(
                        draft_row_ptr, V_draft, c, k, p, gathered_ptr, FILTER, TILE
                    )
            # p is max(p - factor q, 0) / left; q without replacement q / rest, but for what was refused
            factor, left, rest, count, tried = 0.0, 1.0, 1.0, 0, 0
            refused = places < 0
            while (i < PLACES) & (child == PLACES):
                x = tl.sum(tl.where(places == i, tokens, 0), axis=0)
                again = tl.max(tl.where(refused & (tokens == x), 1, 0), axis=0) > 0
                px = _probability(row_ptr, x, V, c, threshold, top, total)
                qx = tl.where((x >= 0) & (x < V), 1.0, 0.0)
                if DRAFT:
                    qx = _probability(draft_row_ptr, x, V_draft, c, draft_threshold, draft_top, draft_total)
                    if not REPLACED:
                        qx = tl.where(again, 0.0, qx)
                    px = tl.maximum(px - factor * qx, 0.0)
                else:
                    px = tl.where(again, 0.0, px)
                if qx > 0.0:
                    u = tl.sum(tl.where(places == i, us, 0.0), axis=0)
                    if (left > 0.0) & (u < (px / left) / (qx / rest)):
                        child = i
                    else:
                        refused = refused | (places == i)
                        if DRAFT:
                            factor += left / rest
                            if not REPLACED:
                                tl.store(refused_ptr + tried, x)
                                tried += 1
                                tl.debug_barrier()
                            left, untried = _remainder(
                                row_ptr, V, c, threshold, top, total,
                                draft_row_ptr, V_draft, draft_threshold, draft_top, draft_total, factor, refused_ptr, tried, TILE,
                            )  # fmt: skip
                            if not REPLACED:
                                rest = tl.maximum(untried, 1.0e-37)
                        else:
                            tl.store(refused_ptr + count, x)
                            count += 1
                            left -= px
                i = tl.min(tl.where(children & (places > i), places, PLACES), axis=0)
            if child == PLACES:
                tl.debug_barrier()
                tries = 0
                while (winner < 0) & (tries < 2):  # the second time from p itself, where nothing is left of it
                    _, winner = race(
                        row_ptr, V, 0, V, c, threshold, top, 1.0 / total,
                        draft_row_ptr, V_draft, draft_threshold, draft_top, 1.0 / draft_total, factor,
                        refused_ptr, count, gumbel_ptr, seed, offset, 1, GUMBEL, DRAFT, FILTER, TILE // 2,
                    )  # fmt: skip
                    factor, count = 0.0, 0
                    tries += 1
        walking = child < PLACES
        if walking:
            emitted = tl.where(places == num_accepted, tl.sum(tl.where(places == child, tokens, 0), axis=0), emitted)
            path = tl.where(places == num_accepted, child, path)
            node = child
            num_accepted += 1
    emitted = tl.where(places == num_accepted, winner, emitted)
    tl.store(out_ptr + b * (depth + 1) + places, emitted, mask=places <= depth)
    tl.store(path_ptr + b * depth + places, path, mask=places < depth)
    tl.store(num_accepted_ptr + b, num_accepted.to(tl.int64))


def _tile(V: int, aligned: bool, two_rows: bool) -> dict[str, int]:
    """As `tile`, half as many logits a thread: walking takes registers too. A quarter where a draft's filtered row is subtracted
    from the target's: both rows' numbers live on."""
    tiles = tile(V, aligned)
    return tiles | {"TILE": tiles["TILE"] // (4 if two_rows and aligned else 2)}


def _options(backend_name: str, two_rows: bool) -> dict[str, Any]:
    """With two rows' numbers alive, more registers than `compiler_options` allows: a tree is one program, and there are no more
    programs than trees."""
    options = compiler_options(backend_name)
    return options | {"maxnreg": 192} if two_rows and "maxnreg" in options else options


def _places(N: int) -> int:
    """Lanes for a root and N nodes, at least 64: trees vary in size, and each width is compiled anew."""
    return max(64, triton.next_power_of_2(N + 1))


def verify_draft_tree_triton(
    node_tokens: Tensor, parents: Tensor, target_logits: Tensor, draft_logits: Tensor | None, num_nodes: Tensor, temperature: float,
    top_k: int, top_p: float, parameters: Tensor | None, with_replacement: bool, depth: int, uniforms: Tensor | None,
    gumbel: Tensor | None, seed: int, seeds: Tensor | None, offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel: (tokens, num_accepted, path), as the op."""
    target, draft = same_rows(target_logits, draft_logits)
    B, rows, V = target.shape
    N, device = rows - 1, target.device
    tokens, path = (torch.empty(B, width, dtype=torch.int64, device=device) for width in (depth + 1, depth))
    num_accepted = torch.empty(B, dtype=torch.int64, device=device)
    if not B:
        return tokens, num_accepted, path
    strides = (0, 0) if draft is None else draft.stride()[:2]
    filtered = parameters is not None or top_k > 0 or top_p < 1
    aligned = all(s % 16 == 0 for s in (*target.stride()[:2], *strides))
    two_rows = draft is not None and filtered and not with_replacement
    tiles = _tile(V, aligned, two_rows)
    gathered = torch.empty(B * tiles["TILE"] if filtered else 1, dtype=target.dtype, device=device)
    refused = torch.empty(B * max(N, 1), dtype=torch.int64, device=device)
    drafted, above, num_nodes = node_tokens.contiguous(), parents.contiguous(), num_nodes.contiguous()
    parameters, *noise = (contiguous(tensor) for tensor in (parameters, uniforms, gumbel, seeds, offsets))
    _spec_tree_kernel[(B,)](
        drafted, above, draft, target, num_nodes, parameters, gathered, refused, *noise,
        tokens, num_accepted, path, drafted.stride(0), above.stride(0) if above.dim() == 2 else 0, *strides,
        *target.stride()[:2], N, V, V if draft is None else draft.shape[2], depth, temperature, top_k, top_p, seed,
        OWN=parameters is not None, DRAFT=draft is not None, FILTER=filtered, REPLACED=with_replacement,
        UNIFORMS=uniforms is not None, GUMBEL=gumbel is not None, SEEDS=seeds is not None, OFFSETS=offsets is not None,
        PLACES=_places(N), **tiles, **_options(backend(), two_rows),
    )  # fmt: skip
    return tokens, num_accepted, path


@triton.jit(do_not_specialize=["N"])
def _tree_attention_kernel(parents_ptr, mask_ptr, depth_ptr, N, PLACES: tl.constexpr):
    # One program owns a node's row: it walks up to the root. A parent that does not come before its child ends the walk.
    b, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, PLACES)
    node, depth = row - 1, tl.full((), 0, tl.int32)
    seen = columns == row
    while node >= 0:
        parent = tl.load(parents_ptr + b * N + node).to(tl.int32)
        node = tl.where(parent < node, parent, -1)
        seen = seen | (columns == node + 1)
        depth += 1
    at = b * (N + 1) + row
    tl.store(mask_ptr + at * (N + 1) + columns, seen, mask=columns <= N)
    tl.store(depth_ptr + at, depth.to(tl.int64))


def tree_attention_triton(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel, a program for each node: (mask bool (B, N + 1, N + 1), depth int64 (B, N + 1))."""
    parents = parents.contiguous()
    B, N = parents.shape
    mask = torch.empty(B, N + 1, N + 1, dtype=torch.bool, device=parents.device)
    depth = torch.empty(B, N + 1, dtype=torch.int64, device=parents.device)
    if B:
        _tree_attention_kernel[(B, N + 1)](parents, mask, depth, N, PLACES=_places(N), num_warps=1)
    return mask, depth


def aot_variants() -> Iterator[Variant]:
    """Every dtype, chosen children and drawn ones with replacement and without, filters, either source of noise."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    settings = (False, False), (False, True), (True, True)
    children = {"chosen": (False, True), "drawn": (True, True), "drawn_once": (True, False)}
    for dtype, (kind, (draft, replaced)), (own, filtered), passed, (V, aligned) in product(
        DTYPES, children.items(), settings, (True, False), ((32_000, True), (151_936, False))
    ):
        pointer, integer = f"*{names[dtype]}", "i32:16" if aligned else "i32"
        two_rows = draft and filtered and not replaced
        tiles = _tile(V, aligned, two_rows)
        signature = {
            "tokens_ptr": "*i64", "parents_ptr": "*i64", "draft_ptr": pointer, "target_ptr": pointer, "num_nodes_ptr": "*i64",
            "parameters_ptr": "*fp64", "gathered_ptr": pointer, "refused_ptr": "*i64", "uniforms_ptr": "*fp32",
            "gumbel_ptr": "*fp32", "seeds_ptr": "*i64", "offsets_ptr": "*i64", "out_ptr": "*i64",
            "num_accepted_ptr": "*i64", "path_ptr": "*i64",
            "stride_tokens": "i32", "stride_parents": "i32", "stride_db": integer, "stride_dk": integer, "stride_tb": integer,
            "stride_tk": integer, "N": "i32", "V": integer, "V_draft": integer, "depth": "i32", "temperature": "fp32",
            "top_k": "i32", "top_p": "fp32", "seed": "i64",
        }  # fmt: skip
        constants = {
            "OWN": own, "DRAFT": draft, "FILTER": filtered, "REPLACED": replaced, "UNIFORMS": passed, "GUMBEL": passed,
            "SEEDS": not passed, "OFFSETS": not passed, "PLACES": 64, "TILE": tiles["TILE"],
        }  # fmt: skip
        here = {"draft_ptr": draft, "parameters_ptr": own, "uniforms_ptr": passed, "gumbel_ptr": passed, "seeds_ptr": not passed}
        absent = {name for name, given in (here | {"offsets_ptr": not passed}).items() if not given}
        name = (
            f"spec_tree_{names[dtype]}_{kind}"
            + "_own" * own
            + "_filtered" * filtered
            + "_passed" * passed
            + f"_{V}"
            + "_odd" * (not aligned)
        )
        for variant in _variants(name, _spec_tree_kernel, signature, constants, absent, tiles["num_warps"]):
            yield replace(variant, options=_options(variant.backends[0], two_rows))
    signature = {"parents_ptr": "*i64", "mask_ptr": "*i1", "depth_ptr": "*i64", "N": "i32"}
    yield Variant("tree_attention", _tree_attention_kernel, signature, {"PLACES": 64}, num_warps=1)
