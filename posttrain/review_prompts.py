"""Prompts made of the scored reviews, to practise on: a task with a verifiable answer, and openings for a reward model to judge.

    sentiment   a review, after one answered example; the answer, one word and a new line, is the sign of people's score
    openings    what the pairs derived from the reviews begin with (review_pairs.py) and a review's first words, to be continued

The example is one short review of the training split, so that the answer's form is told and most of the prompt is the question.
Prompts are made within a split (reviews.py): no text, nor a near-duplicate of one, crosses from train to test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from posttrain import review_pairs
from posttrain.atomic import atomic_write
from posttrain.reviews import LABELS, Review, prompt

STOP = "\n"  # ends an answer
OPENING = 4  # words
SHORT = 5  # words of an example


def example(train: Sequence[Review]) -> Review:
    """The best scored of the short positive reviews, as an answered example: of equals the first in the split."""
    short = [review for review in train if review.label == LABELS[1] and len(review.text.split()) <= SHORT]
    if not short:
        raise ValueError(f"no positive review has at most {SHORT} words; expected the training split")
    return max(short, key=lambda review: review.score)


def sentiment(reviews: Iterable[Review], train: Sequence[Review]) -> list[dict[str, Any]]:
    """Rows with "prompt" and "answer"; `train` gives the example, which is no question itself."""
    shot = example(train)
    return [{"prompt": prompt(r.text, [shot]), "answer": r.label} for r in reviews if r != shot]


def openings(reviews: Iterable[Review]) -> list[dict[str, Any]]:
    """Rows with "prompt": a sentiment that is asked for, every other one negative, and the first words of a review of either."""
    long = [review for review in reviews if len(review.text.split()) > OPENING]
    begun = (" ".join(review.text.split()[:OPENING]) for review in long)
    return [{"prompt": f"{review_pairs.prompt(LABELS[i % 2])} {words}"} for i, words in enumerate(begun)]


def to_jsonl(rows: Iterable[dict[str, Any]], path: str | os.PathLike) -> Path:
    """Write JSON Lines, and return the path."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Path(path)
