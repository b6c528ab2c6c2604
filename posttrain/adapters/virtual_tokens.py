"""Virtual tokens: P vectors that train while the model does not, which every sequence sees before its first token.

What prompt tuning (prompt.py), P-tuning (p_tuning.py) and prefix tuning (prefix.py) share. `prompt_embeddings` (P, width)
is what PEFT's files hold of each:

    prompt tuning, P-tuning   width = hidden_size; the vectors go through the layers as tokens' embeddings do
    prefix tuning             width = layers * 2 * kv heads * head_dim; per layer a key and a value, as attention sees them

It either trains itself or is the output of a small encoder that trains in its place; then the file holds the encoder
too, under `prompt_encoder.`, so that training goes on from it. PEFT reads `prompt_embeddings` and passes over the rest.

Either way a model sees keys and values (posttrain/model/kv_cache.py: Prefix). Those of prompt_embeddings that are
embeddings come from one row through the layers, whatever the batch. docs/math/virtual_tokens.md
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.model.config import ModelConfig
from posttrain.model.kv_cache import Prefix
from posttrain.model.tokenizer import Tokenizer

from .peft_format import plain_fields, read_config

EMBEDDINGS, ENCODER = "prompt_embeddings", "prompt_encoder."
MOST_COMMON = 5000

Config = TypeVar("Config", bound="VirtualTokensConfig")


@dataclass(frozen=True)
class VirtualTokensConfig:
    """The fields that PEFT's three configurations share. What is None follows from the model, and is checked against it."""

    PEFT_TYPE: ClassVar[str]
    OWN: ClassVar[tuple[str, ...]] = ()  # fields that PEFT does not have, and that its files therefore leave out

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self):
        plain_fields(self)
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens is {self.num_virtual_tokens}; expected a whole number of at least 1")

    def to_peft(self, model: nn.Module) -> dict[str, Any]:
        """adapter_config.json's content."""
        content = {key: value for key, value in asdict(self).items() if key not in self.OWN}
        kind = {"peft_type": self.PEFT_TYPE, "task_type": "CAUSAL_LM", "num_transformer_submodules": 1}
        return {**content, **kind, "inference_mode": True}

    @classmethod
    def from_peft(cls: type[Config], content: dict[str, Any], source: str | os.PathLike) -> Config:
        """What an adapter_config.json describes. PosttrainError where it asks for what is not supported."""
        if content.get("num_transformer_submodules") not in (None, 1):
            count = content["num_transformer_submodules"]
            raise PosttrainError(f"{source}: num_transformer_submodules is {count!r}; a decoder has 1")
        if content.get("num_virtual_tokens") is None:
            raise PosttrainError(f"{source}: num_virtual_tokens is missing")
        ignored = ("num_transformer_submodules", "tokenizer_kwargs", *cls.OWN)
        content = {key: value for key, value in content.items() if key not in cls.OWN}
        return read_config(cls, content, source, ("modules_to_save",), ignored)


