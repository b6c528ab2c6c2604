"""Every method of `posttrain sft` on SmolLM2-135M and the movie reviews, beside PEFT where PEFT has it.

    python benchmarks/bench_adapters.py [--quick] [--methods lora ia3 ...] [--parts accuracy decode memory step] [--steps 40]
                                        [--test-items 600] [--rounds 5] [--output FOLDER]

Method by method, so that an interrupted run leaves what it has; a later one of the same settings fills in other methods and
parts. With --output the trained adapters stay, and what is trained there is not trained again.
  accuracy   after a fixed number of steps of 2 rows of 256 tokens with the method's default settings, on the test split,
             with Wilson's 95 % interval and McNemar's exact test against the same base untrained. How the learning
             rates were chosen: posttrain/adapters/recipes.py
  step       forward, backward, clipping and AdamW on 2 x 256 tokens, a quarter of them labelled; ours and PEFT's in turn
             in one process, so that a busy machine slows both; the ratio is the median of those within a round
  memory     the highest resident size during two such steps, each system in a process of its own
  disk       bytes of the saved weights;  decode  tokens/s at batch 1, greedily, 32 after 32
Before a step is timed the losses must agree: ours is at most twice as far from float32 as PEFT's. All bases are bf16 but
qlora's (NF4; the peer is bitsandbytes + PEFT) and full's (fp32). The weights are dequantized Q4_1 values.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.adapters import adapter_parameters, attach, load_adapter, save_adapter
from posttrain.adapters.counts import total_parameters, trainable_parameters
from posttrain.adapters.recipes import RECIPES
from posttrain.atomic import atomic_write
from posttrain.data import load_dataset
from posttrain.evaluate import choice_accuracy
from posttrain.fetch import fetch
from posttrain.model import CausalLM, generate, load
from posttrain.model.tokenizer import Tokenizer
from posttrain.progress import peak_memory
from posttrain.quickstart import choice_items, load_task
from posttrain.reviews import to_jsonl
from posttrain.sft import sft
from posttrain.statistics import compare
from posttrain.trainer import TrainConfig

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import bench_sft

B, T = 2, 256
RESULTS = Path(__file__).parent / "results"
PEERS = {name: "PEFT" for name in RECIPES if name not in ("adapter", "full", "qlora")} | {"qlora": "bitsandbytes + PEFT"}


def base(method: str, folder: Path, dtype: str | None = None) -> CausalLM:
    """The base that the method trains on."""
    return load(folder, dtype or ("fp32" if method == "full" else "bf16"), quantize=RECIPES[method].quantize)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids, labels = bench_sft.tokens("completion")
    return input_ids[:B], labels[:B]


def ours(method: str, folder: Path, adapter: Path) -> tuple[bench_sft.Parameters, Callable[[], torch.Tensor]]:
    """(what trains, function that gives the mean loss)."""
    model = base(method, folder).train()
    if method == "full":
        return dict(model.named_parameters()), functools.partial(bench_sft.mean_loss, model, *tokens())
    load_adapter(model, adapter, any_base=True)
    return adapter_parameters(model), functools.partial(bench_sft.mean_loss, model, *tokens())


def theirs(method: str, folder: Path, adapter: Path) -> tuple[bench_sft.Parameters, Callable[[], torch.Tensor]]:
    """As `ours`, by transformers and PEFT with the same adapter."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    input_ids, labels = tokens()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained, lambda: model(input_ids=input_ids, labels=labels).loss


def moved_adapter(method: str, folder: Path, output: Path) -> None:
    """An adapter somewhat off its start, so that it acts."""
    model = base(method, folder)
    torch.manual_seed(0)
    attach(model, RECIPES[method].adapter())
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.01 * torch.randn_like(parameter)
    save_adapter(model, output)


def agree(method: str, folder: Path, adapter: Path, systems: dict[str, tuple]) -> str:
    """Losses beside ours in float32 on the weights as bf16 has them. P-tuning's is not compared: PEFT keeps no encoder."""
    if len(systems) < 2 or method in ("p-tuning", "qlora"):
        return ""
    wide = base(method, folder).float()
    load_adapter(wide, adapter, any_base=True)
    with torch.no_grad():
        exact = bench_sft.mean_loss(wide, *tokens()).item()
        mine, peers = (abs(loss().item() - exact) for _, loss in systems.values())
    if mine > max(2 * peers, torch.finfo(torch.bfloat16).eps * exact):
        raise SystemExit(f"{method}: our loss is {mine:.2e} from float32's {exact:.4f}, PEFT's {peers:.2e}")
    return f"loss {exact:.4f} in float32; ours is {mine:.1e} from it, PEFT's {peers:.1e}"


