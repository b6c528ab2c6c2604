"""The native CPU engine: a plain C library (AVX-512, AVX2, NEON or portable, chosen at run time) called through ctypes.

The functions have the signatures of `pytorch.py` and write the same bytes. `POSTTRAIN_CPU_ISA` (portable, avx2, avx512,
avx512_bf16, amx, neon) holds the engine to one instruction set, for tests and for comparing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from .. import codebooks
from . import pytorch_multi_lora, recycled

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_QUANT_TYPES = {"nf4": 0, "fp4": 1}
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_WEIGHT = [_P, _P, _P, _P, _L, _L, _I]  # packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type
_SIGNATURES = {
    "quantize_4bit": [_P, _I, _L, _L, _I, _P, _P, _L],
    "dequantize_4bit": [*_WEIGHT, _I, _L, _P, _L],
    "double_quantize": [_P, _L, _L, _P, _P, _P, _L],
    "double_dequantize": [_P, _P, _P, _L, _L, _P, _L],
    "linear_4bit": [_P, _I, _L, *_WEIGHT, _P, _L, _L, _P, _L, _P],
    "linear_4bit_dx": [_P, _I, _L, *_WEIGHT, _L, _L, _P, _L],
    "dense_linear": [_P, _L, _P, _P, _L, _L, _P, _L],
    "multi_lora_add": [_P, _I, _L, _P, _P, _I, _P, _P, _P, _L, _L, _L, _L, _P, _L],
}
# Below so many weights a second thread costs more than it saves.
_SERIAL_WEIGHTS = 1 << 16
# The memory for a dequantized weight is kept for the next one up to this size: fresh memory would cost more in page faults
# than the dequantization itself.
_KEPT_BYTES = 64 << 20
_local = threading.local()


def _openmp() -> tuple[ctypes.CDLL | None, str]:
    """The OpenMP runtime that torch itself uses: looked up through libtorch_cpu, whose dependencies are searched too."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))
            if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_thread_num"):
                return library, "OpenMP of torch"
    return None, "serial: torch brings no OpenMP runtime with GOMP_parallel"


def _pointer(array: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.data_ptr())


def _load(path: str) -> tuple[ctypes.CDLL, str]:
    library = ctypes.CDLL(path)
    for name, argtypes in _SIGNATURES.items():
        getattr(library, name).argtypes = argtypes
    library.multi_lora_add.restype = _L
    library.set_isa.argtypes, library.set_isa.restype = [ctypes.c_char_p], ctypes.c_char_p
    library.isa_level.argtypes, library.isa_level.restype = [_I], ctypes.c_char_p
    fp4_magnitudes = codebooks.FP4_MAGNITUDE_CODES.int()
    for which, values, thresholds, ranks in (
        (0, codebooks.NF4, codebooks.NF4_THRESHOLDS, torch.arange(16, dtype=torch.int32)),
        (1, codebooks.FP4, codebooks.FP4_THRESHOLDS, fp4_magnitudes),
    ):
        status = library.set_codebook(which, _pointer(values), _pointer(thresholds), len(thresholds), _pointer(ranks))
        if status:
            raise RuntimeError(f"codebook {which}: two thresholds share a bucket of the native quantizer")
    library.set_dynamic_map(_pointer(codebooks.DYNAMIC_MAP), _pointer(codebooks.DYNAMIC_THRESHOLDS))
    openmp, threading = _openmp()
    if openmp is not None:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        library.set_openmp(*(ctypes.cast(getattr(openmp, name), _P) for name in names))
    return library, threading


def set_isa(name: str = "") -> str:
    """Hold the engine to one instruction set; "" is the machine's best. Returns its name; ValueError if it is not here."""
    global ISA
    chosen = _library.set_isa(name.encode())
    if chosen is None:
        raise ValueError(f"this machine does not run {name!r}; it runs {', '.join(levels())}")
    ISA = chosen.decode()
    return ISA


def levels() -> list[str]:
    """The instruction sets this machine can run, ascending."""
    found: list[str] = []
    while (name := _library.isa_level(len(found))) is not None:
        found.append(name.decode())
    return found


