"""Preference data: JSON Lines with TRL's columns, to token ids. Batches of them without padding between.

One row of preferences is one of

    {"prompt": "...", "chosen": "...", "rejected": "..."}       plain text, or lists of messages (a conversation)
    {"chosen": "...", "rejected": "..."}                        the prompt is what both begin with: their shared messages, or
                                                                the words before the first that differs
and may have "margin", a number, by how much the chosen one is better (reward models), and what posttrain.data passes on to
chat templates. Without pairs (KTO):

    {"prompt": "...", "completion": "...", "label": true}       label: is this completion desirable

Completions in plain form end with the tokenizer's end-of-sequence token. Nothing is dropped: a row that cannot be used, or
whose completion would be cut away, is an error with its file and line.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeVar

from posttrain.data import IGNORE_INDEX, Example, encode_completion, fit, messages_in, read_jsonl, text_in
from posttrain.errors import PosttrainError

PAIRS = '"prompt", "chosen" and "rejected", or "chosen" and "rejected" that begin alike'
LABELLED = '"prompt", "completion" and "label"'
TRUNCATION = "error", "keep_end", "keep_start"


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of two completions of it. margin: by how much `chosen` is better, where people said so."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float | None = None


@dataclass(frozen=True)
class Unpaired:
    """Token ids of a prompt and of one completion. label: whether it is desirable."""

    prompt: list[int]
    completion: list[int]
    label: bool


def load_preferences(
    path: str | os.PathLike, tokenizer: Any, max_length: int | None = None, truncation: str = "error"
) -> list[Pair]:
    """The pairs of a JSON Lines file. `max_length` and `truncation` as in `fit_pair`. PosttrainError with file and line."""

    def pair(row: dict[str, Any]) -> list[Pair]:
        return [fit_pair(encode_pair(row, tokenizer), max_length, truncation, tokenizer.bos_id)]

    return _load(path, PAIRS, pair)


def load_unpaired(
    path: str | os.PathLike, tokenizer: Any, max_length: int | None = None, truncation: str = "error"
) -> list[Unpaired]:
    """Labelled completions of a JSON Lines file; a pair counts as a desirable and an undesirable one. Otherwise as
    `load_preferences`."""

    def labelled(row: dict[str, Any]) -> list[Unpaired]:
        if "chosen" in row or "rejected" in row:
            return unpair([fit_pair(encode_pair(row, tokenizer), max_length, truncation, tokenizer.bos_id)])
        return [fit_unpaired(encode_unpaired(row, tokenizer), max_length, truncation, tokenizer.bos_id)]

    return _load(path, f"{LABELLED}, or {PAIRS}", labelled)


_Item = TypeVar("_Item", Pair, Unpaired)


def _load(path: str | os.PathLike, kinds: str, items_of: Callable[[dict[str, Any]], list[_Item]]) -> list[_Item]:
    items: list[_Item] = []
    for number, row in read_jsonl(path, kinds):
        try:
            items += items_of(row)
        except ValueError as error:
            raise PosttrainError(f"{path}:{number}: {error}") from error
    if not items:
        raise PosttrainError(f"{path} holds no preferences; expected one JSON object a line with {kinds}")
    return items


def unpair(pairs: Iterable[Pair]) -> list[Unpaired]:
    """Each pair as a desirable completion and an undesirable one."""
    return [Unpaired(p.prompt, ids, label) for p in pairs for ids, label in ((p.chosen, True), (p.rejected, False))]


def encode_pair(row: dict[str, Any], tokenizer: Any) -> Pair:
    """One row, through a posttrain.model.Tokenizer. ValueError where a column is missing, empty or of another type, and where
    chosen and rejected are the same."""
    _need(row, ("chosen", "rejected"), PAIRS)
    row = row if "prompt" in row else _with_prompt(row)
    prompt, chosen = _encode(row, "chosen", tokenizer)
    _, rejected = _encode(row, "rejected", tokenizer)
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)):
        raise ValueError(f'"margin" is {margin!r}; expected a finite number')
    return _different(Pair(prompt, chosen, rejected, None if margin is None else float(margin)))


def encode_unpaired(row: dict[str, Any], tokenizer: Any) -> Unpaired:
    """One row with a label. ValueError as `encode_pair`."""
    _need(row, ("prompt", "completion", "label"), LABELLED)
    if not isinstance(row["label"], bool):
        raise ValueError(f'"label" is {row["label"]!r}; expected true (desirable) or false')
    return Unpaired(*_encode(row, "completion", tokenizer), row["label"])


def _need(row: dict[str, Any], columns: Sequence[str], kinds: str) -> None:
    if missing := [column for column in columns if column not in row]:
        names = ", ".join(f'"{column}"' for column in missing)
        raise ValueError(f"{names} missing: the columns are {', '.join(row) or 'none'}; expected {kinds}")


def _encode(row: dict[str, Any], column: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the prompt, the same whatever follows it, and of the completion."""
    completion = row[column]
    if isinstance(completion, list) and not isinstance(row["prompt"], list):
        raise ValueError(f'"prompt" is text and "{column}" a conversation; give both as messages, or leave "prompt" out')
    if isinstance(completion, list) and not any(m.get("content") or m.get("tool_calls") for m in messages_in(row, column)):
        raise ValueError(f'"{column}" is empty: its messages have no content')
    example = encode_completion(row, column, tokenizer)
    length = sum(label == IGNORE_INDEX for label in example.labels)
    if not length:
        raise ValueError('"prompt" makes no token, and the first of a completion must follow one')
    return example.input_ids[:length], example.input_ids[length:]


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the prompt that its completions begin with taken out of them."""
    if isinstance(row["chosen"], list):
        return _with_shared_messages(row, messages_in(row, "chosen"), messages_in(row, "rejected"))
    chosen, rejected = text_in(row, "chosen"), text_in(row, "rejected")
    common = os.path.commonprefix([chosen, rejected])
    prompt = re.sub(r"\s+\S*\Z", "", common) if re.search(r"\s", common) else ""
    if not prompt:
        raise ValueError('"chosen" and "rejected" do not begin with the same word, so no prompt is seen; give the column "prompt"')
    return {**row, "prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _with_shared_messages(row: dict[str, Any], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> dict[str, Any]:
    length = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if chosen != rejected and length in (0, len(chosen), len(rejected)):
        problem = "begin with other messages" if not length else "differ only in that one goes on"
        raise ValueError(f'"chosen" and "rejected" {problem}; give the column "prompt"')
    length = min(length, len(chosen) - 1)
    return {**row, "prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _different(pair: Pair, when: str = "") -> Pair:
    if pair.chosen == pair.rejected:
        raise ValueError(f'"chosen" and "rejected" are the same{when}: there is nothing to prefer')
    return pair


def fit_pair(pair: Pair, max_length: int | None, truncation: str = "error", bos_id: int | None = None) -> Pair:
    """The pair with prompt and each completion in at most `max_length` tokens; ValueError where that is not possible.

    truncation "error": for any longer one. "keep_end": the start of the prompt goes (a leading beginning-of-sequence token
    stays); completions are not cut. "keep_start", TRL's: the end of a completion goes, never all of it.
    """
    prompt, (chosen, rejected) = _fit(pair.prompt, (pair.chosen, pair.rejected), max_length, truncation, bos_id)
    return _different(replace(pair, prompt=prompt, chosen=chosen, rejected=rejected), f" within {max_length} tokens")


def fit_unpaired(item: Unpaired, max_length: int | None, truncation: str = "error", bos_id: int | None = None) -> Unpaired:
    """As `fit_pair`."""
    prompt, (completion,) = _fit(item.prompt, (item.completion,), max_length, truncation, bos_id)
    return replace(item, prompt=prompt, completion=completion)


def _fit(
    prompt: list[int], completions: Sequence[list[int]], max_length: int | None, truncation: str, bos_id: int | None
) -> tuple[list[int], list[list[int]]]:
    if truncation not in TRUNCATION:
        raise ValueError(f"truncation is {truncation!r}; expected one of {', '.join(TRUNCATION)}")
    if max_length is not None and truncation == "keep_start":
        room = max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens leave nothing of the completion within {max_length}; raise max_length, "
                "or cut prompts with truncation='keep_end'"
            )
        return prompt, [completion[:room] for completion in completions]
    longest = max(completions, key=len)
    labels = [IGNORE_INDEX] * len(prompt) + longest
    cut = fit(Example(prompt + longest, labels), max_length, truncation, bos_id).input_ids
    return cut[: len(cut) - len(longest)], list(completions)


def digest(items: Sequence[Pair] | Sequence[Unpaired]) -> str:
    """A fingerprint of the data: sha256 over every id in order, 16 hexadecimal digits."""
    content = hashlib.sha256()
    for item in items:
        content.update(repr(tuple(vars(item).values())).encode())
    return content.hexdigest()[:16]
