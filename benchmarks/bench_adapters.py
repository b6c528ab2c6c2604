"""Every method of `posttrain sft` with its default settings, on SmolLM2-135M and the movie reviews: one table.

    python benchmarks/bench_adapters.py [--methods lora ia3 ...] [--no-accuracy]

20 to 40 minutes on two cores, 7 without the accuracy, which is where the training is.
  trained    parameters that train, and their share;  disk  bytes of the saved weights
  peak       the highest resident size during two steps, ours and PEFT's each in a process of its own
  step       forward, backward, clipping and AdamW on 2 x 256 tokens, a quarter of them labelled; ours and PEFT's in turn in one
             process, so that a busy machine slows both; the ratio is the median of those within a round
  accuracy   on the test split after STEPS of 2 rows of 256 tokens, with Wilson's 95 % interval and McNemar's exact test against the
             same base untrained. How rates and steps were chosen, on validation items: posttrain/adapters/recipes.py
  decode     tokens/s at batch 1, greedily, 16 after 32
Before a step is timed the losses must agree: ours is at most twice as far from float32 as PEFT's, or within
bfloat16's epsilon of it. All bases are bf16 but
qlora's (NF4; the peer is bitsandbytes + PEFT) and full's (fp32). The weights are dequantized Q4_1 values.

Each method is written to results/adapters.json when it is done; a later run of the same settings adds its methods to the table.
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
from safetensors.torch import load_file

from posttrain.adapters import adapter_parameters, attach, load_adapter, save_adapter
from posttrain.adapters.counts import total_parameters, trainable_parameters
from posttrain.adapters.recipes import RECIPES
from posttrain.adapters.virtual_tokens import EMBEDDINGS, ENCODER
from posttrain.atomic import atomic_write
from posttrain.data import load_dataset
from posttrain.evaluate import choice_accuracy
from posttrain.fetch import fetch
from posttrain.model import CausalLM, generate, load, save
from posttrain.model.tokenizer import Tokenizer
from posttrain.progress import peak_memory
from posttrain.quickstart import choice_items, load_task
from posttrain.reviews import to_jsonl
from posttrain.sft import sft
from posttrain.statistics import compare
from posttrain.trainer import TrainConfig

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import bench_sft

B, T, ROUNDS, TEST_ITEMS = 2, 256, 3, 1000
STEPS = dict.fromkeys(RECIPES, 40) | {"prefix": 100, "p-tuning": 100}
RESULTS, WEIGHTS = Path(__file__).parent / "results" / "adapters.json", "adapter_model.safetensors"
PEERS = {"qlora": ("peft", "bitsandbytes"), "adapter": None, "full": None}  # modules of the peer: by default PEFT alone


def base(method: str, folder: Path, dtype: str | None = None) -> CausalLM:
    """The base that the method trains on."""
    return load(folder, dtype or ("fp32" if method == "full" else "bf16"), quantize=RECIPES[method].quantize)


def has_peer(method: str) -> bool:
    modules = PEERS.get(method, ("peft",))
    return modules is not None and all(importlib.util.find_spec(name) for name in ("transformers", *modules))


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids, labels = bench_sft.tokens("completion")
    return input_ids[:B], labels[:B]


System = tuple[bench_sft.Parameters, Callable[[], torch.Tensor]]
"""(what trains, function that gives the mean loss)."""


def ours(method: str, folder: Path, adapter: Path) -> System:
    model = base(method, folder).train()
    if method == "full":
        return dict(model.named_parameters()), functools.partial(bench_sft.mean_loss, model, *tokens())
    load_adapter(model, adapter, any_base=True)
    return adapter_parameters(model), functools.partial(bench_sft.mean_loss, model, *tokens())


def theirs(method: str, folder: Path, adapter: Path) -> System:
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
    config = peft.PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:  # which PEFT loads only to be used: here what it would train gets our weights
        config.inference_mode = False
        model = peft.get_peft_model(model, config)
        tensors = load_file(adapter / WEIGHTS)
        encoder = {key.removeprefix(ENCODER): tensor for key, tensor in tensors.items() if key.startswith(ENCODER)}
        model.prompt_encoder["default"].load_state_dict(encoder or {"embedding.weight": tensors[EMBEDDINGS]})
    else:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    input_ids, labels = tokens()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained, lambda: model(input_ids=input_ids, labels=labels).loss


def moved_adapter(method: str, folder: Path, output: Path) -> int:
    """Save an adapter somewhat off its start, so that it acts, or the whole model; bytes of the weights."""
    model = base(method, folder)
    if method == "full":
        save(model, output)
        return (output / "model.safetensors").stat().st_size
    torch.manual_seed(0)
    attach(model, RECIPES[method].adapter())
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.01 * torch.randn_like(parameter)
    save_adapter(model, output)
    return (output / WEIGHTS).stat().st_size


def agree(method: str, folder: Path, adapter: Path, systems: dict[str, System]) -> str:
    """Losses beside ours in float32 on the weights as bf16 has them."""
    if len(systems) < 2 or method == "qlora":
        return "losses not compared"
    wide = base(method, folder).float()
    load_adapter(wide, adapter, any_base=True)
    with torch.no_grad():
        exact = bench_sft.mean_loss(wide, *tokens()).item()
        mine, peers = (abs(loss().item() - exact) for _, loss in systems.values())
    if mine > max(2 * peers, torch.finfo(torch.bfloat16).eps * exact):
        raise SystemExit(f"{method}: our loss is {mine:.2e} from float32's {exact:.4f}, PEFT's {peers:.2e}")
    return f"loss {exact:.4f} in float32; ours is {mine:.1e} from it, PEFT's {peers:.1e}"


def step_times(method: str, folder: Path, adapter: Path) -> dict[str, list[float]]:
    """Seconds of steps in turn."""
    systems = {"ours": ours(method, folder, adapter)}
    if has_peer(method):
        systems["PEFT"] = theirs(method, folder, adapter)
    print(f"{method}: {agree(method, folder, adapter, systems)}", flush=True)
    steps = {name: bench_sft.stepper(*system) for name, system in systems.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(bench_sft._timed(step))
    return times


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
    for system in ("ours", "PEFT") if has_peer(method) else ("ours",):
        command = [sys.executable, __file__, "--memory-of", system, method, str(folder), str(adapter)]
        # Not from the repository's root: its folder `kernels` would shadow a package of that name that the peers look for.
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), check=True)
        found[system] = int(ended.stdout.split()[-1])
    return found


def decode_speed(method: str, folder: Path, adapter: Path) -> float:
    """Tokens a second, the better of two: 16 after a prompt of 32, never stopping early. In bf16, a 4-bit base's in 4 bits."""
    model = base(method, folder, "bf16").eval()
    if method != "full":
        load_adapter(model, adapter, any_base=True)
    prompt = [tokens()[0][0, :32].tolist()]
    generate(model, prompt, 4)
    return 16 / min(bench_sft._timed(functools.partial(generate, model, prompt, 16)) for _ in range(2))


