"""One training step of SmolLM2-135M: LoRA r=8 on all linear layers, 4 x 256 tokens, bf16; beside transformers + PEFT
and bitsandbytes + PEFT on the same weights, tokens and labels.

    python benchmarks/bench_sft.py [--rounds 5] [--labels all|completion] [--json FILE]

First the systems must agree: the adapter's gradient of each 16-bit or 4-bit pair, row by row, against float32 on the same
(de)quantized weights. The median over rows counts: a row of random tokens can sit where the model's answer turns over with the
last bit, and any bfloat16 system may then be off by a multiple of the gradient. The first row is such a one (measured: errors
from 0.09 to 10 with the same weights and every layer right to rounding; 0.04 to 0.1 on the other rows).

Then they take steps in turn in one process, so that a busy machine slows all alike: medians, and medians of the ratios
within a round. Memory is each system's alone, in a process of its own: the highest resident size from the first step's start
to the last step's end (the mark is reset before), and of the whole process.

Without the real model in the cache (`posttrain fetch smollm2-135m`) the weights are random ones of its shape.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from posttrain.adapters import LoraConfig, adapter_parameters, attach, load_adapter, save_adapter
from posttrain.atomic import atomic_write
from posttrain.data import Example
from posttrain.model import CausalLM, ModelConfig, load, save
from posttrain.packing import collate
from posttrain.progress import peak_memory
from posttrain.sft import loss_sum

B, T, R = 4, 256, 8
SYSTEMS = {
    "posttrain bf16": ("bf16", None),
    "transformers + PEFT bf16": ("bf16", "posttrain bf16"),
    "posttrain NF4": ("nf4", None),
    "bitsandbytes + PEFT NF4": ("nf4", "posttrain NF4"),
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "initializer_range": 0.04,
}  # fmt: skip


def cached_model() -> Path | None:
    folder = Path(os.environ.get("POSTTRAIN_CACHE", Path.home() / ".cache" / "posttrain")) / "smollm2-135m"
    return folder if (folder / "model.safetensors").is_file() else None


def tokens(labels: str) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), int64 (B, T): every token learned but the first, or the last quarter (a completion)."""
    input_ids = torch.randint(10, 49000, (B, T), generator=torch.Generator().manual_seed(0))
    learned = input_ids.clone()
    learned[:, : 1 if labels == "all" else 3 * T // 4] = -100
    return input_ids, learned


Parameters = dict[str, torch.nn.Parameter]


def ours(kind: str, model_path: Path, adapter: Path, input_ids: Tensor, labels: Tensor):
    """(the adapter's parameters by PEFT's keys, function that gives the mean loss)."""
    model = load(model_path, dtype="bf16", quantize="nf4" if kind == "nf4" else None)
    load_adapter(model, adapter, any_base=True)
    model.train()
    return adapter_parameters(model), functools.partial(mean_loss, model, input_ids, labels)


def mean_loss(model: CausalLM, input_ids: Tensor, labels: Tensor, rows: slice = slice(B)) -> Tensor:
    pairs = zip(input_ids[rows].tolist(), labels[rows].tolist(), strict=True)
    batch = collate([[Example(ids, learned)] for ids, learned in pairs])
    return loss_sum(model, batch) / batch.normalizer


def theirs(kind: str, model_path: Path, adapter: Path, input_ids: Tensor, labels: Tensor):
    """As `ours`, through transformers and PEFT."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    if kind == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, **options)
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    parameters = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}

    def loss(rows: slice = slice(B)) -> Tensor:
        return model(input_ids=input_ids[rows], labels=labels[rows], use_cache=False).loss

    return parameters, loss


def system(name: str, arguments: argparse.Namespace) -> tuple[Parameters, Callable[[], Tensor]]:
    kind, peer_of = SYSTEMS[name]
    make = theirs if peer_of else ours
    return make(kind, Path(arguments.model), Path(arguments.adapter), *tokens(arguments.labels))


def stepper(parameters: Parameters, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Forward, backward, clipping and AdamW, the same for all."""
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def gradients(parameters: Parameters, loss: Callable[..., Tensor]) -> list[Tensor]:
    """The adapter's gradient on each row."""
    found = []
    for row in range(B):
        loss(slice(row, row + 1)).backward()
        found.append(torch.cat([parameters[key].grad.double().flatten() for key in sorted(parameters)]))
        for parameter in parameters.values():
            parameter.grad = None
    return found


def exact_gradients(kind: str, arguments: argparse.Namespace) -> list[Tensor]:
    """In fp32, on the weights that the systems of that kind hold."""
    model = load(arguments.model, dtype="bf16", quantize="nf4" if kind == "nf4" else None)
    for name, layer in list(model.named_modules()):
        if kind == "nf4" and name.endswith("_proj"):
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = torch.nn.Parameter(layer.weight.dequantize())
            model.set_submodule(name, dense)
    model.float()
    load_adapter(model, arguments.adapter, any_base=True)
    return gradients(adapter_parameters(model), functools.partial(mean_loss, model, *tokens(arguments.labels)))


def agree(name: str, peer: str, made: dict, arguments: argparse.Namespace) -> str:
    """Ours is at most twice as far from fp32 as the peer: the median over rows of the gradient's relative error."""
    exact = exact_gradients(SYSTEMS[name][0], arguments)
    errors = {
        n: [((g - e).norm() / e.norm()).item() for g, e in zip(gradients(*made[n]), exact, strict=True)] for n in (name, peer)
    }
    ours, theirs = (statistics.median(errors[n]) for n in (name, peer))
    if not ours <= 2 * theirs:
        raise SystemExit(f"{name}: the gradient's relative error is {ours:.2e}, the peer's {theirs:.2e}")
    rows = "; ".join(f"{n} " + " ".join(f"{e:.2g}" for e in errors[n]) for n in (name, peer))
    return f"gradient against fp32: ours {ours:.1e}, {peer} {theirs:.1e} (by row: {rows})"


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    """Run in a process of its own: two steps; prints the two peaks in bytes."""
    step = stepper(*system(name, arguments))
    whole = peak_memory(torch.device("cpu"))
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    for _ in range(2):
        step()
    during = peak_memory(torch.device("cpu"))
    print(json.dumps({"steps": during, "process": max(whole, during)}))


def available(name: str) -> bool:
    import importlib.util

    needed = {"transformers + PEFT bf16": ("transformers", "peft"), "bitsandbytes + PEFT NF4": ("bitsandbytes", "peft")}
    return all(importlib.util.find_spec(module) for module in needed.get(name, ()))


def prepare(folder: Path, arguments: argparse.Namespace) -> str:
    """Fill in arguments.model and arguments.adapter; what the weights are."""
    torch.manual_seed(0)
    real = Path(arguments.model) if arguments.model else cached_model()
    if real is None:
        real = folder / "model"
        save(CausalLM(ModelConfig.from_hf(SMOLLM2)).bfloat16(), real)
    model = load(real, dtype="bf16")
    attach(model, LoraConfig(r=R, lora_alpha=R, init_lora_weights=False))
    for key, parameter in adapter_parameters(model).items():
        if "lora_B" in key:
            parameter.data.mul_(0.02)  # as after some training: not zero, and not noise that drowns the model
    save_adapter(model, folder / "adapter")
    arguments.model, arguments.adapter = str(real), str(folder / "adapter")
    return "random" if real.parent == folder else real.name


def matmul_rate() -> float:
    """Flops a second of a bf16 product large enough to be at its best here."""
    a = torch.randn(1024, 1536).bfloat16()
    w = torch.randn(1536, 1536).bfloat16()
    best = min(_timed(functools.partial(torch.nn.functional.linear, a, w)) for _ in range(30))
    return 2 * 1024 * 1536 * 1536 / best


def _timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    call()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--labels", choices=("all", "completion"), default="all")
    parser.add_argument("--model", help="a Hugging Face folder of SmolLM2-135M's shape")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds instead: for a machine with other work")
    parser.add_argument("--memory-of", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = prepare(Path(folder), arguments)
        names = [name for name in SYSTEMS if name in arguments.systems and available(name)]
        made = {name: system(name, arguments) for name in names}
        pairs = [(SYSTEMS[name][1], name) for name in names if SYSTEMS[name][1] in names]
        agreement = {peer: agree(name, peer, made, arguments) for name, peer in pairs}
        steps = {name: stepper(*made[name]) for name in names}
        for step in steps.values():
            step()
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                times[name].append(_timed(steps[name], clock))
        rate = matmul_rate()
        memory = {name: memory_in_own_process(name, arguments) for name in names}
    report(names, times, memory, agreement, rate, weights, arguments)


def memory_in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory-of", name, "--labels", arguments.labels]
    command += ["--model", arguments.model, "--adapter", arguments.adapter]
    # Not from the repository's root: its folder `kernels` would shadow a package of that name that the peers look for.
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def report(names, times, memory, agreement, rate, weights, arguments) -> None:
    learned = int((tokens(arguments.labels)[1][:, 1:] != -100).sum())
    linear = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    flops = 4 * B * T * linear + 4 * learned * 576 * 49152
    print(f"{B} x {T} tokens, {learned} with a label; LoRA r={R} on 210 layers; weights: {weights}; "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"least work: {flops / 1e9:.0f} Gflop (frozen products forward and for dX), "
          f"{flops / rate:.2f} s at the {rate / 1e12:.2f} Tflop/s of a large bf16 product here")  # fmt: skip
    for text in agreement.values():
        print(text)
    clock = "cpu (s)" if arguments.cpu_time else "step (s)"
    head = f"{clock:>10}{'range':>15}{'times ours':>12}{'peak, steps':>13}{'times ours':>12}{'process':>10}"
    print(f"\n{'':28}{head}")
    rows = {}
    for name in SYSTEMS:
        if name not in names:
            print(f"{name:28}{'n/a':>10}")
            continue
        base = SYSTEMS[name][1] or name
        base = base if base in names else name
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
        held = memory[name]["steps"] / memory[base]["steps"]
        rows[name] = {
            "seconds": times[name], "ratio": ratio, "memory": memory[name], "memory_ratio": held,
        }  # fmt: skip
        print(
            f"{name:28}{statistics.median(times[name]):10.2f}{min(times[name]):8.2f}-{max(times[name]):.2f}{ratio:12.2f}"
            f"{memory[name]['steps'] / 2**30:9.2f} GiB{held:12.2f}{memory[name]['process'] / 2**30:6.2f} GiB"
        )
    if arguments.json:
        about = {
            "labels": learned, "weights": weights, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(), "flops": flops, "flops_per_second": rate,
        }  # fmt: skip
        with atomic_write(arguments.json) as file:
            file.write_text(json.dumps({**about, "systems": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
