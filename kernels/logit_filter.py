"""What temperature, top-k and top-p leave of rows of logits: a threshold and a log-normaliser, two numbers a row.

    p[v] = exp(z[v] / T - log Z) where z[v] >= tau, else 0          log Z = log sum over kept v of exp(z[v] / T)
    tau = the larger of the k-th largest logit and of the least logit that has less than top_p of what top-k kept above it

logits      float32 | float16 | bfloat16 (N, V)     rows contiguous; float64 on a CPU. NaN counts as -inf, +inf as 3e38
threshold   float32 (N,)                            tau, a logit of the row or -inf; float64 for float64
log_total   float32 (N,)                            log Z; -inf where no logit is finite

The one definition of sampling's filters: `posttrain.model.sampling` masks by this threshold, and spec_verify.py by the same. A
threshold keeps or drops equal tokens together, so neither a sort nor its stability is in the definition.
Least bytes: a row read once, 2 N V in bfloat16. Oracle: reference/logit_filter.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import cpu
from ._library import define
from ._row_filter import LARGEST, row_filter
from ._rows import contiguous
from ._triton import backend, tl, triton
from ._variant import Variant
from .nf4 import DTYPES


def tile(V: int, aligned: bool) -> dict[str, int]:
    """Logits at once and the warps that share them: 16 a thread, 8 where they are loaded one by one and their addresses take the
    registers. A function of the row alone, so that sums are the same in any batch."""
    warps = 4 if V <= 65_536 else 8
    return {"TILE": (512 if aligned else 256) * warps, "num_warps": warps}


def compiler_options(backend_name: str) -> dict[str, Any]:
    """ptxas keeps a few values of these kernels in memory to have fewer registers, unless it is told how many it may take."""
    return {"enable_fp_fusion": True, **({"maxnreg": 128} if backend_name == "cuda" else {})}


def for_compilers(variant: Variant) -> Iterator[Variant]:
    """The variant as either compiler is asked for it."""
    for name in ("cuda", "hip"):
        yield replace(variant, options=compiler_options(name), backends=(name,))


@triton.jit(do_not_specialize=["top_k"])
def _logit_filter_kernel(
    logits_ptr, parameters_ptr, gathered_ptr, threshold_ptr, log_total_ptr, stride, V, temperature, top_k, top_p,
    OWN: tl.constexpr, FILTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # One program owns a row.
    row = tl.program_id(0).to(tl.int64)
    if OWN:
        temperature = tl.load(parameters_ptr + row * 3).to(tl.float32)
        top_k = tl.load(parameters_ptr + row * 3 + 1).to(tl.int32)
        top_p = tl.load(parameters_ptr + row * 3 + 2).to(tl.float32)
    c = 1.4426950408889634 / temperature
    threshold, top, total = row_filter(logits_ptr + row * stride, V, c, top_k, top_p, gathered_ptr + row * TILE, FILTER, TILE)
    some = top > -LARGEST
    tl.store(threshold_ptr + row, tl.where(some & (threshold > -LARGEST), threshold, -float("inf")))
    log_total = top.to(tl.float64) / temperature + tl.log2(total) * 0.6931471805599453
    tl.store(log_total_ptr + row, tl.where(some, log_total.to(tl.float32), -float("inf")))


def logit_filter_triton(
    logits: Tensor, temperature: float, top_k: int, top_p: float, parameters: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel, one program a row: (threshold, log_total). parameters float64 (N, 3): temperature, top_k, top_p by row."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parameters = contiguous(parameters)
    N, V = logits.shape
    threshold, log_total = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    if N:
        filtered = parameters is not None or top_k > 0 or top_p < 1
        tiles = tile(V, logits.stride(0) % 16 == 0)
        gathered = logits.new_empty(N * tiles["TILE"] if filtered else 1)
        _logit_filter_kernel[(N,)](
            logits, parameters, gathered, threshold, log_total, logits.stride(0), V, temperature, top_k, top_p,
            OWN=parameters is not None, FILTER=filtered, **tiles, **compiler_options(backend()),
        )  # fmt: skip
    return threshold, log_total


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError unless temperature >= 0 and finite, top_k >= 0 (0: off) and 0 < top_p <= 1 (1: off)."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or a positive number")
    if top_k < 0 or int(top_k) != top_k:
        raise ValueError(f"top_k is {top_k}; expected 0 (off) or a positive integer")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number in (0, 1], 1 being off")


def _fake(logits, temperature, top_k, top_p, parameters):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(len(logits), dtype=wide), logits.new_empty(len(logits), dtype=wide)


define(
    "logit_filter(Tensor logits, float temperature, int top_k, float top_p, Tensor? parameters) -> (Tensor, Tensor)",
    _fake,
    CPU=lambda *given: cpu.logit_filter(*given),
    CUDA=logit_filter_triton,
)


def aot_variants() -> Iterator[Variant]:
    """Every dtype, with filters and without, one setting for all rows or each its own, rows aligned and not."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    settings = (False, False), (False, True), (True, True)
    for dtype, (own, filtered), aligned, V in product(DTYPES, settings, (True, False), (32_000, 151_936)):
        integer, pointer = "i32:16" if aligned else "i32", f"*{names[dtype]}"
        signature = {
            "logits_ptr": pointer, "parameters_ptr": "*fp64", "gathered_ptr": pointer, "threshold_ptr": "*fp32",
            "log_total_ptr": "*fp32", "stride": integer, "V": integer, "temperature": "fp32", "top_k": "i32", "top_p": "fp32",
        }  # fmt: skip
        tiles = tile(V, aligned)
        constants: dict[str, object] = {"OWN": own, "FILTER": filtered, "TILE": tiles["TILE"]}
        if not own:  # None at the launch
            del signature["parameters_ptr"]
            constants["parameters_ptr"] = None
        name = f"logit_filter_{names[dtype]}" + "_own" * own + "_filtered" * filtered + f"_{V}" + "_odd" * (not aligned)
        yield from for_compilers(Variant(name, _logit_filter_kernel, signature, constants, num_warps=tiles["num_warps"]))


def logit_filter(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """(threshold (...), log_total (...)) of logits (..., V): token v has probability exp(logit / temperature - log_total) where
    its logit is at least the threshold, else 0. temperature > 0; top_k 0 and top_p 1 are off.

    Raises ValueError for settings out of range and for rows of no logits, TypeError for dtypes.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("temperature is 0: the argmax needs no threshold")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits are {tuple(logits.shape)}; expected (..., V) with V > 0")
    if logits.dtype not in DTYPES and not (logits.dtype == torch.float64 and logits.device.type == "cpu"):
        raise TypeError(f"logits are {logits.dtype}; expected float32, float16 or bfloat16 (float64 on a CPU)")
    rows = logits.detach().reshape(-1, logits.shape[-1])
    found = torch.ops.posttrain.logit_filter(rows, float(temperature), int(top_k), float(top_p), None)
    threshold, log_total = (t.view(logits.shape[:-1]) for t in found)
    return threshold, log_total
