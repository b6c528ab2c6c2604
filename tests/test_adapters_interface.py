"""What every adapter method must hold, on a dense and on a 4-bit base: parametrised over METHODS, so that a new one must too."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_cases import random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import examples, settings
from tolerance import assert_as_accurate
from torch import nn

from posttrain import adapters
from posttrain.adapters import METHODS, adapter_parameters, attach, load_adapter, save_adapter
from posttrain.adapters.counts import trainable_parameters
from posttrain.errors import PosttrainError
from posttrain.model.generate import generate
from posttrain.packing import collate, pack
from posttrain.quantized import QuantizedLinear, quantize_model
from posttrain.sft import loss_sum, sft

IDS = torch.arange(24).view(2, 12)
# Small enough for the small model, where the defaults are not.
SMALL = {
    "LoraConfig": {"r": 4},
    "BottleneckConfig": {"bottleneck_size": 8},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
}
STARTS_AT_THE_BASE = {"LoraConfig", "IA3Config"}
MERGES = {"LoraConfig", "IA3Config"}


@pytest.mark.parametrize("kind", sorted(MERGES))
def test_unmerging_another_adapter_leaves_the_active_one(kind):
    """Merged, `b` alone acts, in whichever layers it is; after that it is as before: `a` acts, or none where it is disabled."""
    configs = {
        "LoraConfig": [adapters.LoraConfig(r=2, target_modules=[t], init_lora_weights=False) for t in ("q_proj", "v_proj")],
        "IA3Config": [
            adapters.IA3Config(target_modules=[t], feedforward_modules=[], init_ia3_weights=False) for t in ("k_proj", "v_proj")
        ],
    }[kind]
    model = random_model("smollm2")
    with torch.no_grad():
        base = model(IDS)
        alone = {}
        for name, config in zip("ab", configs, strict=True):
            attach(model, config, name)
            alone[name] = model(IDS)
        adapters.set_adapter(model, "a")
        adapters.merge(model, "b")
        merged = model(IDS)
        adapters.enable(model)  # nothing was disabled: the merged one acts, not the active one
        assert torch.equal(model(IDS), merged)
        adapters.unmerge(model)
        assert adapters.active_adapter(model) == "a" and torch.equal(model(IDS), alone["a"])
        closest = min({"base": base, **alone}.items(), key=lambda named: (merged - named[1]).norm())
        assert closest[0] == "b"
        adapters.disable(model)
        adapters.merge(model)
        adapters.unmerge(model)
        assert torch.equal(model(IDS), base)
        adapters.enable(model)
        assert torch.equal(model(IDS), alone["a"])


@pytest.fixture(params=list(METHODS), ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def config(kind):
    return kind(**SMALL.get(kind.__name__, {}))


def make(quantized=False, **changes):
    torch.manual_seed(3)
    model = random_model("qwen2", **changes)  # biases, grouped heads, a tied head
    if quantized:
        quantize_model(model)
    return model


@pytest.fixture(params=["dense", "nf4"])
def model(request):
    return make(request.param == "nf4")


def logits(model):
    with torch.no_grad():
        return model(IDS)


def wide(model):
    """A dense float64 copy."""
    copied = copy.deepcopy(model)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight, dense.bias = nn.Parameter(layer.weight.dequantize()), layer.bias
            copied.set_submodule(name, dense)
    return copied.double()


@torch.no_grad()
def move(model, name=None, seed=0):
    """As if trained: every parameter of the adapter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()], logits(model)


def assert_unchanged(model, before):
    state, types, outputs = before
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), outputs)


def test_attach_trains_the_adapter_alone(model, kind, config):
    base, exact, before = logits(model), logits(wide(model)), {n: p.clone() for n, p in model.named_parameters()}
    places = attach(model, config)
    assert places and adapters.active_adapter(model) == "default"
    if kind.__name__ in STARTS_AT_THE_BASE:
        assert_as_accurate(logits(model), base, exact)
    trained = {id(p): key for key, p in adapter_parameters(model).items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained.keys()
    move(model)
    model(IDS).float().logsumexp(-1).sum().backward()
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), trained.get(id(parameter))
        assert parameter.grad is None or parameter.grad.any(), f"{trained[id(parameter)]} gets no gradient"
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(logits(model), base)
    adapters.delete_adapter(model, "default")
    assert {n: torch.equal(p, before[n]) for n, p in model.named_parameters()} == dict.fromkeys(before, True)


