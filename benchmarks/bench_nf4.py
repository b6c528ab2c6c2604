"""Quantize and dequantize a 4096 x 4096 weight beside bitsandbytes: NF4, block 64, double quantization, in one process.

The limit is the bytes that must move over the measured bandwidth: x read and 4.127 bits a weight written, or the reverse. A fresh
tensor of this size costs page faults besides, for everyone but our second: large results take the memory of one that was freed
(kernels/cpu/recycled.py). "new pages" is ours without that; "into" writes to a tensor that is already there.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from posttrain import kernels
from posttrain.kernels import cpu
from posttrain.kernels.cpu import recycled

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

N = K = 4096


def on_new_pages(w: kernels.QuantizedWeight) -> torch.Tensor:
    recycled._freed.clear()
    return w.dequantize()


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    speed = _bench.bandwidth(options)
    print(f"measured read bandwidth {speed / 1e9:.1f} GB/s on {options.threads} thread(s)")
    peer = None
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes.functional as peer
    rows = []
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(N, K, dtype=dtype)
        w = kernels.quantize_weight(x)
        theirs = None
        if peer:
            theirs = peer.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True)
            plain, state = peer.quantize_4bit(x, quant_type="nf4", blocksize=64)
            packed, absmax = kernels.quantize_nf4(x)
            assert torch.equal(packed, plain.view(-1)) and torch.equal(absmax, state.absmax), "the bytes differ"
            ours = kernels.dequantize_nf4(packed, absmax, (N, K), dtype)
            assert torch.equal(ours, peer.dequantize_4bit(plain, state)), "the values differ"
        name, weight_bytes, dense_bytes = str(dtype).removeprefix("torch."), N * K * 4.127 / 8, x.numel() * x.element_size()
        times = _bench.in_turn(
            {
                "posttrain": lambda x=x: kernels.quantize_weight(x),
                "bitsandbytes": (lambda x=x: peer.quantize_4bit(x, quant_type="nf4", compress_statistics=True)) if peer else None,
            },
            options,
        )
        rows.append(_bench.row(f"quantize {name}", times, int(weight_bytes + dense_bytes), speed))
        times = _bench.in_turn(
            {
                "posttrain": w.dequantize,
                "posttrain, new pages": lambda w=w: on_new_pages(w),
                "bitsandbytes": (lambda t=theirs: peer.dequantize_4bit(*t)) if peer else None,
                "torch.empty.fill_": lambda dtype=dtype: torch.empty(N, K, dtype=dtype).fill_(1.0),
            },
            options,
        )
        rows.append(_bench.row(f"dequantize {name}, fresh", times, int(weight_bytes + dense_bytes), speed))
        if cpu.describe()["engine"] == "native":
            from posttrain.kernels.cpu import native

            there = torch.zeros(N, K, dtype=dtype)
            tensors = w.tensors()
            times = _bench.in_turn(
                {
                    "posttrain": lambda there=there, tensors=tensors: native._dequantize_into(there, *tensors, 64, "nf4"),
                    "fill_": lambda there=there: there.fill_(1.0),
                },
                options,
            )
            rows.append(_bench.row(f"dequantize {name}, into", times, int(weight_bytes + dense_bytes), speed))
    _bench.save("nf4", rows, options, {"bandwidth": speed, **cpu.describe()})


if __name__ == "__main__":
    main()
