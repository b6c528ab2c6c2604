"""posttrain.model.tokenizer and chat_template: ids, texts and masks are transformers', templates stay boxed in."""

import json
import re
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from make_gguf import gguf_bytes, tiny_llama

from posttrain import offline
from posttrain.fetch import fetch
from posttrain.model import chat_template
from posttrain.model.gguf_to_hf import convert
from posttrain.model.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": "hell 12 <b>é</b>"},
    {"role": "assistant", "content": "Hello\n\n1."},
    {"role": "user", "content": "ö?"},
    {"role": "assistant", "content": " 🙂 "},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
TEXTS = [
    "",
    " ",
    "hello hell",
    "\n\n1",
    "a1b22c333",
    "  two  spaces",
    "tab\tnew\r\nline",
    "ﬁne ÅÅ é",
    "日本語 текст",
    "עברית",
    "🙂👩‍👩‍👧",
    "<|im_end|>",
    "a<|im_start|>b <|endoftext|>",
    "'s 't I'll",
    "1234567890",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    (path / "tiny.gguf").write_bytes(gguf_bytes(*tiny_llama(np.random.default_rng(0))))
    return convert(path / "tiny.gguf", path / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def test_ids_by_hand(tokenizer):
    hell, two = tokenizer.backend.token_to_id("hell"), tokenizer.backend.token_to_id("2")
    assert tokenizer.encode("hell22") == [hell, two, two]
    assert tokenizer.encode("<|im_end|>hell") == [2, hell]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 2, 262)
    assert tokenizer.decode([1, hell, 2]) == "hell"
    assert tokenizer.decode([1, hell, 2], skip_special_tokens=False) == "<|im_start|>hell<|im_end|>"
    assert tokenizer.encode_batch(["hell", ""]) == [[hell], []]


@given(st.text())
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_ids_without_a_token_have_no_text(folder, tokenizer):
    hell = tokenizer.backend.token_to_id("hell")
    assert tokenizer.decode([hell, 262, 100_000, hell]) == "hellhell" and tokenizer.decode([262]) == tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="-1 is no token id; expected ids from 0 on"):
        tokenizer.decode([5, -1])
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["hell"] = 400  # holes before it
    holed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    assert holed.vocab_size <= 400 and holed.encode("hell") == [400] and holed.decode([400, 300, 400]) == "hellhell"


def test_chat_by_hand(tokenizer):
    text = tokenizer.chat_text(TALK[:1])
    assert text == "<|im_start|>user\nhell 12 <b>é</b><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.chat_text(TALK[:1], add_generation_prompt=False) == text.removesuffix("<|im_start|>assistant\n")
    assert tokenizer.chat(TALK[:1]) == tokenizer.encode(text)
    assert tokenizer.chat(TALK[:1])[0] == tokenizer.bos_id != tokenizer.chat(TALK[:1])[1]


def test_masks_with_and_without_generation_blocks(folder):
    tokenizer = Tokenizer.load(folder)
    ids, mask = tokenizer.chat_with_mask(TALK)
    assert ids == tokenizer.chat(TALK, add_generation_prompt=False)
    expected = tokenizer.encode("Hello\n\n1.<|im_end|>\n") + tokenizer.encode(" 🙂 <|im_end|>\n")
    assert [i for i, chosen in zip(ids, mask, strict=True) if chosen] == expected
    tokenizer.chat_template = MARKED
    marked_ids, marked = tokenizer.chat_with_mask(TALK)
    expected = tokenizer.encode("Hello\n\n1.<|im_end|>") + tokenizer.encode(" 🙂 <|im_end|>")
    assert marked_ids == ids and [i for i, chosen in zip(ids, marked, strict=True) if chosen] == expected


def test_a_template_that_rewrites_earlier_turns_has_no_mask(folder):
    tokenizer = Tokenizer.load(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}|{% endfor %}"
    with pytest.raises(ValueError, match="message 1 differently once others follow"):
        tokenizer.chat_with_mask(TALK)


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content.missing.more }}", "missing"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ ''['__class__'].mro() }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% for %}", "Expected an expression"),
        ("{% generation %}never closed", "endgeneration"),
    ],
)
def test_what_a_template_may_not_do(folder, template, why):
    tokenizer = Tokenizer.load(folder)
    tokenizer.chat_template = template
    for render in (tokenizer.chat_text, tokenizer.chat_with_mask):
        with pytest.raises(ValueError, match=re.compile(why)):
            render(TALK)


