"""Starts: beside PEFT's, against what they promise, and that the base comes back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_cases import hf_config, random_model
from safetensors.torch import load_file, save_file
from small_run import examples, settings
from test_adapters_lora import assert_unchanged, logits, snapshot, wide
from tolerance import assert_as_accurate

from posttrain import adapters
from posttrain.adapters import LoraConfig, load_adapter, save_adapter
from posttrain.adapters.lora import lora_layers
from posttrain.adapters.lora_init import dense_weight, init_loftq, initial
from posttrain.errors import PosttrainError
from posttrain.kernels import quantize_weight
from posttrain.model import save
from posttrain.quantized import QuantizedLinear, quantize_model
from posttrain.sft import sft

TAKE = ["pissa", "pissa_niter_8", "olora"]


@pytest.fixture(params=["dense", "nf4"])
def model(request):
    model = random_model("qwen2")
    if request.param == "nf4":
        quantize_model(model)
    return model


def train_a_little(model):
    """Every parameter moved by a tenth of its size."""
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * parameter.std() / 10)


@pytest.mark.parametrize(
    ("init", "use_dora"), [(init, False) for init in (*TAKE, "orthogonal")] + [("pissa", True), ("olora", True)]
)
def test_starts_at_the_base_and_gives_it_back(model, init, use_dora):
    before, state, exact = logits(model), snapshot(model), logits(wide(model))
    adapters.attach(model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, use_dora=use_dora))
    unit = torch.finfo(torch.float32).eps
    for layer in lora_layers(model).values():
        assert all(p.abs().max() > 0 for p in layer.tensors("default").values())
        A, B = layer.factors("default")
        # A product of 2 r terms that cancel: each rounds by its own size.
        sizes = layer.lora_B["default"].abs() @ layer.lora_A["default"].abs()
        assert ((B @ A).abs() <= 8 * unit * sizes).all()
    # The update adds rounding of the size of W x itself: that of a second product with W.
    assert_as_accurate(logits(model), before + (before.double() - exact).float() * 8, exact)
    train_a_little(model)
    assert not torch.allclose(logits(model), before)
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, state)


def peft_layer(peft, W, **settings):
    peer = torch.nn.Sequential(torch.nn.Linear(W.shape[1], W.shape[0]))
    peer[0].weight.data = W.clone()
    peer = peft.get_peft_model(peer, peft.LoraConfig(target_modules=["0"], **settings))
    return peer.base_model.model[0]


@pytest.mark.peers
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_factors_are_pefts(init, shape):
    peft = pytest.importorskip("peft")
    W = torch.randn(shape) @ torch.diag(0.8 ** torch.arange(shape[1]))  # singular values well apart
    theirs = peft_layer(peft, W, r=4, lora_alpha=6, init_lora_weights=init)
    layer = torch.nn.Linear(shape[1], shape[0])
    layer.weight.data = W.clone()
    _, tensors = initial(LoraConfig(r=4, lora_alpha=6, init_lora_weights=init), "x", layer, None)
    A, B = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
    # Both are backward stable: right for a matrix within (N + K) eps of W (Higham, chapters 19 and 3).
    unit = sum(shape) * torch.finfo(torch.float32).eps
    assert (tensors["lora_B"] @ tensors["lora_A"] - B @ A).norm() < unit * W.norm()
    assert torch.equal(tensors["lora_A0"], tensors["lora_A"]) and torch.equal(tensors["lora_B0"], -tensors["lora_B"])
    # The same share of it in A: their Gram matrices, which forget the signs that a decomposition leaves open.
    grams = [factor.double() @ factor.double().t() for factor in (tensors["lora_A"], A)]
    assert (grams[0] - grams[1]).norm() < unit * grams[1].norm()
    # Residual and update together are W again.
    residual = W - 1.5 * tensors["lora_B0"].neg() @ tensors["lora_A0"]
    assert_as_accurate(residual + 1.5 * tensors["lora_B"] @ tensors["lora_A"], residual + 1.5 * B @ A, W.double())


@pytest.mark.peers
@pytest.mark.parametrize("init", TAKE)
@pytest.mark.parametrize(("use_dora", "use_rslora"), [(False, False), (True, True)])
def test_saved_for_the_original_base(tmp_path, model, init, use_dora, use_rslora):
    """As twice the rank: loaded here and by PEFT onto the untouched base, with equal logits."""
    settings = {"use_dora": use_dora, "use_rslora": use_rslora, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}
    original, fingerprint = copy.deepcopy(model), adapters.base_fingerprint(model)
    adapters.attach(model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, **settings))
    train_a_little(model)
    save_adapter(model, tmp_path)
    reloaded = copy.deepcopy(original)
    load_adapter(reloaded, tmp_path)
    assert adapters.base_fingerprint(reloaded) == fingerprint
    assert torch.equal(logits(reloaded), logits(model))
    if init == TAKE[0] and not isinstance(original.model.layers[0].mlp.up_proj, QuantizedLinear):
        peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**hf_config("qwen2"))).eval()
        peer.load_state_dict(original.state_dict(), strict=False)
        peer.tie_weights()
        peer = peft.PeftModel.from_pretrained(peer, tmp_path)
        with torch.no_grad():
            theirs = peer(torch.arange(24).view(2, 12)).logits
            exact = peer.double()(torch.arange(24).view(2, 12)).logits
        assert_as_accurate(logits(model), theirs, exact)


@pytest.mark.parametrize("alpha", [4, -4])
def test_pissa_takes_the_most_of_the_weight_and_olora_the_first_columns(alpha):
    layer = torch.nn.Linear(40, 24)
    W = dense_weight(layer)
    left = {}
    for init in TAKE:
        _, tensors = initial(LoraConfig(r=4, lora_alpha=alpha, init_lora_weights=init), "x", layer, None)
        left[init] = torch.linalg.matrix_norm(W - alpha / 4 * tensors["lora_B"] @ tensors["lora_A"])
    best = torch.linalg.svdvals(W.double())[4:].norm()
    assert abs(left["pissa"] - best) < 100 * torch.finfo(torch.float32).eps * W.norm()
    assert best <= left["pissa_niter_8"] < W.norm()
    if alpha > 0:  # Q R takes no sign
        assert left["pissa_niter_8"] < left["olora"] < W.norm()


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_loftq_is_nearer_than_quantizing(tmp_path, iterations, quant_type):
    """On every layer, and nearer with more steps in sum; the file loads on the dense model with the same bits."""
    dense = random_model()
    original = copy.deepcopy(dense)
    settings = {"loftq_iter": iterations, "quant_type": quant_type}
    adapters.attach(dense, LoraConfig(r=8, init_lora_weights="loftq", loftq_config=settings))
    total = [0.0, 0.0]
    for name, layer in lora_layers(dense).items():
        W = original.get_submodule(name).weight
        plain = quantize_weight(W.detach(), quant_type)
        assert isinstance(layer.base_layer, QuantizedLinear)
        assert torch.equal(layer.base_layer.packed, plain.packed) == (iterations == 1)
        A, B = layer.factors("default")
        errors = [
            torch.linalg.matrix_norm(W - plain.dequantize()).item(),
            torch.linalg.matrix_norm(W - layer.base_layer.weight.dequantize() - layer.scaling["default"] * (B @ A)).item(),
        ]
        assert errors[1] < errors[0]
        total = [t + e for t, e in zip(total, errors, strict=True)]
    assert total[1] < 0.9 * total[0]
    train_a_little(dense)
    save_adapter(dense, tmp_path)
    if iterations == 1:
        quantize_model(original, quant_type)
    load_adapter(original, tmp_path)
    assert torch.equal(logits(original), logits(dense))
    save_adapter(original, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    adapters.delete_adapter(dense, "default")
    assert isinstance(dense.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_loftq_with_more_steps_is_nearer():
    errors = []
    for steps in (1, 5):
        layer = torch.nn.Linear(128, 96)
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        config = LoraConfig(r=16, init_lora_weights="loftq", loftq_config={"loftq_iter": steps})
        base, tensors = initial(config, "x", layer, None)
        left = layer.weight - base.weight.dequantize() - config.scaling("x") * tensors["lora_B"] @ tensors["lora_A"]
        errors.append(torch.linalg.matrix_norm(left).item())
    assert errors[1] < errors[0]


def test_loftq_for_a_base_in_4_bits(tmp_path):
    """The adapter makes up for what quantizing took, read from the dense model's files; the base keeps its bytes."""
    dense = random_model()
    save(dense, tmp_path / "dense")
    model = copy.deepcopy(dense)
    quantize_model(model)
    state = snapshot(model)
    exact, before = logits(dense), logits(model)
    with pytest.raises(ValueError, match="down_proj is in 4 bits already|q_proj is in 4 bits already"):
        adapters.attach(model, LoraConfig(init_lora_weights="loftq"))
    assert_unchanged(model, state)
    adapters.attach(model, LoraConfig(r=16))
    init_loftq(model, tmp_path / "dense")
    assert (logits(model) - exact).norm() < (before - exact).norm()
    twin = copy.deepcopy(dense)
    adapters.attach(twin, LoraConfig(r=16, init_lora_weights="loftq"))
    ours, theirs = adapters.adapter_parameters(model), adapters.adapter_parameters(twin)
    assert all(torch.equal(p, theirs[key]) for key, p in ours.items())
    adapters.delete_adapter(model, "default")
    assert_unchanged(model, state)
    adapters.attach(model, LoraConfig(r=4))
    save(random_model("llama2"), tmp_path / "other")
    with pytest.raises(PosttrainError, match=r"holds no model.layers.0.self_attn.k_proj.weight of \(32, 64\)"):
        init_loftq(model, tmp_path / "other")


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_resumes_bit_for_bit(tmp_path, init):
    """What trains is in the checkpoint; what it started with is made again."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=init)

    def run(folder, **rest):
        torch.manual_seed(0)
        model = random_model(num_hidden_layers=1)
        sft(model, examples(6), settings(tmp_path / folder, max_steps=4, gradient_accumulation_steps=1), lora, quiet=True, **rest)
        return adapters.saved_tensors(model)

    class Stop(Exception):
        pass

    def stop(entry):
        if entry["step"] == 3:
            raise Stop

    whole = run("whole")
    with pytest.raises(Stop):
        run("cut", on_step=stop)
    resumed = run("cut", resume=True)
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_cannot_be_decomposed_is_named(init, value):
    model = random_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"layers.1.mlp.up_proj holds NaN or infinite values, and init_lora_weights='{init}'"):
        adapters.attach(model, LoraConfig(r=2, init_lora_weights=init))
    assert [type(module) for module in model.modules()] == before


def test_refused_ranks_leave_the_model_alone(model):
    before = snapshot(model)
    for config, message in (
        (LoraConfig(r=65), r"the rank of .*q_proj is 65, and its weight of 64 x 64 has rank 64 at most"),
        (LoraConfig(r=4, rank_pattern={"k_proj": 33}), r"the rank of .*k_proj is 33, and its weight of 32 x 64"),
        (LoraConfig(r=33), r"lower r, or give such layers a rank of their own: rank_pattern=\{'k_proj': 32\}"),
        (LoraConfig(r=65, target_modules=["embed_tokens"]), r"97 x 64 has rank 64 at most; .*rank_pattern=\{'embed_tokens': 64\}"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters.attach(model, config)
        assert_unchanged(model, before)


def test_a_file_may_hold_a_rank_above_the_layers(model, tmp_path):
    """PEFT trains such adapters; only new ones are refused."""
    adapters.attach(model, LoraConfig(r=32, target_modules=["k_proj"], init_lora_weights=False))
    expected = logits(model)
    save_adapter(model, tmp_path)
    adapters.delete_adapter(model, "default")
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    # Twice the columns and rows, each half the product: 64 ranks in a weight of 32 rows.
    double = {key: torch.cat((tensor, tensor), int("lora_B" in key)) for key, tensor in load_file(file).items()}
    save_file(double, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 64}))
    load_adapter(model, tmp_path)
    assert_as_accurate(logits(model), expected, logits(wide(model)))


def test_no_adapter_comes_to_a_base_that_loftq_made():
    """Its file could name no base that it fits."""
    model = random_model("qwen2")
    before = adapters.base_fingerprint(model)
    adapters.attach(model, LoraConfig(r=2, init_lora_weights="loftq", loftq_config={"loftq_iter": 2}), "a")
    assert adapters.base_fingerprint(model) == before  # the file holds what makes that base of this one
    with pytest.raises(ValueError, match="adapter 'a' brought the base that LoftQ quantized"):
        adapters.attach(model, LoraConfig(r=2), "b")
    assert adapters.adapter_names(model) == ["a"]
    adapters.delete_adapter(model, "a")
    assert adapters.base_fingerprint(model) != before
