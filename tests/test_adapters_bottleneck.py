"""Bottleneck adapters: the paper's equation in every place, its start, and what trains beside them.

(What every method must hold, on a dense and a 4-bit base: tests/test_adapters_interface.py.)
"""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import random_model
from safetensors.torch import load_file
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import BottleneckConfig, adapter_parameters, attach, load_adapter, save_adapter
from posttrain.adapters.bottleneck import NONLINEARITIES, AdaptedWeight, Bottleneck, BottleneckLinear
from posttrain.errors import PosttrainError
from posttrain.quantized import quantize_model

IDS = torch.arange(24).view(2, 12)
SMALL = BottleneckConfig(bottleneck_size=6)


def logits(model):
    with torch.no_grad():
        return model(IDS)


def expected_hidden(model, places):
    """Decoder of figure 2 in float64, written out: `places` maps (layer, which) to down, down_bias, up, up_bias."""
    hooks = []

    def after(values, f):
        down, down_bias, up, up_bias = values
        return lambda module, inputs, y: y + f(y @ down.T + down_bias) @ up.T + up_bias

    for name, (values, f) in places.items():
        hooks.append(model.get_submodule(name).register_forward_hook(after(values, f)))
    result = logits(model)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_the_papers_equation_before_each_residual_sum(nonlinearity):
    plain = {"gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), "relu": lambda x: x.clamp(min=0),
             "silu": lambda x: x / (1 + torch.exp(-x))}[nonlinearity]  # fmt: skip
    model = random_model("qwen2")
    attach(model, BottleneckConfig(bottleneck_size=6, nonlinearity=nonlinearity, init_std=0.3, train_norms=False))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = logits(model)
    places = {
        name: ([p.detach().clone() for p in module.adapters["default"].parts().values()], plain)
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLinear)
    }
    ends = ["self_attn.o_proj", "mlp.down_proj"]
    assert list(places) == [f"model.layers.{i}.{end}" for i in range(3) for end in ends]
    adapters.delete_adapter(model, "default")
    in_fp32 = expected_hidden(model, places)
    exact = expected_hidden(model.double(), {n: ([v.double() for v in values], f) for n, (values, f) in places.items()})
    assert_as_accurate(ours, in_fp32, exact)


def test_starts_as_the_paper_says():
    model = random_model("smollm2", hidden_size=256, num_attention_heads=4)
    attach(model, BottleneckConfig())
    weights = [p.detach() for key, p in adapter_parameters(model).items() if key.endswith(("down.weight", "up.weight"))]
    biases = [p.detach() for key, p in adapter_parameters(model).items() if key.endswith(".bias")]
    assert len(weights) == len(biases) == 2 * 2 * 3 and not any(bias.any() for bias in biases)
    values = torch.cat([weight.flatten() for weight in weights]) / 1e-2
    assert values.abs().max() <= 2
    # A normal cut at two deviations: its variance is 1 - 4 phi(2) / (2 Phi(2) - 1). Five deviations of the two estimates,
    # whose own variances are at most those of the whole normal: 1 / n and 2 / n.
    n = values.numel()
    phi, Phi = torch.exp(torch.tensor(-2.0)) / (2 * torch.pi) ** 0.5, torch.special.ndtr(torch.tensor(2.0))
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.var() - (1 - 4 * phi / (2 * Phi - 1))) < 5 * (2 / n) ** 0.5


def test_near_the_identity_as_near_as_asked():
    """With ReLU the first change is a product of the two weights: a deviation of a quarter makes it a sixteenth, exactly."""
    y = torch.randn(40, 64, dtype=torch.float64)

    def change(std):
        torch.manual_seed(5)
        model = random_model(num_hidden_layers=1)
        attach(model, BottleneckConfig(bottleneck_size=6, nonlinearity="relu", init_std=std), dtype=torch.float64)
        down, _, up, _ = model.model.layers[0].mlp.down_proj.adapters["default"].parts().values()
        return torch.relu(y @ down.T) @ up.T

    assert torch.equal(change(2**-6), 16 * change(2**-8)) and change(2**-6).any()


