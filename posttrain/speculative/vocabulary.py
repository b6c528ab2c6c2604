"""A draft whose ids are not the target's: tokens of the same bytes correspond, the others are never drafted.

Byte-level vocabularies and those with word markers write the same bytes differently; both are read as bytes. The draft's
distribution is cut to the shared tokens before a token is drawn from it (Timor et al., arXiv:2502.05202, algorithm 4), which is
lossless as any draft is. Text that the draft cannot say in single tokens it is shown in its own spelling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.errors import PosttrainError
from posttrain.model.tokenizer import Tokenizer

_LEAST_SHARED = 0.1  # of the draft's vocabulary; two byte-pair encodings of like text share a third and more


class VocabularyMap:
    """target_ids, draft_ids int64 (n,): the shared tokens' ids, pairwise. target_size: of the target's logits."""

    def __init__(self, target_ids: Tensor, draft_ids: Tensor, target_size: int, target: Tokenizer, draft: Tokenizer):
        self.target_ids, self.draft_ids, self.target_size = target_ids, draft_ids, target_size
        self._tokenizers = target, draft
        self._spelling = {t: [d] for t, d in zip(target_ids.tolist(), draft_ids.tolist(), strict=True)}
        self._to_draft = torch.zeros(target_size, dtype=torch.int64).index_put_((target_ids,), draft_ids)

    def to_target(self, logits: Tensor) -> Tensor:
        """Draft logits (B, V') as the target's (B, V): -inf where nothing corresponds."""
        wide = logits.new_full((len(logits), self.target_size), -torch.inf)
        wide[:, self.target_ids.to(logits.device)] = logits[:, self.draft_ids.to(logits.device)]
        return wide

    def shared_to_draft(self, tokens: Tensor) -> Tensor:
        """Draft ids of the target's shared tokens (B,)."""
        return self._to_draft.to(tokens.device)[tokens]

    def to_draft(self, tokens: Sequence[int]) -> list[int]:
        """Draft ids of any of the target's tokens."""
        ids: list[int] = []
        for token in tokens:
            if token not in self._spelling:
                target, draft = self._tokenizers
                text = target.decode([token])
                # Special tokens and padding have no text: shown as whichever is shared.
                self._spelling[token] = draft.encode(text, add_special_tokens=False) or self.draft_ids[:1].tolist()
            ids += self._spelling[token]
        return ids


def match(target: Tokenizer, draft: Tokenizer, target_size: int, draft_size: int) -> VocabularyMap | None:
    """How the vocabularies correspond; None where ids and sizes are the same. Sizes are those of the models' logits, which padding
    may make larger than the tokenizers' vocabularies.

    PosttrainError where too little is shared for the draft to be worth anything.
    """
    ours = {i: token for i, token in _tokens(target).items() if i < target_size}
    theirs = {i: token for i, token in _tokens(draft).items() if i < draft_size}
    if ours == theirs and target_size == draft_size:
        return None
    ids: dict[bytes | str, int] = {}
    for i, token in sorted(theirs.items(), reverse=True):
        ids[token] = i
    shared = sorted((i, ids[token]) for i, token in ours.items() if token in ids)
    if len(shared) < _LEAST_SHARED * len(theirs):
        raise PosttrainError(
            f"the draft's tokenizer and the target's share {len(shared)} of {len(theirs)} tokens; expected a draft with the "
            "target's tokenizer, or one that is much alike"
        )
    target_ids, draft_ids = (torch.tensor(side) for side in zip(*shared, strict=True))
    return VocabularyMap(target_ids, draft_ids, target_size, target, draft)


def _tokens(tokenizer: Tokenizer) -> dict[int, bytes | str]:
    """{id: its bytes, or of a special token its name}."""
    backend = json.loads(tokenizer.backend.to_str())
    byte_level = "ByteLevel" in json.dumps([backend.get("decoder"), backend.get("pre_tokenizer")])
    special = {added["id"] for added in backend.get("added_tokens", [])}
    letters = _byte_letters()
    found: dict[int, bytes | str] = {}
    for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if i in special:
            found[i] = token
        elif byte_level:
            found[i] = bytes(letters[c] for c in token) if all(c in letters for c in token) else token
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[i] = bytes([int(token[3:5], 16)])
        else:
            found[i] = token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
    return found


def _byte_letters() -> dict[str, int]:
    """The letters of byte-level vocabularies and their bytes (GPT-2): printable ones stand for themselves, from 256 on others."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
