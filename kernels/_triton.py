"""triton, or a stand-in that lets the kernel files be imported where triton is not installed (macOS, for one).

The stand-in can decorate a kernel and be named in annotations; nothing in it can run. The CPU engine needs no triton.
"""

from __future__ import annotations

import contextlib

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:

    class _Absent:
        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return args[0] if args and callable(args[0]) else self

    triton = tl = _Absent()
    HAS_TRITON = False


def backend() -> str:
    """Who runs a launched kernel: "cuda", "hip", or "interpreter" (TRITON_INTERPRET=1 when triton was imported)."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return triton.runtime.driver.active.get_current_target().backend


def current_arch() -> tuple[str, int | str]:
    """(backend, architecture) that launches compile for: ("cuda", 90), ("hip", "gfx942"), ("interpreter", 0)."""
    if backend() == "interpreter":
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device as the current one, where triton launches. CPU tensors (interpreter, emulator) need nothing."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


__all__ = ["HAS_TRITON", "backend", "current_arch", "on_device_of", "tl", "triton"]
