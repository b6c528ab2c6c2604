"""A Hugging Face tokenizer directory: tokenizer.json through `tokenizers`, special tokens, chat template.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json (older models), chat_template.jinja and
additional_chat_templates/ (newer ones). Ids are those of transformers' AutoTokenizer on the same directory, except that
special tokens written in text are recognised even where the configuration says `split_special_tokens`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from posttrain.model import chat_template
from posttrain.model.chat_template import Message, Span

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """bos_id, eos_id, pad_id: int or None. chat_template: Jinja source, several by their names, or None."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        """`special` maps bos_token, eos_token, pad_token and other names, which templates may use, to their text."""
        self.backend = backend
        self.special = special or {}
        self.chat_template = chat_template
        # tokenizer.json may carry the padding and truncation of whoever saved it; every text here is encoded whole.
        backend.no_padding()
        backend.no_truncation()
        self.bos_id, self.eos_id = self._special_id("bos_token"), self._special_id("eos_token")
        # Some name a padding token that is only about to be added: the model has no row for its id, so it pads nothing.
        pad = self.special.get("pad_token")
        self.pad_id: int | None = None if pad is None else backend.token_to_id(pad)
        _add_special(backend, self.special.values())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones too. With holes in the vocabulary, ids may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

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
        # The older file counts where the newer one does not list the added tokens; then it counts for more.
        named = config if "added_tokens_decoder" in config else config | _read_json(folder / "special_tokens_map.json")
        backend.add_tokens(_added_tokens(folder, config))
        tokenizer = cls(backend, _special_tokens(named), _chat_template(folder, config))
        _add_special(backend, _unnamed(named))
        return tokenizer

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
        return chat_template.render(self._template(variables), messages, add_generation_prompt, **self._variables(variables))

    def chat_with_mask(self, messages: Sequence[Message], **variables: Any) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and for each whether the assistant wrote it (what a completion loss is over).

        With {% generation %} in the template, that is what those blocks produce. Without, it is what each assistant
        message adds to the conversation before it with the generation prompt, which must be a prefix: otherwise (some
        templates rewrite earlier turns) a ValueError.
        """
        template = self._template(variables)
        text, spans = chat_template.render_with_spans(
            template, messages, **self._variables({"add_generation_prompt": False} | variables)
        )
        if not chat_template.has_generation_blocks(template):
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

    def _template(self, variables: dict[str, Any]) -> str:
        """The one called "tool_use" where there are tools to use, as in transformers; else the default."""
        if isinstance(self.chat_template, dict):
            name = "tool_use" if variables.get("tools") is not None and "tool_use" in self.chat_template else "default"
            if name not in self.chat_template:
                names = ", ".join(self.chat_template) or "none"
                raise ValueError(f'the chat templates are {names}; expected one called "default"')
            return self.chat_template[name]
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """{name: text}, of whatever is called some_token, and of extra_special_tokens with names. The order decides which ids
    those get that are new."""
    named = {name: config[name] for name in sorted(config, key=_order) if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    texts = {name: _text(value) for name, value in (named | (extra if isinstance(extra, dict) else {})).items()}
    return {name: text for name, text in texts.items() if text is not None}


def _order(name: str) -> int:
    return _NAMES.index(name) if name in _NAMES else len(_NAMES)


def _unnamed(config: dict[str, Any]) -> list[str]:
    tokens = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return [text for token in (tokens if isinstance(tokens, list) else []) if (text := _text(token)) is not None]


def _text(token: Any) -> str | None:
    # A token is written as its text, or as an object whose "content" is the text; null means there is none.
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None  # add_bos_token is a switch


def _switches(token: dict[str, Any]) -> bool:
    """Whether what an added token turns on or off is said by true or false."""
    return all(isinstance(token.get(key), bool | None) for key in ("single_word", "lstrip", "rstrip", "normalized", "special"))


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tokenizers.AddedToken]:
    """What the configuration adds to tokenizer.json, in the order of the ids: those that are new get the next free ones."""
    tokens = config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict) or not all(
        i.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str) and _switches(token)
        for i, token in tokens.items()
    ):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is {json.dumps(tokens)[:80]}; "
            'expected {"id": {"content": text, "special": true, ...}}'
        )
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return [tokenizers.AddedToken(**{k: tokens[i][k] for k in fields if k in tokens[i]}) for i in sorted(tokens, key=int)]


def _add_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Special tokens are never split, also those that are words of the vocabulary."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [text for text in dict.fromkeys(texts) if text not in known]
    backend.add_tokens([tokenizers.AddedToken(text, special=True) for text in new])


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (file := folder / "chat_template.jinja").is_file():
        files["default"] = file
    if files:
        texts = {name: _read_text(file) for name, file in files.items()}
        return texts["default"] if texts.keys() == {"default"} else texts
    found = config.get("chat_template")
    templates = found
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        templates = {entry.get("name"): entry.get("template") for entry in found}
    parts = [part for pair in templates.items() for part in pair] if isinstance(templates, dict) else [templates]
    if templates is not None and not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {json.dumps(found)[:80]}; expected text, or several as "
            '[{"name": text, "template": text}]'
        )
    return templates
