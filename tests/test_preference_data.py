"""JSON Lines to preference pairs: where the prompt ends, what is cut, and every way in which a row can be wrong."""

from __future__ import annotations

import json

import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import PosttrainError
from posttrain.preference.data import (
    Pair,
    Unpaired,
    digest,
    encode_pair,
    encode_unpaired,
    fit_pair,
    fit_unpaired,
    load_preferences,
    load_unpaired,
    unpair,
)

TOKENIZER = byte_tokenizer()
ASK = [{"role": "user", "content": "hi"}]
YES, NO = [{"role": "assistant", "content": "yo"}], [{"role": "assistant", "content": "go away"}]


def said(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def texts(pair: Pair):
    return said(pair.prompt), said(pair.chosen), said(pair.rejected)


def write(tmp_path, *rows):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return file


def test_explicit_and_implicit_prompts_are_the_same_pair():
    expected = "The sky is", " blue.<|im_end|>", " black.<|im_end|>"
    explicit = encode_pair({"prompt": "The sky is", "chosen": " blue.", "rejected": " black.", "source": 3}, TOKENIZER)
    assert texts(explicit) == expected
    # Both go on with " bl": the prompt ends before the word in which they part.
    assert encode_pair({"chosen": "The sky is blue.", "rejected": "The sky is black."}, TOKENIZER) == explicit
    assert texts(encode_pair({"chosen": "a b", "rejected": "a b c"}, TOKENIZER)) == ("a", " b<|im_end|>", " b c<|im_end|>")
    assert texts(encode_pair({"chosen": "Q\n\nA: x", "rejected": "Q\n\nA: y"}, TOKENIZER))[:2] == ("Q\n\nA:", " x<|im_end|>")


def test_conversations():
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    explicit = encode_pair({"prompt": ASK, "chosen": YES, "rejected": NO}, TOKENIZER)
    assert texts(explicit) == (chat, "yo<|im_end|>\n", "go away<|im_end|>\n")
    assert encode_pair({"chosen": ASK + YES, "rejected": ASK + NO}, TOKENIZER) == explicit
    two = encode_pair({"chosen": ASK + YES + ASK + YES, "rejected": ASK + YES + ASK + NO}, TOKENIZER)
    assert said(two.prompt).count("<|im_start|>assistant") == 2 and two.chosen == explicit.chosen


def test_margins_and_labels():
    pair = encode_pair({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, TOKENIZER)
    assert pair.margin == 2.0 and encode_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, TOKENIZER).margin is None
    one = encode_unpaired({"prompt": "a", "completion": "b", "label": True}, TOKENIZER)
    assert one == Unpaired(pair.prompt, pair.chosen, True)
    assert unpair([pair]) == [one, Unpaired(pair.prompt, pair.rejected, False)]


def test_a_file_of_pairs_serves_both_kinds(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file = write(tmp_path, pair, "", {"prompt": "a", "completion": "d", "label": False})
    assert [one.label for one in load_unpaired(file, TOKENIZER)] == [True, False, False]
    with pytest.raises(PosttrainError, match=r'pairs\.jsonl:3: "chosen", "rejected" missing: the columns are prompt, completion'):
        load_preferences(file, TOKENIZER)
    assert load_preferences(write(tmp_path, pair), TOKENIZER) == [encode_pair(pair, TOKENIZER)]


BOTH = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "a JSON list; expected an object with"),
        ("{", "not JSON"),
        ({}, '"chosen", "rejected" missing: the columns are none'),
        ({"prompt": "a", "chosen": "b"}, '"rejected" missing: the columns are prompt, chosen; expected "prompt", "chosen"'),
        (BOTH | {"chosen": ""}, '"chosen" is empty'),
        (BOTH | {"rejected": ""}, '"rejected" is empty'),
        (BOTH | {"rejected": None}, '"rejected" is a NoneType'),
        (BOTH | {"prompt": ""}, '"prompt" is empty'),
        (BOTH | {"chosen": "c"}, '"chosen" and "rejected" are the same: there is nothing to prefer'),
        (BOTH | {"chosen": YES}, '"prompt" is text and "chosen" a conversation'),
        (BOTH | {"prompt": ASK}, '"chosen" is a str; expected a list'),
        (BOTH | {"margin": "much"}, "\"margin\" is 'much'; expected a finite number"),
        (BOTH | {"margin": True}, '"margin" is True'),
        ({"chosen": "one", "rejected": "two"}, "do not begin with the same word"),
        ({"chosen": "same words", "rejected": "same words"}, "are the same"),
        ({"chosen": YES, "rejected": NO}, '"chosen" and "rejected" begin with other messages'),
        ({"chosen": ASK, "rejected": ASK + NO}, "differ only in that one goes on"),
        ({"chosen": ASK + YES, "rejected": ASK + YES}, "are the same"),
        ({"prompt": ASK, "chosen": [{"role": "assistant", "content": ""}], "rejected": NO}, "its messages have no content"),
        ({"prompt": ASK, "chosen": [3], "rejected": NO}, r'"chosen"\[0\] is not a message'),
    ],
)
def test_a_wrong_pair_is_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(PosttrainError, match=rf"pairs\.jsonl:3: .*{message}"):
        load_preferences(write(tmp_path, BOTH, "", row), TOKENIZER)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, '"label" missing'),
        ({"prompt": "a", "completion": "b", "label": 1}, '"label" is 1; expected true'),
        ({"prompt": "a", "completion": "", "label": True}, '"completion" is empty'),
        ({"prompt": "a", "chosen": "b"}, '"rejected" missing'),
    ],
)
def test_a_wrong_label_is_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(PosttrainError, match=rf"pairs\.jsonl:1: .*{message}"):
        load_unpaired(write(tmp_path, row), TOKENIZER)


