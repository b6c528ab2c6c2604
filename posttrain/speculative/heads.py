"""What Medusa's and EAGLE's heads share: the draft vocabulary, and the folder they are saved in.

Most of a small head's work is the product with the vocabulary's rows. Drafts need not be able to say every token: over the most
frequent ones (EAGLE-3, arXiv:2503.01840; FR-Spec, arXiv:2502.14856) that product shrinks and acceptance hardly does. A token
outside is never drafted, which costs an acceptance and never correctness.

    config.json          kind, sizes, the base's fingerprint, the accuracy measured on held-out text
    model.safetensors    trained tensors in the base's dtype, and draft_ids; the fingerprint again among the metadata
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.atomic import atomic_dir
from posttrain.data import IGNORE_INDEX, Example
from posttrain.errors import PosttrainError
from posttrain.fingerprint import METADATA_KEY, fingerprint
from posttrain.model.checkpoint import read_json
from posttrain.model.decoder import CausalLM
from posttrain.model.safetensors_file import SafetensorsReader, write_safetensors
from posttrain.quantized import QuantizedLinear

WEIGHTS, CONFIG, KIND = "model.safetensors", "config.json", "speculative_heads"


def draft_vocabulary(examples: Sequence[Example], vocab_size: int, size: int | None) -> Tensor:
    """The ids int64 (size,), ascending, that a draft may say: the most frequent ones among the labels, then the lowest others.

    Of a byte-pair encoding the lowest are the first merged, and so the most frequent where it was trained. None or a size of the
    vocabulary's or more: every id.
    """
    if size is None or size >= vocab_size:
        return torch.arange(vocab_size)
    if size < 1:
        raise ValueError(f"the draft vocabulary has {size} tokens; expected at least 1")
    counts = Counter(label for example in examples for label in example.labels if label != IGNORE_INDEX)
    by_frequency = sorted(counts, key=lambda i: (-counts[i], i))[:size]
    others = (i for i in range(vocab_size) if i not in counts)
    return torch.tensor(sorted(by_frequency + [i for i, _ in zip(others, range(size - len(by_frequency)), strict=False)]))


def places(draft_ids: Tensor, vocab_size: int) -> Tensor:
    """int64 (V,): each id's place in the draft vocabulary, -100 outside it."""
    table = torch.full((vocab_size,), IGNORE_INDEX, device=draft_ids.device)
    table[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return table


def head_rows(model: CausalLM, draft_ids: Tensor) -> Tensor:
    """The target's head weight (V', D) for the draft vocabulary, as a copy unless that is the whole one."""
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    weight = head.weight.dequantize() if isinstance(head, QuantizedLinear) else head.weight
    if not isinstance(weight, Tensor):
        raise ValueError(f"the head is a {type(head).__name__}; heads train on a plain one: merge its adapter first")
    weight = weight.detach()
    return weight if len(draft_ids) == len(weight) else weight[draft_ids.to(weight.device)]


def save_heads(
    path: str | os.PathLike, kind: str, heads: nn.Module, draft_ids: Tensor, config: dict[str, Any], base: CausalLM
) -> None:
    """Write the folder described above."""
    base_print = fingerprint(base)
    dtype = base.model.embed_tokens.weight.dtype
    tensors = {name: parameter.detach().to(dtype) for name, parameter in heads.named_parameters()}
    tensors["draft_ids"] = draft_ids.to(torch.int32)
    sizes = {"hidden_size": base.config.hidden_size, "vocab_size": base.config.vocab_size}
    content = {KIND: kind, **sizes, "base_fingerprint": base_print, **config}
    with atomic_dir(path) as folder:
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_safetensors(folder / WEIGHTS, tensors.items(), {METADATA_KEY: base_print})


def read_heads(
    path: str | os.PathLike, kind: str, base: CausalLM, any_base: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a saved folder. PosttrainError where it holds something else, or heads of another base (both named)
    unless any_base."""
    path = Path(path)
    config = read_json(path / CONFIG)
    if config.get(KIND) != kind:
        found = f"{config[KIND]} heads" if KIND in config else "a model or an adapter"
        raise PosttrainError(
            f"{path} holds {found}; expected {kind} heads, which posttrain speculative train-draft --kind {kind} writes"
        )
    with SafetensorsReader(path / WEIGHTS) as file:
        tensors = {name: file.read(name) for name in file.entries}
        trained_on = file.metadata.get(METADATA_KEY)
    if config.get("base_fingerprint") != trained_on:
        raise PosttrainError(
            f"{path / CONFIG} and {WEIGHTS} are not of one run: their base_fingerprint differs; train the heads again"
        )
    if trained_on != (ours := fingerprint(base)) and not any_base:
        raise PosttrainError(
            f"{path} was trained on the base {trained_on}, and this model is {ours}: it would draft what another model says. "
            "Load the base that they were trained on, or train them on this one"
        )
    expected = base.config.hidden_size, base.config.vocab_size
    if (sizes := (config.get("hidden_size"), config.get("vocab_size"))) != expected:
        raise PosttrainError(f"{path}: hidden_size and vocab_size are {sizes}, and the model's {expected}; they do not fit")
    return config, tensors


def put_tensors(heads: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """The file's tensors into the module's parameters. PosttrainError naming what is missing, left over or of another shape."""
    parameters = dict(heads.named_parameters())
    ours = {name: tuple(p.shape) for name, p in parameters.items()}
    theirs = {name: tuple(t.shape) for name, t in tensors.items() if name != "draft_ids"}
    if ours != theirs:
        wrong = sorted({name for name, _ in ours.items() ^ theirs.items()})
        raise PosttrainError(f"{Path(path) / WEIGHTS} does not hold what its config.json describes: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
