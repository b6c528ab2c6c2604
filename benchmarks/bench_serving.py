"""Tokens a second of a batch in which every request has a LoRA adapter of its own, beside PEFT's `generate(adapter_names=)`.

SmolLM2-135M (dequantized Q4_1 weights) in bfloat16, and ours in NF4 too; 8 requests, 8 adapters of rank 16 on every linear layer of
the decoder, made here at random and read by both from the same files. Logits of the mixed batch are compared with float32's first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from posttrain import adapters
from posttrain.adapters import LoraConfig, serving
from posttrain.model import generate, load

REQUESTS, PROMPT = 8, 32


def make_adapters(model_path: Path, folder: Path) -> list[str]:
    """Random adapters, small enough that text stays text; their names."""
    model = load(model_path)
    for i in range(REQUESTS):
        torch.manual_seed(i)
        adapters.attach(model, LoraConfig(r=16, lora_alpha=2, init_lora_weights=False), f"a{i}")
        adapters.save_adapter(model, folder / f"a{i}", f"a{i}")
        adapters.delete_adapter(model, f"a{i}")
    return [f"a{i}" for i in range(REQUESTS)]


def ours(model_path: Path, folder: Path, names: list[str], **options):
    model = load(model_path, **options)
    for name in names:
        serving.load(model, name, folder / name)

    def run(prompts, count: int):
        return generate(model, prompts, count, adapter_ids=names)

    def logits(prompts) -> torch.Tensor:
        ids = torch.tensor(prompts)
        with torch.inference_mode(), model.served_adapters.rows(names, len(prompts), ids.device):
            return model(ids)

    return run, logits


def peft(model_path: Path, folder: Path, names: list[str]):
    if not (importlib.util.find_spec("peft") and importlib.util.find_spec("transformers")):
        return None
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    base.generation_config.eos_token_id = None
    model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.load_adapter(folder / name, name, autocast_adapter_dtype=False)
    model.to(torch.bfloat16).eval()  # its faster way: adapters in the base's dtype

    def run(prompts, count: int):
        ids = torch.tensor(prompts)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, max_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    def logits(prompts) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=torch.tensor(prompts), adapter_names=names).logits

    return run, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: SmolLM2-135M, fetched)")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of this thread; takes --threads 1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    path = options.model
    if path is None:
        from posttrain.fetch import fetch

        path = fetch("smollm2-135m")
    prompts = torch.randint(100, 1000, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        names = make_adapters(path, Path(folder))
        exact = ours(path, Path(folder), names, dtype="fp32")[1](prompts)
        runs = {"ours bf16": ours(path, Path(folder), names), "ours nf4": ours(path, Path(folder), names, quantize="nf4")}
        runs["PEFT bf16"] = peft(path, Path(folder), names)
    errors = {kind: (run[1](prompts).float() - exact).square().mean().sqrt().item() for kind, run in runs.items() if run}
    print("logits' rms distance from float32:", ", ".join(f"{kind} {error:.3g}" for kind, error in errors.items()))
    if "PEFT bf16" in errors:
        assert errors["ours bf16"] <= 2 * errors["PEFT bf16"], errors
    times: dict[str, list[float]] = {kind: [] for kind, run in runs.items() if run}
    for _ in range(options.rounds):
        for kind in times:
            runs[kind][0](prompts, 2)
            start = clock()
            runs[kind][0](prompts, options.tokens)
            times[kind].append((clock() - start) / options.tokens)
    medians = {kind: statistics.median(spread) for kind, spread in times.items()}
    for kind in runs:
        if kind not in times:
            print(f"{kind:10} n/a")
            continue
        spread = f"{1e3 * min(times[kind]):.1f}-{1e3 * max(times[kind]):.1f}"
        print(f"{kind:10} {REQUESTS / medians[kind]:7.1f} tokens/s   {1e3 * medians[kind]:7.1f} ms a step ({spread})")
    if "PEFT bf16" in medians:
        for kind in ("ours bf16", "ours nf4"):
            print(f"{kind} is {medians['PEFT bf16'] / medians[kind]:.2f}x PEFT")
    if options.json:
        options.json.write_text(json.dumps({"model": str(path), "errors": errors, "seconds a step": times}, indent=2) + "\n")


if __name__ == "__main__":
    main()
