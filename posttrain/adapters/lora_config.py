"""What a LoRA adapter is and which layers it goes on: PEFT's fields, defaults and matching rules."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from posttrain.errors import PosttrainError

from .peft_format import plain_fields, read_config

# PEFT's fields that change what an adapter computes or holds, in ways that are not supported here: refused unless off.
REFUSED = (
    "fan_in_fan_out", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
    "megatron_config",
)  # fmt: skip
# Fields that say how an adapter was initialised; nothing here depends on them.
IGNORED = (
    "megatron_core", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip
# Initialisations that leave the base as it was. The others (PiSSA, OLoRA, ...) train, in PEFT, against a base that they changed.
HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Those of the others that give the same again: a file need not bring what they took from the base.
REPEATED_INIT = ("pissa", "olora")
BIASES = ("none", "all", "lora_only")
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1, "quant_type": "nf4", "block_size": 64, "double_quant": True}


def check_patterns(**values: object) -> None:
    """ValueError naming the field whose text is no regular expression."""
    for name, value in values.items():
        try:
            if isinstance(value, str):
                re.compile(value)
        except re.error as error:
            raise ValueError(f"{name} is {value!r}, which is no regular expression: {error}") from error


def _by_pattern(pattern: dict, name: str, default):
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _ends_with(name: str, keys: list[str]) -> bool:
    return any(name == key or name.endswith(f".{key}") for key in keys)


def _in_layers(config: LoraConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    regexes = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for m in (re.match(regex, name) for regex in regexes) if m), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's field names and meanings; the defaults are PEFT's but for `target_modules`, which is every linear layer.

    target_modules: "all-linear" (all but the output head), a regular expression that must match a layer's whole name,
    or a list of names or of their last parts ("q_proj"). rank_pattern and alpha_pattern: {regular expression for the
    end of a name: value}; the first that matches wins.

    init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero), "orthogonal",
    "pissa", "pissa_niter_<n>", "olora", "loftq" (lora_init.py), or False (both Kaiming-uniform: the output changes at
    once, for tests). loftq_config: PEFT's loftq_iter, and how to quantize: quant_type, block_size, double_quant.
    use_dora: dora.py. lora_bias: a trained bias beside B. bias: which of the base's biases train, as copies of the
    adapter's: "none", "lora_only" (of the layers with an update) or "all". modules_to_save: modules whose name ends so
    train whole, as copies.
    """

    PEFT_TYPE: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str = True
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        plain_fields(self)
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, r in ranks.items():
            if r <= 0:
                raise ValueError(f"{name} is {r!r}; a rank is a whole number of at least 1")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            if not math.isfinite(alpha) or not alpha:
                raise ValueError(f"{name} is {alpha}; expected a finite number other than 0, which scales the update")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; expected 0 <= lora_dropout < 1")
        init = self.init_lora_weights
        known = init in (True, False, "gaussian", "orthogonal", "pissa", "olora", "loftq")
        if not known and not (isinstance(init, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", init)):
            raise ValueError(
                f"init_lora_weights is {init!r}; expected True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_<n>', "
                "'olora' or 'loftq'"
            )
        if init == "orthogonal" and (odd := [f"{name} = {r}" for name, r in ranks.items() if r % 2]):
            raise ValueError(f"{odd[0]}; init_lora_weights='orthogonal' takes even ranks")
        if self.bias not in BIASES:
            raise ValueError(f"bias is {self.bias!r}; expected one of {', '.join(BIASES)}")
        if self.lora_bias and (self.use_dora or self.bias != "none" or init not in (True, False)):
            raise ValueError("lora_bias goes with init_lora_weights=True, bias='none' and without use_dora")
        self._check_loftq()
        if not self.target_modules:
            raise ValueError("target_modules is empty; expected 'all-linear', a regular expression or a list of names")
        check_patterns(target_modules=self.target_modules, exclude_modules=self.exclude_modules)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check_patterns(**{"a key of rank_pattern or alpha_pattern": pattern})
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need target_modules to be a list, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform; say which layers")

    def _check_loftq(self) -> None:
        loftq = self.loftq
        if unknown := sorted(loftq.keys() - LOFTQ.keys()):
            raise ValueError(f"loftq_config has {unknown[0]}; expected {', '.join(LOFTQ)}")
        if loftq["loftq_bits"] != 4 or not isinstance(loftq["loftq_iter"], int) or loftq["loftq_iter"] < 1:
            raise ValueError(f"loftq_config is {self.loftq_config}; expected loftq_bits 4 and loftq_iter of at least 1")

    @property
    def loftq(self) -> dict[str, Any]:
        """loftq_config with its defaults."""
        return {**LOFTQ, **self.loftq_config}

    @property
    def takes_weight(self) -> bool:
        """Whether the adapter starts with a part of the base's weight (PiSSA, OLoRA), to be left out of the base."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @property
    def own_base(self) -> bool:
        """Whether the adapter's base is not the model's quantization but LoftQ's after several steps."""
        return self.init_lora_weights == "loftq" and self.loftq["loftq_iter"] > 1

    def to_peft(self, model: nn.Module) -> dict[str, Any]:
        """adapter_config.json's content, which describes the adapter as saved: where it started with a part of the
        weight, one of twice the rank on the whole weight."""
        config = self
        if self.takes_weight:
            grown = math.sqrt(2) if self.use_rslora else 2
            config = replace(
                self,
                r=2 * self.r,
                lora_alpha=grown * self.lora_alpha,
                rank_pattern={k: 2 * r for k, r in self.rank_pattern.items()},
                alpha_pattern={k: grown * alpha for k, alpha in self.alpha_pattern.items()},
            )
        content = {**asdict(config), "init_lora_weights": self.init_lora_weights, "loftq_config": self.loftq}
        if not self.own_base:
            content["loftq_config"] = {}
            if self.init_lora_weights not in HARMLESS_INIT:
                content["init_lora_weights"] = True
        task = "SEQ_CLS" if "score" in (self.modules_to_save or ()) else "CAUSAL_LM"  # a reward model (posttrain/reward.py)
        return {**content, "peft_type": "LORA", "task_type": task, "fan_in_fan_out": False, "inference_mode": True}

    @classmethod
    def from_peft(cls, content: dict[str, Any], source: str | os.PathLike) -> LoraConfig:
        """What an adapter_config.json describes. PosttrainError where it asks for what is not supported."""
        init = content.get("init_lora_weights", True)
        loftq = content.get("loftq_config") or {}
        if content.get("task_type") == "SEQ_CLS" and "classifier" in (content.get("modules_to_save") or ()):
            # PEFT names the head both ways, and decoders have it as "score".
            content = {**content, "modules_to_save": [name for name in content["modules_to_save"] if name != "classifier"]}
        ours = init == "loftq" and "quant_type" in loftq
        if init not in (*HARMLESS_INIT, *REPEATED_INIT) and not ours:
            raise PosttrainError(
                f"{source}: init_lora_weights is {init!r}, which changes the base; save the adapter in PEFT with "
                "path_initial_model_for_weight_conversion to get one for the original base"
            )
        if not ours:
            known = init in (True, False, "gaussian", *REPEATED_INIT)
            content = {**content, "init_lora_weights": init if known else True, "loftq_config": {}}
        if content.get("target_modules") is None:
            # PEFT's default for Llama, Mistral, Qwen2 and Qwen3. (It is written out where PEFT itself saves.)
            content = {**content, "target_modules": ["q_proj", "v_proj"]}
        return read_config(cls, content, source, REFUSED, IGNORED)

    def rank(self, name: str) -> int:
        """Rank of the adapter on the layer of that name."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA, on the layer of that name."""
        r = self.rank(name)
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)


def check_rank(config: LoraConfig, name: str, N: int, K: int) -> None:
    """ValueError for a rank above what the layer's weight (N, K) can have."""
    r, most = config.rank(name), min(N, K)
    if r > most:
        raise ValueError(
            f"the rank of {name} is {r}, and its weight of {N} x {K} has rank {most} at most; lower r, or give such layers a rank "
            f"of their own: rank_pattern={{{name.rpartition('.')[2]!r}: {most}}}"
        )


def matches(config: LoraConfig, name: str) -> bool:
    """Whether a layer of that name is a target of the config, by PEFT's rules; "all-linear" is all but `lm_head`."""
    excluded, targets = config.exclude_modules, config.target_modules
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends_with(name, excluded)):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return name.rpartition(".")[2] != "lm_head"
        return re.fullmatch(targets, name) is not None
    return name in targets or (_ends_with(name, targets) and _in_layers(config, name))
