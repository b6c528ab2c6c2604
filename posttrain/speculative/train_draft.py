"""Train a draft for a target on what the target itself writes: `posttrain speculative train-draft`.

Items (posttrain/speculative/draft_data.py) are made once, with the target's hidden states; a share of the continuations is held
out, and what the draft reaches there is what its tree is chosen by. The loop is posttrain/trainer.py's: exact to resume, and the
same bits from the same command and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.adapters import base_fingerprint
from posttrain.data import Example
from posttrain.errors import PosttrainError
from posttrain.model.decoder import CausalLM
from posttrain.model.loading import save
from posttrain.quantized import held_as
from posttrain.sft import digest
from posttrain.trainer import TrainConfig, TrainResult, train

from . import eagle_head, medusa_heads, truncated
from .draft_data import DraftBatch, Item, collate, compute_items, split
from .eagle_head import EagleHead, feature_layers, save_eagle, set_scale
from .heads import draft_vocabulary
from .medusa_heads import MedusaHeads, save_medusa
from .truncated import Distilled, truncate

KINDS = ("draft", "medusa", "eagle")
HELD_OUT = 0.1


@dataclass(frozen=True)
class DraftConfig:
    """What is trained.

    layers: of a draft, those of the target that it keeps. num_heads, own_heads: Medusa's. version, unroll, noise: EAGLE's
    (posttrain/speculative/eagle_head.py). vocab_size: tokens a head may draft, None for all (heads.py). depths: how far ahead
    EAGLE's accuracy is measured.
    """

    kind: str
    layers: tuple[int, ...] = ()
    num_heads: int = 4
    own_heads: bool = False
    version: int = 1
    unroll: int = 3
    noise: float = 0.0
    vocab_size: int | None = 8192
    depths: int = 6

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.unroll < 1 or self.depths < 1 or not 0 <= self.noise < float("inf"):
            raise ValueError(f"unroll is {self.unroll}, depths {self.depths} and noise {self.noise}; expected at least 1, 1 and 0")


def train_draft(
    target: CausalLM,
    examples: Sequence[Example],
    draft: DraftConfig,
    config: TrainConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Path, dict[str, Any], TrainResult]:
    """Train, measure on held-out text and save in the folder `model` (heads: `heads`) of config.output_dir.

    examples: continuations by the target (posttrain/speculative/continuations.py). Returns (the folder, what was measured, the
    run). PosttrainError as `train`, and where the continuations are too few to hold some out.
    """
    try:
        training, held_out = split(examples, HELD_OUT, config.seed)
    except ValueError as error:
        raise PosttrainError(str(error)) from error
    torch.manual_seed(config.seed)
    target.requires_grad_(False)
    module, loss_sum, horizon = _prepare(target, training, draft, config.seed)
    layers = feature_layers(target.config.num_hidden_layers) if (draft.kind, draft.version) == ("eagle", 3) else None
    data = compute_items(target, training, layers)
    if isinstance(module, EagleHead):
        set_scale(module, data)
    identity = {"data": digest(examples), "draft": asdict(draft), "base": base_fingerprint(target), "held": held_as(target)}
    run = partial(train, module, data, partial(collate, horizon=horizon), loss_sum, config)
    result = run(resume=resume, identity=identity, quiet=quiet, on_step=on_step)
    batches = _batches(compute_items(target, held_out, layers), horizon)
    return *_finish(module.eval(), target, batches, draft, config), result


def _prepare(target: CausalLM, training: Sequence[Example], draft: DraftConfig, seed: int) -> tuple[nn.Module, Callable, int]:
    """(what trains, its loss, its horizon)."""
    if draft.kind == "draft":
        return Distilled(truncate(target, draft.layers)), truncated.loss_sum, truncated.HORIZON
    ids = draft_vocabulary(training, target.config.vocab_size, draft.vocab_size)
    if draft.kind == "medusa":
        return MedusaHeads(target, draft.num_heads, ids, draft.own_heads), medusa_heads.loss_sum, medusa_heads.HORIZON
    head = EagleHead(target, ids, draft.version).initialize(target, seed)
    return head, partial(eagle_head.loss_sum, unroll=draft.unroll, noise=draft.noise), eagle_head.HORIZON


def _batches(items: Sequence[Item], horizon: int, size: int = 16) -> list[DraftBatch]:
    return [collate(items[start : start + size], horizon) for start in range(0, len(items), size)]


def _finish(
    module: nn.Module, target: CausalLM, batches: list[DraftBatch], draft: DraftConfig, config: TrainConfig
) -> tuple[Path, dict[str, Any]]:
    """Measure and save: (folder, what was measured)."""
    if isinstance(module, Distilled):
        path = Path(config.output_dir) / "model"
        model = module.finish()
        save(model, path)
        return path, dict(truncated.agreement(model, batches))
    path = Path(config.output_dir) / "heads"
    measured: dict[str, Any]
    if isinstance(module, MedusaHeads):
        measured = {"accuracy": medusa_heads.accuracy(module, batches)}
        save_medusa(path, module, target, measured)
    else:
        assert isinstance(module, EagleHead)
        measured = {"accuracy": eagle_head.accuracy(module, batches, draft.depths), "unroll": draft.unroll}
        save_eagle(path, module, target, measured)
    return path, measured
