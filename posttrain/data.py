"""Training data: JSON Lines with TRL's columns, to token ids with labels on the completion alone.

One row is one of

    {"prompt": "...", "completion": "..."}                      plain text
    {"prompt": [messages], "completion": [messages]}            conversation, through the model's chat template
    {"messages": [{"role": "user", "content": "..."}, ...]}     loss on what the assistant says
    {"text": "..."}                                             loss on every token

Other columns are passed over, but for two that go to the chat template: "tools" (a list of objects, or JSON text of one)
and "chat_template_kwargs" (an object of further variables, such as enable_thinking). A completion or text in plain form ends
with one end-of-sequence token, written out or added. Nothing is dropped: a row that cannot be used is an error with its file
and line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PosttrainError

IGNORE_INDEX = -100
# Names that mean something to those who call the template, or have a column.
_TAKEN = {"self", "messages", "add_generation_prompt", "tools", "template", "chat_template", "generation_mark"}
KINDS = '"prompt" and "completion", or "messages", or "text"'


@dataclass(frozen=True)
class Example:
    """One sequence: token ids, and for each the id to learn there or -100 (labels[t] is input_ids[t], not shifted)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_labels(self) -> int:
        """Tokens that are learned: the first has nothing before it to be predicted from."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def read_jsonl(path: str | os.PathLike, kinds: str = KINDS) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank. PosttrainError names the line that is not a JSON object
    in UTF-8, or has a column twice; `kinds` says in it which columns are expected."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise PosttrainError(f"{path} {problem}; expected a JSON Lines file with {kinds} on every line")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_object)
            except UnicodeDecodeError as error:
                raise PosttrainError(f"{path}:{number}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise PosttrainError(f"{path}:{number}: not JSON: {error}; expected one object a line") from error
            if not isinstance(row, dict):
                raise PosttrainError(f"{path}:{number}: a JSON {type(row).__name__}; expected an object with {kinds}")
            yield number, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ. ValueError where one is there twice: which of its values was meant?"""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{json.dumps(next(name for name in row if names.count(name) > 1))} is there twice")
    return row


def load_dataset(
    path: str | os.PathLike, tokenizer: Any, max_length: int | None = None, truncation: str = "error"
) -> list[Example]:
    """The examples of a JSON Lines file. `max_length` and `truncation` as in `fit`. PosttrainError with file and
    line."""
    examples = []
    for number, row in read_jsonl(path):
        try:
            examples.append(fit(encode(row, tokenizer), max_length, truncation, tokenizer.bos_id))
        except ValueError as error:
            raise PosttrainError(f"{path}:{number}: {error}") from error
    if not examples:
        raise PosttrainError(f"{path} holds no examples; expected one JSON object a line with {KINDS}")
    return examples


def encode(row: dict[str, Any], tokenizer: Any) -> Example:
    """One row, through a posttrain.model.Tokenizer. ValueError where a column is missing, empty or of another type."""
    kinds = [k for k in ("prompt", "messages", "text") if k in row or (k == "prompt" and "completion" in row)]
    if len(kinds) != 1:
        raise ValueError(f"the columns are {', '.join(row) or 'none'}; expected {KINDS}")
    if kinds == ["text"]:
        ids = _ended(tokenizer.encode(text_in(row, "text"), add_special_tokens=True), tokenizer)
        example = Example(ids, list(ids))
    elif kinds == ["messages"]:
        ids, said = tokenizer.chat_with_mask(messages_in(row, "messages"), **template_variables(row))
        example = Example(ids, [i if mine else IGNORE_INDEX for i, mine in zip(ids, said, strict=True)])
    else:
        example = encode_completion(row, "completion", tokenizer)
    if not example.num_labels:
        raise ValueError("nothing to learn: no token of this row has a label (an assistant message or a completion is needed)")
    return example


def encode_completion(row: dict[str, Any], column: str, tokenizer: Any) -> Example:
    """The columns "prompt" and `column`, both text or both messages, with labels on the second. ValueError as `encode`."""
    if not isinstance(row.get("prompt"), list):
        return _join(tokenizer, text_in(row, "prompt"), text_in(row, column), special=True)
    variables = template_variables(row)
    prompt, completion = messages_in(row, "prompt"), messages_in(row, column)
    before = tokenizer.chat_text(prompt, add_generation_prompt=True, **variables)
    whole = tokenizer.chat_text(prompt + completion, add_generation_prompt=False, **variables)
    if not whole.startswith(before):
        raise ValueError(
            "the chat template writes the prompt differently once the completion follows, so where the completion "
            'begins cannot be told; use "messages", or plain text'
        )
    return _join(tokenizer, before, whole[len(before) :], special=False)


