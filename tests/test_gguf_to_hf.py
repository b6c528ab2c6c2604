"""posttrain.model.gguf_to_hf: the directory holds the GGUF's values, exactly, where transformers looks for them."""

import json

import numpy as np
import pytest
import torch
from make_gguf import gguf_bytes, tiny_llama
from safetensors import safe_open

from posttrain.fetch import SOURCES, fetch, obtain
from posttrain.model.gguf import GGUF
from posttrain.model.gguf_to_hf import convert, to_bfloat16, undo_rope_permutation


def write_tiny(tmp_path, change=None, **options):
    entries, tensors = tiny_llama(np.random.default_rng(0), **options)
    if change:
        entries, tensors = change(entries, tensors)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(entries, tensors))
    return path


def read_all(folder) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}
    return weights


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"])
def test_every_value_is_the_ggufs(tmp_path, kind):
    path = write_tiny(tmp_path, kind=kind, tied=False)
    weights = read_all(convert(path, tmp_path / "hf"))
    with GGUF(path) as gguf:
        gate = gguf.read("blk.1.ffn_gate.weight")
        q, k = gguf.read("blk.0.attn_q.weight"), gguf.read("blk.0.attn_k.weight")
    assert len(weights) == 2 * 9 + 3 and all(w.dtype == torch.float32 for w in weights.values())
    assert np.array_equal(weights["model.layers.1.mlp.gate_proj.weight"].numpy(), gate)
    for name, stored, heads in (("q", q, 4), ("k", k, 2)):
        ours = weights[f"model.layers.0.self_attn.{name}_proj.weight"].numpy()
        for head in range(heads):
            for i in range(4):  # GGUF rotates row 2i with 2i + 1, Hugging Face row i with i + 4 (heads of 8)
                assert np.array_equal(ours[head * 8 + i], stored[head * 8 + 2 * i])
                assert np.array_equal(ours[head * 8 + i + 4], stored[head * 8 + 2 * i + 1])


def test_config_and_tokenizer_files(tmp_path):
    folder = convert(write_tiny(tmp_path), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 262,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    assert expected.items() <= config.items()
    assert "lm_head.weight" not in read_all(folder)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    assert [tokens[f"{name}_token"] for name in ("bos", "eos", "pad")] == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    assert "message['content']" in tokens["chat_template"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_shards_hold_the_same_tensors(tmp_path):
    path = write_tiny(tmp_path)
    whole = read_all(convert(path, tmp_path / "whole"))
    folder = convert(path, tmp_path / "sharded", max_shard_bytes=20_000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * w.numel() for w in whole.values())
    sharded = read_all(folder)
    assert sharded.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    for file in files:
        size = sum(4 * sharded[name].numel() for name, where in index["weight_map"].items() if where == file)
        assert size <= 20_000 or list(index["weight_map"].values()).count(file) == 1


def test_bfloat16_rounds_as_torch_does(tmp_path):
    special = [0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, float("inf"), -float("inf"), 1e-45, float("nan")]
    any_bits = torch.randint(-(2**31), 2**31 - 1, (4096,)).int().view(torch.float32)
    x = torch.cat([torch.tensor(special), torch.randn(4096), any_bits])
    ours = torch.from_numpy(to_bfloat16(x.numpy()).astype(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), x.isnan())
    assert torch.equal(ours[~x.isnan()], x[~x.isnan()].bfloat16())
    path = write_tiny(tmp_path)
    exact, rounded = read_all(convert(path, tmp_path / "f")), read_all(convert(path, tmp_path / "b", dtype="bfloat16"))
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


def set_entry(key, kind, value):
    return lambda entries, tensors: ([e for e in entries if e[0] != key] + [(key, kind, value)], tensors)


def rename(old, new):
    return lambda entries, tensors: (entries, [(new if t[0] == old else t[0], *t[1:]) for t in tensors])


FAULTS = {
    "architecture is 'bert'": set_entry("general.architecture", "str", "bert"),
    "rope scaling": set_entry("llama.rope.scaling.type", "str", "yarn"),
    "byte-level BPE": set_entry("tokenizer.ggml.model", "str", "llama"),
    "pre-tokenizer 'tekken'": set_entry("tokenizer.ggml.pre", "str", "tekken"),
    "merge 'h zz' does not join": set_entry("tokenizer.ggml.merges", "[str]", ["h zz"]),
    "metadata 'llama.embedding_length' is 'x'": set_entry("llama.embedding_length", "str", "x"),
    "1 token types for 262": set_entry("tokenizer.ggml.token_type", "[i32]", [1]),
    "token id 262 is outside": set_entry("tokenizer.ggml.eos_token_id", "u32", 262),
    r"no tensor for \['model.norm.weight'\]": rename("output_norm.weight", "output.weight"),
    "'blk.0.ffn_gate_exps.weight' is not one": rename("blk.0.ffn_gate.weight", "blk.0.ffn_gate_exps.weight"),
    "beyond the 1 layers": set_entry("llama.block_count", "u32", 1),
    r"has shape \(64, 32\), expected \(96, 32\)": set_entry("llama.feed_forward_length", "u32", 96),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_named_and_leave_nothing(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        convert(write_tiny(tmp_path, FAULTS[message]), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        convert(write_tiny(tmp_path), tmp_path / "hf", dtype="int8")


def test_permutation_by_hand():
    rows = np.arange(8).reshape(8, 1)  # two heads of four rows
    assert undo_rope_permutation(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.peers
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_model_equals_transformers_own_loader(tmp_path, tied):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    path = write_tiny(tmp_path, tied=tied)
    folder = convert(path, tmp_path / "hf")
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ours.config.rope_parameters == theirs.config.rope_parameters
    assert np.float32(ours.config.rms_norm_eps) == np.float32(theirs.config.rms_norm_eps)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.peers
@pytest.mark.real
def test_smollm2_equals_transformers_own_loader(tmp_path):
    """Every tensor of the real model, bit for bit."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    folder = fetch("smollm2-135m", progress=False)
    path = obtain(SOURCES["smollm2-135m"], tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours, expected = read_all(folder), dict(theirs.named_parameters())
    assert ours.keys() == expected.keys() and len(ours) == 272
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
