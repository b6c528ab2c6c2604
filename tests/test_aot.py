"""Every configuration of every kernel, compiled for every target: it builds, fits shared memory and spills no register."""
from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor

import pytest

pytestmark = pytest.mark.aot
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# kernels that read or write long rows: they must move 128 bits at a time, where the processor can
STREAMING = ("quantize_nf4_", "quantize_fp4_", "dequantize_", "quantized_linear_")


def _compile(target: str, worker: int, workers: int) -> list:
    from posttrain.kernels import _aot

    chosen = [v for v in _aot.variants() if _aot.applies(v, target)]
    return [_aot.report(v, target) for v in chosen[worker::workers]]


@pytest.fixture(scope="module")
def reports() -> dict[str, list]:
    """All of them, on every core: {target: [Report]}. triton caches what it compiled, so a second run is quick."""
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {t: [pool.submit(_compile, t, w, workers) for w in range(workers)] for t in TARGETS}
        return {t: [r for job in parts for r in job.result()] for t, parts in jobs.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_builds_fits_and_spills_nothing(reports, target):
    from posttrain.kernels import _aot

    found = reports[target]
    assert {r.name for r in found} == {v.name for v in _aot.variants() if _aot.applies(v, target)}
    assert [r.name for r in found if r.spills] == []
    assert [r.name for r in found if r.shared > _aot.TARGETS[target].shared_bytes] == []


def test_every_kernel_file_is_compiled(reports):
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


@pytest.mark.parametrize("target", TARGETS)
def test_streaming_kernels_move_128_bits(reports, target):
    """Inputs of a tile are loaded 128 bits wide; dequantization, whose output is the larger side, stores 128 bits wide.

    A short block's kernel reads from wherever the whole blocks end, and on AMD a wavefront of 64 needs fewer bits a lane.
    """
    narrow = []
    for r in reports[target]:
        if r.name.startswith(STREAMING) and not r.name.endswith("_short"):
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
