"""The CPU engine: native C where it was built, else PyTorch. Which one runs is fixed at import; `describe()` tells."""
from __future__ import annotations

from .pytorch import (
    dequantize_4bit,
    double_dequantize,
    double_quantize,
    linear_4bit,
    linear_4bit_dx,
    quantize_4bit,
)

__all__ = [
    "dequantize_4bit",
    "describe",
    "double_dequantize",
    "double_quantize",
    "linear_4bit",
    "linear_4bit_dx",
    "quantize_4bit",
]


def describe() -> dict[str, str]:
    """Which CPU engine runs and why, for `posttrain doctor`."""
    return {"engine": "pytorch", "isa": "-", "why": "the native extension was not built"}
