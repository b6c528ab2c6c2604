"""A drafter by its name, out of what was trained for it or out of nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.model.decoder import CausalLM
from posttrain.model.loading import load
from posttrain.model.tokenizer import Tokenizer

from .draft_model import DraftModel
from .eagle import Eagle
from .eagle_head import load_eagle
from .interface import Drafter
from .lookahead import Lookahead
from .medusa import Medusa
from .medusa_heads import load_medusa
from .ngram import NgramDrafter
from .tree import search_tree
from .vocabulary import match

TRAINED = ("draft", "medusa", "eagle")
KINDS = (*TRAINED, "ngram", "lookahead")
# of a tree: 16 rows with the root, a matrix unit's tile. A pass over 17 rows takes a second one (bench_speculative.py prints v).
NODES = 15


def make_drafter(
    kind: str,
    target: CausalLM,
    tokenizer: Tokenizer,
    path: str | os.PathLike | None = None,
    *,
    quantize: str | None = None,
    any_base: bool = False,
) -> Drafter:
    """The drafter `kind` for a target and its tokenizer. path: the folder of a draft model (loaded in the target's dtype,
    or in 4 bits by `quantize`), of Medusa heads or an EAGLE head; any_base takes heads that were trained for another target.

    PosttrainError for an unknown kind, for a path that is missing or superfluous, and as the loaders say.
    """
    if kind not in KINDS:
        raise PosttrainError(f"the kind of draft is {kind!r}; expected one of {', '.join(KINDS)}")
    if (path is None) == (kind in TRAINED):
        raise PosttrainError(
            f"{kind} drafts need the folder of what was trained for them (posttrain speculative train-draft --kind {kind})"
            if path is None
            else f"{kind} drafts need nothing trained; {path} would not be used"
        )
    if path is None:
        return NgramDrafter() if kind == "ngram" else Lookahead()
    if kind == "draft":
        return _draft_model(target, tokenizer, path, quantize)
    loaders: dict[str, Callable] = {"medusa": load_medusa, "eagle": load_eagle}
    heads, measured = loaders[kind](path, target, any_base)
    if kind == "eagle":
        return Eagle(heads, total=NODES)
    return Medusa(heads, search_tree(measured["accuracy"], NODES)[0])


def _draft_model(target: CausalLM, tokenizer: Tokenizer, path: str | os.PathLike, quantize: str | None) -> DraftModel:
    weight = target.model.embed_tokens.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    draft = load(Path(path), dtype=dtype, quantize=quantize, device=str(weight.device))
    vocabulary = match(tokenizer, Tokenizer.load(path), target.config.vocab_size, draft.config.vocab_size)
    return DraftModel(draft, target, vocabulary)
