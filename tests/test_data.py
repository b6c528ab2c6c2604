"""JSON Lines to examples: what is learned of each kind of row, and every way in which a row can be wrong."""

from __future__ import annotations

import json

import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from make_gguf import CHAT_TEMPLATE

from posttrain.data import Example, encode, fit, load_dataset
from posttrain.errors import PosttrainError
from posttrain.preference.data import encode_pair
from posttrain.rl.prompts import encode_prompt

TOKENIZER = byte_tokenizer()
ASK = [{"role": "user", "content": "hi"}]
ANSWER = [{"role": "assistant", "content": "yo"}]


def learned(example: Example) -> str:
    assert all(label in (-100, i) for i, label in zip(example.input_ids, example.labels, strict=True))
    return TOKENIZER.decode([i for i in example.labels if i != -100], skip_special_tokens=False)


def whole(example: Example) -> str:
    return TOKENIZER.decode(example.input_ids, skip_special_tokens=False)


def test_prompt_and_completion():
    example = encode({"prompt": "ab", "completion": " cd", "other": 3}, TOKENIZER)
    assert whole(example) == "ab cd<|im_end|>" and learned(example) == " cd<|im_end|>"
    assert example.num_labels == 4


def test_text_is_learned_whole():
    example = encode({"text": "abc"}, TOKENIZER)
    assert learned(example) == whole(example) == "abc<|im_end|>"
    assert example.num_labels == 3  # nothing predicts the first


def test_text_that_ends_in_the_end_of_sequence_token_gets_no_second_one():
    for end in ("", "<|im_end|>"):
        assert whole(encode({"prompt": "a", "completion": "b" + end}, TOKENIZER)) == "ab<|im_end|>"
        assert whole(encode({"text": "ab" + end}, TOKENIZER)) == "ab<|im_end|>"
        assert encode_pair({"prompt": "a", "chosen": "b" + end, "rejected": "c"}, TOKENIZER).chosen[1:] == [TOKENIZER.eos_id]
    assert whole(encode({"text": "a<|im_end|>b"}, TOKENIZER)) == "a<|im_end|>b<|im_end|>"
    assert whole(encode({"prompt": "a<|im_end|>", "completion": "b"}, TOKENIZER)) == "a<|im_end|>b<|im_end|>"


def test_a_beginning_of_sequence_token_goes_before_plain_text_and_is_not_learned():
    tokenizer = byte_tokenizer(bos=True)
    example = encode({"prompt": "ab", "completion": "c"}, tokenizer)
    assert whole(example) == "<|im_start|>abc<|im_end|>" and learned(example) == "c<|im_end|>"


def test_conversations():
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    example = encode({"prompt": ASK, "completion": ANSWER}, TOKENIZER)
    assert whole(example) == chat + "yo<|im_end|>\n" and learned(example) == "yo<|im_end|>\n"
    assert example.input_ids[: -example.num_labels] == TOKENIZER.chat(ASK)
    both = encode({"messages": ASK + ANSWER + ASK + ANSWER}, TOKENIZER)
    assert whole(both) == 2 * (chat + "yo<|im_end|>\n") and learned(both) == 2 * "yo<|im_end|>\n"


def test_the_prompt_is_tokenized_as_at_inference_even_where_a_token_would_cross_the_seam():
    assert len(TOKENIZER.encode("hell")) == 1
    example = encode({"prompt": "he", "completion": "ll"}, TOKENIZER)
    assert example.input_ids == [*TOKENIZER.encode("he"), *TOKENIZER.encode("ll"), TOKENIZER.eos_id]
    assert example.num_labels == 2


TOOLS = [{"type": "function", "function": {"name": "add"}}, {"type": "function", "function": {"name": "dot"}}]
WITH_TOOLS = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + CHAT_TEMPLATE


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON text"])
def test_tools_reach_the_template_as_objects(tools):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    rows = {"messages": ASK + ANSWER}, {"prompt": ASK, "completion": ANSWER}
    plain = whole(encode(rows[0], tokenizer))
    assert [whole(encode({**row, "tools": tools}, tokenizer)) for row in rows] == ["[add][dot]" + plain] * 2
    prompt = encode_prompt({"prompt": ASK, "tools": tools}, tokenizer)
    assert prompt.ids == [*tokenizer.encode("[add][dot]"), *TOKENIZER.chat(ASK)] and prompt.columns == {}
    for none in (None, [], "null", "[]"):
        assert whole(encode({**rows[0], "tools": none}, tokenizer)) == plain


