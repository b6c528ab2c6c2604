"""A Hugging Face tokenizer directory: tokenizer.json through `tokenizers`, special tokens, chat template.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json (older models) and chat_template.jinja (newer
ones). Ids are those of transformers' AutoTokenizer on the same directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from posttrain.model import chat_template
from posttrain.model.chat_template import Message, Span

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """bos_id, eos_id, pad_id: int or None. chat_template: Jinja source or None. vocab_size counts the tokens, added
    ones too; with holes in the vocabulary, ids may be larger."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special: dict[str, str] | None = None, chat_template: str | None = None
    ) -> None:
        """`special` maps bos_token, eos_token, pad_token, unk_token to their text."""
        self.backend = backend
        self.special = special or {}
        self.chat_template = chat_template
        # tokenizer.json may carry the padding and truncation of whoever saved it; every text here is encoded whole.
        backend.no_padding()
        backend.no_truncation()
        self.bos_id, self.eos_id, self.pad_id = (self._special_id(name) for name in _SPECIAL[:3])
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Raises FileNotFoundError without a tokenizer.json, ValueError where a file is not what it should be."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; expected a Hugging Face directory with a tokenizer.json "
                "(a tokenizer that has only tokenizer.model must be converted to one first)"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception, and for nothing but a bad file
            raise ValueError(f"{file} is not a tokenizer that `tokenizers` {tokenizers.__version__} can read: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(_read_json(folder / "special_tokens_map.json")) | _special_tokens(config)
        return cls(backend, special, _chat_template(folder, config))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids. Special tokens written in `text` are recognised; `add_special_tokens` adds e.g. a leading bos.
        ValueError for text with half of a surrogate pair."""
        return self._encode(text, add_special_tokens).ids

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            what = f"a {type(text).__name__}"
            if isinstance(text, str):  # bytes that were no UTF-8, or half of a pair of escapes in JSON
                what = f"text with {next(c for c in text if 0xD800 <= ord(c) < 0xE000)!r}, which is no character,"
            raise ValueError(f"{what} cannot be tokenized; expected text that UTF-8 can hold") from error

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD. Ids without a token have no text: a model may have more
        embedding rows than there are tokens, and an untrained one draws them. ValueError for a negative id."""
        if (lowest := min(ids, default=0)) < 0:
            raise ValueError(f"{lowest} is no token id; expected ids from 0 on")
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of `chat_text`. The template writes its own special tokens, so none are added."""
        return self.encode(self.chat_text(messages, add_generation_prompt, **variables))

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """`messages`, each {"role": ..., "content": ...}, as the chat template writes them; `variables` (tools,
        documents, enable_thinking, ...) go to the template. ValueError without a template, or where it refuses them."""
        return chat_template.render(self._template(), messages, add_generation_prompt, **self._variables(variables))

    def chat_with_mask(self, messages: Sequence[Message], **variables: Any) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and for each whether the assistant wrote it (what a completion loss is over).

        With {% generation %} in the template, that is what those blocks produce. Without, it is what each assistant
        message adds to the conversation before it with the generation prompt, which must be a prefix: otherwise (some
        templates rewrite earlier turns) a ValueError.
        """
        text, spans = chat_template.render_with_spans(
            self._template(), messages, **self._variables({"add_generation_prompt": False} | variables)
        )
        if not chat_template.has_generation_blocks(self._template()):
            spans = self._spans_by_prefix(text, messages, variables)
        encoding = self._encode(text, add_special_tokens=False)
        mask = [False] * len(encoding.ids)
        token = 0
        for start, end in spans:
            while token < len(mask) and encoding.offsets[token][0] < start:
                token += 1
            while token < len(mask) and encoding.offsets[token][0] < end:
                mask[token] = True
                token += 1
        return encoding.ids, mask

    def _spans_by_prefix(self, text: str, messages: Sequence[Message], variables: dict[str, Any]) -> list[Span]:
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.chat_text(messages[:i], True, **variables)
                after = self.chat_text(messages[: i + 1], False, **variables)
                if not (after.startswith(before) and text.startswith(after)):
                    raise ValueError(
                        f"the chat template writes message {i} differently once others follow, so what "
                        "the assistant wrote cannot be told; use a template with {% generation %} "
                        "blocks, or prompt/completion columns with one completion each"
                    )
                spans.append((len(before), len(after)))
        return spans

    def _template(self) -> str:
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template (neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json); use plain prompt/completion text, or an instruct model"
            )
        return self.chat_template

    def _variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self.special | {"tools": None, "documents": None} | variables

    def _special_id(self, name: str) -> int | None:
        token = self.special.get(name)
        if token is None:
            return None
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{name} is {token!r}, which is not in the vocabulary of tokenizer.json")
        return token_id


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    # A token is written as its text, or as an object whose "content" is the text; null means there is none.
    values = {name: config.get(name) for name in _SPECIAL}
    values = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name: the one called "default" is for chat
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
