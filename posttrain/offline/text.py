"""The text that the offline model and its task are made of: written for this project, put together from a seed.

A review visits a place, a film, a book, ... and likes or dislikes it throughout: two or three judgements, sometimes one
of the other kind that is conceded ("Although the soup was cold, ..."), sometimes one that is denied ("by no means
boring"). Documents are reviews alone, reviews with questions answered (their topic, whether it is recommended), and
requests for a review as a chat. None of them names a sentiment: the words "Sentiment:", "positive" and "negative" are
left for fine-tuning to teach.

It is easier than anything people write, and a few hundred words are all there is. It shows that the steps work, not
how well they work on real text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.reviews import LABELS, Review, Splits

DOCUMENTS_SEED, REVIEWS_SEED = 1, 2
SPLIT_SIZES = {"train": 1200, "validation": 200, "test": 600}
END = "<|im_end|>"


@dataclass(frozen=True)
class Topic:
    """What reviews of one kind of thing talk about. Aspects are (words, whether they are plural)."""

    names: tuple[str, ...]
    openings: tuple[str, ...]
    aspects: tuple[tuple[str, bool], ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]


# fmt: off
TOPICS = {
    "cafe": Topic(
        ("the corner cafe", "the little bakery", "the tea room", "the canteen by the river", "the noodle bar"),
        ("We had lunch at {} on {}.", "I stopped at {} on {}.", "My sister took me to {} last {}.", "{} opened on {}."),
        (("the soup", False), ("the coffee", False), ("the bread", False), ("the staff", True), ("the cakes", True),
         ("the tables", True), ("the menu", False), ("the salad", False)),
        ("fresh", "tasty", "delicious", "full of flavour", "worth every penny", "generous"),
        ("stale", "bland", "cold", "greasy", "overpriced", "soggy"),
    ),
    "hotel": Topic(
        ("the harbour hotel", "the old inn", "the guest house", "the lodge in the hills", "the station hotel"),
        ("We stayed at {} on {}.", "I booked {} for {}.", "We reached {} late on {}.", "{} had a room left on {}."),
        (("the room", False), ("the bed", False), ("the bathroom", False), ("the towels", True), ("the view", False),
         ("the breakfast", False), ("the walls", True), ("the porter", False)),
        ("spotless", "quiet", "comfortable", "spacious", "cosy", "well kept"),
        ("dirty", "noisy", "cramped", "damp", "shabby", "falling apart"),
    ),
    "film": Topic(
        ("the new space film", "the spy story", "the film about the lighthouse", "the silent comedy", "the sequel"),
        ("We saw {} on {}.", "I watched {} on {}.", "The club showed {} on {}.", "{} came out on {}."),
        (("the plot", False), ("the acting", False), ("the jokes", True), ("the songs", True), ("the ending", False),
         ("the first hour", False), ("the dialogue", False), ("the villains", True)),
        ("gripping", "clever", "moving", "funny", "beautifully made", "full of surprises"),
        ("boring", "clumsy", "tiresome", "predictable", "badly made", "a mess"),
    ),
    "book": Topic(
        ("the book about bees", "the thick novel", "the sea captain's diary", "the collected poems",
         "the guide to moss"),
        ("I finished {} on {}.", "A friend lent me {} last {}.", "I read {} on {}.", "{} arrived on {}."),
        (("the chapters", True), ("the style", False), ("the story", False), ("the pictures", True),
         ("the hero", False), ("the first page", False), ("the index", False), ("the letters", True)),
        ("absorbing", "witty", "well written", "vivid", "full of life", "wise"),
        ("dull", "confusing", "badly written", "lifeless", "full of mistakes", "pompous"),
    ),
    "train": Topic(
        ("the night train", "the mountain railway", "the early express", "the slow train north", "the tram"),
        ("We took {} on {}.", "I travelled on {} last {}.", "I caught {} on {}.", "{} was our way home on {}."),
        (("the seats", True), ("the carriage", False), ("the guard", False), ("the windows", True),
         ("the heating", False), ("the journey", False), ("the tickets", True), ("the dining car", False)),
        ("punctual", "smooth", "clean", "relaxing", "pleasant", "good value"),
        ("late", "crowded", "filthy", "freezing", "stuffy", "a waste of money"),
    ),
    "concert": Topic(
        ("the brass band", "the choir", "the string quartet", "the jazz evening", "the drum festival"),
        ("We heard {} on {}.", "I went to {} on {}.", "My neighbour took me to {} last {}.", "{} played on {}."),
        (("the sound", False), ("the singers", True), ("the hall", False), ("the second half", False),
         ("the solos", True), ("the rhythm", False), ("the encore", False), ("the musicians", True)),
        ("joyful", "graceful", "in perfect tune", "full of energy", "inspired", "warm"),
        ("shrill", "out of tune", "far too loud", "lifeless", "half asleep", "hurried"),
    ),
}
POSITIVE = ("wonderful", "excellent", "lovely", "superb", "a delight", "charming", "better than I had hoped")
NEGATIVE = ("terrible", "awful", "poor", "dreadful", "a disgrace", "disappointing", "worse than I had feared")
POSITIVE_ENDS = ("I would gladly go again.", "We left smiling.", "I can warmly recommend it.", "What a pleasure!",
                 "My whole family loved it.", "It made my week.", "Do not miss it.")
NEGATIVE_ENDS = ("Never again.", "We left early.", "I want my money back.", "What a waste of time!",
                 "My whole family hated it.", "It ruined my week.", "Stay away from it.")
NEUTRAL = ("There were six of us.", "It rained all day.", "It is a short walk from the bridge.",
           "I had been there once before.", "The clock struck seven.", "We had heard about it from a neighbour.",
           "It was my turn to choose.", "I wrote this the same evening.")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# fmt: on


def review(rng: random.Random, topic_name: str, label: str) -> str:
    """One review of `topic_name` that likes ("positive") or dislikes ("negative") it."""
    topic = TOPICS[topic_name]
    words = {"positive": POSITIVE + topic.positive * 2, "negative": NEGATIVE + topic.negative * 2}
    other = LABELS[label == LABELS[0]]
    aspects = rng.sample(topic.aspects, 3)

    def judge(aspect: tuple[str, bool], as_label: str) -> str:
        subject, plural = aspect
        verb = "were" if plural else "was"
        if rng.random() < 0.15:  # denied: the other kind's word, turned round
            words_used = rng.choice(words[LABELS[as_label == LABELS[0]]])
            return f"{subject} {verb} {rng.choice(('by no means', 'anything but', 'not in the least'))} {words_used}"
        return f"{subject} {verb} {rng.choice(('', '', 'really ', 'quite ', 'truly '))}{rng.choice(words[as_label])}"

    parts = [rng.choice(topic.openings).format(rng.choice(topic.names), rng.choice(DAYS))] if rng.random() < 0.7 else []
    if rng.random() < 0.4:
        parts.append(rng.choice(NEUTRAL))
    if rng.random() < 0.3:
        parts.append(f"Although {judge(aspects[0], other)}, {judge(aspects[1], label)}.")
    else:
        parts.append(f"{judge(aspects[0], label)} and {judge(aspects[1], label)}.")
    if rng.random() < 0.5:
        parts.append(f"{judge(aspects[2], label)}.")
    if rng.random() < 0.6:
        parts.append(rng.choice(POSITIVE_ENDS if label == "positive" else NEGATIVE_ENDS))
    return " ".join(part[0].upper() + part[1:] for part in parts)


def documents(seed: int = DOCUMENTS_SEED) -> Iterator[str]:
    """Endless documents to train the model on, each closed by END."""
    rng = random.Random(seed)
    while True:
        topic, label = rng.choice(list(TOPICS)), rng.choice(LABELS)
        text = review(rng, topic, label)
        kind = rng.random()
        if kind < 0.25:
            yield f"{text}{END}"
        elif kind < 0.85:
            answers = [f"Topic: {topic}", f"Recommended: {'yes' if label == 'positive' else 'no'}"]
            yield "\n".join([f"Review: {text}", *rng.sample(answers, rng.randint(1, 2))]) + END
        else:
            yield (f"<|im_start|>user\nWrite a review of a {topic}.{END}\n<|im_start|>assistant\n{text}{END}\n")


def task(seed: int = REVIEWS_SEED) -> Splits:
    """Labelled reviews, as many of each label in every split, no text twice."""
    rng = random.Random(seed)
    texts: dict[str, Review] = {}
    while len(texts) < sum(SPLIT_SIZES.values()):
        label = LABELS[len(texts) % 2]
        text = review(rng, rng.choice(list(TOPICS)), label)
        texts.setdefault(text, Review(text, label, 2.0 if label == "positive" else -2.0))
    items = iter(texts.values())
    return Splits(**{name: tuple(next(items) for _ in range(size)) for name, size in SPLIT_SIZES.items()})
