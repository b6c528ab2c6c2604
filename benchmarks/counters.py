"""`make counters`: work done by our GPU kernels beside their peers', in an emulator that executes their PTX on this CPU.

Warp instructions per weight are PTX, without mov, ld.param and cvta (which mostly vanish in machine code), one for each
issue to a warp. Bytes are distinct 32-byte sectors read plus written, over the least that the operation must move. These
count work, not time. Peers' kernels are bitsandbytes' Triton kernels where it is installed, and a plain table gather
written here; rows marked "measured once" are from CUDA sources compiled with nvcc 13.0, and are not run again here.

    python benchmarks/counters.py [--arch 80 | 90]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import types

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table

from posttrain.kernels import codebooks, nf4
from posttrain.kernels._low_rank import LowRank
from posttrain.kernels.cpu import pytorch as engine
from posttrain.kernels.cpu import pytorch_spec_verify as spec_engine
from posttrain.kernels.lora_linear_down import lora_linear_down_triton
from posttrain.kernels.quantized_linear_decode import quantized_linear_decode_triton
from posttrain.kernels.quantized_linear_gemm import quantized_linear_gemm_triton
from posttrain.kernels.spec_verify_gpu import verify_draft_tokens_triton
from posttrain.model.sampling import filter_logits

WEIGHTS = 1 << 19
BLOCK = 64
N, K = 512, 4096  # the linear layers': W (N, K)
MEASURED_ONCE = {  # (warp instructions a weight without mov, bytes over the floor, occupancy A100 / H100, bank factor)
    "dequantize": ("bitsandbytes CUDA", 1.07, "1.00", "56 / 62 %", "-"),
    "quantize": ("bitsandbytes CUDA", 3.66, "1.00", "50 %", "-"),
    "linear M=1": ("bitsandbytes CUDA gemm_4bit SIMT", 0.219, "1.00", "100 / 100 %", "-"),
    "linear M=16": ("bitsandbytes CUDA gemm_4bit MMA", 0.274, "1.00", "38 / 50 %", "1.64"),
    "linear M=64": ("bitsandbytes CUDA gemm_4bit MMA", 0.387, "1.00", "50 / 62 %", "1.38"),
    "verify B=4 K=4, T=1": ("vLLM V2 Triton, with mov", 1.73, "-", "31 %", "-"),
    "verify B=4 K=4, greedy": ("vLLM V2 Triton, with mov", 0.37, "-", "31 %", "-"),
}


@triton.jit
def _plain_gather_kernel(packed_ptr, absmax_ptr, values_ptr, out_ptr, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    # What one writes first: a byte a lane, each code looked up in the table, each absmax looked up by its weight.
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = offs < n_bytes
    byte = tl.load(packed_ptr + offs, mask=mask).to(tl.int32)
    absmax = tl.load(absmax_ptr + offs * 2 // BLOCK_SIZE, mask=mask)
    high = (tl.load(values_ptr + (byte >> 4)) * absmax).to(tl.bfloat16)
    low = (tl.load(values_ptr + (byte & 15)) * absmax).to(tl.bfloat16)
    out = tl.program_id(0) * TILE * 2 + tl.arange(0, TILE * 2)
    tl.store(out_ptr + out, tl.interleave(high, low), mask=out < n_bytes * 2)


class Counters:
    """One table; `row` runs a launch through the emulator, checks its result and adds a line."""

    def __init__(self, arch: int):
        from gpuemu import counters

        self.arch, self.counters = arch, counters
        counters.start(arch)
        self.shown = Table(title=f"sm_{arch}: work per weight", title_justify="left")
        columns = ("operation", "kernel", "warp instructions", "bytes / floor", "occupancy A100 / H100", "bank factor")
        for i, column in enumerate(columns):
            self.shown.add_column(column, justify="left" if i < 2 else "right")

    def row(self, operation: str, kernel: str, launch, check, weights: int, floor: float) -> None:
        with self.counters.record() as recorded:
            result = launch()
        if not check(result):
            raise AssertionError(f"{kernel}: the result of {operation} is wrong, so its counters mean nothing")
        runs = recorded.launches
        instructions = sum(r["warp_instr_nomov"] for r in runs) / weights
        main = max(runs, key=lambda r: r["warp_instr"])
        occupancy = " / ".join(f"{main['occ'][d][2]:.0%}" for d in ("A100", "H100"))
        bank = f"{main['conflict']:.2f}" if main["conflict"] else "-"
        moved = sum(r["dram"] for r in runs) / floor
        self.shown.add_row(operation, kernel, f"{instructions:.3f}", f"{moved:.2f}", occupancy, bank)

    def measured_once(self, operation: str) -> None:
        kernel, instructions, moved, occupancy, bank = MEASURED_ONCE[operation]
        if self.arch == 80:
            self.shown.add_row(operation, f"{kernel} (measured once)", f"{instructions:.3f}", moved, occupancy, bank)


def _bitsandbytes_triton():
    """bitsandbytes' Triton launchers, told that this CPU is their device; None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    torch.accelerator.current_accelerator = lambda *a, **k: torch.device("cpu")
    import bitsandbytes.backends.triton.ops as ops

    ops.torch_accelerator_module = types.SimpleNamespace(device=lambda d: contextlib.nullcontext())
    return ops