def test_no_rows(tmp_path):
    with pytest.raises(PosttrainError, match='holds no preferences; expected one JSON object a line with "prompt", "chosen"'):
        load_preferences(write(tmp_path), TOKENIZER)
    with pytest.raises(PosttrainError, match='does not exist; expected a JSON Lines file with "prompt", "chosen"'):
        load_preferences(tmp_path / "absent", TOKENIZER)


def test_truncation(tmp_path):
    row = {"prompt": "abcdef", "chosen": "xyz", "rejected": "xw"}
    file = write(tmp_path, row)
    with pytest.raises(PosttrainError, match=":1: 10 tokens, and at most 9 fit"):
        load_preferences(file, TOKENIZER, 9)
    (end,) = load_preferences(file, TOKENIZER, 8, "keep_end")
    assert texts(end) == ("cdef", "xyz<|im_end|>", "xw<|im_end|>")  # one prompt for both
    with pytest.raises(PosttrainError, match=":1: 10 tokens, and at most 4 fit; cutting the prompt is not enough"):
        load_preferences(file, TOKENIZER, 4, "keep_end")
    (start,) = load_preferences(file, TOKENIZER, 8, "keep_start")
    assert texts(start) == ("abcdef", "xy", "xw")
    with pytest.raises(PosttrainError, match=':1: "chosen" and "rejected" are the same within 7 tokens'):
        load_preferences(file, TOKENIZER, 7, "keep_start")
    with pytest.raises(PosttrainError, match=":1: the prompt's 6 tokens leave nothing of the completion within 6"):
        load_preferences(file, TOKENIZER, 6, "keep_start")
    with pytest.raises(PosttrainError, match="expected one of error, keep_end, keep_start"):
        load_preferences(file, TOKENIZER, 6, "middle")


@given(*[st.integers(1, 8)] * 3, st.integers(1, 20), st.sampled_from(["keep_end", "keep_start"]), st.booleans())
def test_no_cut_loses_a_completion(prompt, chosen, rejected, limit, truncation, bos):
    ids = list(range(100, 100 + prompt))
    pair = Pair(ids, list(range(200, 200 + chosen)), list(range(300, 300 + rejected)), 1.5)
    try:
        cut = fit_pair(pair, limit, truncation, ids[0] if bos else None)
    except ValueError:
        assert limit <= (max(chosen, rejected) + (bos or 0) if truncation == "keep_end" else prompt)
        return
    assert cut.margin == 1.5 and cut.prompt and cut.chosen and cut.rejected
    assert max(len(cut.prompt) + len(c) for c in (cut.chosen, cut.rejected)) == min(limit, prompt + max(chosen, rejected))
    if truncation == "keep_end":
        assert (cut.chosen, cut.rejected) == (pair.chosen, pair.rejected) and cut.prompt[-1] in (ids[-1], ids[0])
    else:
        assert cut.prompt == ids and cut.chosen == pair.chosen[: limit - prompt]
    one = fit_unpaired(Unpaired(ids, pair.chosen, True), limit + 8, truncation)
    assert len(one.prompt) + len(one.completion) <= limit + 8


def test_digest_sees_order_and_labels():
    one, two = Pair([1], [2], [3]), Pair([1], [3], [2])
    assert len({digest(x) for x in ([one], [two], [one, two], [two, one], [Pair([1, 2], [], [3])])}) == 5
    assert digest([Unpaired([1], [2], True)]) != digest([Unpaired([1], [2], False)])
