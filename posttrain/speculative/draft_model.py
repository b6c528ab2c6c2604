"""Drafts by a smaller model: it goes on from the text by itself, a token at a time (Leviathan et al., arXiv:2211.17192).

Its cache keeps what turned out right. What it has not seen, the tokens that the target put in the place of refused ones (and, after
a fully accepted draft, its own last token), it is shown together when it is asked next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.model.config import ModelConfig
from posttrain.model.decoder import CausalLM
from posttrain.model.fused import fused_projections
from posttrain.model.kv_cache import KVCache

from .interface import Proposal, Requests
from .vocabulary import VocabularyMap


class DraftModel:
    """draft: the smaller model; target: whose tokens it drafts. vocabulary: how their ids correspond, None where they are the same
    (posttrain.speculative.vocabulary.match says so).

    ValueError where the vocabularies' sizes differ and nothing says how.
    """

    features: tuple[int, ...] = ()

    def __init__(self, draft: CausalLM, target: CausalLM, vocabulary: VocabularyMap | None = None):
        sizes = draft.config.vocab_size, target.config.vocab_size
        if vocabulary is None and sizes[0] != sizes[1]:
            raise ValueError(
                f"the draft's vocabulary has {sizes[0]} tokens and the target's {sizes[1]}; give vocabulary=match(...) of the two "
                "tokenizers (posttrain.speculative.vocabulary), or a draft with the target's tokenizer"
            )
        self.draft, self.vocabulary = draft.eval(), vocabulary
        self.prompt_cost = _work(draft.config) / _work(target.config)
        self.begin(0)

    def begin(self, count: int) -> None:
        self._cache: KVCache | None = None
        self._read = [0] * count  # of the request's tokens, those that `_text` has
        self._text: list[list[int]] = [[] for _ in range(count)]  # in the draft's ids
        self._held = [0] * count  # of `_text`, those in the cache ..
        self._drafted: list[list[int]] = [[] for _ in range(count)]  # .. and behind them these, of which some may come true

    def propose(self, requests: Requests, limit: int) -> Proposal:
        self._take_in(requests.tokens)
        context = self.draft.context_length
        caps = [max(0, min(cap, limit, context - len(text))) for cap, text in zip(requests.cap, self._text, strict=True)]
        N = max(caps)
        num = torch.tensor(caps, device=requests.device)
        if N == 0:
            return Proposal(num.new_empty(len(caps), 0), num)
        with fused_projections(self.draft):
            hidden = self._catch_up(requests.device)
            tokens, logits = [], []
            for i in range(N):
                row = self.draft.head(hidden[:, -1])
                logits.append(row if self.vocabulary is None else self.vocabulary.to_target(row))
                tokens.append(requests.draw(logits[-1], i))
                if i + 1 < N:
                    ids = tokens[-1] if self.vocabulary is None else self.vocabulary.shared_to_draft(tokens[-1])
                    hidden = self.draft.hidden(ids[:, None], cache=self._cache)
        drafted = torch.stack(tokens, 1)
        self._drafted = [row[: N - 1] for row in drafted.tolist()]
        beyond = torch.arange(N, device=num.device) >= num[:, None]
        return Proposal(drafted.masked_fill(beyond, -1), num, torch.stack(logits, 1))

    def _take_in(self, tokens: Sequence[list[int]]) -> None:
        """Read the requests' new tokens; of what was drafted, keep in the cache what came true. The last is always left to show."""
        kept = []
        for row, text in enumerate(tokens):
            new, drafted = text[self._read[row] :], self._drafted[row]
            right = 0
            while right < min(len(new) - 1, len(drafted)) and new[right] == drafted[right]:
                right += 1
            kept.append(right)
            self._held[row] += right
            self._read[row] = len(text)
            self._text[row] += new if self.vocabulary is None else self.vocabulary.to_draft(new)
        if self._cache is None:
            return
        fed, longest = max(map(len, self._drafted)), max(kept)
        before = self._cache.length - fed
        self._drafted = [[] for _ in tokens]
        if min(kept) == longest:
            self._cache.length = before + longest
        else:
            steps = torch.arange(longest)
            mine = torch.tensor([[step < count for step in range(longest)] for count in kept])
            self._cache.keep(before, torch.where(mine, steps, -1).to(self.draft.model.norm.weight.device))
        if self._cache.length > max(self._held) * 5 // 4 + 16:
            self._cache.compact()

    def _catch_up(self, device: torch.device) -> Tensor:
        """The hidden states of what the draft has not seen, (B, T, D), the last of each row at the end."""
        pending = [text[held:] for text, held in zip(self._text, self._held, strict=True)]
        longest = max(map(len, pending))
        if self._cache is None:
            dtype = self.draft.model.embed_tokens.weight.dtype
            self._cache = KVCache(self.draft.config, len(pending), longest + 64, dtype, device)
        input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in pending], device=device)
        lengths = torch.tensor([len(ids) for ids in pending], device=device)
        mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
        self._held = [len(text) for text in self._text]
        return self.draft.hidden(input_ids, attention_mask=None if bool(mask.all()) else mask, cache=self._cache)

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        kept = rows.tolist()
        for name in ("_read", "_text", "_held", "_drafted"):
            state = getattr(self, name)
            setattr(self, name, [state[i] for i in kept])
        if self._cache is not None:
            self._cache.select(rows)


def _work(config: ModelConfig) -> int:
    """Multiplications of a token in the layers: what the prompts' pass consists of."""
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return config.num_hidden_layers * config.hidden_size * (heads + 3 * config.intermediate_size)
