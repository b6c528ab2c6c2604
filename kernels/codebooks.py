"""The code values of NF4, FP4 and the dynamic 8-bit map, and the thresholds between them.

NF4 (Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E) puts its values at quantiles of N(0, 1):
eight of the positive half, seven of the negative half and an exact zero, divided by the largest. The published values
come from float32 spacing; computed in float64 they differ in the last digits, so the derivation below rounds where the
original does. FP4 is sign, two exponent bits and one mantissa bit, divided by 12; its codes are bit patterns, not ranks.
The dynamic map (Dettmers et al. 2021, arXiv:2110.02861) gives each decade from 1e-6 to 1 its own evenly spaced
fractions.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import torch


def _spacing(start: float, stop: float, count: int) -> torch.Tensor:
    """torch.linspace in float32 as most processors compute it: a rounded step, then one rounding a point.

    Written out in float64, so that the tables do not depend on whether this processor fuses multiply and add.
    """
    ends = torch.tensor([start, stop], dtype=torch.float32).double()
    step = ((ends[1] - ends[0]).float() / (count - 1)).double()
    i = torch.arange(count)
    return torch.where(i < count // 2, ends[0] + step * i, ends[1] - step * (count - 1 - i)).float()


def _nf4_values() -> torch.Tensor:
    offset = 0.9677083  # 1 - (1/32 + 1/30) / 2: the outermost quantile kept, so that no code falls at infinity
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in _spacing(offset, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in _spacing(offset, 0.5, 8)[:-1].tolist()]
    values = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return values / values.max()


def _fp4_values() -> torch.Tensor:
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32) / 12
    values = torch.cat([magnitudes, -magnitudes])
    values[8] = 0.0  # the second zero is +0, as in bitsandbytes' table
    return values


def _dynamic_map_values() -> torch.Tensor:
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _spacing(0.1, 1.0, 2**decade + 1)
        fractions = ((edges[:-1] + edges[1:]) / 2.0 * 10 ** (decade - 6)).tolist()
        values += fractions + [-f for f in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32)


def midpoints(values: torch.Tensor) -> torch.Tensor:
    """The fp32 thresholds between neighbours of an ascending table: (values[i] + values[i+1]) / 2."""
    return (values[:-1] + values[1:]) / 2


NF4 = _nf4_values()  # float32 (16,), ascending
FP4 = _fp4_values()  # float32 (16,), indexed by bit pattern: sign, exponent, exponent, mantissa
DYNAMIC_MAP = _dynamic_map_values()  # float32 (256,), ascending
FP4_MAGNITUDE_CODES = torch.argsort(FP4[:8])  # rank of a magnitude -> its bit pattern
NF4_THRESHOLDS = midpoints(NF4)
FP4_THRESHOLDS = midpoints(FP4[:8][FP4_MAGNITUDE_CODES])
# for kernels that index a threshold by code: nothing lies above the last code
NF4_UPPER = torch.cat([NF4_THRESHOLDS, torch.tensor([torch.inf])])
FP4_UPPER = torch.cat([FP4_THRESHOLDS, torch.tensor([torch.inf])])
DYNAMIC_THRESHOLDS = midpoints(DYNAMIC_MAP)
DYNAMIC_UPPER = torch.cat([DYNAMIC_THRESHOLDS, torch.tensor([torch.inf])])

CODEBOOKS = {"nf4": NF4, "fp4": FP4}


@functools.cache
def on(name: str, device: torch.device) -> torch.Tensor:
    """The table `name` of this module (NF4, FP4_THRESHOLDS, ...) on `device`, copied there once.

    By a thread of its own, which has none of the caller's state: a table outlives the call, so it must be neither an inference
    tensor nor in the memory pool of a CUDA graph (torch.compile's "reduce-overhead" runs ops once in such a pool, and checks that
    nothing stays behind).
    """
    if device.type == "cpu":
        return globals()[name]
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(globals()[name].to, device).result()
