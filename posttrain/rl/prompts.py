"""Prompts to practise on: JSON Lines with a prompt, as text or messages, and whatever its reward needs to know (an answer)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data import messages_in, read_jsonl, template_variables, text_in
from posttrain.errors import PosttrainError

KINDS = '"prompt" (text or messages), and the columns that the reward reads, such as "answer"'


@dataclass(frozen=True)
class Prompt:
    """ids: what the model continues. text: the column "prompt" as it was. columns: the others."""

    ids: list[int]
    text: Any
    columns: dict[str, Any]


def load_prompts(path: str | os.PathLike, tokenizer: Any, max_length: int | None = None) -> list[Prompt]:
    """The prompts of a JSON Lines file; all rows have the same columns. PosttrainError with file and line, also for one of
    more than max_length tokens."""
    prompts: list[Prompt] = []
    for number, row in read_jsonl(path, KINDS):
        try:
            prompts.append(encode_prompt(row, tokenizer))
            if max_length is not None and len(prompts[-1].ids) > max_length:
                raise ValueError(f"the prompt has {len(prompts[-1].ids)} tokens, and at most {max_length} fit; shorten it")
            if prompts[-1].columns.keys() != prompts[0].columns.keys():
                first = ", ".join(("prompt", *prompts[0].columns))
                raise ValueError(f"the columns are {', '.join(row)}; the first row has {first}")
        except ValueError as error:
            raise PosttrainError(f"{path}:{number}: {error}") from error
    if not prompts:
        raise PosttrainError(f"{path} holds no prompts; expected one JSON object a line with {KINDS}")
    return prompts


def encode_prompt(row: dict[str, Any], tokenizer: Any) -> Prompt:
    """One row, through a posttrain.model.Tokenizer. ValueError where the prompt is missing, empty or of another type."""
    given = row.get("prompt")
    columns = {name: value for name, value in row.items() if name not in ("prompt", "tools", "chat_template_kwargs")}
    if isinstance(given, list):
        text = tokenizer.chat_text(messages_in(row, "prompt"), add_generation_prompt=True, **template_variables(row))
        return Prompt(tokenizer.encode(text), given, columns)
    ids = tokenizer.encode(text_in(row, "prompt"), add_special_tokens=True)
    if not ids:
        raise ValueError('"prompt" makes no token; expected text')
    return Prompt(ids, given, columns)


def digest(prompts: Sequence[Prompt]) -> str:
    """A fingerprint of the data: sha256 over everything in order, 16 hexadecimal digits."""
    content = hashlib.sha256()
    for prompt in prompts:
        content.update(repr((prompt.ids, prompt.text, sorted(prompt.columns.items(), key=lambda item: item[0]))).encode())
    return content.hexdigest()[:16]
