"""The main job from end to end: quantize a model, measure it, fine-tune adapters, measure again, prove and report.

The defaults for SmolLM2-135M were chosen on 400 validation items (zero-shot 0.800; after 40 steps 0.825 at a learning
rate of 4e-4 and 0.848 at 1e-3); those for the offline model on 100 of its own (no more than 0.52 after 60 steps at 1e-3
or 3e-3, 0.82 after 100 at 4e-3). The test split is only ever measured.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from posttrain.adapters import LoraConfig, load_adapter
from posttrain.atomic import make_folder
from posttrain.cli.common import progress_bar
from posttrain.data import load_dataset, max_tokens
from posttrain.errors import PosttrainError
from posttrain.evaluate import Accuracy, ChoiceItem, choice_accuracy
from posttrain.fetch import fetch, origin
from posttrain.model.decoder import CausalLM
from posttrain.model.generate import generate
from posttrain.model.loading import load
from posttrain.model.tokenizer import Tokenizer
from posttrain.progress import peak_memory
from posttrain.quantized import QuantizedLinear, bits_per_parameter
from posttrain.reviews import CHOICES, LABELS, Splits, few_shot, load_reviews, prompt, to_jsonl
from posttrain.sft import sft
from posttrain.statistics import Comparison, compare
from posttrain.trainer import TrainConfig, TrainResult


@dataclass(frozen=True)
class Settings:
    """What a run is made of. A step learns from `rows` rows, into which examples are packed up to `max_length` tokens
    (or to the longest example's)."""

    task: str
    steps: int
    learning_rate: float
    rows: int = 2
    max_length: int = 256
    r: int = 8
    lora_alpha: float = 16
    shots: int = 4
    test_items: int = 1000
    seed: int = 0
    save_steps: int = 10

    @property
    def is_default(self) -> bool:
        """Whether what shapes the training is as it was chosen on the validation split."""
        default = OFFLINE if self.task == "offline" else REVIEWS
        return replace(self, shots=default.shots, test_items=default.test_items, seed=default.seed) == default


REVIEWS = Settings("reviews", steps=60, learning_rate=1e-3)
OFFLINE = Settings("offline", steps=150, learning_rate=4e-3, max_length=512, test_items=300)


def load_task(name: str) -> Splits:
    """ "reviews": the fetched ones; "offline": the made-up ones that come with posttrain."""
    if name == "offline":
        from posttrain import offline

        return offline.load_task()
    return load_reviews(fetch("reviews"))


def choice_items(splits: Splits, split: str, tokenizer: Tokenizer, shots: int = 0) -> list[ChoiceItem]:
    """Reviews as questions in token ids, each after the same `shots` answered ones from the training split."""
    answered = few_shot(splits.train, shots)
    choices = [tokenizer.encode(choice) for choice in CHOICES]
    prompts = [prompt(review.text, answered) for review in getattr(splits, split)]
    return [
        ChoiceItem(tokenizer.encode(text, add_special_tokens=True), choices, LABELS.index(review.label))
        for text, review in zip(prompts, getattr(splits, split), strict=True)
    ]


@dataclass
class Phase:
    """One part of a run: wall time, processor time of all threads, and the process's peak memory by its end."""

    name: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class Results:
    """Everything that report.md tells."""

    settings: Settings
    splits: Splits
    model: Path
    model_note: str
    storage: str
    phases: list[Phase]
    accuracies: dict[str, Accuracy]
    comparisons: list[Comparison]
    training: TrainResult
    train_seconds: float
    reload_error: float  # largest difference of a log-probability after saving and loading the adapter
    sample: dict[str, str]
    own_model: bool  # given by the user, rather than the one that the defaults were chosen for
    machine: dict[str, str]
    output: Path
    adapter: Path

    @property
    def seconds(self) -> float:
        """Wall time without what was fetched."""
        return sum(phase.seconds for phase in self.phases if phase.name != "fetch")


def quickstart(
    settings: Settings,
    output: Path,
    model: Path | None = None,
    device: str = "cpu",
    restart: bool = False,
) -> Results:
    """Run it all, print as it goes, and leave adapter/, report.md and its plots in `output`.

    model: a Hugging Face folder instead of the one that goes with the task. Run again after an interruption, training
    goes on from its last checkpoint; restart=True begins anew. PosttrainError where the reloaded adapter does not give
    the very same predictions.
    """
    from posttrain import report

    adapter = output / "adapter"
    if restart:
        shutil.rmtree(adapter, ignore_errors=True)
    make_folder(output)
    phases: list[Phase] = []
    with _phase(phases, "fetch"):
        folder, note = _model(settings, model)
        splits = load_task(settings.task)
        print(f"    model {folder}\n    {note}")
    with _phase(phases, "quantize to NF4"):
        tokenizer = Tokenizer.load(folder)
        base = load(folder, quantize="nf4", device=device)
        stored = storage(base)
        print(f"    {stored}")
    test = choice_items(splits, "test", tokenizer)[: settings.test_items]
    accuracies: dict[str, Accuracy] = {}
    with _phase(phases, "zero-shot accuracy"):
        accuracies["zero-shot"] = _measure(base, test, "zero-shot")
    with _phase(phases, "few-shot accuracy"):
        few = choice_items(splits, "test", tokenizer, settings.shots)[: settings.test_items]
        accuracies[f"{settings.shots}-shot"] = _measure(base, few, "few-shot")
    with _phase(phases, "QLoRA training") as training_phase:
        training = train(base, splits, tokenizer, settings, adapter)
    with _phase(phases, "accuracy after"):
        accuracies["fine-tuned"] = _measure(base, test, "fine-tuned")
        comparisons = [
            compare(before.correct, accuracies["fine-tuned"].correct, name, "fine-tuned")
            for name, before in accuracies.items()
            if name != "fine-tuned"
        ]
        print(*(f"    {comparison}" for comparison in comparisons), sep="\n")
    del base
    with _phase(phases, "reload from disk"):
        fresh = load(folder, quantize="nf4", device=device)
        load_adapter(fresh, adapter)
        again = _measure(fresh.eval(), test, "reloaded")
        error = reload_error(accuracies["fine-tuned"], again)
        print(f"    all {again.n} predictions are the same; largest difference of a log-probability {error:g}")
    with _phase(phases, "generate a sample"):
        sample = _sample(fresh, tokenizer, splits)
        print(f"    {sample['prompt']!r} -> {sample['output']!r} (people say {sample['label']})")
    results = Results(
        settings=settings,
        splits=splits,
        model=folder,
        model_note=note,
        storage=stored,
        phases=phases,
        accuracies=accuracies,
        comparisons=comparisons,
        training=training,
        train_seconds=training_phase.seconds,
        reload_error=error,
        sample=sample,
        own_model=model is not None,
        machine=_machine(),
        output=output,
        adapter=adapter,
    )
    path = report.write(results)
    print(f"\n{results.seconds:.0f} s after the downloads, peak memory {phases[-1].peak_bytes / 1e9:.2f} GB")
    print(f"report: {path}\nadapter: {adapter}")
    return results


def train(model: CausalLM, splits: Splits, tokenizer: Tokenizer, settings: Settings, adapter: Path) -> TrainResult:
    """QLoRA on the training split, by way of a train.jsonl; goes on from the last checkpoint in `adapter`, if any."""
    data = to_jsonl(splits.train, adapter / "train.jsonl")
    examples = load_dataset(data, tokenizer)
    config = TrainConfig(
        output_dir=adapter,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows,
        learning_rate=settings.learning_rate,
        warmup_ratio=0.1,
        seed=settings.seed,
        save_steps=settings.save_steps,
    )
    lora = LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha)
    length = max(settings.max_length, max_tokens(examples))
    pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id
    return sft(model, examples, config, lora, max_length=length, pad_id=pad_id, resume=True)