class Task:
    """The reviews: training examples, test items, and each base's answers before training."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch, tokenizer, splits = folder, scratch, Tokenizer.load(folder), load_task("reviews")
        self.examples = load_dataset(to_jsonl(splits.train, scratch / "train.jsonl"), tokenizer)
        self.test = choice_items(splits, "test", tokenizer)[:TEST_ITEMS]

    @functools.lru_cache  # noqa: B019 (one Task a process)
    def untrained(self, kind: str | None) -> list[bool]:
        """Which items the base in bf16 or in that 4-bit format answers rightly untrained."""
        found = choice_accuracy(load(self.folder, "bf16", quantize=kind), self.test)
        print(f"untrained, {kind or 'bf16'}: {found}", flush=True)
        return found.correct

    def train(self, method: str) -> dict[str, Any]:
        """Fine-tune with the method's defaults and measure."""
        recipe, model = RECIPES[method], base(method, self.folder)
        settings = {"max_steps": STEPS[method], "per_device_train_batch_size": B, "learning_rate": recipe.learning_rate}
        sft(model, self.examples, TrainConfig(self.scratch / method, **settings), recipe.adapter(), max_length=T, quiet=True)
        after = choice_accuracy(model.bfloat16() if method == "full" else model, self.test)
        comparison = compare(self.untrained(recipe.quantize), after.correct, "untrained", method)
        print(f"{method}: {comparison}", flush=True)
        return {"accuracy": after.accuracy, "interval": after.interval, "p": comparison.p_value}