def test_chat_template_kwargs_reach_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'think ' if enable_thinking }}" + WITH_TOOLS
    rows = {"messages": ASK + ANSWER}, {"prompt": ASK, "completion": ANSWER}
    plain = whole(encode(rows[0], tokenizer))
    for value, before in (({"enable_thinking": True}, "think "), ({"enable_thinking": False}, ""), ({}, ""), (None, "")):
        given = {"chat_template_kwargs": value}
        assert [whole(encode(row | given, tokenizer)) for row in rows] == [before + plain] * 2
        assert whole(encode(rows[0] | given | {"tools": TOOLS}, tokenizer)) == before + "[add][dot]" + plain
        prompt = encode_prompt({"prompt": ASK} | given, tokenizer)
        assert prompt.ids == [*tokenizer.encode(before), *TOKENIZER.chat(ASK)] and prompt.columns == {}


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
WITH_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is defined else '' }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_calls_of_tools_are_learned_without_content():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITH_CALLS
    said = '<add {"a": 1}><|im_end|>\n'
    result = {"role": "tool", "content": "2"}
    for call in (CALL, {**CALL, "content": None}, {**CALL, "content": ""}):
        assert learned(encode({"prompt": ASK, "completion": [call]}, tokenizer)) == said
        assert learned(encode({"messages": [*ASK, call, result, *ANSWER]}, tokenizer)) == said + "yo<|im_end|>\n"
        pair = encode_pair({"prompt": ASK, "chosen": [call], "rejected": ANSWER}, tokenizer)
        assert tokenizer.decode(pair.chosen, skip_special_tokens=False) == said


def test_content_in_text_parts_goes_to_the_template_as_it_is():
    tokenizer = byte_tokenizer()
    parts = [[{"type": "text", "text": text} for text in message["content"]] for message in (*ASK, *ANSWER)]
    row = {"messages": [{**m, "content": p} for m, p in zip(ASK + ANSWER, parts, strict=True)]}
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | map(attribute='text') | join")
    assert encode(row, tokenizer) == encode({"messages": ASK + ANSWER}, TOKENIZER)
    for text_alone in (CHAT_TEMPLATE, CHAT_TEMPLATE.replace(" + message['content'] + ", " ~ message['content'] ~ ")):
        tokenizer.chat_template = text_alone
        with pytest.raises(ValueError, match="not every template takes content in parts: give it as text"):
            encode(row, tokenizer)