def _join(tokenizer, prompt: str, completion: str, special: bool) -> Example:
    """Tokens of prompt + completion, the prompt's being those it has on its own, as at inference.

    Where tokenizing both together would put a token across the seam, they are tokenized apart.
    """
    before = tokenizer.encode(prompt, add_special_tokens=special)
    both = tokenizer.encode(prompt + completion, add_special_tokens=special)
    after = both[len(before) :] if both[: len(before)] == before else tokenizer.encode(completion)
    after = _ended(after, tokenizer) if special else after
    return Example(before + after, [IGNORE_INDEX] * len(before) + after)


def _ended(ids: list[int], tokenizer) -> list[int]:
    """The ids with the end-of-sequence token last, once: the text may have it written out already."""
    return ids if tokenizer.eos_id is None or ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]


def text_in(row: dict[str, Any], column: str) -> str:
    """Text that is not empty, of a row's column. ValueError where there is none."""
    value = row.get(column)
    if not isinstance(value, str):
        found = "is missing" if column not in row else f"is a {type(value).__name__}"
        raise ValueError(f'"{column}" {found}; expected text')
    if not value:
        raise ValueError(f'"{column}" is empty; expected text')
    return value


def messages_in(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """The messages of a row's column, at least one. ValueError where it holds something else.

    Content is text, or a list of parts {"type": "text", "text": ...}; beside "tool_calls" it may be null or missing.
    """
    value = row.get(column)
    if not isinstance(value, list) or not value:
        found = "is missing" if column not in row else "is empty" if value == [] else f"is a {type(value).__name__}"
        raise ValueError(f'"{column}" {found}; expected a list of messages')
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'"{column}"[{i}] is not a message; expected {{"role": text, "content": text}}')
        if problem := _content_problem(message):
            raise ValueError(f'"{column}"[{i}] {problem}')
    return value


def _content_problem(message: dict[str, Any]) -> str | None:
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not _objects(calls):
        return f'has "tool_calls" {_short(calls)}; expected a list of objects'
    if isinstance(content, list):
        wrong = [part for part in content if not _is_text_part(part)]
        part = '{"type": "text", "text": text}; models here read text alone'
        return f"has the content part {_short(wrong[0])}; expected {part}" if wrong else None
    if isinstance(content, str) or (content is None and calls):
        return None
    return 'is not a message; expected {"role": text, "content": text}, or "tool_calls" for the content'


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def template_variables(row: dict[str, Any]) -> dict[str, Any]:
    """What a row gives its chat template besides messages: "tools", and what is in "chat_template_kwargs". ValueError where
    the one is no list of objects, or the other no object of names that are free."""
    tools = row.get("tools")
    if isinstance(tools, str):  # JSON text: tables have no column type for objects of differing keys
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'"tools" is text, but not JSON: {error}; expected a list of objects') from error
    if tools is not None and not _objects(tools):
        raise ValueError(f'"tools" is {_short(tools)}; expected a list of objects, one a tool')
    variables = row.get("chat_template_kwargs")
    if not isinstance(variables, dict | None):
        raise ValueError(f'"chat_template_kwargs" is {_short(variables)}; expected an object, such as {{"enable_thinking": false}}')
    if taken := _TAKEN & (variables or {}).keys():
        raise ValueError(f'"chat_template_kwargs" has "{min(taken)}", which is not for a row to say there; leave it out')
    return ({"tools": tools} if tools else {}) | (variables or {})


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def fit(example: Example, max_length: int | None, truncation: str = "error", bos_id: int | None = None) -> Example:
    """The example in at most `max_length` tokens. A labelled token is never cut, nor the last token before the first one, which
    it is predicted from: ValueError where that is not possible.

    truncation "error": ValueError for any longer example. "keep_end": the start of the prompt goes (a leading
    beginning-of-sequence token stays).
    """
    if truncation not in ("error", "keep_end"):
        raise ValueError(f"truncation is {truncation!r}; expected 'error' or 'keep_end'")
    length = len(example.input_ids)
    if max_length is None or length <= max_length:
        return example
    problem = f"{length} tokens, and at most {max_length} fit"
    if truncation == "error":
        raise ValueError(f"{problem}; shorten it, raise max_length, or cut prompts with truncation='keep_end'")
    head = 1 if example.input_ids[0] == bos_id and example.labels[0] == IGNORE_INDEX else 0
    start = length - max_length + head
    first = next((i for i, label in enumerate(example.labels) if label != IGNORE_INDEX), length)
    if first < start or (first == start and head == 0):
        raise ValueError(f"{problem}; cutting the prompt is not enough: completions are not cut, and one token stays before them")
    return Example(*(ids[:head] + ids[start:] for ids in (example.input_ids, example.labels)))


def max_tokens(examples: Sequence[Example]) -> int:
    """Length of the longest example, 0 without any."""
    return max((len(e.input_ids) for e in examples), default=0)