HEAD = (
    f"{'method':10}{'trained':>12}{'% of all':>9}{'disk MB':>9}{'peak GB':>8}{'PEFT':>6}{'step s':>8}{'PEFT':>7}{'tokens/s':>9}"
    f"{'accuracy':>10}{'95 % interval':>16}{'p':>9}"
)


def line(row: dict[str, Any]) -> str:
    """One line of the table; what PEFT needs is a multiple of ours."""
    peak, step, more, slower, accuracy = row["memory"], row["step"], "n/a", "n/a", ""
    if "PEFT" in step:
        more = f"{peak['PEFT'] / peak['ours']:.1f}x"
        slower = f"{statistics.median(t / o for t, o in zip(step['PEFT'], step['ours'], strict=True)):.2f}x"
    if "accuracy" in row:
        interval = "-".join(f"{end:.3f}" for end in row["interval"])
        accuracy = f"{row['accuracy']:10.3f}{interval:>16}{row['p']:9.1g}"
    return (
        f"{row['method']:10}{row['trainable']:12,}{100 * row['trainable'] / row['total']:9.3f}{row['disk'] / 1e6:9.2f}"
        f"{peak['ours'] / 1e9:8.2f}{more:>6}{statistics.median(step['ours']):8.2f}{slower:>7}"
        f"{row['tokens_per_second']:9.1f}{accuracy}"
    )


def measure(method: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """The method's row but for its accuracy."""
    config, adapter = base(method, folder).config, scratch / f"{method}-moved"
    disk = moved_adapter(method, folder, adapter)
    return {
        "method": method,
        "trainable": trainable_parameters(config, RECIPES[method].adapter()),
        "total": total_parameters(config),
        "disk": disk,
        "tokens_per_second": decode_speed(method, folder, adapter),
        "memory": memory(method, folder, adapter),
        "step": step_times(method, folder, adapter),
    }


def earlier(facts: dict[str, Any]) -> dict[str, Any]:
    """{method: row} of earlier runs of the same settings."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return found["rows"] if found.get("facts") == facts else {}


def keep(facts: dict[str, Any], rows: dict[str, Any]) -> None:
    """The JSON file, and a picture of the accuracies over what trains where matplotlib is."""
    RESULTS.parent.mkdir(exist_ok=True)
    with atomic_write(RESULTS) as file:
        file.write_text(json.dumps({"facts": facts, "rows": rows}) + "\n", encoding="utf-8")
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for row in (row for row in rows.values() if "accuracy" in row):
        low, high = row["interval"]
        spread, share = [[row["accuracy"] - low], [high - row["accuracy"]]], 100 * row["trainable"] / row["total"]
        axes.errorbar(share, row["accuracy"], spread, fmt="o", capsize=3)
        axes.annotate(row["method"], (share, row["accuracy"]), xytext=(5, 5), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("% of the parameters that train")
    axes.set_ylabel("test accuracy")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--no-accuracy", action="store_true", help="train nothing")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        system, method, folder, adapter = arguments.memory_of
        return measure_memory(system, method, Path(folder), Path(adapter))
    folder = fetch("smollm2-135m")
    facts = {
        "steps": STEPS, "rows": B, "row_tokens": T, "test_items": TEST_ITEMS, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    rows = earlier(facts)
    with tempfile.TemporaryDirectory() as scratch:
        task = None if arguments.no_accuracy else Task(folder, Path(scratch))
        for method in arguments.methods:
            rows[method] = rows.get(method, {}) | measure(method, folder, Path(scratch)) | (task.train(method) if task else {})
            keep(facts, rows)
    print(f"\n{HEAD}", *(line(rows[method]) for method in RECIPES if method in rows), sep="\n")


if __name__ == "__main__":
    main()
