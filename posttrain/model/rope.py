"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864, eq. 34) in Hugging Face's half-split layout; scalings.

Dimension pair i is (x[i], x[i + head_dim/2]) and turns by position * theta^(-2i / head_dim). Scalings change the
frequencies: linear (arXiv:2306.15595), dynamic NTK, YaRN (arXiv:2309.00071) and Llama 3's by wavelength.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain import kernels

from .functional import FEW, decoding

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """The keys of `rope_parameters` (transformers 5), or of `rope_theta` and `rope_scaling` (transformers 4)."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> RopeConfig:
        """Read a config.json of transformers 4 or 5. ValueError for an unknown scaling or one that lacks a key."""
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, dict):
            raise ValueError(f"config.json: rope_scaling is {given!r}; expected an object")
        given = dict(given)
        given.setdefault("rope_type", given.pop("type", None) or "default")
        if given["rope_type"] not in ROPE_TYPES:
            raise ValueError(f"rope_type is {given['rope_type']!r}; expected one of {', '.join(ROPE_TYPES)}")
        partial = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise ValueError(f"partial_rotary_factor is {partial}; the Llama family rotates whole heads (1.0)")
        given.setdefault("rope_theta", config.get("rope_theta") or cls.rope_theta)
        needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        missing = [key for key in needed.get(given["rope_type"], ("factor",)) if given.get(key) is None]
        if missing:
            raise ValueError(f"rope_type {given['rope_type']!r} needs {', '.join(missing)}, which config.json lacks")
        if given["rope_type"] in ("llama3", "yarn") and given.get("original_max_position_embeddings") is None:
            given["original_max_position_embeddings"] = config.get("original_max_position_embeddings") or config.get(
                "max_position_embeddings"
            )
        for key in (
            "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
        ):  # fmt: skip
            if given.get(key) is not None:
                positive_number(key, given[key])
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if given.get(key):  # of these, 0 means the default
                positive_number(key, given[key])
        return cls(**{key: given[key] for key in cls.__dataclass_fields__ if given.get(key) is not None})

    def to_hf(self) -> dict[str, Any]:
        """The keys as both transformers 4 and 5 read them."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if self.rope_type == "default":
            given.pop("factor")
        scaling = {key: value for key, value in given.items() if key != "rope_theta"} if self.rope_type != "default" else None
        return {"rope_theta": self.rope_theta, "rope_scaling": scaling, "rope_parameters": given}


def positive_number(key: str, value: Any) -> float:
    """`value`, the number that config.json has under `key`. ValueError where it is none above 0, or not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"config.json: {key} is {value!r}; expected a positive number")
    return value


def rope_frequencies(rope: RopeConfig, head_dim: int, max_position: int, length: int = 0) -> tuple[Tensor, float]:
    """Angular frequencies float32 (head_dim / 2,) and the factor that YaRN multiplies cos and sin by.

    `length` matters to the dynamic scaling only: past `max_position` its base grows with the length of the sequence.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = rope.rope_theta
    if rope.rope_type == "dynamic":
        stretch = rope.factor * max(length, max_position) / max_position - (rope.factor - 1)
        base = base * stretch ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / base**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, frequencies), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, frequencies, head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3_frequencies(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear ramp (in turns per old context) between."""
    assert rope.original_max_position_embeddings and rope.low_freq_factor and rope.high_freq_factor  # from_hf saw to it
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * frequencies / rope.factor + ramp * frequencies


def _yarn_frequencies(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """YaRN's "NTK-by-parts": dimensions that turn often are kept, those that turn rarely are divided by the factor."""

    old_context = rope.original_max_position_embeddings
    assert old_context  # from_hf saw to it

    def dimension(turns: float) -> float:
        """The pair index that makes this many turns over the old context (inverse of the frequency's formula)."""
        return head_dim * math.log(old_context / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class RotaryTable:
    """cos and signed sin by position, computed in float32 once and kept in the activations' dtype; grows by doubling.

    The sine's first half is negated, so that rotating is x * cos + roll(x, head_dim / 2) * sin.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_position: int):
        self.rope, self.head_dim, self.max_position = rope, head_dim, max_position
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _compute(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies, factor = rope_frequencies(self.rope, self.head_dim, self.max_position, length)
        wide = torch.promote_types(dtype, torch.float32)
        # The angle is float32 (as the models were trained) unless the activations are wider.
        angles = positions[..., None].to(wide) * frequencies.to(positions.device, wide)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        table = self._tables.get((device, dtype))
        if table is None or table[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            with torch.inference_mode(False):  # a table first made while generating must serve training too
                table = self._compute(torch.arange(size, device=device), 0, dtype)
            self._tables[device, dtype] = table
        return table

    def at(self, start: int, count: int, device: torch.device, dtype: torch.dtype, length: int = 0) -> tuple[Tensor, Tensor]:
        """cos and signed sin (1, count, 1, head_dim) for positions start .. start + count - 1.

        length: of the whole sequence, where more tokens follow; dynamic scaling goes by it.
        """
        end = start + count
        length = max(length, end)
        if self.rope.rope_type == "dynamic" and length > self.max_position:
            cos, sin = self._compute(torch.arange(start, end, device=device), length, dtype)
        else:
            cos, sin = self._table(end, device, dtype)
            cos, sin = cos[start:end], sin[start:end]
        return cos[None, :, None], sin[None, :, None]

    def gather(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin (B, T, 1, head_dim) for position_ids (B, T). Dynamic scaling goes by each row's length."""
        length = int(position_ids.max()) + 1
        if self.rope.rope_type == "dynamic" and length > self.max_position:
            rows = [self._compute(row, int(row.max()) + 1, dtype) for row in position_ids]
            cos, sin = (torch.stack(parts) for parts in zip(*rows, strict=True))
        else:
            table_cos, table_sin = self._table(length, position_ids.device, dtype)
            cos, sin = table_cos[position_ids], table_sin[position_ids]
        return cos[:, :, None], sin[:, :, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, head_dim) by cos and signed sin (B or 1, T, 1, head_dim), all of one dtype. Differentiable in x."""
    if x.numel() <= FEW and decoding(x):
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return kernels.rope(x, cos, sin)
