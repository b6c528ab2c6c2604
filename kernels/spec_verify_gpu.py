"""Triton kernels of spec_verify.py: two launches, or three where few requests leave the processor empty.

1. rows: a program for each draft and side, target and draft: (threshold, largest, total, p(x)) of a row that is read once.
2. draw: a program for each request (and part of the vocabulary): which drafts are accepted, by four numbers each; then a race over
   the one row that is drawn from. The row after the last draft is filtered here, where it is needed at all.
3. finish, where a request's vocabulary was split: the winner of the parts' winners.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ._row_filter import LARGEST, LEAST, load_clean, row_filter
from ._rows import contiguous
from ._spec_noise import exponentials, log2_near, request_noise, uniforms
from ._triton import backend, tl, triton
from ._variant import Variant
from .logit_filter import compiler_options, for_compilers, tile
from .nf4 import DTYPES

_PROGRAMS = 256  # that fill a processor


@triton.jit
def request_setting(parameters_ptr, temperature, top_k, top_p, b, OWN: tl.constexpr):
    """(temperature, top_k, top_p) of request b."""
    if OWN:
        temperature = tl.load(parameters_ptr + b * 3).to(tl.float32)
        top_k = tl.load(parameters_ptr + b * 3 + 1).to(tl.int32)
        top_p = tl.load(parameters_ptr + b * 3 + 2).to(tl.float32)
    return temperature, top_k, top_p


@triton.jit
def first_largest(row_ptr, V, TILE: tl.constexpr):
    """(largest finite logit, its first index), or (-LARGEST, -1). A lane notes in which two tiles its largest lies; the first index
    of the largest of all is found in a second look at these."""
    lanes = tl.arange(0, TILE)
    best, at = tl.full((TILE,), -LARGEST, tl.float32), tl.full((TILE,), 2147483647, tl.int32)
    for start in range(0, V, 2 * TILE):
        most = best
        for i in tl.static_range(2):
            offsets = start + i * TILE + lanes
            z = tl.load(row_ptr + offsets, mask=offsets < V, other=-float("inf")).to(tl.float32)
            most = tl.maximum(most, z)
        at = tl.where(most > best, start, at)
        best = most
    top = tl.minimum(tl.max(best, axis=0), LARGEST)
    first = tl.full((), -1, tl.int32)
    if top > -LARGEST:
        low = tl.min(tl.where(best >= top, at, 2147483647), axis=0)
        end = low + 2 * TILE
        if top >= LARGEST:  # equals that differ, infinity and what is beyond 3e38: the first may be anywhere
            end = (V + TILE - 1) // TILE * TILE
            low = end * 0
        found = tl.full((TILE,), 2147483647, tl.int32)
        for behind in range(0, end - low, TILE):  # the last tile first
            start = tl.multiple_of(end - TILE - behind, 256)
            z = tl.load(row_ptr + start + lanes, mask=start + lanes < V, other=-float("inf")).to(tl.float32)
            found = tl.where(z >= top, start, found)
        first = tl.min(tl.where(found < 2147483647, found + lanes, 2147483647), axis=0)
    return top, first


@triton.jit
def row_statistics(
    row_ptr, V, x, temperature, top_k, top_p, gathered_ptr, out_ptr, FILTER: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store (threshold, largest, total, p(x)), p(x) 0 where x is no index; or, at temperature 0, (0, 0, 0, argmax)."""
    if temperature <= 0.0:
        top, first = first_largest(row_ptr, V, TILE)
        tl.store(out_ptr + 3, first.to(tl.float32))
    else:
        c = 1.4426950408889634 / temperature
        threshold, top, total = row_filter(row_ptr, V, c, top_k, top_p, gathered_ptr, FILTER, TILE)
        inside = (x >= 0) & (x < V)
        z = load_clean(row_ptr, tl.where(inside, x, V), V)
        kept = inside & (z >= threshold) & (z > -LARGEST)
        tl.store(out_ptr, threshold)
        tl.store(out_ptr + 1, top)
        tl.store(out_ptr + 2, total)
        tl.store(out_ptr + 3, tl.where(kept, tl.exp2((z - top) * c) / total, 0.0))


