"""One DPO step of SmolLM2-135M: 8 pairs of 2 x 512 tokens, LoRA r=8 on all linear layers, bf16; beside TRL 1.16 on the same weights
and tokens, with its fused head and with whole logits.

    python benchmarks/bench_dpo.py [--pairs 8] [--length 512] [--rounds 3] [--checkpointing] [--json FILE]
    python benchmarks/bench_dpo.py --curve [--plot FILE] [--json FILE]      memory over tokens and over vocabulary

A quarter of each sequence is the prompt, which the pair shares. A step is the reference's log-probabilities (the adapter off, in
the same model), the policy's, the loss with its metrics, backward, clipping and AdamW. TRL's is its own DPOTrainer's loss on its
own collator's batch; "whole logits" is the same trainer with the log-probabilities and entropies taken from logits that exist
whole, as before its fused head. --checkpointing computes layers again in the backward pass in all systems, which is TRL's default.

First the gradients must agree: each system's against float32, on two pairs of 64 tokens. Then the systems take steps in turn in one
process. Memory is each system's alone, in a process of its own: the highest resident size from the first step's start to the last
step's end, less what was resident before (weights), and of the whole process.

The curve: peak over what was resident before one step of a model of SmolLM2's width and two layers (random weights), by tokens
at its vocabulary, and by vocabulary at 2048 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from posttrain.model import CausalLM, ModelConfig, load, save
from posttrain.preference.data import Pair
from posttrain.preference.paired import PreferenceConfig, collate_pairs, pair_loss
from posttrain.progress import peak_memory

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from bench_sft import SMOLLM2, cached_model

R, BETA = 8, 0.1
SYSTEMS = ("posttrain", "TRL, fused head", "TRL, whole logits")
Parameters = dict[str, torch.nn.Parameter]


def make_pairs(count: int, length: int, vocab_size: int = 49152) -> list[Pair]:
    ids = torch.randint(10, vocab_size - 100, (count, 2 * length), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = length // 4
    return [Pair(row[:prompt], row[prompt:length], row[length : 2 * length - prompt]) for row in ids]


def ours(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[Parameters, Callable[[list[Pair]], Tensor]]:
    """(the adapter's parameters by PEFT's keys, function of pairs that gives the mean loss)."""
    model = load(arguments.model, dtype="bf16").to(dtype)
    load_adapter(model, arguments.adapter, any_base=True)
    model.train()
    model.activation_checkpointing = arguments.checkpointing
    preference = PreferenceConfig(beta=BETA)

    def loss(pairs: list[Pair]) -> Tensor:
        batch = collate_pairs([(pair, None) for pair in pairs])
        return pair_loss(model, batch, preference)[0] / batch.normalizer

    return adapter_parameters(model), loss


def theirs(arguments: argparse.Namespace, fused: bool) -> tuple[Parameters, Callable[[list[Pair]], Tensor]]:
    """As `ours`, through TRL's DPOTrainer on transformers and PEFT."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}
    import datasets
    import peft
    import transformers
    import trl

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = peft.PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True)
    output = tempfile.mkdtemp()
    config = trl.DPOConfig(
        output_dir=output, beta=BETA, bf16=False, use_cpu=True, report_to=[], max_length=None,
        gradient_checkpointing=arguments.checkpointing, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = _byte_tokenizer(transformers)
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    model.delete_adapter("ref")  # a copy of the adapter as it came: here the base is the reference
    model.train()
    if arguments.checkpointing:
        model.enable_input_require_grads()
    if not fused:
        _whole_logits(model.get_base_model())
    parameters = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}

    def loss(pairs: list[Pair]) -> Tensor:
        batch = trainer.data_collator([{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs])
        return trainer._compute_loss(model, batch, False)

    return parameters, loss


def _byte_tokenizer(transformers):
    """The trainer wants one to prepare its data set, of which nothing is used here."""
    import tokenizers

    vocabulary = {chr(97 + i): i for i in range(26)} | {"<eos>": 26}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def _whole_logits(model) -> None:
    """Log-probabilities, entropies and the other measures from logits (B, T, V), where TRL's fused head gives them in tiles."""
    from types import SimpleNamespace

    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    plain = type(model).forward

    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        outputs = plain(model, *args, **kwargs)
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        mask = targets != -100
        log_probs = selective_log_softmax(logits, targets.clamp(min=0)) * mask
        with torch.no_grad():
            entropy, top = entropy_from_logits(logits), logits.argmax(-1) == targets
            mean = logits.mean(-1)
        return SimpleNamespace(log_probs=log_probs, entropy=entropy, mean_logits=mean, is_top1=top, log_sum_sq_probs=None)

    model.forward = forward


def system(name: str, arguments: argparse.Namespace):
    return ours(arguments, torch.bfloat16) if name == "posttrain" else theirs(arguments, name.endswith("fused head"))


def stepper(parameters: Parameters, loss: Callable[[list[Pair]], Tensor], pairs: list[Pair]) -> Callable[[], float]:
    """Forward, backward, clipping and AdamW, the same for all."""
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> float:
        value = loss(pairs)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def gradient(parameters: Parameters, loss: Callable[[list[Pair]], Tensor], pairs: list[Pair]) -> Tensor:
    loss(pairs).backward()
    found = torch.cat([parameters[key].grad.double().flatten() for key in sorted(parameters)])
    for parameter in parameters.values():
        parameter.grad = None
    return found


def agree(made: dict, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Relative errors of each system's gradient against float32 on four pairs; ours at most twice TRL's, by the medians."""
    pairs = make_pairs(4, 64)
    exact = [gradient(*ours(arguments, torch.float32), [pair]) for pair in pairs]
    errors = {
        name: [((gradient(*one, [pair]) - e).norm() / e.norm()).item() for pair, e in zip(pairs, exact, strict=True)]
        for name, one in made.items()
    }
    medians = {name: statistics.median(values) for name, values in errors.items()}
    for name in medians.keys() - {"posttrain"}:
        if not medians["posttrain"] <= 2 * medians[name]:
            raise SystemExit(f"the gradient's relative error is {medians['posttrain']:.2e}, that of {name} {medians[name]:.2e}")
    return errors


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    """Run in a process of its own: two steps; prints the peaks in bytes."""
    step = stepper(*system(name, arguments), make_pairs(arguments.pairs, arguments.length, arguments.vocab_size))
    whole = peak_memory(torch.device("cpu"))
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    before = peak_memory(torch.device("cpu"))
    began = time.process_time()
    for _ in range(arguments.memory_steps):
        step()
    during = peak_memory(torch.device("cpu"))
    seconds = (time.process_time() - began) / arguments.memory_steps
    print(json.dumps({"steps": during, "over": during - before, "process": max(whole, during), "cpu_seconds": seconds}))


def in_own_process(name: str, arguments: argparse.Namespace, **changes) -> dict[str, float]:
    options = {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "pairs": arguments.pairs,
        "length": arguments.length,
    } | changes
    command = [sys.executable, __file__, "--memory-of", name]
    command += [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command += ["--checkpointing"] if arguments.checkpointing else []
    # Not from the repository's root: its folder `kernels` would shadow a package of that name that the peers look for.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), env=environment)
    if ended.returncode:
        raise SystemExit(f"{name}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def available(name: str) -> bool:
    return name == "posttrain" or all(importlib.util.find_spec(module) for module in ("trl", "transformers", "peft"))


def prepare(folder: Path, model_path: str | None, vocab_size: int | None = None, layers: int = 30) -> tuple[str, str]:
    """Folders of the weights (random ones of `layers` layers where vocab_size is given) and of an adapter as after some steps."""
    real = Path(model_path) if model_path else None if vocab_size else cached_model()
    if real is None:
        real = folder / "model"
        torch.manual_seed(0)
        shape = SMOLLM2 | {"vocab_size": vocab_size or 49152, "num_hidden_layers": layers}
        save(CausalLM(ModelConfig.from_hf(shape)).bfloat16(), real)
    torch.manual_seed(0)
    model = load(real, dtype="bf16")
    attach(model, LoraConfig(r=R, lora_alpha=R, init_lora_weights=False))
    for key, parameter in adapter_parameters(model).items():
        if "lora_B" in key:
            parameter.data.mul_(0.02)
    save_adapter(model, folder / "adapter")
    return str(real), str(folder / "adapter")


def timed(step: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    step()
    return clock() - began


def compare(arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        arguments.model, arguments.adapter = prepare(Path(folder), arguments.model)
        names = [name for name in SYSTEMS if name in arguments.systems and available(name)]
        memory = {} if arguments.no_memory else {name: in_own_process(name, arguments) for name in names}
        made = {name: system(name, arguments) for name in names}
        errors = agree(made, arguments)
        pairs = make_pairs(arguments.pairs, arguments.length)
        steps = {name: stepper(*made[name], pairs) for name in names}
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        times: dict[str, list[float]] = {name: [] for name in names}
        if arguments.rounds:
            for step in steps.values():
                step()
        for _ in range(arguments.rounds):
            for name in names:
                times[name].append(timed(steps[name], clock))
    labelled = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    kept = "layers computed again" if arguments.checkpointing else "layers kept"
    print(f"{arguments.pairs} pairs of 2 x {arguments.length} tokens, {labelled} with a label; LoRA r={R} on all linear layers")
    print(f"bf16, {kept}; {torch.get_num_threads()} threads")
    for name in names:
        print(f"gradient against float32, {name}: {' '.join(f'{e:.2g}' for e in errors[name])}")
    head = "cpu (s)" if arguments.cpu_time else "step (s)"
    print(f"\n{'':20}{head:>10}{'range':>16}{'over ours':>11}{'peak':>15}{'over ours':>11}{'over weights':>14}{'over ours':>11}")
    for name in SYSTEMS:
        print(f"{name:20}" + (_row(name, times, memory) if name in names else f"{'n/a':>10}"))
    return {"seconds": times, "memory": memory, "errors": errors}


def _row(name: str, times: dict[str, list[float]], memory: dict[str, dict]) -> str:
    first = next(iter(times))
    text = ""
    if times[name]:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[first], strict=True))
        text = f"{statistics.median(times[name]):10.2f}{min(times[name]):9.2f}-{max(times[name]):<6.2f}{ratio:11.2f}"
    if memory:
        peak, over = (memory[name][key] / memory[first][key] for key in ("steps", "over"))
        held = (memory[name][key] / 2**30 for key in ("steps", "over"))
        text += "{:11.2f} GiB{:11.2f}{:10.2f} GiB{:11.2f}".format(
            *(x for both in zip(held, (peak, over), strict=True) for x in both)
        )
    return text


LENGTHS, VOCABULARIES = (128, 256, 512, 1024, 2048), (16384, 32768, 65536, 131072)


def curve(arguments: argparse.Namespace) -> dict:
    """{"tokens" | "vocabulary": {system: [(x, bytes over weights, processor seconds)]}}, one pair of growing length, two layers."""
    found: dict[str, dict[str, list]] = {"tokens": {}, "vocabulary": {}}
    names = [name for name in SYSTEMS if name in arguments.systems and available(name)]
    points = [("tokens", 49152, length) for length in LENGTHS] + [("vocabulary", size, 1024) for size in VOCABULARIES]
    for kind, vocab_size, length in points:
        with tempfile.TemporaryDirectory() as folder:
            arguments.model, arguments.adapter = prepare(Path(folder), None, vocab_size, layers=2)
            for name in names:
                one = in_own_process(name, arguments, pairs=1, length=length, vocab_size=vocab_size, memory_steps=2)
                x = 2 * length if kind == "tokens" else vocab_size
                found[kind].setdefault(name, []).append((x, one["over"], one["cpu_seconds"]))
                print(f"{kind} {x:7}  {name:20}{one['over'] / 2**20:10.0f} MiB over weights{one['cpu_seconds']:8.2f} s")
    if arguments.plot:
        _plot(found, arguments.plot)
    return found


def _plot(found: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col")
    for column, kind in enumerate(found):
        for name, rows in found[kind].items():
            xs, bytes_, seconds = zip(*rows, strict=True)
            axes[0][column].plot(xs, [b / 2**20 for b in bytes_], marker="o", label=name)
            axes[1][column].plot(xs, seconds, marker="o", label=name)
        axes[1][column].set_xlabel("tokens of the pair" if kind == "tokens" else "vocabulary, 2048 tokens")
    for row, label in zip(axes, ("peak over the weights (MiB)", "processor seconds a step"), strict=True):
        row[0].set_ylabel(label)
        for axis in row:
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle("One DPO step, two layers of SmolLM2's width, LoRA r=8, bf16")
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix.lstrip("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a Hugging Face folder of SmolLM2-135M's shape")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--plot", help="file to draw the curve in")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds instead: for a machine with other work")
    parser.add_argument("--memory-steps", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--vocab-size", type=int, default=49152, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of, arguments)
        return
    found = (curve if arguments.curve else compare)(arguments)
    if arguments.json:
        settings = {"pairs": arguments.pairs, "length": arguments.length, "checkpointing": arguments.checkpointing}
        about = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
        }
        with atomic_write(arguments.json) as file:
            file.write_text(json.dumps({**settings, **about, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
