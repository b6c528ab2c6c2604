"""Read and write safetensors files one tensor at a time, through ordinary file reads.

The format: 8 bytes with the header's length (little-endian), a JSON header {name: {dtype, shape, data_offsets},
"__metadata__": {str: str}}, the tensors' bytes. The `safetensors` package maps whole files into memory and, saving,
copies every tensor first; a model that is quantized while it streams must do neither.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from posttrain.errors import PosttrainError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` counts from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsReader:
    """An open file: `.entries` by name, `.metadata`, `.read(name)`. Use as a context manager.

    Raises PosttrainError that names the file when it is truncated, corrupt, or holds a dtype torch models do not use.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = open(self.path, "rb", buffering=0)
        try:
            self.entries, self.metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _error(self, what: str) -> PosttrainError:
        return PosttrainError(f"{self.path} is not a whole safetensors file: {what}. Download or save it again")

    def _header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise self._error(f"it has {size} bytes, fewer than its header announces")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError) as error:
            raise self._error(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._error("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("its metadata is not an object of texts")
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != end:
                raise self._error(f"tensor {name} starts at byte {entry.start}, not where the one before ends ({end})")
            end = entry.start + entry.nbytes
        if end != size:
            raise self._error(f"it has {size} bytes and its header describes {end}")
        return entries, metadata

    def _entry(self, name: str, value: object, data: int) -> Entry:
        try:
            dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]  # type: ignore[index]
            if not all(type(n) is int for n in (*shape, begin, end)) or math.prod(n or 1 for n in shape) >= 2**60:
                raise ValueError("expected whole numbers, and in an empty tensor too no more than torch can count")
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
            wrong = begin < 0 or end - begin != nbytes or any(n < 0 for n in shape)
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(f"its entry for tensor {name} is malformed") from error
        if dtype not in DTYPES:
            raise PosttrainError(f"{self.path}: tensor {name} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
        if wrong:
            raise self._error(f"tensor {name} of {dtype} {list(shape)} does not fit bytes {begin} to {end}")
        return Entry(DTYPES[dtype], shape, data + begin, nbytes)

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own. KeyError for a name the file does not hold."""
        entry = self.entries[name]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        view, done = memoryview(raw.numpy()), 0  # type: ignore[arg-type]
        self._file.seek(entry.start)
        while done < entry.nbytes:
            count = self._file.readinto(view[done:])
            if not count:
                raise self._error(f"tensor {name} ends early")
            done += count
        return raw.view(entry.dtype).view(entry.shape)


def write_safetensors(
    path: str | os.PathLike, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Write (name, tensor) pairs, one tensor's bytes at a time. Not atomic by itself: give it `atomic_write`'s path."""
    items = sorted(tensors, key=lambda item: (-item[1].dtype.itemsize, item[0]))  # aligned, as the format asks
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in items:
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in items:
            file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