@triton.jit(do_not_specialize=["stride_tokens", "K", "top_k"])
def _spec_rows_kernel(
    tokens_ptr, draft_ptr, target_ptr, num_draft_ptr, parameters_ptr, gathered_ptr, statistics_ptr,
    stride_tokens, stride_db, stride_dk, stride_tb, stride_tk, K, V, V_draft, temperature, top_k, top_p,
    OWN: tl.constexpr, DRAFT: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # One program owns a draft's row of the target (axis 1: 0) or of the draft (1); a row that no request has is left alone.
    row, side = tl.program_id(0), tl.program_id(1)
    b, j = (row // K).to(tl.int64), row % K
    t, k, p = request_setting(parameters_ptr, temperature, top_k, top_p, b, OWN)
    if (j < tl.load(num_draft_ptr + b)) & ((side == 0) | (t > 0.0)):
        x = tl.load(tokens_ptr + b * stride_tokens + j)
        row_ptr = target_ptr + b * stride_tb + j.to(tl.int64) * stride_tk
        width = V
        if DRAFT:
            if side == 1:
                row_ptr = draft_ptr + b * stride_db + j.to(tl.int64) * stride_dk
                width = V_draft
        program = side * tl.num_programs(0).to(tl.int64) + row
        row_statistics(row_ptr, width, x, t, k, p, gathered_ptr + program * TILE, statistics_ptr + program * 4, FILTER, TILE)


@triton.jit
def race(
    row_ptr, V, start, stop, c, threshold, top, inverse, draft_row_ptr, V_draft, draft_threshold, draft_top, draft_inverse, factor,
    refused_ptr, refused, gumbel_ptr, seed, offset, stream,
    GUMBEL: tl.constexpr, DRAFT: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(score, id) of the winner among tokens start .. stop - 1, of weight p, or max(p - factor q, 0) where factor > 0; none of
    the `refused` tokens at refused_ptr. (-inf, -1) where no weight is positive. inverse: 1 / total of exp2((z - top) c)."""
    lanes = tl.arange(0, TILE)
    best, at = tl.full((TILE,), -float("inf"), tl.float32), tl.full((TILE,), -1, tl.int32)
    least, draft_least = tl.maximum(threshold, LEAST), tl.maximum(draft_threshold, LEAST)  # which no NaN reaches
    for first in range(start, stop, TILE):
        ids = first + lanes
        z = tl.load(row_ptr + ids, mask=ids < stop, other=-float("inf")).to(tl.float32)
        eligible = z >= least
        for r in range(0, refused):
            eligible = eligible & (ids != tl.load(refused_ptr + r))
        some = True
        if FILTER:
            some = tl.max(eligible.to(tl.int32), axis=0) > 0
        if some:
            score = (z - top) * c
            if DRAFT:
                if factor > 0.0:
                    zq = tl.load(draft_row_ptr + ids, mask=ids < V_draft, other=-float("inf")).to(tl.float32)
                    q = tl.where(zq >= draft_least, tl.exp2((zq - draft_top) * c) * draft_inverse, 0.0)
                    score = tl.exp2(score) * inverse - factor * q
                    eligible = eligible & (score > 1.0e-37)
            if GUMBEL:
                if factor > 0.0:
                    score = log2_near(tl.maximum(score, 1.0e-37), score - 1.0)
                score += tl.load(gumbel_ptr + ids, mask=ids < V, other=0.0).to(tl.float32) * 1.4426950408889634
            else:
                waited = exponentials(seed, offset, first, stream, TILE)
                if factor > 0.0:
                    score = score / waited
                else:
                    score -= log2_near(waited, waited - 1.0)
            score = tl.where(eligible, score, -float("inf"))
            at = tl.where(score > best, first, at)
            best = tl.maximum(best, score)
    score = tl.max(best, axis=0)
    winner = tl.min(tl.where((best == score) & (at >= 0), at + lanes, 2147483647), axis=0)
    return score, tl.where(score > -float("inf"), winner, -1)


@triton.jit(do_not_specialize=["stride_tokens", "K", "B", "top_k", "seed"])
def _spec_draw_kernel(
    tokens_ptr, draft_ptr, target_ptr, num_draft_ptr, parameters_ptr, statistics_ptr, gathered_ptr, uniforms_ptr, gumbel_ptr,
    seeds_ptr, offsets_ptr, parts_ptr, winners_ptr, out_ptr, num_accepted_ptr,
    stride_tokens, stride_db, stride_dk, stride_tb, stride_tk, K, V, V_draft, B, part, temperature, top_k, top_p, seed,
    OWN: tl.constexpr, DRAFT: tl.constexpr, FILTER: tl.constexpr, UNIFORMS: tl.constexpr, GUMBEL: tl.constexpr,
    SEEDS: tl.constexpr, OFFSETS: tl.constexpr, SPLIT: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # One program owns a request, or with SPLIT a part of the vocabulary of one.
    b = tl.program_id(0).to(tl.int64)
    B = b * 0 + B
    t, k, p = request_setting(parameters_ptr, temperature, top_k, top_p, b, OWN)
    seed, offset = request_noise(seeds_ptr, offsets_ptr, seed, b, SEEDS, OFFSETS)
    n = tl.minimum(tl.maximum(tl.load(num_draft_ptr + b), 0), K).to(tl.int32)
    places = tl.arange(0, PLACES)
    mine = places < n
    x = tl.load(tokens_ptr + b * stride_tokens + places, mask=mine, other=-1)
    rows = b * K + places
    px = tl.load(statistics_ptr + rows * 4 + 3, mask=mine, other=0.0)
    inside = (x >= 0) & (x < V)
    if t <= 0.0:
        accepted = inside & (px == x.to(tl.float32))
        drawable = inside
    else:
        u = (
            tl.load(uniforms_ptr + b * K + places, mask=mine, other=1.0).to(tl.float32)
            if UNIFORMS
            else uniforms(seed, offset, places)
        )
        qx = tl.where(inside, 1.0, 0.0)
        if DRAFT:
            qx = tl.load(statistics_ptr + (B * K + rows) * 4 + 3, mask=mine, other=0.0)
        drawable = inside & (qx > 0.0)
        accepted = drawable & (u < px / tl.where(drawable, qx, 1.0))
    num_accepted = tl.min(tl.where(mine & accepted, n, places), axis=0)
    num_accepted = tl.minimum(num_accepted, n)
    refused = num_accepted < n
    at_refusal = places == num_accepted
    row_ptr = target_ptr + b * stride_tb + num_accepted.to(tl.int64) * stride_tk
    start, stop = 0, V
    if SPLIT:
        start = tl.program_id(1) * part
        stop = tl.minimum(start + part, V)
    if GUMBEL:
        gumbel_ptr += b * V
    score, winner, whole = -float("inf"), -1, 0
    if (t <= 0.0) & refused:
        winner = tl.sum(tl.where(at_refusal, px, 0.0), axis=0).to(tl.int32)
    elif t <= 0.0:
        score, winner = first_largest(row_ptr + start, stop - start, TILE)
        score = tl.where(winner >= 0, score, -float("inf"))
        winner = tl.where(winner >= 0, winner + start, -1)
    else:
        c = 1.4426950408889634 / t
        threshold, top, inverse = -LARGEST, 0.0, 1.0
        draft_threshold, draft_top, draft_inverse, factor, without = -LARGEST, 0.0, 1.0, 0.0, 0
        draft_row_ptr = draft_ptr
        if refused:
            row = b * K + num_accepted
            threshold, top = tl.load(statistics_ptr + row * 4), tl.load(statistics_ptr + row * 4 + 1)
            inverse = 1.0 / tl.load(statistics_ptr + row * 4 + 2)
            can = tl.max(tl.where(at_refusal & drawable, 1, 0), axis=0) > 0
            if DRAFT:
                draft_row_ptr = draft_ptr + b * stride_db + num_accepted.to(tl.int64) * stride_dk
                row += B * K
                draft_threshold, draft_top = tl.load(statistics_ptr + row * 4), tl.load(statistics_ptr + row * 4 + 1)
                draft_inverse = 1.0 / tl.load(statistics_ptr + row * 4 + 2)
                factor = tl.where(can, 1.0, 0.0)
            else:
                without = tl.where(can, 1, 0)
        elif FILTER:  # half a tile at a time: beside what the race holds, a whole one takes more registers than there are
            threshold, top, inverse = row_filter(row_ptr, V, c, k, p, gathered_ptr + b * TILE, FILTER, TILE // 2)
        tries = 0
        while (winner < 0) & (tries < 2):  # the second time from p itself, where nothing is left of it
            score, winner = race(
                row_ptr, V, start, stop, c, threshold, top, inverse,
                draft_row_ptr, V_draft, draft_threshold, draft_top, draft_inverse, factor,
                tokens_ptr + b * stride_tokens + num_accepted, without, gumbel_ptr, seed, offset, 1,
                GUMBEL, DRAFT, FILTER, TILE // 2,
            )  # fmt: skip
            whole = tries
            factor, without = 0.0, 0
            tries += 1
    if SPLIT:
        at_part = b * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts_ptr + at_part, score)
        tl.store(winners_ptr + at_part, tl.where(winner < 0, -1, winner * 2 + whole))
    if tl.program_id(1) == 0:
        emitted = tl.where(places < num_accepted, x, -1)
        if not SPLIT:
            emitted = tl.where(at_refusal, winner, emitted)
        tl.store(out_ptr + b * (K + 1) + places, emitted, mask=places <= K)
        tl.store(num_accepted_ptr + b, num_accepted.to(tl.int64))


@triton.jit(do_not_specialize=["K", "parts"])
def _spec_finish_kernel(parts_ptr, winners_ptr, num_accepted_ptr, out_ptr, K, parts, PARTS: tl.constexpr):
    # One program owns a request: the best of its parts' winners, a remainder's before those of p itself, the first of equals.
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, PARTS)
    score = tl.load(parts_ptr + b * parts + lanes, mask=lanes < parts, other=-float("inf"))
    winner = tl.load(winners_ptr + b * parts + lanes, mask=lanes < parts, other=-1)
    found = winner >= 0
    least = tl.min(tl.where(found, winner & 1, 2), axis=0)
    taken = found & ((winner & 1) == least)
    best = tl.max(tl.where(taken, score, -float("inf")), axis=0)
    first = tl.min(tl.where(taken & (score == best), winner >> 1, 2147483647), axis=0)
    token = tl.where(tl.max(found.to(tl.int32), axis=0) > 0, first, -1)
    tl.store(out_ptr + b * (K + 1) + tl.load(num_accepted_ptr + b), token.to(tl.int64))


def same_rows(target: Tensor, draft: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with contiguous rows and in one dtype, the wider; copies only where they must be."""
    wide = target.dtype if draft is None else torch.promote_types(target.dtype, draft.dtype)

    def contiguous_rows(logits: Tensor) -> Tensor:
        return (logits if logits.stride(2) == 1 or logits.shape[2] == 1 else logits.contiguous()).to(wide)

    return contiguous_rows(target), None if draft is None else contiguous_rows(draft)


def verify_draft_tokens_triton(
    draft_tokens: Tensor, draft_logits: Tensor | None, target_logits: Tensor, num_draft: Tensor, temperature: float, top_k: int,
    top_p: float, parameters: Tensor | None, uniforms: Tensor | None, gumbel: Tensor | None, seed: int, seeds: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernels: (tokens, num_accepted), as the op."""
    target, draft = same_rows(target_logits, draft_logits)
    B, rows, V = target.shape
    K = rows - 1
    tokens = torch.empty(B, K + 1, dtype=torch.int64, device=target.device)
    num_accepted = torch.empty(B, dtype=torch.int64, device=target.device)
    if not B:
        return tokens, num_accepted
    strides = (0, 0) if draft is None else draft.stride()[:2]
    aligned = all(s % 16 == 0 for s in (*target.stride()[:2], *strides))
    tiles = tile(V, aligned)
    filtered = parameters is not None or top_k > 0 or top_p < 1
    sides = 1 if draft is None else 2
    statistics = torch.empty(sides, B * K, 4, dtype=torch.float32, device=target.device)
    room = max(sides * B * K, B) * tiles["TILE"] if filtered else 1
    gathered = torch.empty(room, dtype=target.dtype, device=target.device)
    drafted = draft_tokens if draft_tokens.stride(1) == 1 or K <= 1 else draft_tokens.contiguous()
    num_draft, parameters = num_draft.contiguous(), contiguous(parameters)
    noise = [contiguous(tensor) for tensor in (uniforms, gumbel, seeds, offsets)]
    shape = (drafted.stride(0), *strides, *target.stride()[:2], K, V, V if draft is None else draft.shape[2])
    options = {"OWN": parameters is not None, "FILTER": filtered, **tiles, **compiler_options(backend())}
    if K:
        _spec_rows_kernel[(B * K, sides)](
            drafted, draft, target, num_draft, parameters, gathered, statistics, *shape, temperature, top_k, top_p,
            DRAFT=draft is not None, **options,
        )  # fmt: skip
    part, parts = _split(B, V, filtered or temperature == 0, tiles["TILE"])
    scores = torch.empty(B, parts, dtype=torch.float32, device=target.device)
    winners = torch.empty(B, parts, dtype=torch.int32, device=target.device)
    places = max(8, triton.next_power_of_2(K + 1))  # at least 8: drafts vary in length, and each width is compiled anew
    _spec_draw_kernel[(B, parts)](
        drafted, draft, target, num_draft, parameters, statistics, gathered, *noise,
        scores, winners, tokens, num_accepted, *shape, B, part, temperature, top_k, top_p, seed,
        DRAFT=draft is not None, UNIFORMS=uniforms is not None, GUMBEL=gumbel is not None, SEEDS=seeds is not None,
        OFFSETS=offsets is not None, SPLIT=parts > 1, PLACES=places, **options,
    )  # fmt: skip
    if parts > 1:
        _spec_finish_kernel[(B,)](scores, winners, num_accepted, tokens, K, parts, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return tokens, num_accepted


def _split(B: int, V: int, whole: bool, TILE: int) -> tuple[int, int]:
    """(tokens of a part, parts): what a filter leaves is a few tiles, and an argmax no more work than a draft's row: not worth a
    launch; else enough to fill a processor."""
    wanted = 1 if whole else max(1, _PROGRAMS // B)
    part = -(-V // wanted)
    part = -(-part // TILE) * TILE
    return part, -(-V // part)


def aot_variants() -> Iterator[Variant]:
    """Every dtype, with drafts' logits and without, filters, settings of a request's own, either source of noise, split or not."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    settings = (False, False), (False, True), (True, True)
    for dtype, draft, (own, filtered), (V, aligned) in product(
        DTYPES, (True, False), settings, ((32_000, True), (151_936, True), (32_000, False), (151_936, False))
    ):
        pointer, integer, tiles = f"*{names[dtype]}", "i32:16" if aligned else "i32", tile(V, aligned)
        pointers = {
            "tokens_ptr": "*i64", "draft_ptr": pointer, "target_ptr": pointer, "num_draft_ptr": "*i64", "parameters_ptr": "*fp64",
            "gathered_ptr": pointer, "statistics_ptr": "*fp32",
        }  # fmt: skip
        numbers = {
            "stride_tokens": "i32", "stride_db": integer, "stride_dk": integer, "stride_tb": integer, "stride_tk": integer,
            "K": "i32", "V": integer, "V_draft": integer,
        }  # fmt: skip
        scalars = {"temperature": "fp32", "top_k": "i32", "top_p": "fp32"}
        constants = {"OWN": own, "DRAFT": draft, "FILTER": filtered, "TILE": tiles["TILE"]}
        absent = {name for name, here in (("draft_ptr", draft), ("parameters_ptr", own)) if not here}
        suffix = f"{names[dtype]}" + "_drawn" * draft + "_own" * own + "_filtered" * filtered + f"_{V}" + "_odd" * (not aligned)
        warps = tiles["num_warps"]
        yield from _variants(f"spec_rows_{suffix}", _spec_rows_kernel, pointers | numbers | scalars, constants, absent, warps)
        for passed, split in product((True, False), (False,) if filtered else (True, False)):
            noise = {"uniforms_ptr": "*fp32", "gumbel_ptr": "*fp32", "seeds_ptr": "*i64", "offsets_ptr": "*i64"}
            out = {"parts_ptr": "*fp32", "winners_ptr": "*i32", "out_ptr": "*i64", "num_accepted_ptr": "*i64"}
            signature = {**pointers, **noise, **out, **numbers, "B": "i32", "part": "i32:16", **scalars, "seed": "i64"}
            flags = {"UNIFORMS": passed, "GUMBEL": passed, "SEEDS": not passed, "OFFSETS": not passed, "SPLIT": split, "PLACES": 8}
            none = absent | ({"seeds_ptr", "offsets_ptr"} if passed else {"uniforms_ptr", "gumbel_ptr"})
            name = f"spec_draw_{suffix}" + "_passed" * passed + "_split" * split
            yield from _variants(name, _spec_draw_kernel, signature, {**constants, **flags}, none, warps)
    signature = {
        "parts_ptr": "*fp32",
        "winners_ptr": "*i32",
        "num_accepted_ptr": "*i64",
        "out_ptr": "*i64",
        "K": "i32",
        "parts": "i32",
    }
    yield Variant("spec_finish", _spec_finish_kernel, signature, {"PARTS": 64}, num_warps=1)


def _variants(name, kernel, signature, constants, absent, warps) -> Iterator[Variant]:
    """For either compiler; arguments that are None at the launch are constants there."""
    given = {k: v for k, v in signature.items() if k not in absent}
    return for_compilers(Variant(name, kernel, given, {**constants, **dict.fromkeys(absent)}, num_warps=warps))
