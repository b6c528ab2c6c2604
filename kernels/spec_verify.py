"""Verification of drafted tokens, from logits: what is emitted is distributed as if the target had drawn every token itself.

    accept draft x_i iff u_i < p_i(x_i) / q_i(x_i)                                  Leviathan et al., arXiv:2211.17192, algorithm 1
    the first rejected: x ~ norm(max(p_i - q_i, 0));  none rejected: one more, x ~ p_K
    p = softmax(target_logits / T) over what top-k and top-p keep (logit_filter.py), q = the same of draft_logits; both draws are
    races, argmax of log weight + Gumbel noise, which needs no normaliser

draft_tokens   int64 (B, K)              of which request b has num_draft[b]; what lies behind is not looked at
draft_logits   float (B, K, V') | None   what the drafts were drawn from, under the same T, top_k and top_p; V' <= V (q = 0 behind)
                                         None: drafts that were chosen, not drawn (q one-hot)
target_logits  float (B, K + 1, V)       row i scores what follows i accepted drafts; float32 | float16 | bfloat16 (float64: CPU)
num_draft      int64 (B,)                0 .. K
tokens         int64 (B, K + 1)          accepted drafts, then the correction or the one more, then -1
num_accepted   int64 (B,)

Temperature 0: a draft is accepted iff it is the row's argmax (the first of equals). A draft that cannot have been drawn, its id
outside [0, V) or its q zero, is rejected and the token drawn from p, not from p - q: whatever x was, that is exact. Where p - q is
empty though x was rejected (roundings apart p = q) the draw is from p too. A row without a finite logit: on a CPU an error, where
it is reached, on a GPU the token -1.

Noise is passed or made: Philox4x32-10 under a request's seed, word i mod 4 of counter (i div 4, stream, offset). Streams: 0 the u
of draft i, 1 the Gumbel noise of token i, 2 for drawing drafts. So a request gets the same tokens alone and in any batch; a seed
and an offset must not come twice. u has 24 bits and is never 1: where p(x) = q(x) a draft is always accepted, and where
p(x) = 0 never.
max(p - q, 0) cancels where p and q are near, by eps p; but it is drawn with probability sum max(p - q, 0) only, so the error of
what is emitted stays eps.
Least bytes: 2 V of bfloat16 for a target row, 2 V' for its draft row, and the row that is drawn from once more.
Oracle: reference/spec_verify.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu
from ._library import define
from .logit_filter import check_sampling
from .nf4 import DTYPES
from .spec_verify_gpu import verify_draft_tokens_triton


def _fake(draft_tokens, *rest):
    B, K = draft_tokens.shape
    return draft_tokens.new_empty(B, K + 1), draft_tokens.new_empty(B)


_NOISE = "Tensor? uniforms, Tensor? gumbel, SymInt seed, Tensor? seeds, Tensor? offsets"
_SETTING = "float temperature, int top_k, float top_p, Tensor? parameters"
define(
    f"verify_draft_tokens(Tensor draft_tokens, Tensor? draft_logits, Tensor target_logits, Tensor num_draft, {_SETTING}, {_NOISE})"
    " -> (Tensor, Tensor)",
    _fake,
    CPU=lambda *given: cpu.verify_draft_tokens(*given),
    CUDA=verify_draft_tokens_triton,
)


def sampling_arguments(B: int, temperature, top_k, top_p, device) -> tuple[float, int, float, Tensor | None]:
    """The op's (temperature, top_k, top_p, parameters float64 (B, 3) where any is a tensor, whose values a CPU checks)."""
    if not any(isinstance(value, Tensor) for value in (temperature, top_k, top_p)):
        check_sampling(temperature, top_k, top_p)
        return float(temperature), int(top_k), float(top_p), None
    parts = []
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if not isinstance(value, Tensor):  # filled in: a copied one waits for the device
            value = torch.full((), value, dtype=torch.float64, device=device)
        part = value.to(device, torch.float64)
        if part.shape not in ((), (B,)):
            raise ValueError(f"{name} has the shape {tuple(part.shape)}; expected a number or one for each of {B} requests")
        parts.append(part.expand(B))
    parameters = torch.stack(parts, 1)
    if parameters.device.type == "cpu":
        for t, k, p in parameters.tolist():
            check_sampling(t, k, p)
    return 1.0, 0, 1.0, parameters


