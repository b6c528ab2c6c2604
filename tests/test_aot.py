"""Every kernel compiled for every target: it builds, fits shared memory and spills no register.

Here a subset of what can be launched, which holds every setting of every kernel. POSTTRAIN_AOT=2 takes every pair of settings that
occurs together (twice as much), 3 triples, "all" compiles all of it, as `make aot` does (eight times as much), 0 each kernel once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

pytestmark = pytest.mark.aot
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# kernels that read or write long rows: they must move 128 bits at a time, where the processor can
STREAMING = ("quantize_nf4_", "quantize_fp4_", "dequantize_", "quantized_linear_", "rms_norm_", "rope_", "swiglu_")
# {(triton, target): bytes a thread} that an older ptxas keeps in local memory and that of CI's triton does not: docs/compiled.md
SPILLED = {("3.6", "sm_80"): 16}


def _chosen(target: str) -> list:
    from posttrain.kernels import _aot

    launchable = [v for v in _aot.variants() if _aot.applies(v, target)]
    strength = os.environ.get("POSTTRAIN_AOT", "1")
    return launchable if strength == "all" else _aot.covering(launchable, int(strength))


def _compile(target: str, worker: int, workers: int) -> list:
    from posttrain.kernels import _aot

    return [_aot.report(v, target) for v in _chosen(target)[worker::workers]]


class _Reports(dict[str, list]):
    """{target: [Report]}, compiled when first asked for, on every core. triton keeps what it compiled: a second run is quick."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int):
        self.pool, self.workers = pool, workers

    def __missing__(self, target: str) -> list:
        parts = [self.pool.submit(_compile, target, w, self.workers) for w in range(self.workers)]
        return self.setdefault(target, [r for part in parts for r in part.result()])


@pytest.fixture(scope="module")
def reports() -> Iterator[_Reports]:
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield _Reports(pool, workers)


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_builds_fits_and_spills_nothing(reports, target):
    import triton

    from posttrain.kernels import _aot

    found = reports[target]
    assert sorted(r.name for r in found) == sorted(v.name for v in _chosen(target))
    most = SPILLED.get((triton.__version__.rpartition(".")[0], target), 0)
    assert {r.name: r.spills for r in found if r.spills > most} == {}
    assert [r.name for r in found if r.shared > _aot.TARGETS[target].shared_bytes] == []


@pytest.mark.parametrize("strength", (1, 2, 3))
def test_the_subset_shows_all_that_occurs_together(strength):
    """Every pair (triple) of settings of any launchable variant is in one of those compiled, by a count of its own."""
    from posttrain.kernels import _aot

    def shown(variants) -> set:
        found = set()
        for v in variants:
            settings = {**v.signature, **{f"{k}=": str(x) for k, x in (*v.constexprs.items(), *v.options.items())}}
            settings |= {"": v.num_warps, " ": bool(v.unaligned)}
            found |= {(v.kernel.__name__, *group) for group in itertools.combinations(sorted(settings.items()), strength)}
        return found

    every = [v for v in _aot.variants() if _aot.applies(v, "sm_80") and v.name.startswith(("add_parts", "dequantize"))]
    subset = _aot.covering(every, strength)
    assert shown(subset) == shown(every) and len(subset) < len(every)
    assert len({v.name for v in every}) == len(every)


def test_every_kernel_file_is_compiled():
    """A kernel that nobody lists is a kernel that nobody checks."""
    import importlib
    import pkgutil

    from posttrain import kernels

    listed = {v.kernel.__name__ for v in importlib.import_module("posttrain.kernels._aot").variants()}
    written = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.ispkg:
            contents = vars(importlib.import_module(f"posttrain.kernels.{module.name}")).values()
            written |= {f.__name__ for f in contents if getattr(f, "arg_names", None) and f.__name__.endswith("_kernel")}
    assert written == listed


def test_launches_specialise_on_nothing_that_is_not_compiled_here():
    """triton compiles once more for an integer that is a multiple of 16, or 1: a stall in the middle of a run where the integer
    changes (a seed, a number of requests), and code that no test has seen. An integer that no variant has as ":16" is passed as it
    is."""
    from posttrain.kernels import _aot

    integers: dict[tuple[str, str], set[str]] = {}
    for v in _aot.variants():
        for p in v.kernel.params:
            kind = v.signature.get(p.name, "constexpr")
            if re.fullmatch(r"i(32|64)(:16)?", kind) and not p.do_not_specialize:
                integers.setdefault((v.kernel.__name__, p.name), set()).add(kind)
    assert integers
    assert [argument for argument, kinds in integers.items() if not any(kind.endswith(":16") for kind in kinds)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_streaming_kernels_move_128_bits(reports, target):
    """Aligned inputs of a tile are loaded 128 bits wide; dequantization, whose output is the larger side, stores 128 bits wide.

    A short block's kernel reads from wherever the whole blocks end, and on AMD a wavefront of 64 needs fewer bits a lane.
    """
    narrow = []
    for r in reports[target]:
        if r.name.startswith(STREAMING) and not r.name.endswith(("_short", "_unaligned")):
            width = 128 if target != "gfx942" else 64
            side = r.stores if r.name.startswith("dequantize_") else r.loads
            if max(side) < width:
                narrow.append((r.name, r.loads, r.stores))
    assert narrow == []


@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
def test_dequantization_fills_the_processor(reports, target):
    assert {r.name: r.occupancy for r in reports[target] if re.match("dequantize_(nf4|fp4)", r.name) and r.occupancy < 1} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_dots_use_tensor_cores(reports, target):
    assert [r.name for r in reports[target] if "gemm" in r.name and not r.mma] == []


@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100"))
def test_machine_code_is_what_ptx_promised(target):
    """SASS of the main dequantization: 128-bit loads of codes, 128-bit stores of weights, PRMT look-ups, no local memory."""
    from posttrain.kernels import _aot

    variant = next(v for v in _aot.variants() if v.name == "dequantize_nf4_bf16_nested")
    sass = _aot.tool("nvdisasm", _aot.compile_variant(variant, target).asm["cubin"], "-c")
    assert re.search(r"LDG\.E\.128", sass) and len(re.findall(r"STG\.E\.128", sass)) == 4
    assert len(re.findall(r"\bPRMT\b", sass)) >= 8 * 8
    assert not re.search(r"\b(LDL|STL)\b", sass)


def test_two_to_the_31_elements_are_indexed_in_64_bits():
    """With n beyond 32 bits triton types it i64; the kernels build, and every global address is 64-bit arithmetic."""
    from dataclasses import replace

    from posttrain.kernels import _aot

    for name in ("quantize_nf4_bf16_64", "dequantize_nf4_bf16_nested", "dequantize_gather_fp32"):
        variant = next(v for v in _aot.variants() if v.name == name)
        wide = {k: t.replace("i32", "i64") if k.startswith("n") else t for k, t in variant.signature.items()}
        ptx = _aot.compile_variant(replace(variant, signature=wide), "sm_80").asm["ptx"]
        # the program's offset: program id times a tile's size, widened before the product can wrap
        assert re.search(r"(mul|mad)\.wide\.u32\s+%rd\d+, %r\d+", ptx)
        assert not re.search(r"mul\.lo\.s32\s+%r\d+, %r\d+, (2048|4096)", ptx)