def test_norms_and_head_train_as_copies():
    model = random_model("llama2")
    names = {n for n, _ in model.named_modules() if n.endswith("norm")}
    base = {n: model.get_submodule(n).weight.clone() for n in [*names, "lm_head"]}
    attach(model, BottleneckConfig(bottleneck_size=6, train_head=True))
    copied = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedWeight)}
    assert copied.keys() == base.keys() and len(base) == 2 * 3 + 2
    with torch.no_grad():
        for name, module in copied.items():
            assert torch.equal(module.adapters["default"], base[name])
            module.adapters["default"].normal_()
            assert torch.equal(module.base_layer.weight, base[name])
    attach(model, BottleneckConfig(bottleneck_size=6, train_norms=False), "bare")
    assert {key.rpartition(".")[2] for key in adapter_parameters(model)} == {"weight", "bias"}
    assert not any("norm" in key or "lm_head" in key for key in adapter_parameters(model))
    adapters.delete_adapter(model, "default")
    assert not any(isinstance(m, AdaptedWeight) and len(m.adapters) for m in model.modules())
    assert all(torch.equal(model.get_submodule(n).weight, weight) for n, weight in base.items())


def test_the_norms_of_a_half_precision_model_start_bit_for_bit():
    """The fp32 copies compute what the base's bfloat16 weights do, in batches and in one row as decoding has it."""
    model = random_model("qwen3", dtype=torch.bfloat16)
    for ids in (IDS, IDS[:1, :1]):
        with torch.no_grad():
            before = model(ids)
            attach(model, SMALL)
            for module in model.modules():
                if isinstance(module, Bottleneck):
                    module.up.zero_()
            assert torch.equal(model(ids), before)
        adapters.delete_adapter(model, "default")


def test_file(tmp_path):
    model = random_model("llama2")
    attach(model, BottleneckConfig(bottleneck_size=6, nonlinearity="silu", train_head=True))
    save_adapter(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "BOTTLENECK" and content["bottleneck_size"] == 6 and content["nonlinearity"] == "silu"
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    place = "base_model.model.model.layers.1.mlp.down_proj.adapter_"
    found = {key.removeprefix(place): shape for key, shape in shapes.items() if key.startswith(place)}
    assert found == {"down.weight": (6, 64), "down.bias": (6,), "up.weight": (64, 6), "up.bias": (64,)}
    assert shapes["base_model.model.model.layers.2.input_layernorm.weight"] == (64,)
    assert shapes["base_model.model.lm_head.weight"] == (97, 64) and len(shapes) == 2 * 3 * 4 + 2 * 3 + 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bottleneck_size", 0, "bottleneck_size is 0; expected a whole number of at least 1"),
        ("bottleneck_size", 2.5, "bottleneck_size is 2.5"),
        ("nonlinearity", "tanh", "nonlinearity is 'tanh'; expected one of gelu, relu, silu"),
        ("init_std", 0, "init_std is 0; expected a deviation above 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**{field: value})
    save_adapter_with(tmp_path, field, value)
    with pytest.raises(PosttrainError, match=message):
        load_adapter(random_model(), tmp_path)


def save_adapter_with(path, field, value):
    model = random_model()
    attach(model, SMALL)
    save_adapter(model, path)
    content = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(content | {field: value}))


def test_models_that_it_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="the decoders of posttrain.model, and this is a Sequential"):
        attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), SMALL)
    with pytest.raises(ValueError, match="head is its embeddings"):
        attach(random_model("smollm2"), BottleneckConfig(train_head=True))
    model = random_model("llama2")
    quantize_model(model, skip=())
    with pytest.raises(ValueError, match="the head is a QuantizedLinear; only a dense one can train"):
        attach(model, BottleneckConfig(train_head=True))
    assert not adapters.adapter_names(model) and not any(isinstance(m, BottleneckLinear) for m in model.modules())
