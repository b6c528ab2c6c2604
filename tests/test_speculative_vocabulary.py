"""Vocabularies that differ: the same bytes written in two ways, padding, what is refused, and greedy tokens all the same."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
from model_cases import random_model
from tokenizers import decoders, models, pre_tokenizers

from posttrain.errors import PosttrainError
from posttrain.model import generate
from posttrain.model.tokenizer import Tokenizer
from posttrain.speculative import engine
from posttrain.speculative.draft_model import DraftModel
from posttrain.speculative.vocabulary import match

WORDS = ["a", "b", "ab", " a", " ab", "\n", "é", "ba"]


def byte_level(words: list[str], special: tuple[str, ...] = ("<end>",)) -> Tokenizer:
    """A byte-level tokenizer of whole words, unmerged bytes among them."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = [letters.pre_tokenize_str(word)[0][0] for word in words]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*written, *alphabet]))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = letters, decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend)


def word_marker(words: list[str]) -> Tokenizer:
    """One whose spaces are word markers and whose bytes are spelled <0xNN>."""
    tokens = [word.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}") if word != "\n" else "<0x0A>" for word in words]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend)


def test_the_same_bytes_correspond_however_they_are_written():
    target, draft = byte_level(WORDS), word_marker(WORDS[::-1])
    found = match(target, draft, target.vocab_size, draft.vocab_size)
    pairs = dict(zip(found.target_ids.tolist(), found.draft_ids.tolist(), strict=True))
    assert pairs == {**{i: len(WORDS) - 1 - i for i in range(len(WORDS))}, target.vocab_size - 1: draft.vocab_size - 1}


def test_the_same_tokenizer_needs_nothing_and_padding_little():
    tokenizer = byte_level(WORDS)
    size = tokenizer.vocab_size
    assert match(tokenizer, tokenizer, size + 5, size + 5) is None
    padded = match(tokenizer, tokenizer, size + 3, size + 7)
    logits = torch.randn(2, size + 7)
    wide = padded.to_target(logits)
    assert torch.equal(wide[:, :size], logits[:, :size]) and (wide[:, size:] == -torch.inf).all() and wide.shape == (2, size + 3)


def test_what_shares_next_to_nothing_is_refused():
    draft = word_marker([f"word{i}" for i in range(40)])
    with pytest.raises(PosttrainError, match=r"share 1 of 41 tokens; expected a draft with the target's tokenizer"):
        match(byte_level(WORDS), draft, 300, 41)


def test_text_that_the_draft_cannot_say_is_shown_in_its_spelling():
    target, draft = byte_level([*WORDS, "abba"], ("<end>", "<other>")), byte_level(WORDS)
    found = match(target, draft, target.vocab_size, draft.vocab_size)
    abba, other = (target.backend.token_to_id(token) for token in ("abba", "<other>"))
    spelled = draft.encode("abba")
    assert len(spelled) > 1 and found.to_draft([abba, 1]) == [*spelled, 1] and len(found.to_draft([other])) == 1
    assert len(found.to_draft([target.vocab_size + 5])) == 1  # a row of the model's embedding that no token has


def test_a_token_after_holes_in_the_vocabulary_has_its_spelling():
    content = json.loads(byte_level([*WORDS, "abba"]).backend.to_str())
    content["model"]["vocab"]["abba"] = 900
    target, draft = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content))), byte_level(WORDS)
    assert match(target, draft, 901, draft.vocab_size).to_draft([900]) == draft.encode("abba")


def test_greedy_tokens_through_another_vocabulary():
    target, draft = byte_level([*WORDS, "abba", "bab"]), byte_level(WORDS[::-1])
    model = random_model("smollm2", vocab_size=target.vocab_size + 2)
    small = random_model("smollm2", vocab_size=draft.vocab_size, num_hidden_layers=1)
    drafter = DraftModel(small, model, match(target, draft, target.vocab_size + 2, draft.vocab_size))
    prompts = [target.encode("a ab\nba"), [target.vocab_size + 1, 4]]
    expected = generate(model, prompts, 24)
    assert engine.generate(model, prompts, 24, drafter, adaptive=False)[0] == expected
    sampled, report = engine.generate(model, prompts, 24, drafter, temperature=1.0, seed=0)
    assert report.drafted and max(map(max, sampled)) < target.vocab_size + 2
