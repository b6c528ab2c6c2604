"""Log-probabilities through a head of bfloat16 or in 4 bits on a machine with AMX, by amx_logprobs.c: no logit leaves the cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native
from .native_many import CLayer, weight_of

_P, _L = ctypes.c_void_p, ctypes.c_int64
_ROWS, _DEPTH = 128, 2048


class _Args(ctypes.Structure):
    """logprobs_args in amx_logprobs.c."""

    _fields_ = [
        *((name, _P) for name in ("hidden", "labels", "logprobs", "entropies", "direction", "workspace")),
        *((name, _L) for name in ("N", "H", "ignore_index", "threads")),
        ("head", CLayer),
    ]


_library = native._library
_library.logprobs_bytes.argtypes, _library.logprobs_bytes.restype = [ctypes.POINTER(_Args)], _L
_library.linear_logprobs.argtypes = [ctypes.POINTER(_Args)]


def faster_than_chunks(N: int, H: int) -> bool:
    """Whether rows (N, H) go through here, or in chunks through torch's products and logit_rows.

    W is packed twice in every call, which costs as much as some 100 rows do; and the deeper the rows, the fewer words at a time fit
    the second-level cache, and the more often the direction's sums are read and written. Measured on two cores, forward with the
    direction, time over that of chunks: H = 576, V = 49,152: 64 rows 1.6, 128 rows 1.2, 256 to 2,048 rows 0.5 to 0.65 (a head in
    NF4 0.55 to 0.8); 1,024 rows of H = 2048 0.9 (0.55); 512 rows of H = 4096 1.5 (1.4).
    """
    return N > _ROWS and 0 < H <= _DEPTH


def fused_logprobs(
    hidden: Tensor, base: tuple, V: int, bias: Tensor | None, labels: Tensor, ignore_index: int, direction: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(logprobs (N,), entropies (N,), direction (N, H) or (0,)), or None where that is slower than chunks of whole logits.

    `base` as in native_many.Layer; labels lie inside the vocabulary or are ignored."""
    if native.ISA != "amx" or hidden.dtype != torch.bfloat16 or not faster_than_chunks(*hidden.shape):
        return None
    (N, H), hidden, labels = hidden.shape, hidden.contiguous(), labels.contiguous()
    logprobs, entropies = torch.empty(N, dtype=torch.float32), torch.zeros(N, dtype=torch.float32)
    saved = hidden.new_empty(hidden.shape if direction else 0)
    weight, format = weight_of(base)
    bias = None if bias is None else bias.contiguous()
    no_low_rank = (None, None, 0, None, None, None)
    args = _Args(
        hidden.data_ptr(), labels.data_ptr(), logprobs.data_ptr(), entropies.data_ptr() if entropy else None,
        saved.data_ptr() if direction else None, None, N, H, ignore_index, torch.get_num_threads(),
        CLayer(*map(native._address, weight), *format, native._address(bias), *no_low_rank, V, 0, 0.0),
    )  # fmt: skip
    workspace = native.kept_memory(_library.logprobs_bytes(args))  # not kept where it is large: it must live as long as the call
    args.workspace = workspace.data_ptr()
    native._check(_library.linear_logprobs(args))
    return logprobs, entropies, saved
