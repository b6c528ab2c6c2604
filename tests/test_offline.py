"""posttrain.offline: what is committed is what the scripts make, is small, and knows the text it was trained on."""

import itertools
import lzma
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from posttrain import offline
from posttrain.data import load_dataset
from posttrain.model import load
from posttrain.model.tokenizer import Tokenizer
from posttrain.offline import text, train
from posttrain.reviews import LABELS, few_shot, prompt

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(offline.path())


def test_the_model_is_small_and_whole():
    sizes = {file.name: file.stat().st_size for file in offline.path().iterdir()}
    assert sizes.keys() == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(sizes.values()) <= 2 * MEGABYTE
    model = load(offline.path())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.vocab_size == 259 and model.config.context_length == 1024


def test_committed_files_are_what_the_scripts_make(tmp_path):
    train.write_task(tmp_path / "task")
    for split in text.SPLIT_SIZES:
        assert offline.task_path(split).read_bytes() == (tmp_path / "task" / f"{split}.jsonl").read_bytes()
    train.write_tokenizer(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (offline.path() / name).read_text() == (tmp_path / "model" / name).read_text()


@given(st.text())
def test_a_token_is_a_byte(tokenizer, text):
    if not any(special in text for special in train.SPECIAL):
        assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_the_task(tokenizer):
    splits = offline.load_task()
    assert splits == text.task()
    assert splits.counts() == {name: dict.fromkeys(LABELS, size // 2) for name, size in text.SPLIT_SIZES.items()}
    texts = [review.text for split in splits for review in split]
    assert len(set(texts)) == len(texts)
    assert len(load_dataset(offline.task_path("test"), tokenizer)) == len(splits.test) >= 400
    shots = few_shot(splits.train, 4)
    assert max(len(tokenizer.encode(prompt(review.text, shots))) for review in splits.test) < 1024 - len(" positive")


def test_nothing_it_was_trained_on_names_a_sentiment():
    documents = " ".join(itertools.islice(text.documents(), 5000)).lower()
    assert not any(word in documents for word in ("sentiment", "positive", "negative"))


def test_it_knows_its_text_better_than_a_compressor(tokenizer):
    """Bits that the model needs for documents it has never seen, beside lzma's for them after 6,000 of the documents
    that the model was trained on."""
    seen, unseen = text.documents(), text.documents(seed=12345)
    before = "".join(itertools.islice(seen, 6000)).encode()
    documents = list(itertools.islice(unseen, 40))
    options = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 24}]
    sizes = [
        len(lzma.compress(content, lzma.FORMAT_RAW, filters=options)) for content in (before, before + "".join(documents).encode())
    ]
    model, bits = load(offline.path(), dtype="fp32"), 0.0
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([tokenizer.encode("<|im_end|>" + document)])
            bits += F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item() / math.log(2)
    assert bits < 8 * (sizes[1] - sizes[0])


def test_training_repeats_itself(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "WINDOWS", ((2, 32), (1, 64)))
    monkeypatch.setattr(train, "STEPS", 4)
    shapes = [tuple(batch.shape) for batch in train.batches(tokenizer)]
    assert shapes == [(2, 33), (1, 65)] * 2
    first = train.train(tokenizer).state_dict()
    stream = torch.cat([batch.flatten() for batch in train.batches(tokenizer)])
    documents = "".join(itertools.islice(text.documents(), 20))
    assert stream.tolist() == tokenizer.encode(documents)[: stream.numel()]
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path)])
    train.main()
    assert (tmp_path / "task" / "test.jsonl").is_file() and Tokenizer.load(tmp_path / "model").vocab_size == 259
    saved = load(tmp_path / "model").state_dict()
    assert all(torch.equal(saved[name], first[name].bfloat16()) for name in first)


def test_chat_masks_what_the_assistant_says(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ja"}]
    ids, mask = tokenizer.chat_with_mask(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nJa<|im_end|>\n"
    )
    said = [i for i, chosen in zip(ids, mask, strict=True) if chosen]
    assert tokenizer.decode(said, skip_special_tokens=False) == "Ja<|im_end|>"


@pytest.mark.peers
def test_transformers_reads_it(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(offline.path(), dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(offline.path())
    prompt = [{"role": "user", "content": "Write a review of a cafe."}]
    ids = tokenizer.chat(prompt)
    assert ids == their_tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ours = load(offline.path(), dtype="fp32")
    assert all(torch.equal(weight, dict(theirs.named_parameters())[name]) for name, weight in ours.named_parameters())
    with torch.no_grad():
        assert torch.equal(ours(torch.tensor([ids])).argmax(-1), theirs(torch.tensor([ids])).logits.argmax(-1))
