"""P-tuning: virtual tokens' embeddings that a small network computes (Liu et al., arXiv:2103.10385, section 3).

    h = MLP(e)                              MLP:  D -> H, ReLU, H -> H, ReLU, H -> D
    h_i = MLP([LSTM->(e)_i : LSTM<-(e)_i])  LSTM: bidirectional, num_layers deep, H each way; 2H -> 2H, ReLU, 2H -> D

e (P, D) and the network train; h (P, D) goes before the tokens, as prompt tuning's vectors do. Names, shapes and values
are those of PEFT's PromptEncoder. PEFT saves h alone, from which no training can go on; here the file holds the encoder
too (virtual_tokens.py), and `drop_encoder` leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

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
    parameters,
    place,
    remove,
    saved,
    source_of,
)

__all__ = [
    "PromptEncoderConfig", "activate", "insert", "optional_shapes", "parameters", "remove", "resolve", "saved", "shapes",
]  # fmt: skip


@dataclass(frozen=True)
class PromptEncoderConfig(VirtualTokensConfig):
    """PEFT's fields. encoder_hidden_size: H above, by default D. encoder_num_layers and encoder_dropout (between the
    layers, while training) are the LSTM's."""

    PEFT_TYPE: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_positive(encoder_hidden_size=self.encoder_hidden_size, encoder_num_layers=self.encoder_num_layers)
        if self.encoder_reparameterization_type not in ("MLP", "LSTM"):
            raise ValueError(
                f"encoder_reparameterization_type is {self.encoder_reparameterization_type!r}; expected 'MLP' or 'LSTM'"
            )
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise ValueError(f"encoder_dropout is {self.encoder_dropout}; expected 0 <= encoder_dropout < 1")


class PromptEncoder(nn.Module):
    """e, the LSTM where there is one, and the MLP; called it gives h (P, D)."""

    def __init__(self, count: int, D: int, config: PromptEncoderConfig):
        super().__init__()
        H = config.encoder_hidden_size or D
        self.embedding = nn.Embedding(count, D)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type == "LSTM":
            dropout = config.encoder_dropout if config.encoder_num_layers > 1 else 0.0
            self.lstm_head = nn.LSTM(D, H, config.encoder_num_layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * H, 2 * H), nn.ReLU(), nn.Linear(2 * H, D))
        else:
            self.mlp_head = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D))

    def forward(self) -> Tensor:
        x = self.embedding.weight
        return self.mlp_head(x if self.lstm_head is None else self.lstm_head(x[None])[0][0])


def resolve(model: nn.Module, config: PromptEncoderConfig) -> PromptEncoderConfig:
    """The config with the model's sizes."""
    shape = decoder_config(model)
    fitted = fit(model, config, shape.hidden_size, shape.num_attention_heads, " (hidden_size)")
    return replace(fitted, encoder_hidden_size=config.encoder_hidden_size or shape.hidden_size)


def shapes(model: nn.Module, config: PromptEncoderConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of what every file holds."""
    return {EMBEDDINGS: (config.num_virtual_tokens, decoder_config(model).hidden_size)}


def optional_shapes(model: nn.Module, config: PromptEncoderConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the encoder: what trains, and what a file holds besides unless PEFT wrote it."""
    D = decoder_config(model).hidden_size
    H = config.encoder_hidden_size or D
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (config.num_virtual_tokens, D)}
    layers = [(2 * H, 2 * H), (D, 2 * H)]
    if config.encoder_reparameterization_type == "MLP":
        layers = [(H, D), (H, H), (D, H)]
    else:
        for layer in range(config.encoder_num_layers):
            for way in ("", "_reverse"):
                found[f"lstm_head.weight_ih_l{layer}{way}"] = (4 * H, D if layer == 0 else 2 * H)
                found[f"lstm_head.weight_hh_l{layer}{way}"] = (4 * H, H)
                found[f"lstm_head.bias_ih_l{layer}{way}"] = found[f"lstm_head.bias_hh_l{layer}{way}"] = (4 * H,)
    for i, (rows, columns) in enumerate(layers):
        found[f"mlp_head.{2 * i}.weight"], found[f"mlp_head.{2 * i}.bias"] = (rows, columns), (rows,)
    return {f"{ENCODER}{key}": shape for key, shape in found.items()}


def insert(
    model: nn.Module, config: PromptEncoderConfig, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None
) -> list[str]:
    """Put the virtual tokens before the embedding's output."""
    encoder = PromptEncoder(config.num_virtual_tokens, decoder_config(model).hidden_size, config)
    source = encoder if tensors is None else source_of(tensors, encoder)
    place(model, name, config, source, dtype if tensors is None else tensors[EMBEDDINGS].dtype)
    return ["model.embed_tokens"]
