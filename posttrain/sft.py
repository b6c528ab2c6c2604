"""Supervised fine-tuning: examples in rows, the head on the tokens that have a label, and the training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from .adapters import base_fingerprint
from .data import Example, max_tokens
from .errors import PosttrainError
from .model.decoder import CausalLM
from .model.generate import check_ids
from .packing import Batch, collate, pack
from .quantized import held_as
from .token_logprobs import completion_logprobs
from .trained_model import attach_for_training, check_lengths, free_weights, save_trained
from .trainer import TrainConfig, TrainResult, train


def loss_sum(model: CausalLM, batch: Batch) -> Tensor:
    """Sum of the next-token losses over the batch's labelled tokens (): the head sees those positions alone."""
    return -completion_logprobs(model, batch).sum()


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of the data: sha256 over every id and label in order, 16 hexadecimal digits."""
    content = hashlib.sha256()
    for example in examples:
        content.update(repr((example.input_ids, example.labels)).encode())
    return content.hexdigest()[:16]


def sft(
    model: CausalLM,
    examples: Sequence[Example],
    config: TrainConfig,
    adapter: Any = None,
    *,
    max_length: int | None = None,
    packing: bool = True,
    pad_id: int = 0,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Fine-tune `model` (a posttrain.model CausalLM, dense or quantized) on `examples` (posttrain.data.load_dataset).

    adapter: a configuration of posttrain.adapters (LoraConfig, BottleneckConfig, ...), attached first, with the config's
    seed, unless the model already has an adapter. Without one all weights train, which must be dense; best in fp32,
    since a step of a good size is lost in bfloat16's rounding. packing: several examples share a row of `max_length`
    tokens (the longest example's by default), none seeing another; a batch is then of rows.

    The adapter is saved in config.output_dir in PEFT's format (a whole model in its folder `model`, as Hugging Face has
    it), beside metrics.jsonl, loss.svg and the checkpoints. PosttrainError as `train`, for an example longer than
    max_length or the model's context, and for 4-bit weights without an adapter. ValueError for ids outside the vocabulary.
    """
    if not examples:
        raise PosttrainError("the training data holds no examples")
    longest = max_tokens(examples)
    check_lengths(model, adapter, longest, max_length)
    check_ids(model, (example.input_ids for example in examples), "example")
    trained = attach_for_training(model, adapter, config.seed)
    rows = pack(examples, max_length or longest) if packing else [[example] for example in examples]
    identity = {
        "data": digest(examples),
        "rows": [packing, max_length],
        "adapter": asdict(trained) if trained else None,
        "base": base_fingerprint(model),
        "held": held_as(model),
    }
    if trained is None:
        free_weights(model)
    run = partial(train, model, rows, partial(collate, pad_id=pad_id), loss_sum, config)
    result = run(resume=resume, identity=identity, quiet=quiet, on_step=on_step)
    save_trained(model, trained, config)
    return result
