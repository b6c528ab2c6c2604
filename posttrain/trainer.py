"""The training loop: what every method that learns by gradient shares.

One step takes `per_device_train_batch_size * gradient_accumulation_steps` items in an order that the seed and the
epoch decide, so the step alone is the position in the data. Its loss is the sum over all its tokens with a label
divided by their number: the same gradient however the step is cut into micro-batches. Then clipping, AdamW (Loshchilov
and Hutter, arXiv:1711.05101) and a learning rate that warms up linearly and falls along a cosine.

A run that was killed at any step and is started again with resume=True ends in the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapters.lora_plus import parameter_groups
from .atomic import sweep
from .checkpoint import checkpoints, keep_last, load_checkpoint, read_state, save_checkpoint, trainable
from .errors import PosttrainError
from .plots import line_chart, running_mean
from .progress import Metrics, ProgressLine, peak_memory, read_metrics

# What a resumed run must share with its beginning for the same result.
IDENTITY = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "seed", "loraplus_lr_ratio",
)  # fmt: skip

# What a run writes in its folder: of these, what a kill left half written is deleted when the run begins again. Another process's
# at work in the folder at the same moment are not told apart: the two would write over each other in any case.
WRITTEN = (
    r"checkpoint-\d+|model|heads|adapter_config\.json|adapter_model\.safetensors|metrics\.jsonl|(?:loss|reward)\.svg"
    r"|reference_logps\.safetensors"
)

LONGEST = 10**12  # steps or epochs: these are multiplied and counted in floats, and an epoch's seed in 64 bits


@dataclass(frozen=True)
class TrainConfig:
    """Names as in transformers' TrainingArguments.

    max_steps: optimizer steps; 0 lets num_train_epochs decide (each at most 10^12). warmup_ratio counts where warmup_steps is 0.
    max_grad_norm 0 does not clip. save_steps 0 keeps one checkpoint, the last. activation_checkpointing recomputes
    each layer in the backward pass: about a third more work, memory of one layer instead of all. loraplus_lr_ratio
    (PEFT's name): the rate of LoRA's B over learning_rate, which is A's (posttrain/adapters/lora_plus.py).
    """

    output_dir: str | os.PathLike
    max_steps: int = 0
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 0
    save_total_limit: int = 2
    loraplus_lr_ratio: float | None = None

    def __post_init__(self):
        at_least = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_total_limit": 1}
        at_least |= dict.fromkeys(("max_steps", "warmup_steps", "save_steps", "max_grad_norm", "weight_decay"), 0)
        for name, low in at_least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number of at least {low}")
        for name in ("max_steps", "num_train_epochs"):
            if (value := getattr(self, name)) > LONGEST:
                raise ValueError(f"{name} is {value}; expected at most {LONGEST:.0e}: a longer run has no end")
        for name in ("num_train_epochs", "learning_rate", "loraplus_lr_ratio"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected more than 0")
        if self.learning_rate * (self.loraplus_lr_ratio or 1) > torch.finfo(torch.float32).max:
            given = f"learning_rate is {self.learning_rate} and loraplus_lr_ratio {self.loraplus_lr_ratio}"
            raise ValueError(f"{given}; expected rates that float32 can hold")
        if not -(2**42) < self.seed < 2**42:  # each epoch's order has a seed made of it, which torch holds in 64 bits
            raise ValueError(f"seed is {self.seed}; expected a whole number of at most 12 digits")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; expected 0 to 1")
        if self.lr_scheduler_type not in ("cosine", "linear", "constant"):
            raise ValueError(f"lr_scheduler_type is {self.lr_scheduler_type!r}; expected cosine, linear or constant")


class Batch(Protocol):
    """What `collate` makes. num_tokens: tokens in it, for the speed. normalizer: what the sum of its losses is divided by, added
    up over a step: tokens with a label, pairs, ..."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def normalizer(self) -> int: ...

    def to(self, device: torch.device | str) -> Batch: ...


# A batch's losses summed, and where there is more to tell: {name: (sum, count)}, shown as the mean over a step.
Loss = Tensor | tuple[Tensor, dict[str, tuple[Tensor, float]]]


@dataclass(frozen=True)
class TrainResult:
    """What a run did: optimizer steps in all, tokens seen in all, and the entries of metrics.jsonl."""

    steps: int
    tokens: int
    metrics: list[dict[str, Any]] = field(repr=False)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of step `step` (from 0) of `total`: linear to the full rate over the warm-up, then down to 0 after the
    last."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * shape[config.lr_scheduler_type]


def total_steps(config: TrainConfig, items: int) -> int:
    """Optimizer steps of a run over `items` items."""
    return config.max_steps or math.ceil(config.num_train_epochs * _steps_per_epoch(config, items))


def _steps_per_epoch(config: TrainConfig, items: int) -> int:
    return math.ceil(items / (config.per_device_train_batch_size * config.gradient_accumulation_steps))


def step_items(config: TrainConfig, step: int, items: int) -> list[list[int]]:
    """Indices of the items of one step, by micro-batch. Each epoch sees every item once, in an order of its own."""
    epoch, within = divmod(step, _steps_per_epoch(config, items))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(items, generator=generator).tolist()
    size = config.per_device_train_batch_size
    ours = order[within * size * config.gradient_accumulation_steps :][: size * config.gradient_accumulation_steps]
    return [ours[i : i + size] for i in range(0, len(ours), size)]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of the model's parameters that require a gradient. PosttrainError for LoRA+'s rate without LoRA."""
    parameters = trainable(model)
    try:
        groups = parameter_groups(parameters, config.loraplus_lr_ratio)
    except ValueError as error:
        raise PosttrainError(str(error)) from error
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values()),
    )


def train(
    model: nn.Module,
    data: Sequence[Any],
    collate: Callable[[list[Any]], Batch],
    loss_sum: Callable[[Any, Any], Loss],
    config: TrainConfig,
    *,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
    quiet: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    unit: str = "nats per token",
) -> TrainResult:
    """Train the parameters of `model` that require a gradient.

    collate: items of `data` -> Batch. loss_sum: (model, batch) -> the batch's losses summed (over its tokens with a
    label, its pairs: what its normalizer counts), alone or with sums to show. In config.output_dir: metrics.jsonl,
    loss.svg and checkpoint-<step>/ folders (posttrain/checkpoint.py). resume=True goes on from the last of these, or
    begins where there is none; `identity` (what data, what adapter) must then be as it was. on_step sees each entry of
    metrics.jsonl. unit: the loss's, in loss.svg. PosttrainError where there is nothing to train or to learn from, where
    the loss or the gradient stops being finite (weights and checkpoints stay those of the step before), or where the
    run to resume was another.
    """
    if not data:
        raise PosttrainError("the training data holds no examples")
    parameters = list(trainable(model).values())
    if not parameters:
        raise PosttrainError("no parameter of the model requires a gradient; attach an adapter first")
    folder, device = Path(config.output_dir), parameters[0].device
    total = total_steps(config, len(data))
    identity = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k in IDENTITY} | (identity or {})))
    optimizer = adamw(model, config)
    state = begin(folder, model, optimizer, identity, config.seed, resume)
    first, tokens, seconds = state["step"], state["tokens"], state["seconds"]
    metrics = Metrics(folder / "metrics.jsonl", first)
    was_training = model.training
    model.train()
    if hasattr(model, "activation_checkpointing"):
        object.__setattr__(model, "activation_checkpointing", config.activation_checkpointing)
    began = time.perf_counter() - seconds
    with ProgressLine(total, first, quiet=quiet) as line:
        for step in range(first, total):
            step_began = time.perf_counter()
            items = step_items(config, step, len(data))
            batches = [collate([data[i] for i in part]) for part in items]
            losses, norm, shown = accumulate(model, batches, loss_sum, parameters, config.max_grad_norm, device)
            if not all(map(math.isfinite, (*losses, norm))):
                optimizer.zero_grad()
                raise PosttrainError(_not_finite(step + 1, losses, norm, items, folder))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total) * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(batch.num_tokens for batch in batches)
            now = time.perf_counter()
            entry = {
                "step": step + 1,
                "epoch": round((step + 1) / _steps_per_epoch(config, len(data)), 4),
                "loss": math.fsum(losses),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": norm,
                **shown,
                "tokens": tokens,
                "tokens_per_second": sum(batch.num_tokens for batch in batches) / (now - step_began),
                "peak_memory": peak_memory(device),
                "seconds": now - began,
            }
            metrics.add(entry)
            line.update(entry)
            if on_step:
                on_step(entry)
            if step + 1 == total or (config.save_steps and (step + 1) % config.save_steps == 0):
                state = {"step": step + 1, "tokens": tokens, "seconds": entry["seconds"], "identity": identity}
                save_checkpoint(folder, model, optimizer, state)
                keep_last(folder, config.save_total_limit)
    entries = read_metrics(folder / "metrics.jsonl")
    if entries:
        _plot(folder / "loss.svg", entries, unit)
    model.train(was_training)
    return TrainResult(total, tokens, entries)


def begin(folder: Path, model, optimizer, identity: dict, seed: int, resume: bool) -> dict[str, Any]:
    """The state that a run goes on from: step, tokens and seconds of 0 for a fresh one, the last checkpoint's for a resumed one,
    whose weights, optimizer and random states are then put back. What a kill left half written is deleted. PosttrainError where
    that was another run."""
    done = checkpoints(folder)
    if not resume or not done:
        if done:
            raise PosttrainError(f"{folder} holds {done[-1].name} of an earlier run; resume it (--resume) or give another folder")
        sweep(folder, WRITTEN)
        torch.manual_seed(seed)
        return {"step": 0, "tokens": 0, "seconds": 0.0}
    before = read_state(done[-1], needed=("tokens", "seconds", "identity"))
    if changed := _changes(before["identity"], identity):
        raise PosttrainError(f"{done[-1]} belongs to another run: {'; '.join(changed)}. Set it back, or start in another folder")
    sweep(folder, WRITTEN)
    return load_checkpoint(done[-1], model, optimizer)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, key by key; of settings that are objects themselves (an adapter's), the fields that do."""
    changes = []
    for key in sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k)):
        was, is_ = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            changes += [f"{key}.{change}" for change in _changes(was, is_)]
        else:
            changes.append(f"{key} was {was!r} and is {is_!r}")
    return changes


