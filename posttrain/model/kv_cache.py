"""Keys and values of the tokens seen so far, in memory allocated ahead; going back is setting `length`.

Virtual tokens, which an adapter trains, are keys and values that every row sees before its own (`Prefix`). They lie at
the front of a cache and count in no `length`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig


class Prefix:
    """Keys and values of P virtual tokens, which every row sees before its own; in a layer it takes a cache's place.

    layers: per layer keys and values (1, kv heads, P, head_dim), as attention sees them: rotated to positions 0 .. P-1.
    Differentiable; nothing is remembered.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers
        self.filled = self.virtual_tokens = layers[0][0].shape[2]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values (B, kv heads, T, head_dim) behind the virtual tokens' (B, kv heads, P + T, head_dim)."""
        size = keys.shape[0], -1, -1, -1
        k, v = self.layers[layer]
        return torch.cat((k.expand(size), keys), 2), torch.cat((v.expand(size), values), 2)


class Recorder:
    """Keeps what each layer writes, for a `Prefix`; differentiable."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, as they are."""
        self.layers.append((keys, values))
        return keys, values


class KVCache:
    """keys, values: per layer (B, kv heads, capacity, head_dim), of which the first `filled` positions are.

    The first `virtual_tokens` of these are an adapter's, the other `length` are the row's tokens. `length` may be
    lowered at any time (constant time: the positions past it are overwritten by the next tokens).
    `valid` bool (B, capacity) marks the positions that are tokens rather than padding or holes; None while every one is.
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
        self.filled = 0
        self.virtual_tokens = 0
        self.virtual: Any = None  # whose virtual tokens they are
        self.valid: Tensor | None = None

    def _views(self) -> tuple[list[Tensor], list[Tensor]]:
        return [layer[0] for layer in self._data], [layer[1] for layer in self._data]

    @property
    def length(self) -> int:
        return self.filled - self.virtual_tokens

    @length.setter
    def length(self, value: int) -> None:
        if not 0 <= value <= self.length:
            raise ValueError(f"cannot set a cache of {self.length} tokens to length {value}; it can only go back")
        self.filled = self.virtual_tokens + value

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def begin(self, virtual: Any, prefix: Prefix | None) -> None:
        """Put the virtual tokens of `virtual` at the front (None: none), with as much room behind them as before.

        ValueError unless the cache holds no tokens: those that it held have not seen them.
        """
        if self.length:
            raise ValueError(
                f"the cache holds {self.length} tokens that saw {self.virtual_tokens} virtual tokens, and not those of the model's "
                "present adapter; begin a new cache after switching adapters"
            )
        count = 0 if prefix is None else prefix.virtual_tokens
        capacity = self.capacity - self.virtual_tokens + count
        if capacity != self.capacity:
            self._data = self._data.new_empty((*self._data.shape[:4], capacity, self._data.shape[5]))
            self._keys, self._values = self._views()
        self.filled, self.capacity, self.virtual, self.virtual_tokens, self.valid = 0, capacity, virtual, count, None
        if prefix is not None:
            for layer, (keys, values) in enumerate(prefix.layers):
                self.write(layer, keys, values)
            self.advance(count)

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens, at least doubling the capacity when it grows."""
        needed = self.filled + count
        if needed <= self.capacity:
            return
        old, capacity = self._data, max(needed, 2 * self.capacity)
        self._data = old.new_empty((*old.shape[:4], capacity, old.shape[5]))
        self._data[:, :, :, :, : self.filled] = old[:, :, :, :, : self.filled]
        if self.valid is not None:
            self.valid = torch.cat((self.valid, self.valid.new_ones(self.batch_size, capacity - self.capacity)), 1)
        self.capacity = capacity
        self._keys, self._values = self._views()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, kv heads, T, head_dim) after the last token; the views (B, kv heads, filled + T,
        head_dim).

        `filled` itself moves when every layer has written: `advance`.
        """
        start, count = self.filled, keys.shape[2]
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
        self.valid[:, self.filled : self.filled + count] = True if attention_mask is None else attention_mask

    def advance(self, count: int) -> None:
        self.filled += count

    def keep(self, start: int, indices: Tensor) -> None:
        """Of the tokens from the start-th on, keep those at `indices` int64 (B, n), counted from there, in that order.

        -1 where a row keeps fewer than others: a hole, which is no token. Nothing is copied where the kept ones lie right
        already, as a draft's accepted tokens do; a tree's accepted path moves to the front.
        """
        n, start = indices.shape[1], self.virtual_tokens + start
        kept = indices >= 0
        moved = (kept & (indices != torch.arange(n, device=indices.device))).any(1)
        for row in moved.nonzero()[:, 0].tolist():
            data = self._data[:, :, row]
            data[:, :, :, start : start + n] = data.index_select(3, start + indices[row].clamp(min=0))
        whole = bool(kept.all())
        if self.valid is None and not whole:
            self.valid = torch.ones(self.batch_size, self.capacity, dtype=torch.bool, device=self._data.device)
        if self.valid is not None:
            self.valid[:, start : start + n] = kept
        self.filled = start + n

    def compact(self) -> None:
        """Close the holes that every row could do without: the tokens of each move together, to the right."""
        if self.valid is None:
            return
        valid = self.valid[:, self.virtual_tokens : self.filled]
        longest = int(valid.sum(1).max())
        if longest < valid.shape[1]:
            order = valid.to(torch.int8).argsort(dim=1, stable=True)[:, -longest:]
            self.keep(0, order.masked_fill(~valid.gather(1, order), -1))

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (int64 indices; a row may be repeated)."""
        self._data = self._data[:, :, rows]
        self._keys, self._values = self._views()
        self.batch_size = len(rows)
        if self.valid is not None:
            self.valid = self.valid[rows]
