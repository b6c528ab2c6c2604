"""posttrain.reviews: splits that depend on the texts alone, no near-duplicate across them (checked by brute force)."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import read_jsonl
from posttrain.fetch import fetch
from posttrain.reviews import (
    CHOICES,
    LABELS,
    MIN_SCORE,
    OVERLAP,
    Review,
    few_shot,
    load_reviews,
    near_duplicate_groups,
    prompt,
    split_reviews,
    to_jsonl,
    word_grams,
)

WORDS = "the film is a very good bad dull bright story of love and war that never ends".split()
texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), max_size=24)


def near_duplicates(a: frozenset, b: frozenset) -> bool:
    return len(a & b) >= OVERLAP * min(len(a), len(b))


def synthetic(n: int, seed: int = 0) -> list[Review]:
    rng = random.Random(seed)
    made = [(" ".join(rng.choices(WORDS, k=rng.randint(2, 9))), rng.choice([-2.0, 2.0])) for _ in range(n)]
    return [Review(text, LABELS[score > 0], score) for text, score in made]


@given(texts)
def test_groups_are_the_components_of_near_duplicates(texts):
    """Against a search that compares every pair and relabels until nothing changes."""
    grams = [word_grams(text) for text in texts]
    group = list(range(len(texts)))
    changed = True
    while changed:
        changed = False
        for i in range(len(texts)):
            for j in range(i):
                if group[i] != group[j] and near_duplicates(grams[i], grams[j]):
                    group[i] = group[j] = min(group[i], group[j])
                    changed = True
    assert near_duplicate_groups(texts) == group


def test_word_grams_by_hand():
    assert word_grams("It's GOOD, it's good!") == {("it", "s", "good"), ("s", "good", "it"), ("good", "it", "s")}
    assert word_grams("Refreshing.") == {("refreshing",)} and word_grams("Très drôle") == {("très", "drôle")}
    assert near_duplicate_groups(["a b c d", "x a b c", "been there", "Been there!", "there been"]) == [0, 0, 2, 2, 4]


def test_splits_depend_on_the_texts_alone():
    reviews = synthetic(300)
    shuffled = random.Random(1).sample(reviews, len(reviews))
    assert [{r.text for r in split} for split in split_reviews(reviews)] == [
        {r.text for r in split} for split in split_reviews(shuffled)
    ]
    unlike = Review("utterly unlike any other", "positive", 2.0)
    once, longer = split_reviews(reviews[:1]), split_reviews([*reviews[:1], unlike])
    assert all(set(a) <= set(b) for a, b in zip(once, longer, strict=True))


@given(st.integers(0, 10**6))
def test_no_near_duplicate_lies_across_splits(seed):
    splits = split_reviews(synthetic(40, seed))
    grams = [[word_grams(review.text) for review in split] for split in splits]
    assert not any(near_duplicates(a, b) for i in range(3) for j in range(i) for a in grams[i] for b in grams[j])


def test_equal_texts_are_kept_once():
    twice = [Review("Good film", "positive", 2.0), Review("good  film!", "positive", 1.5)]
    assert [review for split in split_reviews(twice) for review in split] == [twice[0]]


def write(tmp_path, lines: bytes):
    file = tmp_path / "movieReviewSnippets_GroundTruth.txt"
    file.write_bytes(lines)
    return file


def test_reads_lines_and_drops_the_undecided(tmp_path):
    file = write(tmp_path, "1\t2.5\tA gem – really.\r\n2\t-1.0\tundecided\r\n3\t-3.5\tDreadful stuff\r\n".encode())
    for path in (file, tmp_path):
        found = {review for split in load_reviews(path) for review in split}
        assert found == {Review("A gem – really.", "positive", 2.5), Review("Dreadful stuff", "negative", -3.5)}


@pytest.mark.parametrize(
    "line", [b"1\t2.0", b"1\tgood\ttext", b"1\tnan\ttext", b"1\t9\ttext", b"1\t2\t ", b"1\t2\t\xff\xfe", b"1\t2\ta\tb", b""]
)
def test_a_bad_line_is_named(tmp_path, line):
    with pytest.raises(ValueError, match="line 2"):
        load_reviews(write(tmp_path, b"1\t2.5\tfine\r\n" + line + b"\r\n"))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="posttrain fetch reviews"):
        load_reviews(tmp_path)
    with pytest.raises(ValueError, match="no snippet"):
        load_reviews(write(tmp_path, b"1\t0.5\tundecided\n"))


def test_prompts_and_rows(tmp_path):
    train = [Review("Dull.", "negative", -2), Review("Awful.", "negative", -3), Review("Fine.", "positive", 2)]
    shots = few_shot(train, 2)
    assert shots == [train[0], train[2]]
    text = prompt("So-so?", shots)
    assert text == ("Review: Dull.\nSentiment: negative\n\nReview: Fine.\nSentiment: positive\n\nReview: So-so?\nSentiment:")
    assert prompt("So-so?") == "Review: So-so?\nSentiment:"
    with pytest.raises(ValueError, match="4 shots asked for, 3 available"):
        few_shot(train, 4)
    path = to_jsonl(train, tmp_path / "rows.jsonl")
    rows = [row for _, row in read_jsonl(path)]
    assert rows == [{"prompt": prompt(review.text), "completion": f" {review.label}"} for review in train]
    assert {row["completion"] for row in rows} == set(CHOICES)
    assert json.loads(to_jsonl(train[:1], path, shots).read_text())["prompt"] == prompt("Dull.", shots)


@pytest.mark.real
def test_the_real_splits():
    """Every pair of real items in two different splits compared, without the index that made them."""
    splits = load_reviews(fetch("reviews", progress=False))
    assert splits.counts() == {
        "train": {"negative": 2991, "positive": 2996},
        "validation": {"negative": 430, "positive": 436},
        "test": {"negative": 1062, "positive": 1106},
    }
    assert all(abs(review.score) > MIN_SCORE for split in splits for review in split)
    texts = [review.text for split in splits for review in split]
    assert len(set(texts)) == len(texts)
    grams = [[word_grams(review.text) for review in split] for split in splits]
    for i in range(3):
        for j in range(i):
            for a in grams[i]:
                assert not any(not a.isdisjoint(b) and near_duplicates(a, b) for b in grams[j])