def accumulate(
    model: Any,
    batches: Sequence[Batch],
    loss_sum: Callable[[Any, Any], Loss],
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    device: torch.device,
) -> tuple[list[float], float, dict[str, float]]:
    """Clipped gradients of the mean loss over all batches. Returns each batch's part of it, the gradient's norm before clipping,
    and the means of what else loss_sum tells.

    The host waits for the device once, at the end.
    """
    count = sum(batch.normalizer for batch in batches)
    if not count:
        raise PosttrainError("no token of this step has a label; is the completion missing from the data?")
    losses: list[Tensor] = []
    sums: dict[str, list[Tensor]] = defaultdict(list)
    counts: dict[str, float] = defaultdict(float)
    for batch in batches:
        value = loss_sum(model, batch.to(device))
        loss, told = value if isinstance(value, tuple) else (value, {})
        loss = loss / count
        loss.backward()
        losses.append(loss.detach())
        for name, (total, number) in told.items():
            sums[name].append(total.detach())
            counts[name] += number
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    means = [torch.stack(totals).sum() / max(counts[name], 1) for name, totals in sums.items()]
    *values, norm = torch.stack([t.to(losses[0].dtype) for t in (*losses, *means, norm)]).tolist()
    return values[: len(losses)], norm, dict(zip(sums, values[len(losses) :], strict=True))


def _not_finite(step: int, losses: list[float], norm: float, items: list[list[int]], folder: Path) -> str:
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    what = f"the gradient's norm is {norm}"
    if bad is not None:
        what = f"the loss is {losses[bad]} in micro-batch {bad + 1} of {len(items)}"
    seen = [i for part in items for i in part] if bad is None else items[bad]
    done = checkpoints(folder)
    kept = f"the last good checkpoint is {done[-1]}" if done else "no checkpoint had been written yet"
    return (
        f"step {step}: {what} (items {', '.join(map(str, seen))} of the data); stopped before the weights changed, and {kept}. "
        "Lower learning_rate, lengthen the warm-up, or look at those items"
    )


def _plot(path: Path, entries: list[dict[str, Any]], unit: str) -> None:
    points = [(e["step"], e["loss"]) for e in entries]
    window = max(1, len(points) // 20)
    smooth = running_mean([y for _, y in points], window)
    series = {"loss": points}
    if window > 1:
        series[f"mean of {window} steps"] = [(x, y) for (x, _), y in zip(points, smooth, strict=True)]
    line_chart(path, series, "Training loss", "step", unit)