def storage(model: CausalLM) -> str:
    """How many bits a parameter takes, in the 4-bit layers and in the whole model."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    packed = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(t.nbytes for t in model.state_dict().values())
    rest = sum(p.numel() for p in model.parameters())
    return (
        f"{len(layers)} linear layers, {packed / 1e6:.4g} M parameters at {bits_per_parameter(model):.3f} bits each; "
        f"with {rest / 1e6:.3g} M in {str(next(model.parameters()).dtype).removeprefix('torch.')} "
        f"{8 * held / (packed + rest):.2f} bits a parameter, {held / 1e6:.3g} MB in all"
    )


def reload_error(before: Accuracy, after: Accuracy) -> float:
    """Largest difference of a log-probability. PosttrainError unless every prediction is the same."""
    pairs = zip(before.predictions, after.predictions, strict=True)
    changed = [i for i, (first, second) in enumerate(pairs) if first != second]
    if changed:
        raise PosttrainError(
            f"the adapter that was loaded again answers {len(changed)} of {before.n} items differently (first: item "
            f"{changed[0]}): what was saved is not what was trained. Please report this with `posttrain doctor`"
        )
    return max(
        abs(x - y) for rows in zip(before.logprobs or [], after.logprobs or [], strict=True) for x, y in zip(*rows, strict=True)
    )


def _model(settings: Settings, model: Path | None) -> tuple[Path, str]:
    if settings.task == "offline":
        from posttrain import offline

        return offline.model_path(), "A byte-level model that comes with posttrain, for trying the steps."
    folder = fetch("smollm2-135m") if model is None else model
    return folder, origin(folder).get("note", "A local model, as stored.")


def _measure(model: CausalLM, items: Sequence[ChoiceItem], label: str) -> Accuracy:
    with progress_bar(f"    {label:<12}") as progress:
        result = choice_accuracy(model, items, progress=progress)
    print(f"    {label}: accuracy {result}")
    return result


def _sample(model: CausalLM, tokenizer: Tokenizer, splits: Splits) -> dict[str, str]:
    review = splits.test[0]
    ids = tokenizer.encode(prompt(review.text), add_special_tokens=True)
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    answer = tokenizer.decode(generate(model, [ids], max_new_tokens=12, stop_ids=stop)[0])
    return {"prompt": prompt(review.text), "output": answer, "label": review.label}


def _machine() -> dict[str, str]:
    from posttrain.cli.doctor import inspect_machine

    facts = inspect_machine()
    return {name: facts[name] for name in ("posttrain", "torch", "platform", "GPU", "CPU engine", "CPU threads")}


@contextlib.contextmanager
def _phase(phases: list[Phase], name: str) -> Iterator[Phase]:
    phase = Phase(name)
    print(f"[{len(phases) + 1}] {name}")
    sys.stdout.flush()
    start, cpu_start = time.perf_counter(), time.process_time()
    yield phase
    phase.seconds, phase.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    # The kernel's own high-water mark may step back a little: it sums per-thread counts that lag.
    phase.peak_bytes = max(peak_memory(torch.device("cpu")), *(earlier.peak_bytes for earlier in phases), 0)
    phases.append(phase)
    print(f"    {phase.seconds:.1f} s ({phase.cpu_seconds:.1f} s of CPU), peak memory {phase.peak_bytes / 1e9:.2f} GB")
