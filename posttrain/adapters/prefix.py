"""Prefix tuning: in every layer P keys and values before the tokens' own train (Li and Liang, arXiv:2101.00190).

    h_i = P_theta[i, :]  for the prefix's i, else LM_phi(z_i, h_<i)            (section 4.2, eq. 3)
    P_theta[i, :] = MLP_theta(P'_theta[i, :])                                  (section 4.3; prefix_projection)

P_theta[i] is a key and a value of every layer, given as attention sees them: after rotation, in the shape that grouped
heads share (token_dim = kv heads * head_dim). The MLP, whose output layer is wide, steadies training; afterwards only its
output is needed (`drop_encoder` in virtual_tokens.py). Files are PEFT's (`prompt_embeddings`); of a prefix with the MLP
they hold the MLP besides, so that training goes on.

Where it starts (section 7.4: the activations of real words beat random ones by far):

    init_text      keys and values that the base computes for the text's tokens: the model starts as if it had read it.
                   With the MLP, its last layer is moved by the least that gives these (so encoder_hidden_size must be at
                   least num_virtual_tokens)
    init_weights   "sample_vocab": the same of words drawn from the vocabulary's most common, as SAMPLE_VOCAB of prompt.py
                   None: as PEFT draws them, N(0, 1) or PyTorch's initialisation of the MLP; "zero": zeros
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .virtual_tokens import (
    EMBEDDINGS,
    ENCODER,
    VirtualTokensConfig,
    activate,
    check_positive,
    decoder_config,
    fit,
    pack,
    parameters,
    place,
    remove,
    sampled_embeddings,
    saved,
    source_of,
    text_embeddings,
)

__all__ = [
    "PrefixTuningConfig", "activate", "insert", "optional_shapes", "parameters", "remove", "resolve", "saved", "shapes",
]  # fmt: skip


@dataclass(frozen=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """PEFT's fields, and two that are not: init_text, and in tokenizer_name_or_path the folder of its tokenizer.

    encoder_hidden_size: the MLP's, by default token_dim.
    """

    PEFT_TYPE: ClassVar[str] = "PREFIX_TUNING"
    OWN: ClassVar[tuple[str, ...]] = ("init_text", "tokenizer_name_or_path")

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None
    init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_positive(encoder_hidden_size=self.encoder_hidden_size)
        if self.init_weights not in (None, "zero", "sample_vocab"):
            raise ValueError(f"init_weights is {self.init_weights!r}; expected None, 'zero' or 'sample_vocab'")
        if self.init_text is not None and (self.init_weights is not None or self.tokenizer_name_or_path is None):
            raise ValueError("init_text needs tokenizer_name_or_path, the folder of its tokenizer, and excludes init_weights")


class PrefixEncoder(nn.Module):
    """P' (P, token_dim) and the MLP; called it gives P_theta (P, layers * 2 * token_dim)."""

    def __init__(self, count: int, token_dim: int, hidden: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(count, token_dim)
        self.transform = nn.Sequential(nn.Linear(token_dim, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * token_dim))

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)

    @torch.no_grad()
    def start_at(self, target: Tensor) -> None:
        """Move the last layer's weight by the least that makes the output `target` (P, layers * 2 * token_dim)."""
        last: Any = self.transform[-1]
        inner = self.transform[:-1](self.embedding.weight).double()
        difference = target.double() - self().double()
        last.weight += (torch.linalg.pinv(inner) @ difference).T.to(last.weight.dtype)


def _token_dim(model: nn.Module) -> int:
    shape = decoder_config(model)
    return shape.num_key_value_heads * shape.head_dim


def resolve(model: nn.Module, config: PrefixTuningConfig) -> PrefixTuningConfig:
    """The config with the model's sizes."""
    shape, token_dim = decoder_config(model), _token_dim(model)
    what = f" ({shape.num_key_value_heads} key-value heads of {shape.head_dim})"
    fitted = fit(model, config, token_dim, shape.num_key_value_heads, what)
    hidden = config.encoder_hidden_size or token_dim
    of_words = config.init_text is not None or config.init_weights == "sample_vocab"
    if config.prefix_projection and of_words and hidden < config.num_virtual_tokens:
        raise ValueError(
            f"encoder_hidden_size is {hidden}: an MLP so narrow cannot start {config.num_virtual_tokens} virtual tokens from "
            "words; it takes as many as there are tokens"
        )
    return replace(fitted, encoder_hidden_size=hidden)


def shapes(model: nn.Module, config: PrefixTuningConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of what every file holds."""
    return {EMBEDDINGS: (config.num_virtual_tokens, decoder_config(model).num_hidden_layers * 2 * _token_dim(model))}


def optional_shapes(model: nn.Module, config: PrefixTuningConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the MLP, if any: what trains then, and what a file holds besides unless PEFT wrote it."""
    if not config.prefix_projection:
        return {}
    dim = _token_dim(model)
    hidden, wide = config.encoder_hidden_size or dim, decoder_config(model).num_hidden_layers * 2 * dim
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (config.num_virtual_tokens, dim)}
    found |= {"transform.0.weight": (hidden, dim), "transform.0.bias": (hidden,)}
    found |= {"transform.2.weight": (wide, hidden), "transform.2.bias": (wide,)}
    return {f"{ENCODER}{key}": shape for key, shape in found.items()}


@torch.no_grad()
def initial(model: Any, config: PrefixTuningConfig) -> Tensor | PrefixEncoder:
    """prompt_embeddings (P, layers * 2 * token_dim) to start from, or the encoder that gives them."""
    count, (_, width) = config.num_virtual_tokens, shapes(model, config)[EMBEDDINGS]
    start = None
    if config.init_text is not None:
        assert config.tokenizer_name_or_path is not None
        start = pack(model.prefix(text_embeddings(model, config.init_text, config.tokenizer_name_or_path, count)))
    elif config.init_weights == "sample_vocab":
        start = pack(model.prefix(sampled_embeddings(model, count)))
    elif config.init_weights == "zero":
        start = torch.zeros(count, width)
    if not config.prefix_projection:
        return torch.randn(count, width) if start is None else start
    encoder = _encoder(model, config)
    if config.init_weights == "zero":
        nn.init.zeros_(encoder.transform[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(encoder.transform[-1].bias)  # type: ignore[arg-type]
    elif start is not None:
        encoder.to(start.device).start_at(start)
    return encoder


def _encoder(model: nn.Module, config: PrefixTuningConfig) -> PrefixEncoder:
    dim = _token_dim(model)
    layers = decoder_config(model).num_hidden_layers
    return PrefixEncoder(config.num_virtual_tokens, dim, config.encoder_hidden_size or dim, layers)


def insert(
    model: nn.Module, config: PrefixTuningConfig, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None
) -> list[str]:
    """Put the keys and values before those of every layer's tokens."""
    source: Tensor | nn.Module
    if tensors is None:
        source = initial(model, config)
    else:
        source = source_of(tensors, _encoder(model, config) if config.prefix_projection else None)
        dtype = tensors[EMBEDDINGS].dtype
    place(model, name, config, source, dtype, decoder_config(model).num_key_value_heads)
    return [f"model.layers.{layer}.self_attn" for layer in range(decoder_config(model).num_hidden_layers)]
