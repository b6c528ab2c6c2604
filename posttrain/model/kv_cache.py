"""Keys and values of the tokens seen so far, in memory allocated ahead; going back is setting `length`."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import ModelConfig


class KVCache:
    """keys, values: per layer (B, kv heads, capacity, head_dim), of which the first `length` positions are filled.

    `length` may be lowered at any time (constant time: the positions past it are overwritten by the next tokens).
    `valid` bool (B, capacity) marks the positions that are tokens rather than left padding; None while every one is.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ):
        if batch_size < 1 or capacity < 1:
            raise ValueError(f"a cache of {batch_size} rows and {capacity} positions; both must be at least 1")
        self.config, self.batch_size, self.capacity = config, batch_size, capacity
        shape = (config.num_hidden_layers, 2, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self._keys, self._values = self._views()
        self._length = 0
        self.valid: Tensor | None = None

    def _views(self) -> tuple[list[Tensor], list[Tensor]]:
        return [layer[0] for layer in self._data], [layer[1] for layer in self._data]

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, value: int) -> None:
        if not 0 <= value <= self._length:
            raise ValueError(f"cannot set a cache of {self._length} tokens to length {value}; it can only go back")
        self._length = value

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens, at least doubling the capacity when it grows."""
        needed = self._length + count
        if needed <= self.capacity:
            return
        old, capacity = self._data, max(needed, 2 * self.capacity)
        self._data = old.new_empty((*old.shape[:4], capacity, old.shape[5]))
        self._data[:, :, :, :, : self._length] = old[:, :, :, :, : self._length]
        if self.valid is not None:
            self.valid = torch.cat((self.valid, self.valid.new_ones(self.batch_size, capacity - self.capacity)), 1)
        self.capacity = capacity
        self._keys, self._values = self._views()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, kv heads, T, head_dim) after the last token; the views (B, kv heads, length + T,
        head_dim).

        `length` itself moves when every layer has written: `advance`.
        """
        start, count = self._length, keys.shape[2]
        k, v = self._keys[layer], self._values[layer]
        k.narrow(2, start, count).copy_(keys)
        v.narrow(2, start, count).copy_(values)
        return k.narrow(2, 0, start + count), v.narrow(2, 0, start + count)

    def mark(self, count: int, attention_mask: Tensor | None) -> None:
        """Say which of the next `count` positions are tokens: attention_mask bool (B, count), None when all are."""
        if attention_mask is None and self.valid is None:
            return
        if self.valid is None:
            self.valid = torch.ones(self.batch_size, self.capacity, dtype=torch.bool, device=self._data.device)
        self.valid[:, self._length : self._length + count] = True if attention_mask is None else attention_mask

    def advance(self, count: int) -> None:
        self._length += count

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (int64 indices; a row may be repeated)."""
        self._data = self._data[:, :, rows]
        self._keys, self._values = self._views()
        self.batch_size = len(rows)
        if self.valid is not None:
            self.valid = self.valid[rows]
