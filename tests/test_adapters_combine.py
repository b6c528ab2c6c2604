"""Combining adapters: the products add up exactly, whatever the base, and in as few dimensions as they have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import hf_config, random_model
from test_adapters_lora import assert_unchanged, logits, snapshot
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import LoraConfig, load_adapter, save_adapter
from posttrain.adapters.combine import combine, compress
from posttrain.adapters.lora import lora_layers
from posttrain.quantized import quantize_model

IDS = torch.arange(24).view(2, 12)
NAMES, WEIGHTS = ["a", "b", "c"], [0.7, -1.3, 0.25]
CONFIGS = {
    "a": LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, rank_pattern={"q_proj": 2}),
    "b": LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    "c": LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]),
}


def adapted(quantized=False):
    model = random_model()
    if quantized:
        quantize_model(model)
    for name, config in CONFIGS.items():
        adapters.attach(model, config, name)
    return model


def delta(layer, parts, dtype):
    """The weighted sum of the products, each as a matrix."""
    zero = torch.zeros(layer.out_features, layer.in_features, dtype=dtype)
    for name, weight in parts:
        if name in layer.lora_A:
            A, B = (factor.detach().to(dtype) for factor in layer.factors(name))
            zero = zero + weight * layer.scaling[name] * (B @ A)
    return zero


@pytest.mark.parametrize("how", ["linear", "cat"])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_products_add_up(how, quantized):
    model = adapted(quantized)
    parts = list(zip(NAMES, WEIGHTS, strict=True))
    names = combine(model, NAMES, WEIGHTS, "sum", how)
    assert names == list(lora_layers(model)) and adapters.active_adapter(model) == "sum"
    for layer in lora_layers(model).values():
        exact = delta(layer, parts, torch.float64)
        assert_as_accurate(delta(layer, [("sum", 1.0)], torch.float32), delta(layer, parts, torch.float32), exact)
        assert layer.scaling["sum"] == 1.0
        assert len(layer.lora_A["sum"]) == sum(len(layer.lora_A[name]) for name in NAMES if name in layer.lora_A)


def test_linear_takes_as_few_dimensions_as_the_sum_has():
    model = random_model()
    adapters.attach(model, CONFIGS["a"], "a")
    adapters.attach(model, CONFIGS["a"], "b")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A["b"].copy_(layer.lora_A["a"])  # the same row space
    combine(model, ["a", "b"], [1.0, 1.0], "sum")
    assert all(len(layer.lora_A["sum"]) == len(layer.lora_A["a"]) for layer in lora_layers(model).values())
    combine(model, ["a", "sum"], [1.0, 0.0], "one")
    assert all(len(layer.lora_A["one"]) == len(layer.lora_A["a"]) for layer in lora_layers(model).values())
    combine(model, ["a"], [0.0], "none")
    base = [layer.lora_B["none"] @ layer.lora_A["none"] for layer in lora_layers(model).values()]
    assert not any(product.any() for product in base)


@pytest.mark.parametrize("hidden_size", [64, 256])  # below the sum of the ranks, and above
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_keeps_what_half_precision_adapters_hold(dtype, hidden_size):
    model = random_model(hidden_size=hidden_size)
    for name in ("a", "b"):
        config = LoraConfig(r=64, target_modules=["q_proj"], init_lora_weights=False)
        adapters.attach(model, config, name, dtype=dtype)
    parts = [("a", 0.5), ("b", -0.3)]
    combine(model, *zip(*parts, strict=True), "sum")
    for layer in lora_layers(model).values():
        assert layer.lora_A["sum"].dtype == dtype and len(layer.lora_A["sum"]) == min(128, *layer.base_layer.weight.shape)
        exact = delta(layer, parts, torch.float64)
        assert_as_accurate(delta(layer, [("sum", 1.0)], dtype), delta(layer, parts, dtype), exact)


def test_what_cancels_leaves_nothing():
    model = random_model()
    for name in ("a", "b"):
        adapters.attach(model, CONFIGS["a"], name)
    ours = adapters.adapter_parameters(model, "b")
    with torch.no_grad():
        for key, parameter in adapters.adapter_parameters(model, "a").items():
            ours[key].copy_(parameter)
    combine(model, ["a", "b"], [1.0, -1.0], "sum")
    assert all(len(layer.lora_A["sum"]) == 1 for layer in lora_layers(model).values())


@given(N=st.integers(1, 12), K=st.integers(1, 12), R=st.integers(1, 14), data=st.data())
def test_truncation_is_the_nearest_matrix_of_its_rank(N, K, R, data):
    """Eckart and Young: its distance is the norm of the singular values left out."""
    r = data.draw(st.integers(1, min(N, K, R)))
    A, B = torch.randn(R, K, dtype=torch.float64), torch.randn(N, R, dtype=torch.float64)
    small_A, small_B = compress(A, B, r)
    assert small_A.shape == (r, K) and small_B.shape == (N, r)
    left_out = torch.linalg.svdvals(B @ A)[r:].norm()
    distance = torch.linalg.matrix_norm(B @ A - small_B @ small_A)
    # Singular values are right to a few roundings of the largest, R K of which are summed.
    assert abs(distance - left_out) <= 16 * (N + K + R) * torch.finfo(torch.float64).eps * torch.linalg.matrix_norm(B @ A, 2)


def test_a_combination_of_pissa_adapters_leaves_their_start_out():
    model = random_model()
    adapters.attach(model, LoraConfig(r=2, init_lora_weights="pissa"), "a")
    adapters.attach(model, LoraConfig(r=2, init_lora_weights="olora"), "b")
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model, "a").values():
            parameter.add_(0.1)
    combine(model, ["a", "b"], [1.0, 1.0], "sum")
    for layer in lora_layers(model).values():
        parts = [("a", 1.0), ("b", 1.0)]
        exact = delta(layer, parts, torch.float64)
        assert_as_accurate(delta(layer, [("sum", 1.0)], torch.float32), delta(layer, parts, torch.float32), exact)


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_saved_and_loaded_again(tmp_path, how):
    model = adapted()
    combine(model, NAMES, WEIGHTS, "sum", how, r=2 if how == "svd" else None)
    save_adapter(model, tmp_path)
    twin = random_model()
    twin.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k})
    load_adapter(twin, tmp_path)
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.peers
def test_beside_pefts_cat_and_svd(tmp_path):
    """On the same adapters PEFT's cat and svd add up as ours; its linear, of the factors, does not."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = random_model()
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config("smollm2"))).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    peer.tie_weights()
    same = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    for name in ("a", "b"):
        adapters.attach(model, same, name)
        save_adapter(model, tmp_path / name)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "a", "a")
    peer.load_adapter(tmp_path / "b", "b")
    layers, ours, theirs, exact = lora_layers(model), {}, {}, {}
    for how, r in (("cat", None), ("svd", 3), ("linear", None)):
        combine(model, ["a", "b"], [0.5, 0.5], how, how, r)
        peer.add_weighted_adapter(["a", "b"], [0.5, 0.5], how, combination_type=how, svd_rank=r)
        ours[how], theirs[how], exact[how] = [], [], []
        for name, layer in layers.items():
            whole = delta(layer, [("a", 0.5), ("b", 0.5)], torch.float64)
            if how == "svd":
                U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
                whole = (U[:, :r] * S[:r]) @ Vh[:r]
            exact[how].append(whole.flatten())
            ours[how].append(delta(layer, [(how, 1.0)], torch.float32).flatten())
            theirs[how].append(peer.base_model.model.get_submodule(name).get_delta_weight(how).detach().flatten())
    ours, theirs, exact = ({how: torch.cat(parts) for how, parts in found.items()} for found in (ours, theirs, exact))
    for how in ("cat", "svd"):
        assert_as_accurate(ours[how], theirs[how], exact[how])
    assert_as_accurate(ours["linear"], theirs["cat"], exact["linear"])
    assert (theirs["linear"] - exact["linear"]).norm() > 0.5 * exact["linear"].norm()


