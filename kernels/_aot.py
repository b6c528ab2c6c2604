"""Compile a variant for a target that is not here, and read what the compiler made of it.

Used by tests/test_aot.py and `make aot`; nothing at run time imports it. Registers and spills come from the binary
(cuobjdump is in triton's wheel), the widths of global accesses from PTX, whose accesses become machine code one for one
(the tests look at SASS too, on some); on AMD both come from the assembly that the compiler leaves.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._variant import Variant


@dataclass(frozen=True)
class Target:
    """A processor: what one of its multiprocessors (SM, CU) holds. Registers are 32-bit, per SIMD lane group of a warp."""

    target: GPUTarget
    device: str
    shared_bytes: int  # what one program may have
    shared_per_sm: int
    warps_per_sm: int
    registers_per_sm: int
    bandwidth: float  # bytes/s, from the data sheet


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "A100 40GB", 166_912, 167_936, 64, 65_536, 1.555e12),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "H100 SXM", 232_448, 233_472, 64, 65_536, 3.35e12),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "B200", 232_448, 233_472, 64, 65_536, 8.0e12),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "MI300X", 65_536, 65_536, 32, 4 * 512 * 64, 5.3e12),
}


@dataclass(frozen=True)
class Report:
    """What one compiled variant takes. `loads` and `stores` count global accesses in the code by width in bits."""

    name: str
    target: str
    registers: int
    spills: int  # bytes or instructions that go to local memory; anything but 0 is a fault
    shared: int
    warps: int
    loads: dict[int, int]
    stores: dict[int, int]
    mma: tuple[str, ...]

    @property
    def occupancy(self) -> float:
        """Resident warps over the most that fit, by registers, shared memory and 32 programs an SM."""
        device = TARGETS[self.target]
        lanes = device.target.warp_size
        granule = 8 * lanes
        per_warp = -(-max(self.registers, 1) * lanes // granule) * granule
        # registers are divided among four schedulers, and a warp lives on one
        programs = 4 * (device.registers_per_sm // 4 // per_warp) // self.warps
        programs = min(programs, device.warps_per_sm // self.warps, 32)
        if self.shared:
            reserved = 1024 if device.target.backend == "cuda" else 0  # CUDA keeps 1 KiB a program for itself
            programs = min(programs, device.shared_per_sm // (self.shared + reserved))
        return programs * self.warps / device.warps_per_sm


def variants() -> Iterator[Variant]:
    """The variants of every kernel file, found by their `aot_variants`, and each once more as unaligned arguments launch it."""
    package = __package__ or ""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module.ispkg:
            found = getattr(importlib.import_module(f"{package}.{module.name}"), "aot_variants", None)
            if found is not None and found.__module__ == f"{package}.{module.name}":
                for variant in found():
                    yield replace(variant, unaligned=())
                    if variant.unaligned:
                        options = variant.options | variant.unaligned_options
                        yield replace(variant, name=f"{variant.name}_unaligned", options=options)


def covering(chosen: Sequence[Variant], strength: int = 2) -> list[Variant]:
    """As few of them as show every `strength` settings that occur together in some variant of their kernel (greedily, so not
    the very fewest; the same ones every time).

    A setting is an argument's type or alignment, a constant or an option of the compiler. What a compiler gets wrong depends on
    one or two of them at once, seldom on more: pairs find nearly all that the whole product would, in a fraction of the time.
    """
    kernels: dict[str, list[Variant]] = {}
    for variant in chosen:
        kernels.setdefault(variant.kernel.__name__, []).append(variant)
    return [variant for alike in kernels.values() for variant in _cover(alike, strength)]


def _cover(alike: list[Variant], strength: int) -> list[Variant]:
    settings = [
        {
            *map(repr, (*v.signature.items(), *v.constexprs.items(), *v.options.items())),
            f"{v.num_warps} warps", f"{v.num_stages} stages", f"unaligned {bool(v.unaligned)}",
        }
        for v in alike
    ]  # fmt: skip
    always = set.intersection(*settings)
    # fewer settings than `strength` may vary: then all that do are taken together
    groups = [set(itertools.combinations(sorted(s - always), min(strength, len(s - always)))) for s in settings]
    left, taken = set().union(*groups), set()
    while left:
        best = max(range(len(alike)), key=lambda i: len(groups[i] & left))
        taken.add(best)
        left -= groups[best]
    return [alike[i] for i in sorted(taken or {0})]


def applies(variant: Variant, target: str) -> bool:
    """Whether the launcher could ask for this variant on this target."""
    chosen = TARGETS[target].target
    return chosen.backend in variant.backends and (not variant.archs or chosen.arch in variant.archs)


def compile_variant(variant: Variant, target: str):
    """triton's CompiledKernel, specialised as a launch would: pointers and ":16" integers are multiples of 16, but for those
    in `unaligned`; on AMD a pointer's offsets fit 32 bits, as for every tensor below 2 GiB."""
    names = variant.kernel.arg_names
    types = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes: dict[tuple[int, ...], list] = {}
    for i, name in enumerate(names):
        known = [["tt.divisibility", 16]] if name not in variant.unaligned and re.match(r"\*|.*:16", types[name]) else []
        if types[name][0] == "*" and TARGETS[target].target.backend == "hip":
            known.append(["tt.pointer_range", 32])
        attributes |= {(i,): known} if known else {}
    signature = {name: kind.split(":")[0] for name, kind in types.items()}
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    return triton.compile(source, target=TARGETS[target].target, options=options)


def report(variant: Variant, target: str) -> Report:
    """Compile and read."""
    kernel = compile_variant(variant, target)
    read = _read_nvidia if "cubin" in kernel.asm else _read_amd
    registers, spills, loads, stores, mma = read(kernel.asm)
    return Report(
        variant.name, target, registers, spills, kernel.metadata.shared, variant.num_warps, dict(loads), dict(stores),
        tuple(sorted(mma)),
    )  # fmt: skip


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What cuobjdump or nvdisasm prints about a binary."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}: this triton writes it another way")
    return int(found[1])


def _read_nvidia(asm) -> tuple[int, int, Counter, Counter, set[str]]:
    usage = tool("cuobjdump", asm["cubin"], "-res-usage")
    registers, stack, local = (_number(rf"{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for kind, modifiers in re.findall(r"\b(ld|st)\.global([.:\w]*)", asm["ptx"]):
        vector = re.search(r"\.v([248])\b", modifiers)
        bits = _number(r"(\d+)$", modifiers) * (int(vector[1]) if vector else 1)
        (loads if kind == "ld" else stores)[bits] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]", asm["ptx"]):
        loads[8 * int(size, 0)] += 1
    mma = set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", asm["ptx"]))
    return registers, stack + local, loads, stores, mma


_AMD_WIDTHS = {"byte": 8, "short": 16, "ubyte": 8, "ushort": 16, "sbyte": 8, "sshort": 16, "dword": 32}


def _read_amd(asm) -> tuple[int, int, Counter, Counter, set[str]]:
    text = asm["amdgcn"]
    registers, scratch, spilled = (
        _number(rf"\.{key}:\s*(\d+)", text) for key in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for kind, width in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", text):
        name, _, many = width.removesuffix("_d16").removesuffix("_d16_hi").partition("x")
        if name in _AMD_WIDTHS:
            (loads if kind == "load" else stores)[_AMD_WIDTHS[name] * int(many or 1)] += 1
    return registers, scratch + spilled, loads, stores, set(re.findall(r"\bv_mfma_\w+", text))