def step_times(method: str, folder: Path, adapter: Path, rounds: int) -> dict[str, Any]:
    """Seconds of steps in turn, and the median of PEFT's over ours."""
    systems = {"ours": ours(method, folder, adapter)}
    if method in PEERS and available(method):
        systems["PEFT"] = theirs(method, folder, adapter)
    said = agree(method, folder, adapter, systems)
    steps = {name: bench_sft.stepper(*system) for name, system in systems.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(bench_sft._timed(step))
    ratio = statistics.median(t / o for t, o in zip(times["PEFT"], times["ours"], strict=True)) if "PEFT" in times else None
    return {"seconds": times, "peer_over_ours": ratio, "agreement": said}


def measure_memory(system: str, method: str, folder: Path, adapter: Path) -> None:
    """Run in a process of its own: prints the highest resident size during two steps, in bytes."""
    step = bench_sft.stepper(*(ours if system == "ours" else theirs)(method, folder, adapter))
    if (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")
    for _ in range(2):
        step()
    print(peak_memory(torch.device("cpu")))


def memory(method: str, folder: Path, adapter: Path) -> dict[str, int]:
    found = {}
    for system in ("ours", "PEFT") if method in PEERS and available(method) else ("ours",):
        command = [sys.executable, __file__, "--memory-of", system, method, str(folder), str(adapter)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), check=True)
        found[system] = int(ended.stdout.split()[-1])
    return found


def available(method: str) -> bool:
    needed = ["transformers", "peft"] + (["bitsandbytes"] if method == "qlora" else [])
    return all(importlib.util.find_spec(module) for module in needed)


def decode_speed(method: str, folder: Path, adapter: Path) -> float:
    """Tokens a second, the best of three: 32 after a prompt of 32, never stopping early. In bf16, a 4-bit base's in 4 bits."""
    model = base(method, folder, "bf16").eval()
    if method != "full":
        load_adapter(model, adapter, any_base=True)
    prompt = [tokens()[0][0, :32].tolist()]
    generate(model, prompt, 32)
    return 32 / min(bench_sft._timed(functools.partial(generate, model, prompt, 32)) for _ in range(3))


class Task:
    """The reviews: training examples, test items, and each base's answers before training."""

    def __init__(self, folder: Path, scratch: Path, items: int, untrained: dict[str, list[bool]]):
        self.folder, tokenizer, splits = folder, Tokenizer.load(folder), load_task("reviews")
        self.examples = load_dataset(to_jsonl(splits.train, scratch / "train.jsonl"), tokenizer)
        self.test = choice_items(splits, "test", tokenizer)[:items]
        self.untrained = untrained

    def before(self, method: str) -> list[bool]:
        """Which items the method's base answers rightly untrained: in bf16 or in its 4-bit format."""
        kind = RECIPES[method].quantize or "bf16"
        if kind not in self.untrained:
            found = choice_accuracy(base(method, self.folder, "bf16"), self.test)
            self.untrained[kind] = found.correct
            print(f"untrained, {kind}: {found}", flush=True)
        return self.untrained[kind]

    def train(self, method: str, steps: int, output: Path) -> dict[str, Any]:
        """Fine-tune with the method's defaults and measure."""
        recipe, model, before = RECIPES[method], base(method, self.folder), self.before(method)
        config = TrainConfig(
            output,
            max_steps=steps,
            per_device_train_batch_size=B,
            learning_rate=recipe.learning_rate,
            warmup_ratio=0.1,
        )
        trained = sft(model, self.examples, config, recipe.adapter(), max_length=T, quiet=True, resume=True)
        model.eval()
        if method == "full":
            model = model.bfloat16()
        after = choice_accuracy(model, self.test)
        comparison = compare(before, after.correct, "untrained", method)
        print(f"{method}: {comparison}", flush=True)
        saved = output / ("model/model.safetensors" if method == "full" else "adapter_model.safetensors")
        return {
            "before": sum(before) / len(before), "accuracy": after.accuracy, "interval": after.interval, "items": after.n,
            "p": comparison.p_value, "train_seconds": trained.metrics[-1]["seconds"], "disk": saved.stat().st_size,
            "learning_rate": recipe.learning_rate,
        }  # fmt: skip


PARTS = ("accuracy", "decode", "memory", "step")
HEAD = (
    f"{'method':10}{'trained':>10}{'% of all':>9}{'disk MB':>9}{'peak GB':>8}{'PEFT':>6}{'step s':>8}{'PEFT':>7}{'accuracy':>10}"
    f"{'95 % interval':>16}{'p':>9}{'tokens/s':>9}"
)


def line(row: dict[str, Any]) -> str:
    """One line of the table; what PEFT needs is a multiple of ours."""
    disk = peak = more = seconds = slower = accuracy = interval = p = "n/a"
    speed = f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else "n/a"
    if used := row.get("memory"):
        peak, more = f"{used['ours'] / 1e9:.2f}", f"{used['PEFT'] / used['ours']:.1f}x" if "PEFT" in used else "n/a"
    if step := row.get("step"):
        seconds = f"{statistics.median(step['seconds']['ours']):.2f}"
        slower = f"{step['peer_over_ours']:.2f}x" if step["peer_over_ours"] else "n/a"
    if "accuracy" in row:
        disk, accuracy, p = f"{row['disk'] / 1e6:.2f}", f"{row['accuracy']:.3f}", f"{row['p']:.1g}"
        interval = "-".join(f"{end:.3f}" for end in row["interval"])
    return (
        f"{row['method']:10}{row['trainable']:10,}{row['percent']:9.3f}{disk:>9}{peak:>8}{more:>6}{seconds:>8}{slower:>7}"
        f"{accuracy:>10}{interval:>16}{p:>9}{speed:>9}"
    )


Found = dict[str, Any]
"""What the JSON file holds. facts: the settings; rows: {method: row}; untrained: {base's format: right or wrong by item}."""


def earlier(facts: dict[str, Any], path: Path) -> Found:
    """What an earlier run of the same settings found; nothing where there is no such run."""
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")))["facts"] == facts:
        return found
    return {"facts": facts, "untrained": {}, "rows": {}}


def save(found: Found, path: Path) -> None:
    """The JSON file, and a picture of the accuracies over what trains where matplotlib is."""
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for row in (row for row in found["rows"].values() if "accuracy" in row):
        low, high = row["interval"]
        spread = [[row["accuracy"] - low], [high - row["accuracy"]]]
        axes.errorbar(row["percent"], row["accuracy"], spread, fmt="o", capsize=3)
        axes.annotate(row["method"], (row["percent"], row["accuracy"]), xytext=(5, 5), textcoords="offset points")
        axes.axhline(row["before"], color="grey", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_xlabel("% of the parameters that train")
    axes.set_ylabel(f"test accuracy after {found['facts']['steps']} steps (grey: untrained)")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="folder that keeps what is trained (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--test-items", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20 steps, 200 items, 2 rounds")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead of SmolLM2-135M")
    parser.add_argument("--json", type=Path, default=RESULTS / "adapters.json", help="file to write; the plot goes beside it")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        system, method, folder, adapter = arguments.memory_of
        return measure_memory(system, method, Path(folder), Path(adapter))
    if arguments.quick:
        arguments.steps, arguments.test_items, arguments.rounds = 20, 200, 2
    folder = arguments.model or fetch("smollm2-135m")
    facts = {
        "steps": arguments.steps, "rows": B, "row_tokens": T, "test_items": arguments.test_items, "weights": folder.name,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    found = earlier(facts, arguments.json)
    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.output or Path(scratch)
        accuracy = "accuracy" in arguments.parts
        task = Task(folder, Path(scratch), arguments.test_items, found["untrained"]) if accuracy else None
        for method in arguments.methods:
            config, adapter = base(method, folder).config, Path(scratch) / f"{method}-moved"
            if method != "full":
                moved_adapter(method, folder, adapter)
            row = found["rows"].setdefault(method, {"method": method})
            row["trainable"] = trainable_parameters(config, RECIPES[method].adapter())
            row["percent"] = 100 * row["trainable"] / total_parameters(config)
            if task:
                row |= task.train(method, arguments.steps, output / method)
                save(found, arguments.json)
            if "decode" in arguments.parts:
                row["tokens_per_second"] = decode_speed(method, folder, adapter)
            if "memory" in arguments.parts:
                row["memory"] = memory(method, folder, adapter)
                save(found, arguments.json)
            if "step" in arguments.parts:
                row["step"] = step_times(method, folder, adapter, arguments.rounds)
                print(row["step"]["agreement"] or "losses not compared")
            save(found, arguments.json)
            print(line(row), flush=True)
    print(f"\n{HEAD}", *map(line, found["rows"].values()), sep="\n")


if __name__ == "__main__":
    main()