def write(tmp_path, *rows):
    file = tmp_path / "data.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def test_load_reads_every_row_but_blank_lines(tmp_path):
    file = write(tmp_path, b"\xef\xbb\xbf" + b'{"text": "one"}', b"", b"  ", {"prompt": "a\u2028b", "completion": "\U0001f600"})
    first, second = load_dataset(file, TOKENIZER)
    assert whole(first) == "one<|im_end|>" and whole(second) == "a\u2028b\U0001f600<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a"', "not JSON"),
        (b"[1]", "a JSON list; expected an object"),
        (b"3", "a JSON int"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"prompt": "a", "completion": "b", "completion": "c"}', '"completion" is there twice'),
        (b'{"prompt": "\\ud800", "completion": "b"}', r"text with '\\ud800', which is no character"),
        ({}, "the columns are none"),
        ({"question": "a"}, "the columns are question; expected"),
        ({"text": "a", "messages": ASK + ANSWER}, "the columns are text, messages"),
        ({"prompt": "a"}, '"completion" is missing'),
        ({"completion": "a"}, '"prompt" is missing'),
        ({"prompt": "", "completion": "a"}, '"prompt" is empty'),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"prompt": "a", "completion": 3}, '"completion" is a int'),
        ({"prompt": "a", "completion": ANSWER}, '"completion" is a list'),
        ({"prompt": ASK, "completion": "a"}, '"completion" is a str'),
        ({"prompt": ASK, "completion": []}, '"completion" is empty'),
        ({"text": None}, '"text" is a NoneType'),
        ({"text": ""}, '"text" is empty'),
        ({"messages": "a"}, '"messages" is a str'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": [{"role": "user"}]}, r'"messages"\[0\] is not a message'),
        ({"messages": [*ASK, {"role": "assistant", "content": 1}]}, r'"messages"\[1\] is not a message'),
        ({"messages": [*ASK, {"role": "assistant", "content": None}]}, r'"messages"\[1\] is not a message; .* "tool_calls"'),
        ({"messages": [*ASK, {**CALL, "tool_calls": []}]}, r'"messages"\[1\] is not a message'),
        ({"messages": [*ASK, {**CALL, "tool_calls": ["add"]}]}, r'"tool_calls" \["add"\]; expected a list of objects'),
        ({"messages": [*ASK, {**CALL, "content": ""}]}, "the chat template does not write tool_calls"),
        ({"messages": [{**ASK[0], "content": [{"type": "image"}]}, *ANSWER]}, r'\[0\] has the content part {"type": "image"}'),
        ({"messages": [{**ASK[0], "content": ["hi"]}, *ANSWER]}, r'\[0\] has the content part "hi"'),
        ({"messages": ASK + ANSWER, "chat_template_kwargs": "x"}, '"chat_template_kwargs" is "x"; expected an object'),
        ({"messages": ASK + ANSWER, "chat_template_kwargs": [1]}, r'"chat_template_kwargs" is \[1\]; expected an object'),
        ({"messages": ASK + ANSWER, "chat_template_kwargs": {"messages": []}}, 'has "messages", which is not for a row'),
        ({"prompt": ASK, "completion": ANSWER, "chat_template_kwargs": {"self": 1}}, 'has "self", which is not for a row'),
        ({"messages": ASK}, "nothing to learn"),
        ({"messages": ASK + ANSWER, "tools": "add"}, '"tools" is text, but not JSON'),
        ({"messages": ASK + ANSWER, "tools": "[" * 100_000}, '"tools" is text, but not JSON'),
        ({"messages": ASK + ANSWER, "tools": '{"name": "add"}'}, '"tools" is {"name": "add"}; expected a list of objects'),
        ({"messages": ASK + ANSWER, "tools": {}}, '"tools" is {}; expected a list of objects'),
        ({"prompt": ASK, "completion": ANSWER, "tools": ["add"]}, r'"tools" is \["add"\]; expected a list of objects'),
    ],
)
def test_a_wrong_row_is_named_with_file_and_line(tmp_path, row, message):
    file = write(tmp_path, {"text": "good"}, b"", row)
    with pytest.raises(PosttrainError, match=rf"data\.jsonl:3: .*{message}"):
        load_dataset(file, TOKENIZER)


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(PosttrainError, match="does not exist"):
        load_dataset(tmp_path / "absent", TOKENIZER)
    with pytest.raises(PosttrainError, match="is a folder"):
        load_dataset(tmp_path, TOKENIZER)
    with pytest.raises(PosttrainError, match="holds no examples"):
        load_dataset(write(tmp_path, b""), TOKENIZER)


def test_a_tokenizer_without_chat_template_names_the_line(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PosttrainError, match=":1: .*no chat template"):
        load_dataset(write(tmp_path, {"messages": ASK + ANSWER}), tokenizer)


def test_longer_than_max_length(tmp_path):
    file = write(tmp_path, {"prompt": "abcdef", "completion": "xyz"})
    with pytest.raises(PosttrainError, match=":1: 10 tokens, and at most 9 fit"):
        load_dataset(file, TOKENIZER, max_length=9)
    (example,) = load_dataset(file, TOKENIZER, max_length=6, truncation="keep_end")
    assert whole(example) == "efxyz<|im_end|>" and learned(example) == "xyz<|im_end|>"
    with pytest.raises(PosttrainError, match=":1: .*completions are not cut"):
        load_dataset(file, TOKENIZER, max_length=3, truncation="keep_end")
    with pytest.raises(ValueError, match="expected 'error' or 'keep_end'"):
        fit(example, 3, "keep_start")


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 24), st.booleans())
def test_fit_never_cuts_a_label(prompt, completion, max_length, bos):
    ids = list(range(100, 100 + prompt + completion))
    example = Example(ids, [-100] * prompt + ids[prompt:])
    bos_id = ids[0] if bos else None
    try:
        cut = fit(example, max_length, "keep_end", bos_id)
    except ValueError:
        assert prompt + completion > max_length and completion + 1 > max_length
        return
    assert len(cut.input_ids) == len(cut.labels) == min(max_length, prompt + completion)
    assert [i for i in cut.labels if i != -100] == ids[prompt:]
    assert cut.input_ids[0] == ids[0] or not bos
    assert cut.labels[0] == -100  # the first that is learned has a token before it
