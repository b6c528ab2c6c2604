"""What a decoder of the Llama family is made of, read from and written to Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .rope import RopeConfig, positive_number

# Where the architectures differ when config.json is silent (their own defaults in transformers).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "max_position_embeddings": 2048, "num_key_value_heads": None},
    "MistralForCausalLM": {
        "model_type": "mistral", "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "Qwen2ForCausalLM": {
        "model_type": "qwen2", "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
    },
    "Qwen3ForCausalLM": {
        "model_type": "qwen3", "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
        "head_dim": 128,
    },
}  # fmt: skip
ARCHITECTURES = tuple(_DEFAULTS)

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip

LARGEST = 2**31 - 1  # the product of two such sizes is still one that torch can hold


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. `qkv_bias`, `o_bias`, `qk_norm` and `windows` say what the architecture's name implies."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    rope: RopeConfig = field(default_factory=RopeConfig)
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window in tokens (a token sees itself and the window - 1 before it), or None for all."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)

    @property
    def context_length(self) -> int:
        """The longest sequence the positions are made for."""
        if self.rope.rope_type == "dynamic":
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read a config.json as transformers 4 or 5 writes it.

        Raises ValueError for an architecture outside the family, a missing size, or sizes that do not fit together.
        """
        architecture = _architecture(config)
        given = {**_DEFAULTS[architecture], **{key: value for key, value in config.items() if value is not None}}
        # Written as null, these mean "none", not "the default".
        given.update({key: None for key in ("sliding_window", "num_key_value_heads") if config.get(key, 0) is None})
        sizes = {}
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        ):  # fmt: skip
            sizes[key] = _positive_int(key, given.get(key))
        if given.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"config.json: hidden_act is {given['hidden_act']!r}; the Llama family uses 'silu'")
        heads = sizes["num_attention_heads"]
        kv_heads = _positive_int("num_key_value_heads", given["num_key_value_heads"] or heads)
        if heads % kv_heads:
            raise ValueError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} key-value heads")
        head_dim = _positive_int("head_dim", given.get("head_dim") or sizes["hidden_size"] // heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim is {head_dim}; rotary embeddings need an even one")
        bias = _boolean("attention_bias", given) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        window, layer_types = _windows(architecture, given, sizes["num_hidden_layers"])
        eos = given.get("eos_token_id")
        end_ids(eos)
        dtype = given.get("dtype") or given.get("torch_dtype")
        if not isinstance(dtype, str | None):
            raise ValueError(f"config.json: dtype is {dtype!r}; expected a name, such as 'bfloat16'")
        return cls(
            architecture=architecture,
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive_number("rms_norm_eps", given.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=_boolean("tie_word_embeddings", given),
            qkv_bias=bias or architecture == "Qwen2ForCausalLM",
            o_bias=bias,
            mlp_bias=_boolean("mlp_bias", given) and architecture == "LlamaForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_window=window,
            layer_types=layer_types,
            rope=RopeConfig.from_hf({**config, "max_position_embeddings": given["max_position_embeddings"]}),
            initializer_range=_spread(given.get("initializer_range", 0.02)),
            bos_token_id=_token_id("bos_token_id", given.get("bos_token_id")),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=_token_id("pad_token_id", given.get("pad_token_id")),
            dtype=dtype,
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json's content, readable by transformers 4 and 5."""
        eos = self.eos_token_id
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": _DEFAULTS[self.architecture]["model_type"],
            "hidden_act": "silu",
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "torch_dtype": self.dtype,
            **self.rope.to_hf(),
        }
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "initializer_range", "bos_token_id", "pad_token_id",
        ):  # fmt: skip
            config[key] = getattr(self, key)
        if self.architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
            config["attention_bias"] = self.o_bias
        if self.architecture == "LlamaForCausalLM":
            config["mlp_bias"] = self.mlp_bias
        if self.architecture != "LlamaForCausalLM":
            config["sliding_window"] = self.sliding_window
        if self.layer_types is not None:
            config["layer_types"] = list(self.layer_types)
            config["use_sliding_window"] = self.sliding_window is not None
        return config


def _positive_int(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}; expected a positive integer")
    if value > LARGEST:
        raise ValueError(f"config.json: {key} is {value}; expected at most {LARGEST}: no model has such a size")
    return value


def _spread(value: Any) -> float:
    """initializer_range; 0 is one, of a model that starts with zeros."""
    return 0.0 if value == 0 and not isinstance(value, bool) else positive_number("initializer_range", value)


def _boolean(key: str, config: dict[str, Any]) -> bool:
    """The value under `key`, False where there is none. A text such as "false" would be true to Python."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}; expected true or false, without quotes")
    return value


def _token_id(key: str, value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise ValueError(f"config.json: {key} is {value!r}; expected one token id, or null")
    return value


def end_ids(eos: Any, file: str = "config.json") -> tuple[int, ...]:
    """The tokens that a file's eos_token_id names. ValueError where it is neither a token id, a list of them nor null."""
    ids = eos if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{file}: eos_token_id is {eos!r}; expected a token id, or a list of them")
    return tuple(ids)


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name, "bf16" or "bfloat16"; ValueError that lists the names otherwise."""
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]  # type: ignore[index]


def _architecture(config: dict[str, Any]) -> str:
    """The class name in `architectures`, or the one that `model_type` stands for."""
    kind = config.get("model_type")
    names = config.get("architectures") or [next((n for n, known in _DEFAULTS.items() if known["model_type"] == kind), kind)]
    if not isinstance(names, list) or names[0] not in ARCHITECTURES:
        raise ValueError(
            f"config.json: the architecture is {names!r}; expected one of {', '.join(ARCHITECTURES)}. "
            "Models that need other code than the Llama family's cannot be run here"
        )
    return names[0]


def _windows(architecture: str, given: dict[str, Any], layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    """(sliding_window, layer_types): Mistral slides in every layer, Qwen in the layers it names, Llama nowhere."""
    if architecture == "LlamaForCausalLM":
        return None, None
    window = given.get("sliding_window")
    if architecture != "MistralForCausalLM" and not _boolean("use_sliding_window", given):
        window = None
    if window is not None:
        _positive_int("sliding_window", window)
    if architecture == "MistralForCausalLM":
        return window, None
    first = given.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise ValueError(f"config.json: max_window_layers is {first!r}; expected how many layers attend to everything, 0 or more")
    types = given.get("layer_types") or [
        "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)
    ]
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list | tuple) or len(types) != layers or any(kind not in kinds for kind in types):
        given_types = f"has {len(types)} entries: {types}" if isinstance(types, list | tuple) else f"is {types!r}"
        raise ValueError(f"config.json: layer_types {given_types}; expected a list of {layers}, each {' or '.join(kinds)}")
    return window, tuple(types)
