"""EAGLE's head: one decoder layer that goes on with the target's features (Li et al., arXiv:2401.15077; EAGLE-3, arXiv:2503.01840).

EAGLE-1: the feature f_t is the target's hidden state after its final norm, of which its head predicts token t + 1.
    x_t = fc [e_{t+1}; f_t]    f'_{t+1} = layer(x)_t without its input norm    logits = head f'_{t+1}, which predicts token t + 2
    loss = SmoothL1(f'_{t+1}, f_{t+1}) (mean over D) + 0.1 CE(softmax(head f_{t+1}), softmax(head f'_{t+1}))
    f is divided by `scale`, each dimension's root mean square over the training text: a model whose last norm multiplies by
    hundreds (SmolLM2's) would otherwise have a loss of 10^4, all of it features
EAGLE-3: g_t = fc of what enters three layers of the target, side by side
    x_t = [norm e_{t+1}; norm g_t]    a_t = g_t + attention(x)_t    b_t = a_t + mlp(norm a_t)    logits = head (norm b_t)
    loss = CE alone; b_t takes g_{t+1}'s place in the next step

e are the target's embeddings; they and its head (its rows of a draft vocabulary, posttrain/speculative/heads.py) stay frozen.

Drafting on, the layer reads its own outputs in the place of features. `unroll` steps of that are part of training (EAGLE-3's
training-time test; of EAGLE-1, HASS, arXiv:2408.15766): step s at place t stands for position t + s, sees the true features up to t
and its own steps 1 .. s at t, and its loss weighs 0.8^s.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.model.config import ModelConfig
from posttrain.model.decoder import MLP, Attention, CausalLM, RMSNorm

from .draft_data import DraftBatch, Item, shifted
from .heads import head_rows, places, put_tensors, read_heads, save_heads
from .soft_targets import linear_kl

KIND, DECAY, CE_WEIGHT = "eagle", 0.8, 0.1
HORIZON = 2  # a position counts when the token it predicts has a label


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers whose inputs EAGLE-3 reads: 2, the middle one and the third from the end (moved inward in a shallow model)."""
    return min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)


def draft_config(base: ModelConfig) -> ModelConfig:
    """The shape of the one layer and of its cache."""
    return replace(base, num_hidden_layers=1, layer_types=None, sliding_window=None)


