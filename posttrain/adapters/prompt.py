"""Prompt tuning: P embeddings before the tokens train, and nothing else (Lester et al., arXiv:2104.08691, section 2).

    Pr(Y | [P; X])    P (num_virtual_tokens, hidden_size) trained, X the tokens' embeddings, the model frozen

Files are PEFT's, as are the names of its fields. Where they start (section 3.2 and figure 3b):

    SAMPLE_VOCAB   embeddings of tokens drawn from the vocabulary's 5,000 most common: its first 5,000 ids, as vocabularies
                   are ordered by frequency, each at most once. (PEFT draws from the whole vocabulary.)
    TEXT           the embeddings of a text's tokens, repeated or cut to the number of virtual tokens, as in PEFT
    RANDOM         normal, with the mean and deviation that each dimension has over the vocabulary: vectors as large as
                   those that the model knows. (The paper draws from [-0.5, 0.5], PEFT from N(0, 1), whatever the model.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .virtual_tokens import (
    EMBEDDINGS,
    VirtualTokensConfig,
    activate,
    decoder_config,
    fit,
    parameters,
    place,
    remove,
    sampled_embeddings,
    saved,
    source_of,
    text_embeddings,
)

__all__ = ["PromptTuningConfig", "activate", "insert", "parameters", "remove", "resolve", "saved", "shapes"]

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass(frozen=True)
class PromptTuningConfig(VirtualTokensConfig):
    """PEFT's fields. tokenizer_name_or_path: the folder of the tokenizer that cuts prompt_tuning_init_text (TEXT)."""

    PEFT_TYPE: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.prompt_tuning_init not in INITS:
            raise ValueError(f"prompt_tuning_init is {self.prompt_tuning_init!r}; expected one of {', '.join(INITS)}")
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if getattr(self, name) is None:
                    raise ValueError(f"prompt_tuning_init='TEXT' needs {name}, which is None")


def resolve(model: nn.Module, config: PromptTuningConfig) -> PromptTuningConfig:
    """The config with the model's sizes."""
    shape = decoder_config(model)
    return fit(model, config, shape.hidden_size, shape.num_attention_heads, " (hidden_size)")


def shapes(model: nn.Module, config: PromptTuningConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the adapter's tensors."""
    return {EMBEDDINGS: (config.num_virtual_tokens, decoder_config(model).hidden_size)}


def initial(model: Any, config: PromptTuningConfig) -> Tensor:
    """prompt_embeddings (P, hidden_size) to start from."""
    weight, count = model.model.embed_tokens.weight.detach(), config.num_virtual_tokens
    if config.prompt_tuning_init == "TEXT":
        assert config.prompt_tuning_init_text is not None and config.tokenizer_name_or_path is not None
        return text_embeddings(model, config.prompt_tuning_init_text, config.tokenizer_name_or_path, count)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return sampled_embeddings(model, count)
    wide = weight.float()
    noise = torch.randn(count, weight.shape[1]).to(weight.device)
    return wide.mean(0) + wide.std(0) * noise


def insert(
    model: nn.Module, config: PromptTuningConfig, name: str, dtype: torch.dtype | None, tensors: dict[str, Tensor] | None
) -> list[str]:
    """Put the virtual tokens before the embedding's output."""
    source = initial(model, config).clone() if tensors is None else source_of(tensors, None)
    place(model, name, config, source, dtype if tensors is None else tensors[EMBEDDINGS].dtype)
    return ["model.embed_tokens"]
