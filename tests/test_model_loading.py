"""Saving and loading Hugging Face directories: dense, in shards, quantized on the way; damage; memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from model_cases import CASES, random_model
from safetensors.torch import load_file, save_file

from posttrain.errors import PosttrainError
from posttrain.kernels import quantize_weight
from posttrain.model import ModelConfig, load, save
from posttrain.quantized import QuantizedLinear, quantize_model


def assert_same_tensors(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, tmp_path):
    model = random_model(name)
    save(model, tmp_path / "model")
    back = load(tmp_path / "model", dtype="fp32")
    assert_same_tensors(model, back)
    assert back.config == ModelConfig(**{**model.config.__dict__, "dtype": "float32"})
    assert load(tmp_path / "model", dtype="auto").model.norm.weight.dtype == torch.float32
    assert load(tmp_path / "model").model.norm.weight.dtype == torch.bfloat16
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_ours_and_we_load_its(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(name)
    save(model, tmp_path / "ours", max_shard_bytes=100_000)
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.dtype == torch.float32
    theirs = dict(peer.named_parameters())
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[key])
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_same_tensors(model, load(tmp_path / "theirs", dtype="fp32"))


def test_shards_and_their_index(tmp_path):
    model = random_model("llama3")
    save(model, tmp_path, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 3 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    tensors = {}
    for file in files:
        shard = load_file(tmp_path / file)
        assert sum(t.nbytes for t in shard.values()) <= 60_000 or len(shard) == 1
        assert all(index["weight_map"][name] == file for name in shard)
        tensors.update(shard)
    assert tensors.keys() == index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert_same_tensors(model, load(tmp_path, dtype="fp32"))
    # Saved again whole: the shards do not stay behind, the tokenizer does.
    (tmp_path / "tokenizer.json").write_text("{}")
    save(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_quantizing_while_loading_equals_quantizing_after(quantize, double_quant, tmp_path):
    save(random_model("qwen2"), tmp_path, max_shard_bytes=60_000)
    streamed = load(tmp_path, quantize=quantize, block_size=128, double_quant=double_quant)
    after = load(tmp_path)
    quantize_model(after, quantize, 128, double_quant)
    assert_same_tensors(streamed, after)
    assert streamed.fingerprint == after.fingerprint
    layer = streamed.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear) and layer.bias.dtype == torch.bfloat16 and not layer.bias.requires_grad
    assert layer.weight.block_size == 128 and layer.weight.quant_type == quantize


def test_what_is_no_part_of_the_model_stays_as_it_is(tmp_path):
    """Links as links: one to a folder is not copied whole, a loop has no end, and one to nothing has no bytes."""
    folder, other = tmp_path / "model", tmp_path / "other"
    (folder / "notes").mkdir(parents=True)
    other.mkdir()
    (other / "big").write_text("of somebody else")
    (folder / "notes" / "a").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of the model before")
    links = {"file": other / "big", "folder": other, "loop": folder, "notes/loop": "..", "nothing": "nowhere", "self": "self"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    save(random_model(), folder)
    assert {name: os.readlink(folder / name) for name in links} == {name: str(target) for name, target in links.items()}
    assert (folder / "notes" / "a").read_text() == "mine" and (other / "big").read_text() == "of somebody else"
    names = {"config.json", "model.safetensors", "notes", "file", "folder", "loop", "nothing", "self"}
    assert set(os.listdir(folder)) == names


def test_a_model_is_not_written_beside_what_would_change_it(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(PosttrainError, match=rf"holds an adapter .{name}.*give another folder, or move the adapter away"):
            save(random_model(), tmp_path)
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PosttrainError, match=r"pipe is neither a file nor a folder and cannot stay there"):
        save(random_model(), tmp_path)


def test_a_million_layers_are_not_built(tmp_path, monkeypatch):
    """A mistyped number is told from the tensors' names: on the meta device too, each layer takes a while."""
    save(random_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr("posttrain.model.loading.CausalLM", None)
    for count in (2, 1_000_000):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
        with pytest.raises(PosttrainError, match=f"num_hidden_layers is {count} there, and the tensors are of 3 layers"):
            load(tmp_path)


def test_the_head_stays_dense(tmp_path):
    save(random_model("llama3"), tmp_path)
    model = load(tmp_path, quantize="nf4")
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 7 * 3


MEASURE = """
import sys
from posttrain.model import load
path, small, quantize = sys.argv[1], sys.argv[2], sys.argv[3] or None
load(small, quantize=quantize)  # what the libraries themselves take the first time
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = load(path, quantize=quantize)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_quantizing_never_holds_the_dense_model(tmp_path):
    """Peak memory of loading in a fresh process: what NF4 keeps and a few dense tensors, far from all of them."""
    model = random_model(
        "llama3", torch.bfloat16, num_hidden_layers=24, hidden_size=256, intermediate_size=1024, num_attention_heads=8
    )
    save(model, tmp_path / "model")
    save(random_model("llama3"), tmp_path / "small")
    dense = sum(parameter.nbytes for parameter in model.parameters())
    layer = 2 * 1024 * 256
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    peaks = {
        quantize: int(
            subprocess.check_output(
                [sys.executable, "-c", MEASURE, tmp_path / "model", tmp_path / "small", quantize], env=environment
            )
        )
        for quantize in ("", "nf4")
    }
    quantized = dense * 4.127 / 16
    # Quantizing one tensor takes its dense bytes, float32 copies of it and its result: six of them, of the largest
    # kind.
    assert peaks["nf4"] <= quantized + 6 * 2 * layer, (peaks, quantized, dense)
    assert peaks["nf4"] <= dense / 2
    assert dense <= peaks[""] <= dense + 6 * 2 * layer, (peaks, dense)


def rewrite(path, change):
    """Load the one safetensors file, change its dict of tensors, save it."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: [t.pop(k) for k in list(t) if "layers.2" in k], "num_hidden_layers is 3 there, and the tensors are of 2 layers"),
        (lambda t: t.update(other=torch.ones(1)), "has other besides"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight has shape \[3\] and not \[64\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}), "dtype torch.int32"),
    ],
)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_wrong_tensors_are_named(change, message, quantize, tmp_path):
    save(random_model("smollm2"), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(PosttrainError, match=message):
        load(tmp_path, quantize=quantize)


def test_harmless_leftovers_are_ignored(tmp_path):
    model = random_model("smollm2")
    save(model, tmp_path)
    rewrite(
        tmp_path,
        lambda t: t.update({"lm_head.weight": torch.ones(97, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    assert_same_tensors(model, load(tmp_path, dtype="fp32"))


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "..", "", "sub/model.safetensors", "..\\x", "C:x"])
def test_an_index_cannot_point_outside_its_folder(file, tmp_path):
    save(random_model("smollm2"), tmp_path / "other")
    save(random_model("smollm2"), tmp_path / "model", max_shard_bytes=60_000)
    (tmp_path / "other/model.safetensors").rename(tmp_path / "other.safetensors")
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(PosttrainError, match=r"model\.norm\.weight in .*not a file name in"):
        load(tmp_path / "model")


def test_damaged_directories_say_what_is_wrong(tmp_path):
    with pytest.raises(PosttrainError, match="is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(PosttrainError, match=r"config\.json does not exist"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PosttrainError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(PosttrainError, match="expected an object"):
        load(tmp_path)
    save(random_model("smollm2"), tmp_path, max_shard_bytes=60_000)
    shard = next(tmp_path.glob("model-00002*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(PosttrainError, match=f"{shard.name} is not a whole safetensors file"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(PosttrainError, match=f"{shard.name}, which is not there"):
        load(tmp_path)
    shard.write_bytes(next(tmp_path.glob("model-00001*")).read_bytes())
    with pytest.raises(PosttrainError, match="does not hold it"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(PosttrainError, match="no weight_map"):
        load(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(PosttrainError, match=r"neither model\.safetensors nor .*pytorch_model\.bin, which cannot be loaded"):
        load(tmp_path)


def test_wrong_arguments_are_named(tmp_path):
    save(random_model("smollm2"), tmp_path)
    with pytest.raises(ValueError, match="quantize is 'int8'; expected None or one of nf4, fp4"):
        load(tmp_path, quantize="int8")
    with pytest.raises(ValueError, match="dtype is 'int4'; expected one of fp32"):
        load(tmp_path, dtype="int4")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save(random_model("smollm2"), tmp_path, max_shard_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(PosttrainError, match="is a file"):
        save(random_model("smollm2"), tmp_path / "file")
    model = random_model("smollm2")
    model.model.norm.register_parameter("lora_A", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"model\.norm\.lora_A.*[Mm]erge"):
        save(model, tmp_path / "adapted")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The disk fills at each write in turn: the old model stays whole, and no temporary files stay behind."""
    import posttrain.model.checkpoint as checkpoint

    old, new = random_model("smollm2"), random_model("smollm2")
    save(old, tmp_path / "model", max_shard_bytes=100_000)
    original, calls = checkpoint.write_safetensors, []

    for failing in (1, 2, 3):
        calls.clear()

        def full(path, tensors, metadata=None, failing=failing):
            calls.append(path)
            if len(calls) == failing:
                path.write_bytes(b"part")
                raise OSError(28, "No space left on device")
            original(path, tensors, metadata)

        monkeypatch.setattr(checkpoint, "write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            save(new, tmp_path / "model", max_shard_bytes=100_000)
        assert_same_tensors(old, load(tmp_path / "model", dtype="fp32"))
        assert os.listdir(tmp_path) == ["model"]


def test_the_tokenizer_comes_with_the_model_or_neither_does(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    new = ["additional_chat_templates/tool_use.jinja", "generation_config.json", "tokenizer.json"]
    for name in (*new, "notes.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("new")
    target.mkdir()
    (target / "tokenizer.json").write_text("old")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr("shutil.copyfile", no_space)
        save(random_model("llama3"), target, tokenizer=source)
    assert os.listdir(target) == ["tokenizer.json"]
    for name in ("chat_template.jinja", "license.txt"):  # of the model that was here, and of nobody's
        (target / name).write_text("old")
    save(random_model("llama3"), target, tokenizer=source)
    there = sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
    assert there == sorted([*new, "config.json", "license.txt", "model.safetensors"])
    assert all((target / name).read_text() == "new" for name in new)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


KILLED = """
import os, sys, torch
sys.path.insert(0, sys.argv[2])
from model_cases import random_model
import posttrain.model.checkpoint as checkpoint
from posttrain.model import save
original = checkpoint.write_safetensors
def die_after_one(path, tensors, metadata=None):
    original(path, tensors, metadata)
    os._exit(9)
checkpoint.write_safetensors = die_after_one
save(random_model("smollm2"), sys.argv[1], max_shard_bytes=100_000)
"""


def test_a_kill_loses_nothing(tmp_path):
    old = random_model("smollm2")
    save(old, tmp_path / "model")
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model"), os.path.dirname(__file__)])
    assert result.returncode == 9
    assert_same_tensors(old, load(tmp_path / "model", dtype="fp32"))


def test_dequantized_weights_are_those_of_the_tensor_in_the_file(tmp_path):
    """Rounded to bfloat16 first, as it would be run, then quantized."""
    model = random_model("smollm2")
    save(model, tmp_path)
    weight = model.model.layers[1].mlp.up_proj.weight.detach().bfloat16()
    loaded = load(tmp_path, quantize="nf4").model.layers[1].mlp.up_proj.weight
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.dequantize(), quantize_weight(weight).dequantize())