class EagleHead(nn.Module):
    """version 1 or 3. draft_ids int64 (V',): what it may say; head (V', D): the target's rows for these; embeddings (V, D)."""

    head: Tensor
    embeddings: Tensor
    draft_ids: Tensor
    places: Tensor

    def __init__(self, base: CausalLM, draft_ids: Tensor, version: int = 1):
        super().__init__()
        if version not in (1, 3):
            raise ValueError(f"version is {version}; expected 1 (EAGLE-1, also with EAGLE-2's trees) or 3")
        config, head = draft_config(base.config), head_rows(base, draft_ids)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.version, self.config = version, config
        self.fc = nn.Linear(2 * D if version == 1 else 3 * D, D, bias=version == 1)
        self.attention, self.mlp = Attention(config, 0), MLP(config)
        self.scale = nn.Parameter(torch.ones(D), requires_grad=False) if version == 1 else None
        self.post_attention_norm = RMSNorm(D, eps)
        if version == 3:
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(self.attention, name)
                setattr(self.attention, name, nn.Linear(2 * D, old.out_features, bias=old.bias is not None))
            self.embedding_norm, self.feature_norm, self.norm = RMSNorm(D, eps), RMSNorm(D, eps), RMSNorm(D, eps)
        self.to(head.device)
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("embeddings", base.model.embed_tokens.weight.detach(), persistent=False)
        self.register_buffer("draft_ids", draft_ids.to(head.device), persistent=False)
        self.register_buffer("places", places(self.draft_ids, config.vocab_size), persistent=False)
        # the target's layers whose inputs are the features; None: its hidden state after the final norm is
        self.layers = feature_layers(base.config.num_hidden_layers) if version == 3 else None
        self.base_layers, self.rope = base.config.num_hidden_layers, base._rope

    @torch.no_grad()
    def initialize(self, base: CausalLM, seed: int) -> EagleHead:
        """Starting weights: the target's last layer where shapes are alike, `fc` passing features on, small random numbers else; of
        EAGLE-1 the layer's two output projections are 0."""
        generator = torch.Generator().manual_seed(seed)
        last: Any = base.model.layers[-1]
        std = base.config.initializer_range
        for name, parameter in self.named_parameters():
            if name == "scale":
                continue
            if name.endswith("bias") or "norm" in name:
                parameter.fill_(float("norm" in name and not name.endswith("bias")))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        D = self.fc.out_features
        self.fc.weight[:, -D:] += torch.eye(D, device=self.fc.weight.device)
        for ours, theirs in ((self.attention, last.self_attn), (self.mlp, last.mlp)):
            weights = dict(theirs.named_parameters())
            for name, parameter in ours.named_parameters():
                if name in weights and weights[name].shape == parameter.shape:
                    parameter.copy_(weights[name])
        self.post_attention_norm.weight.copy_(last.post_attention_layernorm.weight)
        if self.version == 3:
            self.norm.weight.copy_(base.model.norm.weight)
        else:  # the layer adds nothing yet: what it added in the target was in the residual stream's units, not the features'
            self.attention.o_proj.weight.zero_()
            self.mlp.down_proj.weight.zero_()
        return self

    def start(self, features: Tensor) -> Tensor:
        """What the first step goes on from (B, T, D), of the target's features (B, T, F)."""
        return self.fc(features) if self.scale is None else features / self.scale

    def step(
        self, state: Tensor, tokens: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, seen: Any
    ) -> tuple[Tensor, Tensor]:
        """(what the next step goes on from, hidden states for the head) (B, T, D) each.

        state (B, T, D): of `start` or the step before. tokens int64 (B, T): those after each state's. rope, mask and seen as the
        decoder's layers have them.
        """
        embedded = F.embedding(tokens, self.embeddings).to(state.dtype)
        if self.version == 1:
            residual = x = self.fc(torch.cat((embedded, state), -1))
        else:
            residual, x = state, torch.cat((self.embedding_norm(embedded), self.feature_norm(state)), -1)
        h = residual + self.attention(x, rope, mask, seen)
        h = h + self.mlp(self.post_attention_norm(h))
        return h, self.norm(h) if self.scale is None else h * self.scale

    def forward(self, features: Tensor, input_ids: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
        """`step`'s results for s = 0 .. steps - 1, from features (B, T, F) and the true tokens int64 (B, T) in what is drafted."""
        state, T = self.start(features), input_ids.shape[1]
        seen: Any = _Unrolled()
        causal = torch.full((T, T), -torch.inf, dtype=state.dtype, device=state.device).triu_(1)
        own = torch.full_like(causal, -torch.inf).fill_diagonal_(0.0)
        results = []
        for s in range(steps):
            mask = torch.cat((causal, *[own] * s), 1)[None, None] if s else None
            rope = self.rope.at(s, T, state.device, state.dtype)
            state, hidden = self.step(state, shifted(input_ids, 1 + s), rope, mask, seen)
            results.append((state, hidden))
        return results


class _Unrolled:
    """Keys and values of every step so far, one step's after another's; takes a cache's place in the layer."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._keys.append(keys)
        self._values.append(values)
        return torch.cat(self._keys, 2), torch.cat(self._values, 2)


def unrolled(head: EagleHead, batch: DraftBatch, steps: int, noise: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """`head.forward` in the features' dtype, its parameters being float32 masters. noise: half the width of what is added
    uniformly to the features, over their root mean square (EAGLE-1's augmentation)."""
    features = batch.features
    if noise:
        rms = features.float().square().mean().sqrt()
        features = features + ((torch.rand(features.shape, device=features.device) * 2 - 1) * (noise * rms)).to(features.dtype)
    cast = {name: parameter.to(features.dtype) for name, parameter in head.named_parameters()}
    return torch.func.functional_call(head, cast, (features, batch.input_ids, steps))


def loss_sum(
    head: EagleHead, batch: DraftBatch, unroll: int = 1, noise: float = 0.0
) -> tuple[Tensor, dict[str, tuple[Tensor, float]]]:
    """Sum over positions of sum_s 0.8^s loss_s, and the means of each step's KL and of EAGLE-1's feature loss to show.

    The cross-entropy with the target's distribution stands here less the target's entropy (KL): the same gradient, and 0 at best.
    Both distributions are over the draft vocabulary.
    """
    total = torch.zeros((), device=batch.hidden.device)
    shown: dict[str, tuple[Tensor, float]] = {}
    for s, (state, hidden) in enumerate(unrolled(head, batch, unroll, noise)):
        learned = batch.learned(HORIZON + s)
        wanted = shifted(batch.hidden, 1 + s)[learned]
        kl = linear_kl(hidden[learned], head.head, wanted, head.head).sum()
        shown[f"kl_{s + 1}"] = kl, int(learned.sum())
        if head.scale is not None:
            features = wanted.float() / head.scale
            feature = F.smooth_l1_loss(state[learned].float(), features, reduction="none").mean(-1).sum()
            if s == 0:
                shown["feature_loss"] = feature, int(learned.sum())
            kl = feature + CE_WEIGHT * kl
        total = total + DECAY**s * kl
    return total, shown


@torch.no_grad()
def set_scale(head: EagleHead, items: Sequence[Item]) -> None:
    """EAGLE-1's: the root mean square of each dimension of the items' features."""
    if head.scale is not None:
        squares = sum((item.features.float().square().sum(0) for item in items), torch.zeros_like(head.scale))
        head.scale.copy_((squares / sum(len(item.features) for item in items)).sqrt().clamp_min(torch.finfo(torch.float32).tiny))


@torch.no_grad()
def accuracy(head: EagleHead, batches: list[DraftBatch], steps: int, ranks: int = 10) -> list[list[float]]:
    """[s][r]: the share of labelled tokens that step s has at rank r when all tokens drafted before were right."""
    hits, count = torch.zeros(steps, ranks), torch.zeros(steps)
    for batch in batches:
        for s, (_, hidden) in enumerate(unrolled(head, batch, steps)):
            learned = batch.learned(HORIZON + s)
            labels = head.places[shifted(batch.labels, HORIZON + s)[learned]]
            top = (hidden[learned] @ head.head.t()).topk(min(ranks, len(head.head)), dim=-1).indices
            hits[s, : top.shape[1]] += (top == labels[:, None]).sum(0).cpu()
            count[s] += len(labels)
    return (hits / count.clamp_min(1)[:, None]).tolist()


def save_eagle(path: str | os.PathLike, head: EagleHead, base: CausalLM, measured: dict[str, Any]) -> None:
    """Write the head's folder; `measured`: what goes into its config.json besides."""
    save_heads(path, KIND, head, head.draft_ids, {"version": head.version, **measured}, base)


def load_eagle(path: str | os.PathLike, base: CausalLM, any_base: bool = False) -> tuple[EagleHead, dict[str, Any]]:
    """(head in the base's dtype, config). PosttrainError for another kind of folder, or a head of another base."""
    config, tensors = read_heads(path, KIND, base, any_base)
    try:
        head = EagleHead(base, tensors["draft_ids"].long(), config["version"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise PosttrainError(f"{path} is damaged ({error!r}); train the head again") from error
    put_tensors(head, tensors, path)
    return head.to(base.model.embed_tokens.weight.dtype).requires_grad_(False).eval(), config
