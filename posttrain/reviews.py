"""The quickstart task: is a movie-review snippet positive or negative?

10,605 snippets, each with the mean of about 15 people's sentiment scores from -4 to 4 (C.J. Hutto and E. Gilbert,
"VADER", ICWSM 2014; `posttrain fetch reviews`). Kept are those with |mean| > 1, the ones people agree on; the sign is
the label.

Splits. Every snippet has a key, the SHA-256 of its normalised text (lower case, runs of letters and digits). Two
snippets are near-duplicates when the one with fewer distinct word 3-grams shares at least half of them with the other
(a text of fewer than three words has one, itself). Snippets that near-duplicates link, directly or through others, go
to one split, chosen by the smallest key among them: a fifth to test, a tenth to validation, the rest to train. So
splits depend on the texts alone, no near-duplicate lies across two of them, and each split, sorted by key, is in random
order: any first n are a fair sample. Snippets that share no wording cannot be told to come from one review, or to be
about one film: the file does not say.

Prompt. Plain text rather than the chat template: of eight wordings tried zero-shot on 200 or 400 validation items it
did best (SmolLM2-135M-Instruct in bfloat16: 0.815 of 400; three other plain ones 0.555 to 0.770, four through the chat
template 0.500 to 0.805, each with its best way to write the choices), so that what training adds is not a weak prompt
repaired. It is also the shortest: 30 tokens on average, 64 to 76 in the chat template.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from posttrain.atomic import atomic_write

FILE_NAME = "movieReviewSnippets_GroundTruth.txt"
LABELS = ("negative", "positive")
CHOICES = tuple(f" {label}" for label in LABELS)  # what continues a prompt; one token each for SmolLM2
MIN_SCORE = 1.0  # |mean| must exceed it
OVERLAP = 0.5  # share of the smaller set of 3-grams that makes a near-duplicate
TEST, VALIDATION = 0.2, 0.1


@dataclass(frozen=True)
class Review:
    """text; label "positive" or "negative"; score: mean of people's scores, -4 to 4."""

    text: str
    label: str
    score: float


class Splits(NamedTuple):
    train: tuple[Review, ...]
    validation: tuple[Review, ...]
    test: tuple[Review, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """{split: {label: items}}."""
        return {
            name: {label: sum(review.label == label for review in split) for label in LABELS}
            for name, split in self._asdict().items()
        }


def load_reviews(path: str | os.PathLike) -> Splits:
    """Splits of the file `path`, or of the one in the folder `path` (what `fetch("reviews")` returns).

    Lines are `id TAB mean score TAB text`. FileNotFoundError, or ValueError naming the line that is wrong.
    """
    file = Path(path)
    if file.is_dir():
        file /= FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; run `posttrain fetch reviews`")
    reviews = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        fields = line.decode("utf-8", errors="replace").split("\t")
        score = _score(fields[1]) if len(fields) == 3 else None
        if score is None or not fields[2].strip() or "\ufffd" in fields[2]:
            raise ValueError(
                f"{file}, line {number}: {line[:60]!r} is not `id TAB score from -4 to 4 TAB text` in UTF-8; fetch it again"
            )
        if abs(score) > MIN_SCORE:
            reviews.append(Review(fields[2].strip(), LABELS[score > 0], score))
    if not reviews:
        raise ValueError(f"{file}: no snippet has a score beyond {MIN_SCORE}")
    return split_reviews(reviews)


def split_reviews(reviews: Sequence[Review]) -> Splits:
    """Train, validation and test by the rule above. Of equal texts (once normalised) the first is kept."""
    unique = list({_key(review.text): review for review in reversed(reviews)}.items())
    groups = near_duplicate_groups([review.text for _, review in unique])
    group_key: dict[int, str] = {}
    for (key, _), group in zip(unique, groups, strict=True):
        group_key[group] = min(key, group_key.get(group, key))
    parts: tuple[list[Review], list[Review], list[Review]] = ([], [], [])
    for (_, review), group in sorted(zip(unique, groups, strict=True), key=lambda item: item[0][0]):
        at = int(group_key[group][:13], 16) / 16**13  # 52 bits: exact in a float
        parts[2 if at < TEST else 1 if at < TEST + VALIDATION else 0].append(review)
    return Splits(*map(tuple, parts))


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """For each text the index of its group's first text; near-duplicates link texts into groups."""
    grams = [word_grams(text) for text in texts]
    seen: dict[tuple[str, ...], list[int]] = defaultdict(list)  # 3-gram -> texts before this one that have it
    group = list(range(len(texts)))

    def first(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    for i, mine in enumerate(grams):
        for j, shared in Counter(j for gram in mine for j in seen[gram]).items():
            if shared >= OVERLAP * min(len(mine), len(grams[j])):
                low, high = sorted((first(i), first(j)))
                group[high] = low
        for gram in mine:
            seen[gram].append(i)
    return [first(i) for i in range(len(texts))]


def word_grams(text: str) -> frozenset[tuple[str, ...]]:
    """Distinct word 3-grams of the normalised text; of fewer than three words, the one tuple of them all."""
    words = _words(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def prompt(text: str, shots: Iterable[Review] = ()) -> str:
    """What the model reads. `shots` are answered before the question; prompts with the same shots begin the same."""
    answered = "".join(f"Review: {shot.text}\nSentiment: {shot.label}\n\n" for shot in shots)
    return f"{answered}Review: {text}\nSentiment:"


def few_shot(train: Sequence[Review], count: int) -> list[Review]:
    """The first `count` of `train`, negative and positive in turn. ValueError if there are not enough of each."""
    labels = [LABELS[i % 2] for i in range(count)]
    left = {label: iter([review for review in train if review.label == label]) for label in LABELS}
    shots = [review for label in labels if (review := next(left[label], None)) is not None]
    if len(shots) < count:
        raise ValueError(f"{count} shots asked for, {len(shots)} available in {len(train)} training items")
    return shots


def to_jsonl(reviews: Iterable[Review], path: str | os.PathLike, shots: Sequence[Review] = ()) -> Path:
    """Write JSON Lines with the columns prompt and completion (TRL's names), and return the path."""
    rows = ({"prompt": prompt(review.text, shots), "completion": f" {review.label}"} for review in reviews)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Path(path)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(_words(text)).encode()).hexdigest()


def _score(field: str) -> float | None:
    try:
        score = float(field)
    except ValueError:
        return None
    return score if math.isfinite(score) and abs(score) <= 4 else None
