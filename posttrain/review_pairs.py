"""Preference pairs DERIVED from the scored reviews: nobody compared these texts; the order follows from the scores.

The prompt asks for a review of one sentiment. Chosen is a review that people scored so, rejected one that they scored the other
way, of nearly the same number of words, so that length tells nothing. Every other prompt asks for the negative one: what is
chosen under one prompt would be rejected under the other, so a model must read the prompt. Each review is in one pair, and pairs
are made within a split (posttrain/reviews.py): no text, nor a near-duplicate of one, crosses from train to test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.atomic import atomic_write
from posttrain.reviews import LABELS, MIN_SCORE, Review

NOTE = "pairs derived from review scores, not compared by people"


@dataclass(frozen=True)
class ReviewPair:
    """TRL's columns in text. margin: difference of the two scores, up to 8."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


def prompt(label: str) -> str:
    """What the model reads before a review of that sentiment."""
    return f"Sentiment: {label}\nReview:"


def review_pairs(reviews: Sequence[Review], min_score: float = MIN_SCORE) -> list[ReviewPair]:
    """Pairs of one split, the same every time, in the order of the split's chosen reviews (a fair sample from the start).

    min_score: both |scores| exceed it. As many pairs as the rarer sentiment has reviews.
    """
    place = {review: i for i, review in enumerate(reviews)}
    negative, positive = (
        sorted((r for r in reviews if r.label == label and abs(r.score) > min_score), key=lambda r: (len(r.text.split()), place[r]))
        for label in LABELS
    )
    longer, shorter = (positive, negative) if len(positive) > len(negative) else (negative, positive)
    # Of the more frequent sentiment, evenly spaced ones by length.
    matched = [longer[i * len(longer) // len(shorter)] for i in range(len(shorter))]
    made = []
    for i, (one, other) in enumerate(zip(shorter, matched, strict=True)):
        chosen, rejected = sorted((one, other), key=lambda r: r.label == LABELS[i % 2], reverse=True)
        pair = ReviewPair(prompt(chosen.label), f" {chosen.text}", f" {rejected.text}", abs(chosen.score - rejected.score))
        made.append((place[chosen], pair))
    return [pair for _, pair in sorted(made, key=lambda item: item[0])]


def to_jsonl(pairs: Iterable[ReviewPair], path: str | os.PathLike) -> Path:
    """Write JSON Lines with TRL's columns, and return the path."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(vars(pair), ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return Path(path)