def check_positive(**sizes: int | None) -> None:
    """ValueError that names the first that is below 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected a whole number of at least 1")


def fit(model: nn.Module, config: Config, token_dim: int, heads: int, what: str) -> Config:
    """The config with its sizes filled in. ValueError where they are another model's, or the context has no room.

    what: what token_dim is of this model, for the message.
    """
    shape = getattr(model, "config", None)
    assert isinstance(shape, ModelConfig)  # `decoder_config` saw to it
    expected = {"token_dim": token_dim, "num_layers": shape.num_hidden_layers, "num_attention_heads": heads}
    for key, value in expected.items():
        if getattr(config, key) not in (None, value):
            raise ValueError(
                f"{key} is {getattr(config, key)!r}, and this model has {value}{what if key == 'token_dim' else ''}; is it an "
                "adapter of another architecture?"
            )
    if config.num_virtual_tokens >= shape.context_length:
        raise ValueError(
            f"num_virtual_tokens is {config.num_virtual_tokens}, and the model's context of {shape.context_length} must hold "
            "tokens besides; use fewer"
        )
    return replace(config, **expected)


def decoder_config(model: nn.Module) -> ModelConfig:
    """The model's configuration. ValueError for what is not one of posttrain.model's decoders."""
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"virtual tokens go before the tokens of a decoder (posttrain.model.CausalLM), not of a {type(model).__name__}"
        )
    return config


def text_ids(text: str, tokenizer_path: str | os.PathLike, count: int) -> list[int]:
    """The first `count` token ids of the text, begun again at its end as often as needed (PEFT's rule).

    ValueError for a text that gives no tokens, FileNotFoundError without a tokenizer in the folder.
    """
    ids = Tokenizer.load(tokenizer_path).encode(text, add_special_tokens=True)
    if not ids:
        raise ValueError(f"the text {text!r} gives no tokens to start from; give a longer one")
    return (ids * (count // len(ids) + 1))[:count]


def text_embeddings(model: Any, text: str, tokenizer_path: str | os.PathLike, count: int) -> Tensor:
    """The model's embeddings (count, hidden_size) of `text_ids`. ValueError where an id is outside its vocabulary."""
    ids, weight = text_ids(text, tokenizer_path, count), model.model.embed_tokens.weight
    if max(ids) >= len(weight):
        raise ValueError(f"the tokenizer in {tokenizer_path} gives the id {max(ids)}, and the model's vocabulary has {len(weight)}")
    return weight.detach()[torch.tensor(ids, device=weight.device)]


def sampled_embeddings(model: Any, count: int) -> Tensor:
    """The model's embeddings (count, hidden_size) of tokens drawn from its first 5,000, each at most once while they last."""
    weight = model.model.embed_tokens.weight.detach()
    ids = torch.randperm(min(MOST_COMMON, len(weight)))
    return weight[ids.repeat(count // len(ids) + 1)[:count].to(weight.device)]


class VirtualTokens(nn.Module):
    """P virtual tokens: `prompt_embeddings` (P, width) as a parameter, or an encoder whose output they are.

    kv_heads: those of a prefix; None where prompt_embeddings are embeddings. Called with the model it gives the Prefix.
    """

    def __init__(self, source: Tensor | nn.Module, num_virtual_tokens: int, kv_heads: int | None = None):
        super().__init__()
        self.num_virtual_tokens, self.kv_heads = num_virtual_tokens, kv_heads
        self.encoder = source if isinstance(source, nn.Module) else None
        if isinstance(source, Tensor):
            self.prompt_embeddings = nn.Parameter(source)

    def embeddings(self) -> Tensor:
        """prompt_embeddings (P, width), differentiable."""
        return self.prompt_embeddings if self.encoder is None else self.encoder()

    def forward(self, model: Any, lengths: Sequence[int] = (0,)) -> Prefix:
        """Keys and values that `model`'s rows see. lengths: as in `CausalLM.prefix`."""
        vectors = self.embeddings().to(model.model.embed_tokens.weight.dtype)
        if self.kv_heads is not None:
            return unpack(vectors, self.kv_heads, model.config.head_dim)
        return model.prefix(vectors, lengths)


def unpack(prompt_embeddings: Tensor, kv_heads: int, head_dim: int) -> Prefix:
    """The keys and values in (P, layers * 2 * kv heads * head_dim): of layer l, vectors 2 l and 2 l + 1 (PEFT's layout)."""
    layers = prompt_embeddings.view(len(prompt_embeddings), -1, 2, kv_heads, head_dim)
    keys_values = layers.permute(1, 2, 3, 0, 4)[:, :, None]  # (layers, 2, 1, kv heads, P, head_dim)
    return Prefix([(layer[0], layer[1]) for layer in keys_values])


def pack(prefix: Prefix) -> Tensor:
    """What `unpack` takes apart: (P, layers * 2 * kv heads * head_dim)."""
    layers = torch.stack([torch.cat(pair) for pair in prefix.layers])  # (layers, 2, kv heads, P, head_dim)
    return layers.permute(3, 0, 1, 2, 4).flatten(1)


def place(
    model: Any,
    name: str,
    config: VirtualTokensConfig,
    source: Tensor | nn.Module,
    dtype: torch.dtype | None,
    kv_heads: int | None = None,
) -> None:
    """Put the virtual tokens on the model: fp32 on a half-precision base (its own dtype if wider) unless `dtype` is given."""
    weight = model.model.embed_tokens.weight
    virtual = VirtualTokens(source, config.num_virtual_tokens, kv_heads)
    virtual.to(weight.device, dtype or torch.promote_types(weight.dtype, torch.float32)).train(model.training)
    adapters = model._modules.get("prompt_encoder", nn.ModuleDict())
    adapters[name] = virtual
    model.prompt_encoder = adapters


def source_of(tensors: dict[str, Tensor], encoder: nn.Module | None) -> Tensor | nn.Module:
    """What a file's tensors say: the encoder with its weights where they are there (PEFT's files lack them), else the
    prompt_embeddings, which then train themselves."""
    weights = {key.removeprefix(ENCODER): tensor for key, tensor in tensors.items() if key.startswith(ENCODER)}
    if encoder is None or not weights:
        return tensors[EMBEDDINGS]
    encoder.load_state_dict(weights)
    return encoder


def parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """What trains: the encoder's parameters under `prompt_encoder.`, or prompt_embeddings."""
    virtual = model.prompt_encoder[name]
    if virtual.encoder is None:
        return {EMBEDDINGS: virtual.prompt_embeddings}
    return {f"{ENCODER}{key}": parameter for key, parameter in virtual.encoder.named_parameters()}


@torch.no_grad()
def saved(model: Any, name: str) -> dict[str, Tensor]:
    """prompt_embeddings, computed without dropout, and the encoder where there is one."""
    virtual = model.prompt_encoder[name]
    was_training = virtual.training
    embeddings = virtual.eval().embeddings().detach()
    virtual.train(was_training)
    return {EMBEDDINGS: embeddings, **parameters(model, name)}


def activate(model: Any, name: str | None) -> None:
    """Let that adapter act, or none."""
    # Beside the registered module, not as one: it would have two names.
    object.__setattr__(model, "virtual", None if name is None else model.prompt_encoder[name])


def remove(model: Any, name: str) -> None:
    """Drop the adapter."""
    if model.virtual is model.prompt_encoder[name]:
        activate(model, None)
    del model.prompt_encoder[name]
    if not model.prompt_encoder:
        del model.prompt_encoder


@torch.no_grad()
def drop_encoder(model: Any, name: str) -> None:
    """Let an adapter's prompt_embeddings take the place of the encoder that computed them; nothing else changes.

    What is saved is then as small as PEFT's file. Training would go on with prompt_embeddings themselves.
    """
    virtual = model.prompt_encoder[name]
    if virtual.encoder is None:
        return
    trained = any(parameter.requires_grad for parameter in virtual.parameters())
    embeddings = saved(model, name)[EMBEDDINGS]
    virtual.encoder = None
    virtual.prompt_embeddings = nn.Parameter(embeddings.clone(), requires_grad=trained)
