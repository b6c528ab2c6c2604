"""One configuration in which a kernel can be launched: what ahead-of-time compilation builds and inspects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """`signature` maps every argument to "*bf16", "i32", ... or "constexpr"; `constexprs` holds the latter's values.

    Every pointer is taken to be aligned to 16 bytes, as torch allocates; an integer that is a multiple of 16 is written
    "i32:16", as triton specialises on it at launch. `unaligned` names those of them that callers may also give otherwise: the
    variant is then compiled a second time without these promises, as `name`_unaligned, with `unaligned_options` where those differ.
    `backends` names the compilers that can be asked for this variant; `archs` the only architectures (80, 90, "gfx942", ...) it is
    launched on, where that is not all of them.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    backends: tuple[str, ...] = ("cuda", "hip")
    archs: tuple[int | str, ...] = ()
    unaligned: tuple[str, ...] = ()
    unaligned_options: dict[str, Any] = field(default_factory=dict)
