"""Adapters: small trained additions to a frozen model. One file a method; interface.py is what they share."""

from .bottleneck import BottleneckConfig
from .combine import combine
from .ia3 import IA3Config
from .interface import (
    METHODS,
    active_adapter,
    adapter_configs,
    adapter_names,
    adapter_parameters,
    attach,
    base_fingerprint,
    delete_adapter,
    disable,
    disabled,
    enable,
    is_merged,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    saved_tensors,
    set_adapter,
    unmerge,
)
from .lora_config import LoraConfig
from .lora_init import init_loftq
from .p_tuning import PromptEncoderConfig
from .prefix import PrefixTuningConfig
from .prompt import PromptTuningConfig
from .virtual_tokens import drop_encoder

__all__ = [
    "METHODS",
    "BottleneckConfig",
    "IA3Config",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "active_adapter",
    "adapter_configs",
    "adapter_names",
    "adapter_parameters",
    "attach",
    "base_fingerprint",
    "combine",
    "delete_adapter",
    "disable",
    "disabled",
    "drop_encoder",
    "enable",
    "init_loftq",
    "is_merged",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "save_adapter",
    "saved_tensors",
    "set_adapter",
    "unmerge",
]
