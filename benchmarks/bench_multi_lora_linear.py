"""32 rows with LoRA adapters of their own (r = 16, bfloat16), on a dense and on an NF4 base, beside PEFT's mixed batches.

PEFT takes `adapter_names=` and loops over the adapters in the batch. It keeps adapters in float32 unless told otherwise: both are
timed, the faster counts. On NF4 its base is bitsandbytes' Linear4bit. `base` is our product without any adapter, what a row of the
base alone costs. First our rows are checked: accuracy against float64, and each row against the batch run through its adapter
alone, bit for bit. The limit is every byte once: the base, the adapters that the batch names, x and y.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from posttrain import kernels
from posttrain.kernels import cpu

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import _bench

ROWS, R, SCALING = 32, 16, 2.0
LARGE = (
    ("identical", 1),
    ("heavy and light", 2),
    ("uniform", 32),
    ("zipf", 32),
    ("distinct", 32),
    ("uniform", 256),
    ("distinct", 256),
)
CASES = {(4096, 4096): LARGE} | {
    shape: (("zipf", 32), ("distinct", 32)) for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536))
}


def mix(kind: str, n: int) -> torch.Tensor:
    """Adapter ids of ROWS rows."""
    if kind == "distinct":
        return torch.randperm(n)[:ROWS]
    if kind == "heavy and light":
        return torch.tensor([1] + [0] * (ROWS - 1))
    weights = torch.arange(1, n + 1).double() ** -1.5 if kind == "zipf" else torch.ones(n)
    return torch.multinomial(weights, ROWS, replacement=True)


class Holder(nn.Module):
    """PEFT adapts layers of a model: this one has one."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, **_):
        return self.layer(x)


def peft_layer(base: nn.Module, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype):
    """PEFT's layer with our adapters named a0, a1, ...; None where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=int(SCALING * R), target_modules=["layer"])
    model = peft.get_peft_model(Holder(base), config, adapter_name="a0", low_cpu_mem_usage=True)
    for i in range(1, len(A)):
        model.add_adapter(f"a{i}", config, low_cpu_mem_usage=True)
    layer = model.eval().base_model.model.layer
    for i in range(len(A)):
        layer.lora_A[f"a{i}"].weight, layer.lora_B[f"a{i}"].weight = nn.Parameter(A[i].to(dtype)), nn.Parameter(B[i].to(dtype))
    return layer


def bitsandbytes_base(w: torch.Tensor) -> nn.Module | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").eval()


def dense_base(w: torch.Tensor) -> nn.Module:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    layer.weight.data = w
    return layer


def check(x, w, A, B, scaling, ids) -> None:
    """Our mixed batch: as accurate as the plain expression, and each row as in the batch run through its adapter alone."""
    dense = w if isinstance(w, torch.Tensor) else w.dequantize()
    mixed = kernels.multi_lora_linear(x, w, A, B, scaling, ids)
    exact, plain = F.linear(x.double(), dense.double()), F.linear(x, dense)
    for i in ids.unique().tolist():
        rows = ids == i
        exact[rows] += SCALING * (x[rows].double() @ A[i].double().T) @ B[i].double().T
        plain[rows] += SCALING * (x[rows] @ A[i].T) @ B[i].T
        alone = kernels.multi_lora_linear(x, w, A, B, scaling, torch.full((ROWS,), i))
        assert torch.equal(alone[rows], mixed[rows]), "a row depends on the others' adapters"
    assert (mixed - exact).norm() <= 2 * (plain - exact).norm(), "less accurate than the plain expression"


@torch.inference_mode()
def main() -> None:
    options = _bench.arguments(__doc__)
    warnings.filterwarnings("ignore")
    print(cpu.describe())
    speed = _bench.bandwidth(options)
    print(f"measured read bandwidth {speed / 1e9:.1f} GB/s on {options.threads} thread(s)")
    torch.manual_seed(0)
    table = []
    for (N, K), cases in CASES.items():
        most = max(n for _, n in cases)
        weight, x = torch.randn(N, K).bfloat16(), torch.randn(ROWS, K).bfloat16()
        A, B = torch.randn(most, R, K).bfloat16() / K**0.5, torch.randn(most, N, R).bfloat16()
        scaling = torch.full((most,), SCALING)
        for base_name in ("dense", "nf4"):
            w = weight if base_name == "dense" else kernels.quantize_weight(weight)
            make = dense_base if base_name == "dense" else bitsandbytes_base
            bases = {dtype: make(weight) for dtype in (torch.float32, torch.bfloat16)}
            peers = {dtype: base and peft_layer(base, A, B, dtype) for dtype, base in bases.items()}
            stored = 2 * N * K if base_name == "dense" else int(N * K * 4.127 / 8)
            for kind, n in cases:
                ids = mix(kind, n)
                names = [f"a{i}" for i in ids.tolist()]
                check(x, w, A, B, scaling, ids)
                few = A[:n].contiguous(), B[:n].contiguous(), scaling[:n]
                plain = F.linear if base_name == "dense" else kernels.quantized_linear
                peer, peer_bf16 = peers[torch.float32], peers[torch.bfloat16]
                candidates = {
                    "posttrain": lambda x=x, w=w, few=few, ids=ids: kernels.multi_lora_linear(x, w, *few, ids),
                    "PEFT": peer and (lambda x=x, f=peer, names=names: f(x, adapter_names=names)),
                    "PEFT bf16": peer_bf16 and (lambda x=x, f=peer_bf16, names=names: f(x, adapter_names=names)),
                    "base": lambda x=x, w=w, plain=plain: plain(x, w),
                }
                size = stored + 2 * len(ids.unique()) * R * (N + K) + 2 * ROWS * (N + K)
                title = f"{base_name} {N}x{K} {kind} of {n}"
                table.append(_bench.row(title, _bench.in_turn(candidates, options), size, speed))
    _bench.save("multi_lora_linear", table, options, {"bandwidth": speed, "rows": ROWS, "r": R, **cpu.describe()})


if __name__ == "__main__":
    main()