def test_adapter_is_fp32_on_a_half_precision_base_and_moves_with_it(config):
    model = make(dtype=torch.bfloat16)
    attach(model, config)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    attach(model, config, "narrow", dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}
    model.double()
    assert logits(model).dtype == torch.float64


def test_switching_disabling_and_deleting(model, config):
    base = snapshot(model)
    outputs = {}
    for seed, name in enumerate(("first", "second")):
        attach(model, config, name)
        move(model, seed=seed)
        outputs[name] = logits(model)
    assert adapters.adapter_names(model) == ["first", "second"] and adapters.active_adapter(model) == "second"
    assert not torch.equal(outputs["first"], outputs["second"]) and not torch.equal(outputs["second"], base[2])
    for name in ("first", "second", "first"):
        adapters.set_adapter(model, name)
        assert torch.equal(logits(model), outputs[name])
        training = {id(p) for p in model.parameters() if p.requires_grad}
        assert training == {id(p) for p in adapter_parameters(model, name).values()}
    with adapters.disabled(model):
        assert torch.equal(logits(model), base[2])
    adapters.disable(model)
    assert torch.equal(logits(model), base[2])
    adapters.enable(model)
    assert torch.equal(logits(model), outputs["first"])
    adapters.delete_adapter(model, "first")
    assert torch.equal(logits(model), base[2]) and adapters.active_adapter(model) is None
    adapters.set_adapter(model, "second")
    assert torch.equal(logits(model), outputs["second"])
    adapters.delete_adapter(model, "second")
    assert_unchanged(model, base)


def test_the_saved_adapter_is_the_attached_one(model, config, tmp_path):
    base = snapshot(model)
    attach(model, config)
    move(model)
    outputs, attached, print_ = logits(model), adapters.adapter_configs(model)["default"], adapters.base_fingerprint(model)
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "base_fingerprint": print_}
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, base)
    load_adapter(model, tmp_path, "again")
    assert torch.equal(logits(model), outputs) and adapters.active_adapter(model) == "again"
    assert adapters.adapter_configs(model)["again"] == attached
    save_adapter(model, tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_refused_load_changes_nothing(model, config, tmp_path):
    before = snapshot(model)
    attach(model, config)
    save_adapter(model, tmp_path)
    adapters.delete_adapter(model, "default")
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    good = load_file(file)
    key = min(good)
    for tensors, message in (
        ({k: v for k, v in good.items() if k != key}, f"{key} is missing"),
        (good | {"extra": torch.ones(2)}, "extra is of no layer"),
        (good | {key: torch.ones(3, 3, 3)}, rf"{key} is \(3, 3, 3\)"),
    ):
        save_file(tensors, file, metadata)
        with pytest.raises(PosttrainError, match=message):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)
        assert not adapters.adapter_names(model)
    save_file(good, file, metadata)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | {"peft_type": "NO_SUCH"}))
    with pytest.raises(PosttrainError, match="peft_type is 'NO_SUCH'; supported are"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_another_base_is_refused_with_both_fingerprints(model, config, tmp_path):
    attach(model, config)
    save_adapter(model, tmp_path)
    mine = adapters.base_fingerprint(model)
    torch.manual_seed(9)
    other = random_model("qwen2")
    before, theirs = snapshot(other), adapters.base_fingerprint(other)
    with pytest.raises(PosttrainError, match=f"{mine}.*{theirs}"):
        load_adapter(other, tmp_path)
    assert_unchanged(other, before)
    load_adapter(other, tmp_path, any_base=True)


def test_refused_changes_change_nothing(model, kind, config):
    attach(model, config)
    before = snapshot(model)
    others = [other for other in METHODS if METHODS[other] is not METHODS[kind]]
    assert others
    for other in others:
        with pytest.raises(ValueError, match=f"adapters are of {kind.__name__}, and this one is of {other.__name__}"):
            attach(model, other(**SMALL.get(other.__name__, {})), "other")
    named = {"default": "already has an adapter", "a.b": "cannot name", "train": "cannot name", 3: "cannot name"}
    for name, message in named.items():
        with pytest.raises(ValueError, match=message):
            attach(model, config, name)
    for change in (adapters.set_adapter, adapters.delete_adapter, adapters.merge, adapters.merge_and_unload):
        with pytest.raises(ValueError, match="no adapter named 'absent'; the model has: default"):
            change(model, "absent")
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, "bf16"])
def test_a_dtype_in_which_nothing_trains_changes_nothing(model, config, dtype, tmp_path):
    other = copy.deepcopy(model)
    attach(other, config)
    save_adapter(other, tmp_path)
    before = snapshot(model)
    for change in (lambda: attach(model, config, dtype=dtype), lambda: load_adapter(model, tmp_path, dtype=dtype)):
        with pytest.raises(ValueError, match=f"dtype is {dtype!r}; expected None or one of torch.float64"):
            change()
        assert_unchanged(model, before)