def dequantize(table: Counters, peer) -> None:
    n = WEIGHTS
    packed, absmax = engine.quantize_4bit(torch.randn(n), BLOCK, "nf4")
    codes, nested, offset = engine.double_quantize(absmax, 256)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        plain = (packed, absmax, None, None, 256, (n,), dtype, BLOCK, "nf4")
        double = (packed, codes, nested, offset, 256, (n,), dtype, BLOCK, "nf4")
        written = dtype.itemsize * n
        for label, args, read in (("", plain, n / 2 + 4 * n / BLOCK), (" nested", double, n / 2 + (1 + 4 / 256) * n / BLOCK)):
            expected = engine.dequantize_4bit(*args)
            table.row(
                f"dequantize to {str(dtype)[6:]}", f"posttrain{label}", lambda args=args: nf4.dequantize_4bit_triton(*args),
                lambda out, expected=expected: torch.equal(out, expected), n, read + written,
            )  # fmt: skip
    floor = n / 2 + 4 * n / BLOCK + 2 * n
    expected = engine.dequantize_4bit(packed, absmax, None, None, 256, (n,), torch.bfloat16, BLOCK, "nf4")
    out = torch.empty(n, dtype=torch.bfloat16)

    def gather():
        _plain_gather_kernel[(n // 2 // 1024,)](packed, absmax, codebooks.NF4, out, n // 2, BLOCK, 1024, num_warps=4)
        return out

    table.row("dequantize to bfloat16", "plain table gather", gather, lambda out: torch.equal(out, expected), n, floor)
    if peer:
        table.row(
            "dequantize to bfloat16", "bitsandbytes Triton",
            lambda: peer.dequantize_4bit(packed, absmax, BLOCK, "nf4", (n,), torch.bfloat16),
            lambda out: torch.equal(out.view(-1), expected), n, floor,
        )  # fmt: skip
    table.measured_once("dequantize")


def quantize(table: Counters, peer) -> None:
    n = WEIGHTS
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(n).to(dtype)
        for quant_type in ("nf4", "fp4"):
            for block_size in (64, 4096):
                packed, absmax = engine.quantize_4bit(x, block_size, quant_type)
                floor = dtype.itemsize * n + n / 2 + 4 * n / block_size
                table.row(
                    f"quantize {quant_type} {str(dtype)[6:]}, block {block_size}", "posttrain",
                    lambda x=x, b=block_size, q=quant_type: nf4.quantize_4bit_triton(x, b, q),
                    lambda out, p=packed, a=absmax: torch.equal(out[0], p) and torch.equal(out[1], a), n, floor,
                )  # fmt: skip
    if peer:
        x = torch.randn(n).bfloat16()
        _, absmax = engine.quantize_4bit(x, BLOCK, "nf4")
        # its kernel divides where the format multiplies, so codes at a threshold may differ: absmax is what is checked
        table.row(
            "quantize nf4 bfloat16, block 64", "bitsandbytes Triton", lambda: peer.quantize_4bit(x, BLOCK, "nf4", torch.uint8),
            lambda out: torch.equal(out[1], absmax), n, 2 * n + n / 2 + 4 * n / BLOCK,
        )  # fmt: skip
    table.measured_once("quantize")


def linear(table: Counters) -> None:
    packed, absmax = engine.quantize_4bit(torch.randn(N, K), BLOCK, "nf4")
    weight = (packed, *engine.double_quantize(absmax, 256), 256)
    exact_weight = engine.dequantize_4bit(*weight, (N, K), torch.bfloat16, BLOCK, "nf4").double()
    for rows in (1, 16, 64):
        launcher = quantized_linear_decode_triton if rows == 1 else quantized_linear_gemm_triton
        x = torch.randn(rows, K).bfloat16()
        exact = x.double() @ exact_weight.T
        plain_error = ((x @ exact_weight.bfloat16().T).double() - exact).abs().max()
        floor = N * K / 2 + (1 + 4 / 256) * N * K / BLOCK + 2 * rows * (K + N)
        table.row(
            f"linear M={rows}", "posttrain nested", lambda x=x, f=launcher: f(x, *weight, None, N, K, BLOCK, "nf4"),
            lambda y, e=exact, p=plain_error: (y.double() - e).abs().max() <= 2 * p, N * K, floor,
        )  # fmt: skip
        table.measured_once(f"linear M={rows}")


def lora_linear(table: Counters) -> None:
    """The same launches with a low-rank term of rank 16 among their sums, x A^T in eight parts beside them; a weight is W's."""
    packed, absmax = engine.quantize_4bit(torch.randn(N, K), BLOCK, "nf4")
    weight = (packed, *engine.double_quantize(absmax, 256), 256)
    A, B = torch.randn(16, K) / 64, torch.randn(N, 16)
    merged = engine.dequantize_4bit(*weight, (N, K), torch.bfloat16, BLOCK, "nf4").double() + B.double() @ A.double()
    for rows in (1, 16, 64):
        launcher = quantized_linear_decode_triton if rows == 1 else quantized_linear_gemm_triton
        x = torch.randn(rows, K).bfloat16()
        exact = x.double() @ merged.T
        plain_error = ((x @ merged.bfloat16().T).double() - exact).abs().max()
        floor = N * K / 2 + (1 + 4 / 256) * N * K / BLOCK + 2 * rows * (K + N) + 4 * 16 * N
        # x A^T is a launch of its own, once for a group, whose work does not grow with N: not counted here
        s = lora_linear_down_triton(x, A, parts=8)
        term = LowRank(s, B, 1.0)
        table.row(
            f"linear + rank 16, M={rows}", "posttrain nested",
            lambda x=x, f=launcher, t=term: f(x, *weight, None, N, K, BLOCK, "nf4", low_rank=t),
            lambda y, e=exact, p=plain_error: (y.double() - e).abs().max() <= 2 * p, N * K, floor + 4 * s.numel(),
        )  # fmt: skip


def verify(table: Counters) -> None:
    """Drafts of four requests from logits; a weight is a word of a draft's row. The floor: each draft's row of the target and of
    the draft, and the row that is drawn from once more (its draft's too, where a draft was refused)."""
    B, drafts, V = 4, 4, 32_000
    target = (4 * torch.randn(B, drafts + 1, V)).bfloat16()
    draft = (target[:, :drafts].float() + 0.7 * torch.randn(B, drafts, V)).bfloat16()
    num = torch.full((B,), drafts)
    for name, setting in (("T=1", (1.0, 0, 1.0)), ("greedy", (0.0, 0, 1.0)), ("T=0.8, top-k 50, top-p 0.95", (0.8, 50, 0.95))):
        greedy = setting[0] == 0
        p = target[:, :drafts] if greedy else filter_logits(draft, *setting) - torch.empty(B, drafts, V).exponential_().log()
        given = (p.argmax(2), draft, target, num, *setting, None, None, None, 7, None, None)
        expected = spec_engine.verify_draft_tokens(*given)
        refused = int((expected[1] < drafts).sum())
        rows = B * drafts + B - refused if greedy else 2 * B * drafts + B + refused
        table.row(
            f"verify B=4 K=4, {name}", "posttrain", lambda given=given: verify_draft_tokens_triton(*given),
            lambda out, e=expected: torch.equal(out[0], e[0]), B * drafts * V, 2 * V * rows,
        )  # fmt: skip
        if f"verify B=4 K=4, {name}" in MEASURED_ONCE:
            table.measured_once(f"verify B=4 K=4, {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, choices=(80, 90), default=80)
    arch = parser.parse_args().arch
    if importlib.util.find_spec("gpuemu") is None:
        sys.exit("make counters needs the emulator gpuemu, which is not installed; nothing was measured")
    torch.manual_seed(0)
    table = Counters(arch)
    peer = _bitsandbytes_triton()
    dequantize(table, peer)
    quantize(table, peer)
    linear(table)
    lora_linear(table)
    verify(table)
    console = Console(width=130 if not sys.stdout.isatty() else None)
    console.print(table.shown)
    console.print("Work done in an emulator, not time. Results were checked against the CPU engine before being counted.")


if __name__ == "__main__":
    main()
