"""`make aot`: what the compiler made of every kernel for every target, without a GPU.

Registers, spills, shared memory, occupancy, widest global load and store, matrix instructions; and for a 4096 x 4096
weight the least bytes that must move, with the time those take at the data sheet's bandwidth. That time is a bound which
no kernel can beat, not a measurement and not a prediction.

Fails when a kernel spills registers or wants more shared memory than a program may have.

    python benchmarks/aot.py [text in the kernel's name] [--target sm_80]
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from rich.console import Console
from rich.progress import track
from rich.table import Table

from posttrain.kernels import _aot

N = K = 4096
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


def least_bytes(name: str) -> float:
    """The floor stated in the kernel's docstring, for a 4096 x 4096 weight; nan where a launch has no such size."""
    n = N * K
    dtype = re.search(r"fp32|fp16|bf16", name.removeprefix("quantize_fp4").removeprefix("dequantize_fp4"))
    size = ITEMSIZE[dtype[0]] if dtype else 0
    nested = "_nested" in name
    block = re.fullmatch(r"quantize_\w+_(\d+)", name)
    absmax = n / 64 * (1 + 4 / 256) if nested else n / 64 * 4
    if block:
        return size * n + n / 2 + 4 * n / int(block[1])
    if name.startswith("dequantize_"):
        return n / 2 + absmax + size * n
    if name == "double_quantize":
        return n / 64 * 4 * 2 + n / 64 * (1 + 4 / 256)
    if name == "double_dequantize":
        return n / 64 * (1 + 4 / 256) + n / 64 * 4
    rows = re.match(r"quantized_linear_[a-z]+_\w+?_(\d+)", name)
    return n / 2 + absmax + int(rows[1]) * (K + N) * size if rows else math.nan


@functools.cache
def _chosen(target: str, text: str) -> list[_aot.Variant]:
    return [v for v in _aot.variants() if _aot.applies(v, target) and text in v.name]


def _report(target: str, text: str, i: int) -> _aot.Report:
    return _aot.report(_chosen(target, text)[i], target)


def _widest(widths: dict[int, int]) -> str:
    return str(max(widths)) if widths else "-"


def table(target: str, reports: list[_aot.Report]) -> Table:
    device = _aot.TARGETS[target]
    shown = Table(title=f"{target} ({device.device}, {device.bandwidth / 1e12:.2f} TB/s)", title_justify="left")
    numbers = ("registers", "spilled", "shared", "occupancy", "load bit", "store bit")
    for column in ("kernel", *numbers, "matrix", "MB, least", "us, bound"):
        shown.add_column(column, justify="left" if column in ("kernel", "matrix") else "right", no_wrap=column == "kernel")
    for r in sorted(reports, key=lambda r: r.name):
        floor = least_bytes(r.name)
        kind = ", ".join(sorted({re.match(r"[\w]+(?:\.\w+)?", m)[0] for m in r.mma})) or "-"
        bound = ["-", "-"] if math.isnan(floor) else [f"{floor / 1e6:.1f}", f"{1e6 * floor / device.bandwidth:.1f}"]
        measured = (str(r.registers), str(r.spills), str(r.shared), f"{r.occupancy:.0%}", _widest(r.loads), _widest(r.stores))
        shown.add_row(r.name, *measured, kind, *bound)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", default="", help="only kernels whose name contains this")
    parser.add_argument("--target", choices=list(_aot.TARGETS), help="only this target")
    args = parser.parse_args()
    console = Console(width=170 if not sys.stdout.isatty() else None)
    faults = []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for target in [args.target] if args.target else _aot.TARGETS:
            count = len(_chosen(target, args.text))
            reports = pool.map(partial(_report, target, args.text), range(count))
            reports = list(track(reports, f"compiling for {target}", count, console=Console(stderr=True)))
            console.print(table(target, reports))
            faults += [r for r in reports if r.spills or r.shared > _aot.TARGETS[target].shared_bytes]
    console.print("Bounds are bytes over the data sheet's bandwidth: a limit, not a measurement. Nothing ran on a GPU.")
    if faults:
        sys.exit("spilled or too large: " + ", ".join(f"{r.target} {r.name}" for r in faults))


if __name__ == "__main__":
    main()