def noise_arguments(B: int, N: int, V: int, uniforms, gumbel, seed, offsets, device) -> tuple:
    """The op's (uniforms, gumbel, seed, seeds, offsets), checked; without a seed one is drawn from torch's generator."""
    for name, tensor, shape in (("uniforms", uniforms, (B, N)), ("gumbel", gumbel, (B, V))):
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected floats of the shape {shape}")
    for name, value in (("seed", seed), ("offsets", offsets)):
        if isinstance(value, Tensor) and (value.shape != (B,) or value.dtype != torch.int64):
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; expected int64, one for each of {B} requests")
    if seed is None:
        seed = int(torch.randint(2**62, ())) if uniforms is None or gumbel is None else 0
    seeds = seed if isinstance(seed, Tensor) else None
    if isinstance(offsets, int):
        offsets = torch.full((B,), offsets, device=device) if offsets else None
    number = 0 if isinstance(seed, Tensor) else (int(seed) + 2**63) % 2**64 - 2**63  # as an int64
    return uniforms, gumbel, number, seeds, offsets


def check_logits(target_logits: Tensor, draft_logits: Tensor | None, shape: tuple[int, int], draft_rows: int) -> None:
    """target_logits (B, N + 1, V) and draft_logits (B, draft_rows, at most V), of dtypes that are computed with."""
    B, N = shape
    if target_logits.dim() != 3 or target_logits.shape[:2] != (B, N + 1) or target_logits.shape[2] == 0:
        shape_given = tuple(target_logits.shape)
        raise ValueError(f"target_logits are {shape_given}; expected ({B}, {N + 1}, V), a row more than drafts, and V > 0")
    if draft_logits is not None and (
        draft_logits.dim() != 3
        or draft_logits.shape[:2] != (B, draft_rows)
        or not 0 < draft_logits.shape[2] <= target_logits.shape[2]
    ):
        raise ValueError(
            f"draft_logits are {tuple(draft_logits.shape)}; expected ({B}, {draft_rows}, V'), and V' from 1 to the target's "
            f"{target_logits.shape[2]}"
        )
    for name, logits in (("target_logits", target_logits), ("draft_logits", draft_logits)):
        if logits is None:
            continue
        if logits.dtype not in DTYPES and not (logits.dtype == torch.float64 and logits.device.type == "cpu"):
            raise TypeError(f"{name} are {logits.dtype}; expected float32, float16 or bfloat16 (float64 on a CPU)")


def check_devices(device: torch.device, **tensors) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"target_logits are on {device} and {name} on {tensor.device}; move one to the other")


def verify_draft_tokens(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    num_draft: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    *,
    uniforms: Tensor | None = None,
    gumbel: Tensor | None = None,
    seed: int | Tensor | None = None,
    offsets: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """(tokens int64 (B, K + 1), -1 behind the last; num_accepted int64 (B,)): verified drafts of B requests.

    draft_tokens int64 (B, K); draft_logits (B, K, V') or None for drafts that were not drawn; target_logits (B, K + 1, V);
    num_draft int64 (B,). temperature (0: greedy), top_k (0: off) and top_p (1: off) are numbers or tensors (B,), and are the
    draft's too. Noise: uniforms (B, K) in [0, 1) and gumbel (B, V), or made from `seed`, int64 (B,), one for each request, or a
    number from which each gets its own, and `offsets`, the tokens that a request has had so far; without a seed one comes from
    torch's generator. Raises TypeError for dtypes, ValueError for shapes, devices and settings, and on a CPU for values of
    tensors too (a GPU is not waited for) and for a row without a finite logit that is drawn from.
    """
    if draft_tokens.dim() != 2 or num_draft.shape != draft_tokens.shape[:1]:
        raise ValueError(f"draft_tokens {tuple(draft_tokens.shape)}, num_draft {tuple(num_draft.shape)}; expected (B, K) and (B,)")
    for name, tensor in (("draft_tokens", draft_tokens), ("num_draft", num_draft)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}; expected int64")
    B, K = draft_tokens.shape
    check_logits(target_logits, draft_logits, (B, K), K)
    device = target_logits.device
    setting = sampling_arguments(B, temperature, top_k, top_p, device)
    noise = noise_arguments(B, K, target_logits.shape[2], uniforms, gumbel, seed, offsets, device)
    check_devices(
        device, draft_tokens=draft_tokens, draft_logits=draft_logits, num_draft=num_draft, uniforms=uniforms, gumbel=gumbel,
        seed=seed, offsets=offsets,
    )  # fmt: skip
    return torch.ops.posttrain.verify_draft_tokens(draft_tokens, draft_logits, target_logits, num_draft, *setting, *noise)