def test_what_is_refused_changes_nothing():
    model = adapted()
    adapters.attach(model, LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), "dora")
    before = snapshot(model)
    for arguments, message in (
        ((["a", "x"], [1, 1], "s"), "no adapter named 'x'; the model has: a, b, c, dora"),
        ((["a", "b"], [1], "s"), "2 adapters and 1 weights"),
        (([], [], "s"), "0 adapters"),
        ((["a", "a"], [1, 1], "s"), "names an adapter twice"),
        ((["a", "b"], [1, float("nan")], "s"), "expected finite numbers"),
        ((["a", "b"], [1, 1], "a"), "already has an adapter named 'a'"),
        ((["a", "b"], [1, 1], "s", "ties"), "how is 'ties'; expected one of linear, cat, svd"),
        ((["a", "b"], [1, 1], "s", "svd"), "'svd' takes a rank r"),
        ((["a", "b"], [1, 1], "s", "cat", 3), "the others take none"),
        ((["a", "b"], [1, 1], "s", "svd", 0), "r is 0"),
        ((["a", "b"], [1, 1], "s", "svd", 6), "r is 6, and the sum on model.layers.0.self_attn.q_proj has rank 5 at most"),
        ((["a", "dora"], [1, 1], "s"), "'dora' has use_dora=True"),
    ):
        with pytest.raises(ValueError, match=message):
            combine(model, *arguments)
        assert_unchanged(model, before)
        assert adapters.active_adapter(model) == "dora"
