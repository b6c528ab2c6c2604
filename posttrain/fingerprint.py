"""A fast fingerprint of a base model, so that an adapter is not put on a base it was not trained on.

What it is: sha256 over the configuration's essentials (those that change what the weights mean) and, for each tensor by
name, its shape and up to 1,024 of its values at even strides, rounded to bfloat16. It is taken from the checkpoint's
tensors *before* any quantization, and quantized checkpoints carry it in their safetensors metadata, so:

- the dense model and its NF4 quantization have the same fingerprint, and so do the float32 and bfloat16 copies of one
  model;
- another architecture, size, or training run has another one;
- a change to a few unsampled values is not seen: it guards against mistakes, not against forgery.

A 4-bit checkpoint made elsewhere has no dense tensors to sample: its fingerprint starts with "4bit:" and is taken from
the packed ones, and so equals only its own.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .model.config import ModelConfig

METADATA_KEY = "base_fingerprint"
_SAMPLES = 1024
_ESSENTIALS = (
    "architecture", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "sliding_window", "qk_norm",
)  # fmt: skip


class Fingerprint:
    """Collects tensors in any order; `digest()` is the fingerprint."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._tensors: dict[str, bytes] = {}
        self._quantized = False

    def update(self, name: str, tensor: Tensor) -> None:
        """Add one checkpoint tensor under its name. Integer tensors (packed weights) are sampled as they are."""
        flat = tensor.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        values = flat[places]
        if values.is_floating_point():
            values = values.to(torch.bfloat16)
        else:
            self._quantized = True
        content = hashlib.sha256(repr(tuple(tensor.shape)).encode())
        content.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self._tensors[name] = content.digest()

    def digest(self) -> str:
        """ "sha256:" (or "4bit:" when packed tensors were among them) and 32 hexadecimal digits."""
        essentials = {key: getattr(self._config, key) for key in _ESSENTIALS} | {"rope": self._config.rope.to_hf()}
        whole = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
        for name in sorted(self._tensors):
            whole.update(name.encode() + b"\0" + self._tensors[name])
        return ("4bit:" if self._quantized else "sha256:") + whole.hexdigest()[:32]


def fingerprint(model: nn.Module) -> str:
    """The fingerprint a model was loaded with; for one made in memory, that of its tensors now (not kept)."""
    if getattr(model, "fingerprint", None) is not None:
        return model.fingerprint  # type: ignore[return-value]
    return dense_fingerprint(model)


def dense_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model's present tensors."""
    collected = Fingerprint(model.config)  # type: ignore[arg-type]
    for name, tensor in model.state_dict().items():
        collected.update(name, tensor)
    return collected.digest()
