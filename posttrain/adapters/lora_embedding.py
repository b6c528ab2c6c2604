"""A frozen embedding with low-rank updates by name (PEFT's lora_embedding_A and lora_embedding_B).

    y = E[i] + scaling B A[:, i]        E (V, D), A (r, V), B (D, r): row i of E + scaling (B A)^T

A starts at zero and B normal, so that the layer starts as it was. Where a head is tied to the embedding, it keeps E alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora_config import LoraConfig, check_rank


class LoraEmbedding(nn.Module):
    """A frozen nn.Embedding and its adapters by name, of which at most one acts."""

    TABLES = ("lora_embedding_A", "lora_embedding_B")
    FROZEN = ()

    def __init__(self, base_layer: nn.Embedding):
        super().__init__()
        self.base_layer = base_layer
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.active_adapter: str | None = None
        self.merged: nn.Embedding | None = None

    @property
    def weight(self) -> Tensor:
        """The base's, for a head that is tied to it."""
        return self.base_layer.weight

    def add(self, name: str, tensors: Mapping[str, Tensor], scaling: float, dropout: float = 0.0) -> None:
        """Add an adapter: `tensors` by the names of TABLES. There is no dropout of ids, as in PEFT."""
        self.lora_embedding_A[name] = nn.Parameter(tensors["lora_embedding_A"])
        self.lora_embedding_B[name] = nn.Parameter(tensors["lora_embedding_B"])
        self.scaling[name] = scaling

    def drop(self, name: str) -> None:
        """Take an adapter away."""
        del self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's tensors by the names of TABLES; empty where it has none here."""
        if name not in self.scaling:
            return {}
        return {"lora_embedding_A": self.lora_embedding_A[name], "lora_embedding_B": self.lora_embedding_B[name]}

    def merge_dense(self, name: str) -> nn.Embedding:
        """A plain embedding that computes what this one does with the adapter. ValueError if its weight is not finite."""
        weight = self.base_layer.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B = (tensor.detach().to(wide) for tensor in self.tensors(name).values())
        merged = torch.addmm(weight.to(wide), A.t(), B.t(), alpha=self.scaling[name]).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError("merging gives NaN or infinite weights; the adapter or the base is broken there")
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(ids)
        y, name = self.base_layer(ids), self.active_adapter
        if name is None:
            return y
        A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
        return y + (F.embedding(ids, A.t()) @ B.t() * self.scaling[name]).to(y.dtype)

    def extra_repr(self) -> str:
        return f"active_adapter={self.active_adapter!r}, merged={self.merged is not None}"


def initial(config: LoraConfig, name: str, base: nn.Embedding, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a new adapter by LoraEmbedding.TABLES. ValueError for a rank above the smaller dimension."""
    V, D, r = base.num_embeddings, base.embedding_dim, config.rank(name)
    check_rank(config, name, V, D)
    dtype, device = dtype or torch.promote_types(base.weight.dtype, torch.float32), base.weight.device
    start = torch.randn if config.init_lora_weights is False else torch.zeros
    A, B = start((r, V), dtype=dtype, device=device), torch.randn(D, r, dtype=dtype, device=device)
    return {"lora_embedding_A": A, "lora_embedding_B": B}
