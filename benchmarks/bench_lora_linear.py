"""y = x W^T + scaling x A^T B^T, W dense bf16 or NF4 (block 64, double quantization), forward and forward + backward, beside PEFT's
LoRA layer on torch's Linear and on bitsandbytes' Linear4bit, and beside our own base product without a low-rank term.

The base of "forward + backward" is x W^T with dY W: what a frozen layer costs. PEFT trains what we train: A and B in fp32, x in
bf16. Forward it is timed as it trains and in eval mode, where bitsandbytes packs the weight anew for few rows. On a machine that
others use, `--cpu-time --threads 1` is the fairer clock.
"""

# ruff: noqa: B023 (every closure runs in the round of the loop that made it)
from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from posttrain import kernels
from posttrain.kernels import cpu

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

# N, K, rank and rows: a large layer, and SmolLM2-135M's in training
CASES = [(4096, 4096, r, (1, 16, 1024)) for r in (16, 64)]
CASES += [(N, K, r, (1024,)) for N, K in ((576, 576), (1536, 576), (576, 1536)) for r in (8, 64)]
HALF = torch.bfloat16


def peft_layer(dense: torch.Tensor, A: torch.Tensor, B: torch.Tensor, four_bit: bool):
    """PEFT's layer with that weight and adapter, scaling 2; None where peft or bitsandbytes is not installed."""
    needed = ("peft", "bitsandbytes") if four_bit else ("peft",)
    if any(importlib.util.find_spec(name) is None for name in needed):
        return None
    import peft

    N, K = dense.shape
    if four_bit:
        import bitsandbytes as bnb

        linear = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=HALF, quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        linear = linear.to("cpu")
    else:
        linear = nn.Linear(K, N, bias=False, dtype=HALF)
        linear.weight = nn.Parameter(dense.clone(), requires_grad=False)
    r = A.shape[0]
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], lora_dropout=0.0)
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    return layer.train()


def step(layer, x: torch.Tensor, dy: torch.Tensor, leaves) -> tuple[torch.Tensor, ...]:
    """Gradients of x and of what the layer trains."""
    return torch.autograd.grad(layer(x), (x, *leaves), dy)


def agree(candidates: dict, exact: torch.Tensor) -> None:
    """Ours is as close to float64 as PEFT's, within the factor two of docs/tolerances.md."""
    errors = {name: (result.double() - exact).norm() for name, result in candidates.items()}
    if "peft" in errors:
        assert errors["posttrain"] <= 2 * errors["peft"], f"less accurate than PEFT: {errors}"


def main() -> None:
    options = _bench.arguments(__doc__)
    print(cpu.describe())
    speed = _bench.bandwidth(options)
    print(f"measured read bandwidth {speed / 1e9:.1f} GB/s on {options.threads} thread(s)")
    torch.manual_seed(0)
    rows = []
    for N, K, r, all_rows in CASES:
        dense = torch.randn(N, K, dtype=HALF) / K**0.5
        packed = kernels.quantize_weight(dense)
        A, B = (torch.randn(s) / s[1] ** 0.5 for s in ((r, K), (N, r)))
        for kind, w in (("dense", dense), ("nf4", packed)):
            peer, still = (peft_layer(dense, A, B, kind == "nf4") for _ in range(2))
            still = still and still.eval()
            peer_leaves = () if peer is None else (peer.lora_A["default"].weight, peer.lora_B["default"].weight)
            leaves = A.clone().requires_grad_(), B.clone().requires_grad_()
            exact_w = (w if kind == "dense" else w.dequantize()).double()

            def ours(x, w=w, leaves=leaves):
                return kernels.lora_linear(x, w, *leaves, 2.0)

            def base(x, w=w):
                return F.linear(x, w) if isinstance(w, torch.Tensor) else kernels.quantized_linear(x, w)

            for M in all_rows:
                x, dy = torch.randn(M, K, dtype=HALF), torch.randn(M, N, dtype=HALF)
                exact = x.double() @ (exact_w + 2.0 * B.double() @ A.double()).t()
                agree({"posttrain": ours(x), **({} if peer is None else {"peft": peer(x)})}, exact)
                weight = 2 * N * K if kind == "dense" else int(N * K * 4.127 / 8)
                moved = weight + 2 * M * (N + K) + 4 * r * (N + K)
                with torch.no_grad():
                    times = _bench.in_turn(
                        {
                            "posttrain": lambda x=x: ours(x),
                            "our base": lambda x=x: base(x),
                            "peft": peer and (lambda x=x: peer(x)),
                            "peft eval": still and (lambda x=x: still(x)),
                        },
                        options,
                    )
                rows.append(_bench.row(f"forward {kind} N={N} K={K} M={M} r={r}", times, moved, speed))
                x.requires_grad_()
                times = _bench.in_turn(
                    {
                        "posttrain": lambda x=x, dy=dy: step(ours, x, dy, leaves),
                        "our base": lambda x=x, dy=dy: step(base, x, dy, ()),
                        "peft": peer and (lambda x=x, dy=dy: step(peer, x, dy, peer_leaves)),
                    },
                    options,
                )
                rows.append(_bench.row(f"forward + backward {kind} N={N} K={K} M={M} r={r}", times, 2 * moved, speed))
    for title in ("our base", "peft"):
        spread = [row["ratios"][title] for row in rows if row["ratios"][title]]
        if spread:
            print(f"{title} / ours over all rows: median {statistics.median(spread):.2f}, {min(spread):.2f} to {max(spread):.2f}")
    _bench.save("lora_linear", rows, options, {"bandwidth": speed, **cpu.describe()})


if __name__ == "__main__":
    main()
