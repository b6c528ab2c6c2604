"""Decoding at batch 1: ours in NF4, ours in bf16, transformers in bf16, in turn in one process.

Agreement is checked first: against the float32 model, the error of our bf16 logits is at most twice that of transformers'; and
NF4's, against float32 on its dequantized weights, at most twice that of bf16 on them. Then each generates as many tokens, round
after round; ratios are medians over the rounds. The limit is the bytes a token must read (every linear weight and the head) over
this machine's measured read bandwidth. Peak memory is that of a fresh process each.

    python benchmarks/bench_generate.py [--model PATH] [--tokens 32] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from posttrain.model import CausalLM, generate, load
from posttrain.quantized import QuantizedLinear

PROMPT = 32  # tokens
KINDS = ("ours nf4", "ours bf16", "transformers bf16")


def make(kind: str, path: Path) -> Callable[[list[int], int], list[int]]:
    """A function that continues a prompt greedily by a number of tokens, never stopping early; `.model` is what it runs."""
    if kind == "transformers bf16":
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

        def run(prompt: list[int], count: int) -> list[int]:
            ids = torch.tensor([prompt])
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            return out[0, len(prompt) :].tolist()

        run.model = peer  # type: ignore[attr-defined]
        return run
    model = load(path, quantize="nf4" if kind == "ours nf4" else None)

    def run_ours(prompt: list[int], count: int) -> list[int]:
        return generate(model, [prompt], count)[0]

    run_ours.model = model  # type: ignore[attr-defined]
    return run_ours


def check_agreement(runs: dict[str, Callable], path: Path, prompt: list[int]) -> dict[str, float]:
    """Root mean square errors of the logits; AssertionError where ours is not as right as the plain expression."""

    def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
        return (logits.float() - exact.float()).square().mean().sqrt().item()

    ids = torch.tensor([prompt])
    errors = {}
    with torch.inference_mode():
        exact = load(path, dtype="fp32")(ids)
        errors["ours bf16"] = error(runs["ours bf16"].model(ids), exact)
        if "transformers bf16" in runs:
            errors["transformers bf16"] = error(runs["transformers bf16"].model(ids).logits, exact)
            assert errors["ours bf16"] <= 2 * errors["transformers bf16"], errors
        quantized = runs["ours nf4"].model
        dense = copy.deepcopy(runs["ours bf16"].model)
        for name, module in quantized.named_modules():
            if isinstance(module, QuantizedLinear):
                dense.get_submodule(name).weight.data = module.weight.dequantize()
        plain = dense(ids)
        exact = dense.float()(ids)
        errors["ours nf4"], errors["nf4 dequantized"] = error(quantized(ids), exact), error(plain, exact)
        assert errors["ours nf4"] <= 2 * errors["nf4 dequantized"], errors
    return errors


def bytes_per_token(model: CausalLM) -> int:
    """What one token has to read: every parameter and buffer; a tied embedding is read once, as the head."""
    tensors = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    if not model.config.tie_word_embeddings:
        tensors.pop(id(model.model.embed_tokens.weight))
    return sum(tensors.values())


def read_bandwidth() -> float:
    """Bytes a second that all threads read together, the best of several passes over 512 MiB."""
    data = torch.ones(128 << 20)
    best = min(_seconds(data.sum) for _ in range(8))
    return data.nbytes / best


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_bytes(kind: str, path: Path, count: int) -> int:
    """Peak resident memory of a fresh process that loads the model and generates."""
    command = [sys.executable, __file__, "--model", str(path), "--peak", kind, "--tokens", str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second at batch 1, and peak memory, beside transformers.")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: SmolLM2-135M, fetched)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (three more processes)")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.model
    if path is None:
        from posttrain.fetch import fetch

        path = fetch("smollm2-135m")
    prompt = torch.randint(100, 1000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    if arguments.peak:
        make(arguments.peak, path)(prompt, arguments.tokens)
        status = Path("/proc/self/status").read_text()
        print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
        return

    kinds = [kind for kind in KINDS if kind.startswith("ours") or importlib.util.find_spec("transformers")]
    runs = {kind: make(kind, path) for kind in kinds}
    errors = check_agreement(runs, path, prompt)
    print("logits' rms error:", ", ".join(f"{name} {value:.3g}" for name, value in errors.items()))
    for run in runs.values():
        run(prompt, 4)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind, run in runs.items():
            times[kind].append(_seconds(lambda run=run: run(prompt, arguments.tokens)) / arguments.tokens)
    bandwidth = read_bandwidth()
    memory = {} if arguments.no_memory else {kind: peak_bytes(kind, path, arguments.tokens) for kind in kinds}

    print(f"{path}, {torch.get_num_threads()} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print("Timed on a machine that may be busy: compare the ratios.")
    rows = {}
    for kind in KINDS:
        if kind not in times:
            print(f"{kind:20} n/a")
            continue
        median = statistics.median(times[kind])
        row = {"tokens_per_second": 1 / median, "ms": [1e3 * t for t in times[kind]], "peak_bytes": memory.get(kind)}
        text = f"{kind:20} {1 / median:7.1f} tokens/s   {1e3 * median:7.1f} ms a token ({1e3 * min(times[kind]):.1f} at best)"
        if kind.startswith("ours"):
            row["limit_ms"] = 1e3 * bytes_per_token(runs[kind].model) / bandwidth
            text += f"   limit {row['limit_ms']:.1f} ms"
        if kind in memory:
            text += f"   peak {memory[kind] / 1e6:.0f} MB"
        print(text)
        rows[kind] = row
    if "transformers bf16" in times:
        for kind in KINDS[:2]:
            ratios = sorted(t / o for t, o in zip(times["transformers bf16"], times[kind], strict=True))
            print(f"{kind} is {statistics.median(ratios):.2f}x transformers ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            rows[kind]["speedup"] = ratios
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": str(path), "errors": errors, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
