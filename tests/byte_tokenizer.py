"""A tokenizer of bytes and a few merges with a chat template, made in memory."""

from __future__ import annotations

import tokenizers
from make_gguf import CHAT_TEMPLATE, byte_level_alphabet

from posttrain.model.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(bos: bool = False) -> Tokenizer:
    """Ids 0 to 2 are special, then 256 bytes, then "he", "ll", "hell". `bos` puts <|im_start|> before plain text."""
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *byte_level_alphabet(), "he", "ll", "hell"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("h", "e"), ("l", "l"), ("he", "ll")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    return Tokenizer(backend, special, CHAT_TEMPLATE)
