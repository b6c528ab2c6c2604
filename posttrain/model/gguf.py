"""GGUF files read with NumPy: metadata, and tensors dequantized to float32 one at a time.

Layout (GGUF 2 and 3, little-endian; github.com/ggml-org/ggml, docs/gguf.md):
    "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries,
    entries (string key, u32 type, value), tensor records (string name, u32 n_dims, u64 dims, u32 type, u64 offset),
    padding to `general.alignment` (32 unless given), tensor data. Dims are stored innermost first.

Block formats, 32 weights w to a block, d and m float16, codes packed with weight j in the low nibble of byte j and
weight j + 16 in its high nibble:
    Q4_0  d, 16 bytes of codes     w = d * (code - 8)
    Q4_1  d, m, 16 bytes of codes  w = d * code + m
    Q8_0  d, 32 int8               w = d * code

The file is memory-mapped and never trusted: every count, length, type and offset is checked before it is used, and
what is wrong is a ValueError that names the file and the field.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}

# ggml type id -> (name, weights in a block, bytes in a block)
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor's record. `shape` is row-major (outermost first); `start` counts from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    nbytes: int


class GGUF:
    """An open GGUF file.

    metadata: dict of str to bool, int, float, str or list of those
    tensors:  dict of name to GGUFTensor, in the file's order

    Raises FileNotFoundError, or ValueError saying which field of which file is wrong.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise ValueError(f"{self.path}: too short for a GGUF header (24 bytes); is the download complete?")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._parse()
        except ValueError:
            self._map.close()
            raise

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *exc: object) -> None:
        self._map.close()

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as float32, in row-major order (a copy: it outlives the file)."""
        if name not in self.tensors:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.start)
        return dequantize(raw, tensor.type).reshape(tensor.shape)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in self.tensors:
            yield name, self.read(name)

    def _parse(self) -> None:
        cursor = _Cursor(self._map, self.path)
        if (magic := cursor.take(4, "magic")) != _MAGIC:
            cursor.fail(f"magic is {magic!r}, expected {_MAGIC!r}: this is not a GGUF file")
        version = cursor.scalar("<u4", "version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "a big-endian file" if swapped in _VERSIONS else f"expected one of {_VERSIONS}"
            cursor.fail(f"version is {version}: {why}; convert it again with a current llama.cpp")
        num_tensors = cursor.count("number of tensors", smallest=8 + 4 + 8 + 4 + 8)
        num_entries = cursor.count("number of metadata entries", smallest=8 + 4 + 1)

        self.metadata: dict[str, Any] = {}
        for i in range(num_entries):
            key = cursor.string(f"key of metadata entry {i}")
            if key in self.metadata:
                cursor.fail(f"metadata key {key!r} appears twice")
            self.metadata[key] = cursor.value(cursor.scalar("<u4", f"type of {key!r}"), key)
        records = [self._tensor_record(cursor, i) for i in range(num_tensors)]

        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            cursor.fail(f"general.alignment is {alignment!r}, expected a power of two")
        data_start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in records:
            if name in self.tensors:
                cursor.fail(f"tensor {name!r} appears twice")
            if kind not in TENSOR_TYPES:
                known = ", ".join(f"{known} ({number})" for number, (known, _, _) in TENSOR_TYPES.items())
                cursor.fail(f"tensor {name!r} has ggml type {kind}; this reader knows {known}")
            type_name, per_block, block_bytes = TENSOR_TYPES[kind]
            if 0 in shape or (shape[-1] if shape else 1) % per_block:
                cursor.fail(f"tensor {name!r} of type {type_name} has shape {shape}, expected rows of a multiple of {per_block}")
            if offset % alignment:
                cursor.fail(f"tensor {name!r} starts at {offset}, not a multiple of the alignment {alignment}")
            nbytes = math.prod(shape) // per_block * block_bytes
            if data_start + offset + nbytes > len(self._map):
                cursor.fail(
                    f"tensor {name!r} ends at byte {data_start + offset + nbytes} of a file of "
                    f"{len(self._map)}: the file is truncated; download it again"
                )
            self.tensors[name] = GGUFTensor(name, shape, type_name, data_start + offset, nbytes)
        previous_end = 0
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.start):
            if tensor.nbytes and tensor.start < previous_end:
                cursor.fail(f"tensor {tensor.name!r} overlaps the one before it")
            previous_end = max(previous_end, tensor.start + tensor.nbytes)

    def _tensor_record(self, cursor: _Cursor, i: int) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string(f"name of tensor {i}")
        n_dims = cursor.scalar("<u4", f"n_dims of {name!r}")
        if n_dims > _MAX_DIMS:
            cursor.fail(f"tensor {name!r} has {n_dims} dimensions, at most {_MAX_DIMS} are possible")
        dims = [cursor.scalar("<u8", f"dims of {name!r}") for _ in range(n_dims)]
        kind = cursor.scalar("<u4", f"type of {name!r}")
        return name, tuple(reversed(dims)), kind, cursor.scalar("<u8", f"offset of {name!r}")


def dequantize(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Bytes of `type_name` (uint8, whole blocks) as float32: products and sums in float32, one rounding each.

    A scale that is infinite or NaN gives what float arithmetic gives (0 * inf is NaN).
    """
    if type_name == "F32":
        return raw.view("<f4").astype(np.float32)
    if type_name == "F16":
        return raw.view("<f2").astype(np.float32)
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        if type_name == "Q8_0":
            blocks = raw.reshape(-1, 34)
            return (_float16(blocks, 0) * blocks[:, 2:].view(np.int8)).reshape(-1)
        if type_name == "Q4_0":
            blocks = raw.reshape(-1, 18)
            return (_float16(blocks, 0) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))).reshape(-1)
        if type_name == "Q4_1":
            blocks = raw.reshape(-1, 20)
            weights = _float16(blocks, 0) * _nibbles(blocks[:, 4:])
            weights += _float16(blocks, 2)
            return weights.reshape(-1)
    known = [name for name, _, _ in TENSOR_TYPES.values()]
    raise ValueError(f"unknown tensor type {type_name!r}, expected one of {known}")


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


