"""x W^T and dX = dY W with W in NF4 (block 64, double quantization), bfloat16, beside dense torch and both bitsandbytes paths.

bitsandbytes has two on a CPU: `matmul_4bit`, which dequantizes the whole weight every time, and what `Linear4bit.eval()` repacks
itself into on machines with AVX-512 BF16. The limit is the packed weight, x and y over the measured bandwidth.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from posttrain import kernels
from posttrain.kernels import cpu

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

SHAPES = [(4096, 4096, M) for M in (1, 2, 8, 32, 64, 256, 1024)]
SHAPES += [(N, K, M) for M in (1, 1024) for N, K in ((576, 576), (192, 576), (1536, 576), (576, 1536))]


def bitsandbytes_paths(w: torch.Tensor):
    """(matmul_4bit of x, eval-mode Linear4bit of x), each None where it is not to be had."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None, None
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    N, K = w.shape
    if N % 32 or K % 64:  # its packed layout takes no others
        return (lambda x: bnb.matmul_4bit(x, packed.t(), state)), None
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4")
    return (lambda x: bnb.matmul_4bit(x, packed.t(), state)), layer.to("cpu").eval()


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    speed = _bench.bandwidth(options)
    print(f"measured read bandwidth {speed / 1e9:.1f} GB/s on {options.threads} thread(s)")
    torch.manual_seed(0)
    rows, weights = [], {}
    for N, K, M in SHAPES:
        if (N, K) not in weights:
            dense = torch.randn(N, K, dtype=torch.bfloat16)
            weights[N, K] = dense, kernels.quantize_weight(dense), *bitsandbytes_paths(dense)
        dense, w, matmul_4bit, packed_layer = weights[N, K]
        x, dy = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(M, N, dtype=torch.bfloat16)
        with torch.no_grad():
            exact = x.double() @ w.dequantize().double().t()
            error = (kernels.quantized_linear(x, w) - exact).norm()
            assert error <= 2 * (F.linear(x, w.dequantize()) - exact).norm(), "less accurate than plain PyTorch"
            times = _bench.in_turn(
                {
                    "posttrain": lambda x=x, w=w: kernels.quantized_linear(x, w),
                    "dense": lambda x=x, dense=dense: F.linear(x, dense),
                    "bnb.matmul_4bit": (lambda x=x, f=matmul_4bit: f(x)) if matmul_4bit else None,
                    "bnb packed": (lambda x=x, f=packed_layer: f(x)) if packed_layer else None,
                },
                options,
            )
            size = int(N * K * 4.127 / 8 + 2 * M * (N + K))
            rows.append(_bench.row(f"x W^T  M={M} N={N} K={K}", times, size, speed))
            arguments = (*w.tensors(), N, K, w.block_size, w.quant_type)
            times = _bench.in_turn(
                {
                    "posttrain": lambda dy=dy, a=arguments: torch.ops.posttrain.quantized_linear_dx(dy, *a),
                    "dense": lambda dy=dy, dense=dense: dy @ dense,
                },
                options,
            )
            rows.append(_bench.row(f"dY W   M={M} N={N} K={K}", times, size, speed))
    _bench.save("quantized_linear", rows, options, {"bandwidth": speed, **cpu.describe()})


if __name__ == "__main__":
    main()