def test_merging_where_it_makes_sense(model, kind, config):
    base = snapshot(model)
    attach(model, config)
    move(model)
    before = snapshot(model)
    if kind.__name__ not in MERGES:
        for change in (adapters.merge, adapters.merge_and_unload):
            with pytest.raises(ValueError, match=f"{kind.__name__} is no change of weights"):
                change(model)
        assert_unchanged(model, before)
        return
    adapters.merge(model)
    merged = logits(model)
    assert not torch.equal(merged, base[2])
    adapters.unmerge(model)
    assert_unchanged(model, before)
    adapters.merge_and_unload(model)
    assert torch.equal(logits(model), merged) and not adapters.adapter_names(model)
    assert {type(m) for m in model.modules()} <= {*base[1], nn.Linear}  # nothing of the method is left


def test_decoding_with_a_cache_writes_what_whole_passes_write(model, config):
    attach(model, config)
    move(model)
    prompts = [[5, 6, 7, 8], [9, 10]]
    for prompt, output in zip(prompts, generate(model, prompts, 6), strict=True):
        expected = list(prompt)
        for _ in range(6):
            expected.append(logits_of(model, expected)[-1].argmax().item())
        assert output == expected[len(prompt) :]


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def gradient(model, batches):
    """(loss, the adapter's gradient), summed over the batches."""
    model.zero_grad()
    losses = [loss_sum(model, batch) for batch in batches]
    for loss in losses:
        loss.backward()
    return torch.stack(losses).sum().item(), torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])


def test_packed_and_checkpointed_training_is_the_same(config):
    """In float64, far beyond what fp32 can tell: rows shared by several examples, and layers computed twice."""
    model = make(dtype=torch.float64)
    attach(model, config)
    move(model)
    some = examples(5)
    loss, expected = gradient(model, [collate([[example]]) for example in some])
    packed = collate(pack(some, 30))
    assert packed.segment_ids is not None
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        ours, found = gradient(model, [packed])
        unit = torch.finfo(torch.float32).eps / 2
        assert abs(ours - loss) < unit * loss and (found - expected).norm() < unit * expected.norm()


class Stopped(Exception):
    pass


def test_a_run_stopped_and_resumed_ends_in_the_same_bits(config, tmp_path):
    def run(folder, on_step=None):
        options = {"max_steps": 4, "save_steps": 1}
        sft(make(num_hidden_layers=1), examples(), settings(folder, **options), config, resume=True, quiet=True, on_step=on_step)

    def stop(entry):
        if entry["step"] == 3:
            raise Stopped

    run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stop)
    run(tmp_path / "stopped")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_counted_from_the_configuration_alone(config):
    model = make()
    attach(model, config)
    assert trainable_parameters(model.config, config) == sum(p.numel() for p in adapter_parameters(model).values())