class _Cursor:
    """Reads forward through the map; every read is checked against what is left."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer, self._path, self.position = buffer, path, 0

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self._path}: {what}")

    def take(self, length: int, what: str) -> bytes:
        left = len(self._buffer) - self.position
        if length > left:
            self.fail(
                f"{what} needs {length} bytes at byte {self.position}, {left} are left: the file is corrupt or "
                "truncated; download it again"
            )
        self.position += length
        return self._buffer[self.position - length : self.position]

    def scalar(self, dtype: str, what: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0].item()

    def count(self, what: str, smallest: int) -> int:
        (count,) = struct.unpack("<Q", self.take(8, what))
        if count * smallest > len(self._buffer) - self.position:
            self.fail(
                f"{what} is {count}, more than a file of {len(self._buffer)} bytes can hold: it is corrupt or "
                "truncated; download it again"
            )
        return count

    def string(self, what: str) -> str:
        raw = self.take(struct.unpack("<Q", self.take(8, f"length of {what}"))[0], what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error})")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self.fail(f"metadata entry {key!r} has unknown type {kind}")
        value = self.scalar(_SCALARS[kind], f"value of {key!r}")
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> list[Any]:
        kind = self.scalar("<u4", f"element type of {key!r}")
        if kind == _STRING:
            return [self.string(f"element {i} of {key!r}") for i in range(self.count(f"length of {key!r}", smallest=8))]
        if kind not in _SCALARS:
            self.fail(f"metadata array {key!r} has element type {kind}; scalars and strings are possible")
        dtype = np.dtype(_SCALARS[kind])
        length = self.count(f"length of {key!r}", smallest=dtype.itemsize)
        values = np.frombuffer(self.take(length * dtype.itemsize, f"elements of {key!r}"), dtype)
        return (values != 0 if kind == _BOOL else values).tolist()
