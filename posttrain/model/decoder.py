"""The Llama family's decoder: Llama 2/3, SmolLM2, Mistral, Qwen2/2.5 and Qwen3, by the configuration's flags.

Parameters carry Hugging Face's names. Shapes: B sequences, T tokens, D hidden_size, V vocab_size, S cached plus new
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attention
from .config import ModelConfig
from .few_rows import few_rows_linear
from .functional import rms_norm, swiglu
from .fused import FusedLinear
from .kv_cache import KVCache, Prefix, Recorder
from .rope import RotaryTable, apply_rope
from .segments import Segments

Mask = Tensor | Segments | None  # added to the scores; None: plain causal attention
Seen = KVCache | Prefix | Recorder  # what a layer writes keys and values to, and gets those that its queries see from


class Embedding(nn.Embedding):
    """nn.Embedding whose weight is left unset: `CausalLM` initializes every weight, or loading replaces it."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """The layers' outputs for one input, by one product where the layers know how (LoraLinear does)."""
    group = getattr(layers[0], "forward_group", None)
    ys = None if group is None else group(layers, x)
    return [layer(x) for layer in layers] if ys is None else ys


class Attention(nn.Module):
    """Causal attention: grouped key-value heads (GQA, arXiv:2305.13245), rotary positions, in Qwen3 q/k norms."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.fused: FusedLinear | None = None
        self._heads = config.num_attention_heads, config.num_key_value_heads

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Seen | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self._project(x, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        if isinstance(mask, Segments):
            y = mask.together(attention(mask.apart(q), mask.apart(k), mask.apart(v)))
        elif T == 1:
            return self.o_proj(_attend_one(q, k, v, mask, self.window))
        else:
            y = attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def _project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, heads, head_dim) and keys (B, T, kv heads, head_dim), rotated, and values like the keys."""
        B, T, _ = x.shape
        heads, kv_heads = self._heads
        fused = self.fused  # once: another thread may take it away
        if fused is not None:
            qkv = fused(x).view(B, T, heads + 2 * kv_heads, self.head_dim)
            if not self.qk_norm:
                q, k = apply_rope(qkv.narrow(2, 0, heads + kv_heads), *rope).split((heads, kv_heads), 2)
                return q, k, qkv.narrow(2, heads + kv_heads, kv_heads)
            q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
        else:
            q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
            q = q.view(B, T, heads, self.head_dim)
            k, v = k.view(B, T, kv_heads, self.head_dim), v.view(B, T, kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, *rope), apply_rope(k, *rope), v


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """Attention of one new token a row: q (B, heads, 1, head_dim), k, v (B, kv heads, S, head_dim) -> (B, 1, D').

    The query heads that share a key-value head become its rows, so keys are neither repeated nor masked for causality.
    """
    B, heads, _, head_dim = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    if mask is None and window is not None and S > window:
        k, v = k.narrow(2, S - window, window), v.narrow(2, S - window, window)
    y = F.scaled_dot_product_attention(q.reshape(B, kv_heads, heads // kv_heads, head_dim), k, v, attn_mask=mask)
    return y.reshape(B, 1, heads * head_dim)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.fused: FusedLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused  # once, as in Attention
        if fused is not None:
            return self.down_proj(swiglu(*fused(x).chunk(2, -1)))
        return self.down_proj(swiglu(*project(x, self.gate_proj, self.up_proj)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Seen | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What Hugging Face calls `model`: the embedding, the layers and the final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class VirtualTokens(Protocol):
    """What trains keys and values that every row sees before its own (posttrain/adapters/virtual_tokens.py)."""

    num_virtual_tokens: int

    def __call__(self, model: CausalLM, lengths: Sequence[int]) -> Prefix: ...


class CausalLM(nn.Module):
    """A decoder and its head.

    `activation_checkpointing`: each layer is computed again in the backward pass instead of kept.
    `virtual`: tokens that are seen before each row's first (in packed rows: before each segment's), at positions from 0
    on; the rows' own follow. No argument and no result counts them, nor does a cache's length.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.virtual: VirtualTokens | None = None
        self.fingerprint: str | None = None
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._windowed = any(window is not None for window in config.windows)
        self._rope = RotaryTable(config.rope, config.head_dim, config.max_position_embeddings)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal weights of `initializer_range` and zero biases, as the family is trained from scratch."""
        if self.model.norm.weight.is_meta:
            return  # about to be loaded; and random numbers on meta tensors import a compiler's 70 MB
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()

    @property
    def context_length(self) -> int:
        """The longest sequence the positions are made for, beside the virtual tokens."""
        return self.config.context_length - (self.virtual.num_virtual_tokens if self.virtual is not None else 0)

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | Segments | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        tree_mask: Tensor | None = None,
        states: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm, for input_ids int64 (B, T).

        position_ids int64 (B, T): counted from the cache's end unless given (over the tokens of attention_mask where it
        is).
        segment_ids int (B, T): packed sequences; a token sees those before it with its own id. Not together with a
        cache. Segments, of one row: sequences that may share their beginnings.
        attention_mask bool (B, T): False on left padding of these T tokens; the cache remembers it.
        cache: its tokens are seen by these, which are appended to it.
        tree_mask bool (T, T) or (B, T, T): which of these tokens each sees (itself among them), where they are no sequence but
        a tree of continuations; all see the cache. position_ids are then needed: a token's depth, after the cache's last.
        states: a dictionary whose keys are layers' numbers; it is given the hidden states (B, T, D) that enter them.
        """
        B, T = input_ids.shape
        if tree_mask is not None and (position_ids is None or segment_ids is not None):
            raise ValueError("a tree_mask goes with position_ids, and not with segment_ids")
        segments = None
        if isinstance(segment_ids, Segments):
            segments, segment_ids = segment_ids, None
            if position_ids is None or cache is not None:
                raise ValueError("Segments go with position_ids, and not with a cache")
            if self.virtual is not None or not all(map(segments.fits, self.config.windows)):
                tree_mask = segments.mask()
                segments = None
        seen = self._seen(B, T, position_ids, segment_ids, attention_mask, cache)
        past = 0 if seen is None else seen.filled
        valid = attention_mask
        if cache is not None:
            valid = None if cache.valid is None else cache.valid[:, : past + T]
        elif seen is not None and valid is not None:
            valid = F.pad(valid, (past, 0), value=True)
        x = self.model.embed_tokens(input_ids)
        if position_ids is not None and seen is not None:
            position_ids = position_ids + seen.virtual_tokens
        elif position_ids is None and valid is not None:
            position_ids = (valid.cumsum(1) - 1).clamp_(min=0)[:, past:]
        if position_ids is None:
            rope = self._rope.at(past, T, x.device, x.dtype)
        else:
            rope = self._rope.gather(position_ids, x.dtype)
        places = self._places(past, position_ids, valid, segment_ids, tree_mask) if self._windowed else None
        if segments is not None:
            masks: dict[int | None, Mask] = dict.fromkeys(self.config.windows, segments)
        else:
            masks = self._masks(past, T, valid, segment_ids, x, places, tree_mask, alone=seen is None)
        for i, (layer, window) in enumerate(zip(self.model.layers, self.config.windows, strict=True)):
            if states is not None and i in states:
                states[i] = x
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, masks[window], seen, use_reentrant=False)
            else:
                x = layer(x, rope, masks[window], seen)
        if cache is not None:
            cache.advance(T)
        return self.model.norm(x)

    def prefix(self, embeddings: Tensor, lengths: Sequence[int] = (0,)) -> Prefix:
        """Keys and values, in every layer, of P virtual tokens given by their embeddings (P, D); differentiable.

        Virtual tokens see only each other, so one row of them serves every row of a batch; but dynamic scaling goes by the
        length of the sequence that they begin. lengths: one for each row, or one for all, virtual tokens included.
        """
        x, recorder = embeddings.expand(len(lengths), -1, -1), Recorder()
        ropes = [self._rope.at(0, len(embeddings), x.device, x.dtype, length) for length in lengths]
        rope = torch.cat([cos for cos, _ in ropes]), torch.cat([sin for _, sin in ropes])
        masks = self._masks(0, len(embeddings), None, None, x)
        for layer, window in zip(self.model.layers, self.config.windows, strict=True):
            x = layer(x, rope, masks[window], recorder)
        return Prefix(recorder.layers)

    def _seen(
        self,
        B: int,
        T: int,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
    ) -> KVCache | Prefix | None:
        """What T new tokens of B rows see beside each other: the cache, with room for them, or the virtual tokens."""
        if cache is None:
            return self._virtual_prefix(T, position_ids, attention_mask)
        if segment_ids is not None:
            raise ValueError("segment_ids are for packed training batches; they cannot be used together with a cache")
        if cache.batch_size != B:
            raise ValueError(f"input_ids have {B} rows and the cache {cache.batch_size}")
        again = self.virtual is not None and not cache.length and self.config.rope.rope_type == "dynamic"
        if cache.virtual is not self.virtual or again:
            cache.begin(self.virtual, None if cache.length else self._virtual_prefix(T, position_ids, attention_mask))
        cache.reserve(T)
        cache.mark(T, attention_mask)
        return cache

    def _virtual_prefix(self, T: int, position_ids: Tensor | None, attention_mask: Tensor | None) -> Prefix | None:
        """The virtual tokens, where there are any, before rows of T tokens."""
        if self.virtual is None:
            return None
        if self.config.rope.rope_type != "dynamic":
            return self.virtual(self, (0,))
        lengths = [T]
        if position_ids is not None:
            lengths = (position_ids.amax(1) + 1).tolist()
        elif attention_mask is not None:
            lengths = attention_mask.sum(1).tolist()
        trained = self.config.max_position_embeddings  # up to here nothing is stretched
        lengths = [max(self.virtual.num_virtual_tokens + length, trained) for length in lengths]
        return self.virtual(self, lengths if len(set(lengths)) > 1 else lengths[:1])

    @staticmethod
    def _places(
        past: int, position_ids: Tensor | None, valid: Tensor | None, segment_ids: Tensor | None, tree_mask: Tensor | None
    ) -> Tensor | None:
        """Positions (B, S) where these are not the columns: holes, other segments or a tree's branches lie between."""
        if tree_mask is None and valid is not None:
            return valid.cumsum(1) - 1
        if (tree_mask is None and (segment_ids is None or past == 0)) or position_ids is None:
            return None
        before = torch.arange(past, device=position_ids.device) if valid is None else valid[:, :past].cumsum(1) - 1
        return torch.cat((before.expand(len(position_ids), past), position_ids), 1)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        if self.config.tie_word_embeddings:
            return few_rows_linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V). Arguments as in `hidden`."""
        return self.head(self.hidden(input_ids, position_ids, segment_ids, attention_mask, cache))

    def _masks(
        self,
        past: int,
        T: int,
        valid: Tensor | None,
        segment_ids: Tensor | None,
        x: Tensor,
        places: Tensor | None = None,
        tree_mask: Tensor | None = None,
        alone: bool = False,
    ) -> dict[int | None, Mask]:
        """For each window in use, what is added to the scores (B or 1, 1, T, S); None: plain causal attention. Segments where the
        tokens are `alone`, with neither a cache nor virtual tokens before them, and one packed row."""
        masks: dict[int | None, Mask] = {}
        S = past + T
        for window in set(self.config.windows):
            whole = window is None or S <= window
            if valid is None and segment_ids is None and tree_mask is None and (T == 1 or (past == 0 and whole)):
                masks[window] = None
                continue
            if alone and T > 1 and segment_ids is not None and valid is None and (packed := Segments.of(segment_ids, window)):
                masks[window] = packed
                continue
            rows = torch.arange(past, S, device=x.device)[:, None]
            columns = torch.arange(S, device=x.device)
            if tree_mask is None:
                allowed = (columns <= rows)[None]
            else:
                allowed = F.pad(tree_mask if tree_mask.dim() == 3 else tree_mask[None], (past, 0), value=True)
            if not whole:
                last = rows if places is None else places[:, past:, None]
                allowed = allowed & ((columns if places is None else places[:, None, :]) > last - window)  # type: ignore[operator]
            if segment_ids is not None:
                allowed = allowed & F.pad(segment_ids[:, :, None] == segment_ids[:, None, :], (past, 0), value=True)
            if valid is not None:
                # Padding sees itself, so that no row is empty: a softmax over nothing is NaN.
                allowed = (allowed & valid[:, None, :]) | (columns == rows)
            masks[window] = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill_(~allowed, -torch.inf)[:, None]
        return masks
