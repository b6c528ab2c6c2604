"""Which tokens end a text."""

from __future__ import annotations

import os
from pathlib import Path

from .checkpoint import read_json
from .config import ModelConfig, end_ids
from .tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"


def stop_ids(tokenizer: Tokenizer, config: ModelConfig, folder: str | os.PathLike | None = None) -> tuple[int, ...]:
    """The tokenizer's end of sequence, and the model's: generation_config.json's eos_token_id where its folder is given and that
    file says one, else config.json's. A model's turn may end in another token than its tokenizer's (Llama 3.1's <|eom_id|>).

    ValueError where that is neither a token id nor a list of them.
    """
    ids = end_ids(config.eos_token_id)
    if folder is not None and (file := Path(folder) / GENERATION_CONFIG).is_file():
        given = read_json(file)
        ids = end_ids(given["eos_token_id"], str(file)) if "eos_token_id" in given else ids
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return tuple(dict.fromkeys(own + ids))
