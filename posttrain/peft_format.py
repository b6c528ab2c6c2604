"""Adapters on disk as PEFT has them: adapter_config.json and adapter_model.safetensors.

Keys are `base_model.model.<layer>.lora_A.weight` (r, in_features) and `.lora_B.weight` (out_features, r). The
safetensors metadata carries, beside PEFT's `format`, the fingerprint of the base that the adapter was trained on: PEFT
passes over it, `load_adapter` refuses another base. An adapter without one (PEFT's own) is taken at its word.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from torch import Tensor

from .atomic import atomic_write
from .errors import PosttrainError
from .fingerprint import METADATA_KEY
from .lora_config import LoraConfig
from .model.safetensors_file import SafetensorsReader, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's fields that change what an adapter computes or holds, in ways that are not supported here: refused unless off.
REFUSED = (
    "fan_in_fan_out", "use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters",
    "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "megatron_config",
)  # fmt: skip
# Fields that say where an adapter comes from or how it was initialised; nothing here depends on them.
IGNORED = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "ensure_weight_tying", "runtime_config",
)  # fmt: skip
# Initialisations that leave the base as it was. The others (PiSSA, OLoRA, ...) train against a base that they changed.
HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal")


def config_to_peft(config: LoraConfig, base_model: str | None = None) -> dict:
    """adapter_config.json's content."""
    return {
        **asdict(config),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def config_from_peft(content: dict, source: str | os.PathLike = CONFIG_FILE) -> LoraConfig:
    """The LoraConfig that an adapter_config.json describes. PosttrainError where it asks for what is not supported."""
    if not isinstance(content, dict):
        raise PosttrainError(f"{source}: expected a JSON object, found {type(content).__name__}")
    if content.get("peft_type") != "LORA":
        raise PosttrainError(f"{source}: peft_type is {content.get('peft_type')!r}; only LORA adapters are supported")
    for key in REFUSED:
        if content.get(key):
            raise PosttrainError(f"{source}: {key} is {content[key]!r}; adapters that use it are not supported")
    init = content.get("init_lora_weights", True)
    if init not in HARMLESS_INIT:
        raise PosttrainError(
            f"{source}: init_lora_weights is {init!r}, which changes the base; save the adapter in PEFT with "
            "path_initial_model_for_weight_conversion to get one for the original base"
        )
    known = {f.name for f in fields(LoraConfig)}
    for key in content.keys() - known - set(REFUSED) - set(IGNORED):
        if content[key]:
            warnings.warn(f"{source}: unknown field {key}={content[key]!r} is passed over", stacklevel=2)
    values = {k: v for k, v in content.items() if k in known and v is not None}
    values["init_lora_weights"] = init if init in (True, False, "gaussian") else True
    try:
        return LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise PosttrainError(f"{source}: {error}") from error


def write_adapter(
    path: str | os.PathLike,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    fingerprint: str | None,
    base_model: str | None = None,
) -> None:
    """Write the folder `path`: `tensors` under PEFT's keys, and the config; each file whole or not at all."""
    path = Path(path)
    content = json.dumps(config_to_peft(config, base_model), indent=2, sort_keys=True) + "\n"
    with atomic_write(path / CONFIG_FILE) as description, atomic_write(path / WEIGHTS_FILE) as weights:
        description.write_text(content, encoding="utf-8")
        write_safetensors(weights, tensors.items(), {METADATA_KEY: fingerprint} if fingerprint else {})


def read_adapter(path: str | os.PathLike) -> tuple[LoraConfig, dict[str, Tensor], str | None]:
    """(config, tensors by PEFT's keys, fingerprint of the base or None) of the adapter in the folder `path`."""
    path = Path(path)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / file).is_file():
            raise PosttrainError(f"{path} holds no {file}; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PosttrainError(f"{path / CONFIG_FILE} is not JSON in UTF-8: {error}") from error
    with SafetensorsReader(path / WEIGHTS_FILE) as reader:
        tensors, metadata = {name: reader.read(name) for name in reader.entries}, reader.metadata
    return config_from_peft(content, path / CONFIG_FILE), tensors, metadata.get(METADATA_KEY)