def find() -> str | None:
    """The path of the built library, or None."""
    spec = importlib.util.find_spec("._native", __package__)
    return spec.origin if spec else None


def _check(status: int) -> None:
    if status:
        raise MemoryError("the native engine could not allocate its scratch memory")


def _threads(weights: int) -> int:
    return 1 if weights < _SERIAL_WEIGHTS else torch.get_num_threads()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def kept_memory(size: int) -> Tensor:
    """`size` bytes or more of memory that this thread uses again: valid until its next call. It begins at a whole line."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8)
        if size <= _KEPT_BYTES:
            _local.buffer = buffer
    return buffer


def quantize_4bit(x: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    n = x.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    _library.quantize_4bit(
        x.data_ptr(), _DTYPES[x.dtype], n, block_size, _QUANT_TYPES[quant_type], packed.data_ptr(), absmax.data_ptr(), _threads(n)
    )
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_block_size: int,
    shape,
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
) -> Tensor:
    out = recycled.empty(tuple(shape), dtype)
    _dequantize_into(out, packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type)
    return out


def _dequantize_into(out, packed, absmax, nested_absmax, nested_offset, nested_block_size, block_size, quant_type) -> None:
    packed, absmax = packed.contiguous(), absmax.contiguous()
    nested_absmax = None if nested_absmax is None else nested_absmax.contiguous()
    _library.dequantize_4bit(
        packed.data_ptr(), absmax.data_ptr(), _address(nested_absmax), _address(nested_offset), nested_block_size,
        block_size, _QUANT_TYPES[quant_type], _DTYPES[out.dtype], out.numel(), out.data_ptr(), _threads(out.numel()),
    )  # fmt: skip


def double_quantize(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    absmax = absmax.contiguous()
    n = absmax.numel()
    offset = absmax.mean() if n else absmax.new_zeros(())
    codes = torch.empty(n, dtype=torch.uint8)
    nested = torch.empty(-(-n // block_size), dtype=torch.float32)
    _library.double_quantize(
        absmax.data_ptr(), n, block_size, offset.data_ptr(), codes.data_ptr(), nested.data_ptr(), _threads(16 * n)
    )
    return codes, nested, offset


def double_dequantize(codes: Tensor, absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
    codes, absmax = codes.contiguous(), absmax.contiguous()
    out = torch.empty(codes.shape, dtype=torch.float32)
    _library.double_dequantize(
        codes.data_ptr(), absmax.data_ptr(), offset.data_ptr(), block_size, codes.numel(), out.data_ptr(), _threads(codes.numel())
    )
    return out


def multi_lora_add(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, ranks, adapter_ids: Tensor) -> None:
    """As pytorch_multi_lora's, or with float32 factors; every tensor contiguous. TypeError for factors in another dtype."""
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in (x.dtype, torch.float32):  # the library would read past their ends
        raise TypeError(f"lora_A is {lora_A.dtype} and lora_B {lora_B.dtype}; expected both in x's dtype, {x.dtype}, or in float32")
    n, r, K = lora_A.shape
    M, N = y.shape
    status = _library.multi_lora_add(
        x.data_ptr(), _DTYPES[x.dtype], M, lora_A.data_ptr(), lora_B.data_ptr(), _DTYPES[lora_A.dtype], scaling.data_ptr(),
        _address(ranks),
        adapter_ids.data_ptr(), n, r, N, K, y.data_ptr(), _threads(M * r * (N + K)),
    )  # fmt: skip
    _check(status < 0)
    if status:
        at = (status - 2) // 2
        if status % 2:
            raise ValueError(pytorch_multi_lora.unknown_rank(at, int(ranks[at]), r))
        raise ValueError(pytorch_multi_lora.unknown_id(at, int(adapter_ids[at]), n))


_path = find()
if _path is None:
    raise ModuleNotFoundError("the native extension was not built", name=f"{__package__}._native")
_library, THREADING = _load(_path)
ISA = ""
set_isa(os.environ.get("POSTTRAIN_CPU_ISA", ""))
