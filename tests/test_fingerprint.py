"""The base model's fingerprint: what it must not notice, and what it must."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import hf_config, random_model

from posttrain import adapters
from posttrain.errors import PosttrainError
from posttrain.fingerprint import Fingerprint, dense_fingerprint, fingerprint
from posttrain.model import CausalLM, ModelConfig, load, save
from posttrain.quantized import quantize_model


def test_dense_quantized_and_every_dtype_of_one_model_agree(tmp_path):
    model = random_model().bfloat16()
    save(model, tmp_path / "bf16")
    save(model.float(), tmp_path / "fp32")
    whole = dense_fingerprint(model)
    assert whole.startswith("sha256:") and len(whole) == len("sha256:") + 32
    for folder in ("bf16", "fp32"):
        for dtype in ("bf16", "fp32"):
            assert load(tmp_path / folder, dtype=dtype).fingerprint == whole
        for quantize in ("nf4", "fp4"):
            assert load(tmp_path / folder, quantize=quantize).fingerprint == whole
    quantized = copy.deepcopy(model)
    quantize_model(quantized)
    assert fingerprint(quantized) == whole
    save(quantized, tmp_path / "nf4")
    assert load(tmp_path / "nf4").fingerprint == whole


def test_shards_do_not_matter(tmp_path):
    model = random_model("qwen2")
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert load(tmp_path / "one").fingerprint == load(tmp_path / "many").fingerprint == dense_fingerprint(model)


def test_another_model_differs():
    prints = {dense_fingerprint(random_model(name)) for name in ("smollm2", "llama3", "llama_linear", "qwen2", "qwen3")}
    torch.manual_seed(1)
    prints.add(dense_fingerprint(random_model()))
    # A continued training moves every tensor a little.
    model = random_model("llama3")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    prints.add(dense_fingerprint(model))
    assert len(prints) == 7


def test_every_tensor_name_and_shape_counts():
    config = ModelConfig.from_hf(hf_config("smollm2"))

    def digest(*tensors):
        collected = Fingerprint(config)
        for name, tensor in tensors:
            collected.update(name, tensor)
        return collected.digest()

    a, b = torch.randn(4, 6), torch.randn(3)
    base = digest(("a", a), ("b", b))
    assert base == digest(("b", b), ("a", a))
    others = {
        digest(("a", a)), digest(("a", b), ("b", a)), digest(("a", a.T), ("b", b)),
        digest(("a", a.reshape(6, 4)), ("b", b)),
        digest(("a", a), ("c", b)), digest(("a", -a), ("b", b)),
    }  # fmt: skip
    assert len(others) == 6 and base not in others


def test_large_tensors_are_sampled_from_end_to_end():
    config = ModelConfig.from_hf(hf_config("smollm2"))
    x = torch.zeros(100_000)

    def digest():
        collected = Fingerprint(config)
        collected.update("x", x)
        return collected.digest()

    before = digest()
    x[-100:] = 1
    assert digest() != before


def test_a_model_without_a_stored_fingerprint_is_sampled_now():
    model = CausalLM(ModelConfig.from_hf(hf_config("smollm2")))
    first = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight += 1
    assert fingerprint(model) != first


@pytest.mark.parametrize(
    "config",
    [
        adapters.LoraConfig(r=4, init_lora_weights=False),
        adapters.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]),
        adapters.IA3Config(init_ia3_weights=False),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_merged_adapter_makes_another_base(tmp_path, config, quantized):
    """Whose own adapters go on it, saved and loaded again too, and on no other."""
    base = random_model("llama2")
    if quantized:
        quantize_model(base)  # with an adapter on q_proj alone the other layers stay in 4 bits
    save(base, tmp_path / "base")
    base = load(tmp_path / "base", dtype="fp32")
    model = copy.deepcopy(base)
    adapters.attach(model, config)
    adapters.save_adapter(model, tmp_path / "first")
    adapters.merge_and_unload(model)
    assert fingerprint(model) != base.fingerprint
    adapters.attach(model, config)
    adapters.save_adapter(model, tmp_path / "second")
    adapters.delete_adapter(model, "default")
    save(model, tmp_path / "merged")
    again = load(tmp_path / "merged", dtype="fp32")
    for one, adapter in ((base, "second"), (model, "first"), (again, "first")):
        with pytest.raises(PosttrainError, match="was trained on the base"):
            adapters.load_adapter(one, tmp_path / adapter)
    for one, adapter in ((base, "first"), (model, "second"), (again, "second")):
        adapters.load_adapter(one, tmp_path / adapter)


def test_a_merged_model_that_is_quantized_keeps_the_merged_ones(tmp_path):
    model = random_model("llama2")
    before = fingerprint(model)
    adapters.attach(model, adapters.LoraConfig(r=4, init_lora_weights=False))
    adapters.merge_and_unload(model)
    merged = dense_fingerprint(model)
    quantize_model(model)
    save(model, tmp_path)
    assert load(tmp_path).fingerprint == fingerprint(model) == merged != before