def test_rendering_leaves_the_messages_alone(folder):
    before = json.dumps(TALK)
    with pytest.raises(ValueError):
        chat_template.render("{% set _ = messages[0].update({'content': ''}) %}", TALK)
    assert json.dumps(TALK) == before


def test_null_is_missing():
    template = "{% for m in messages %}{{ m.content if m.content is defined else 'no' }}{{ m.name }}{% endfor %}"
    messages = [{"role": "user", "content": None, "name": "ann"}, {"role": "user", "content": "yes", "name": None}]
    assert chat_template.render(template, messages) == "noannyes"


def test_extras():
    assert chat_template.render("{{ {'a': '<é>'} | tojson }}", []) == '{"a": "<é>"}'
    assert chat_template.render("{{ [1] | tojson(indent=1) }}", []) == "[\n 1\n]"
    assert re.fullmatch(r"\d{4}", chat_template.render("{{ strftime_now('%Y') }}", []))
    loop = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert chat_template.render(loop, []) == "1"
    assert chat_template.render("{% if true %}\n  x\n  {% endif %}\ny", []) == "  x\ny"


def copy(folder, tmp_path, **changes):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return tmp_path


def test_where_special_tokens_come_from(folder, tmp_path):
    eos = {"content": "<|endoftext|>", "lstrip": False}
    path = copy(folder, tmp_path, bos_token=None, eos_token=eos, chat_template="{{ bos_token }}")
    assert (Tokenizer.load(path).bos_id, Tokenizer.load(path).eos_id) == (None, 0)
    older = {"bos_token": {"content": "<|im_end|>"}, "eos_token": "hell"}
    (path / "special_tokens_map.json").write_text(json.dumps(older))
    tokenizer = Tokenizer.load(path)
    hell = tokenizer.backend.token_to_id("hell")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_text([])) == (2, hell, "<|im_end|>")
    tokenizer = Tokenizer.load(copy(folder, tmp_path, bos_token=None, eos_token=eos, added_tokens_decoder={}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)  # the older file no longer counts


def test_named_templates(folder, tmp_path):
    tools = [{"type": "function"}]
    named = [{"name": "tool_use", "template": "T{{ tools | length }}"}, {"name": "default", "template": "D"}]
    for templates in (named, {entry["name"]: entry["template"] for entry in named}):
        tokenizer = Tokenizer.load(copy(folder, tmp_path, chat_template=templates))
        assert [tokenizer.chat_text([], tools=some) for some in (None, tools)] == ["D", "T1"] and tokenizer.chat_text([]) == "D"
    tokenizer = Tokenizer.load(copy(folder, tmp_path, chat_template={"default": "D"}))
    assert tokenizer.chat_text([], tools=tools) == "D"
    with pytest.raises(ValueError, match='the chat templates are rag; expected one called "default"'):
        Tokenizer.load(copy(folder, tmp_path, chat_template={"rag": "R"})).chat_text([])
    (tmp_path / "chat_template.jinja").write_text("J{{ bos_token }}")
    assert Tokenizer.load(tmp_path).chat_text([], tools=tools) == "J<|im_start|>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("A{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.chat_text([]), tokenizer.chat_text([], tools=tools)) == ("J<|im_start|>", "A")
    assert tokenizer.chat_with_mask(TALK[:2], tools=tools)[0] == tokenizer.encode("A" + TALK[0]["content"] + TALK[1]["content"])


NEW = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
CONFIGURED = {
    "added_tokens_decoder": {"300": {"content": "<new>", **NEW}, "270": {"content": "<b>", **NEW, "lstrip": True}},
    "pad_token": "[PAD]",
    "sep_token": "<sep>",
    "image_token": {"content": "hell", **NEW, "__type": "AddedToken"},
    "extra_special_tokens": {"boi": "he"},
    "chat_template": "{{ sep_token }}|{{ image_token }}|{{ boi }}|{{ cls_token }}|{{ messages | length }}",
}


def test_tokens_that_the_configuration_adds(folder, tmp_path):
    tokenizer = Tokenizer.load(copy(folder, tmp_path, **CONFIGURED))
    assert tokenizer.encode("<new> <b>[PAD]<sep>") == [263, 262, 265, 264]
    assert tokenizer.vocab_size == 266 and tokenizer.pad_id is None
    assert tokenizer.chat_text([]) == "<sep>|hell|he||0"
    assert tokenizer.decode(tokenizer.encode("hell, hello")) == ", o"  # a word of the vocabulary that is special now
    extra = Tokenizer.load(copy(folder, tmp_path, additional_special_tokens=["<x>", {"content": "<y>"}]))
    assert extra.encode("<y><x>") == [263, 262]


def test_faults_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="bos_token is '<none>', which is not in the vocabulary"):
        Tokenizer.load(copy(folder, tmp_path, bos_token="<none>"))
    with pytest.raises(ValueError, match=r"added_tokens_decoder is .*; expected \{"):
        Tokenizer.load(copy(folder, tmp_path, added_tokens_decoder={"300": {"contents": "<new>"}}))
    for template in ([{"nme": "default"}], ["D"], {"default": 3}, 3):
        with pytest.raises(ValueError, match=r"chat_template is .*; expected text, or several as \[\{"):
            Tokenizer.load(copy(folder, tmp_path, chat_template=template))
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(copy(folder, tmp_path, chat_template=None)).chat(TALK)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def assert_same(ours, theirs):
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    for prompt in (True, False):
        theirs_text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat_text(TALK, prompt) == theirs_text
        theirs_ids = theirs.apply_chat_template(TALK, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert ours.chat(TALK, prompt) == theirs_ids
    ours.chat_template = theirs.chat_template = MARKED
    marked = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert ours.chat_with_mask(TALK) == (marked["input_ids"], [bool(m) for m in marked["assistant_masks"]])


@pytest.mark.peers
def test_equals_transformers(folder):
    transformers = pytest.importorskip("transformers")
    assert_same(Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.peers
def test_equals_transformers_where_the_configuration_adds(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    named = {"default": "D", "tool_use": "{{ tools | tojson }}"}
    tools, text = [{"type": "function", "function": {"name": "add"}}], "hello <new> <b>[PAD]<sep> <x>he"
    older = {"bos_token": "<|im_end|>", "eos_token": "hell"}
    for changes in ({}, CONFIGURED, {"extra_special_tokens": ["<x>", "<b>"]}, {"pad_token": "[PAD]", "chat_template": named}):
        path = copy(folder, tmp_path, **changes)
        for _ in range(2):
            ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
            assert ours.vocab_size == len(theirs) and ours.decode([5, 999, 5]) == theirs.decode([5, 999, 5])
            assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
            for some in (None, tools):
                assert ours.chat_text(TALK, tools=some) == theirs.apply_chat_template(
                    TALK, tools=some, tokenize=False, add_generation_prompt=True
                )
            (path / "special_tokens_map.json").write_text(json.dumps(older))
        (path / "special_tokens_map.json").unlink()


@pytest.mark.peers
@pytest.mark.real
def test_equals_transformers_on_the_real_tokenizer():
    transformers = pytest.importorskip("transformers")
    folder = fetch("smollm2-135m", progress=False)
    ours = Tokenizer.load(folder)
    # Digits come apart before the newlines' regular expression looks at them: "\n\n" stays one token before a digit.
    assert ours.encode("\n\n1") == [ours.backend.token_to_id("ĊĊ"), ours.backend.token_to_id("1")]
    assert_same(Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder))


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = shutil.copytree(offline.model_path(), tmp_path / "model")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: not UTF-8"):
        Tokenizer.load(folder)
    (folder / "chat_template.jinja").unlink()
    tokens = {"7": {"content": "<x>", "special": "no"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    with pytest.raises(ValueError, match="tokenizer_config.json: added_tokens_decoder is .*expected"):
        Tokenizer.load(folder)
