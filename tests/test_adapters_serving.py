"""Many adapters on one base: each request as with its adapter alone, hot swap, threads."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from serving_cases import CONFIGS, PROMPTS, alone, make_model, save_adapters, serve
from tolerance import assert_as_accurate

from posttrain import adapters, offline
from posttrain.adapters import LoraConfig, serving
from posttrain.adapters.serving import MultiLoraLinear
from posttrain.model import generate, load
from posttrain.quantized import quantize_model
from posttrain.speculative import engine
from posttrain.speculative.ngram import NgramDrafter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("adapters"))


REQUESTS = ["small", None, "all", "patterned", "late", "all"]


@pytest.mark.parametrize("quantized", (False, True))
def test_each_request_gets_what_its_adapter_alone_gives(folders, quantized):
    model = serve(folders, quantized=quantized)
    mixed = generate(model, PROMPTS, 10, adapter_ids=REQUESTS)
    expected = [alone(folders, name, [prompt], quantized)[0] for name, prompt in zip(REQUESTS, PROMPTS, strict=True)]
    assert mixed == expected
    assert len({tuple(alone(folders, name, [[5]], quantized)[0]) for name in (None, *CONFIGS)}) == 5  # they differ
    assert generate(model, PROMPTS, 10) == alone(folders, None, quantized=quantized)  # no ids: the base
    assert generate(model, PROMPTS, 10, adapter_ids=[None] * 6) == alone(folders, None, quantized=quantized)


def test_rows_that_end_leave_the_others_their_adapters(folders):
    """Stop tokens thin the batch out in the middle; each remaining row keeps its own adapter."""
    names = ["all", None, "small", "patterned"] * 2
    prompts = [[i, 2 * i + 1] for i in range(1, 9)]
    free = [alone(folders, name, [prompt], count=16)[0] for name, prompt in zip(names, prompts, strict=True)]
    stop = {free[0][2], free[1][3], free[2][4], free[5][1]}
    cut = [tokens[: next((i for i, t in enumerate(tokens) if t in stop), len(tokens))] for tokens in free]
    assert len({len(tokens) for tokens in cut}) > 2
    assert generate(serve(folders), prompts, 16, stop_ids=stop, adapter_ids=names) == cut


def test_a_swap_in_the_middle_is_for_the_requests_that_follow(folders):
    """ "all" is replaced by "newer" after four tokens: what is under way ends as it began; the old weights' place is used again."""
    model, seen = serve(folders), []

    def swap(row, token):
        seen.append(row)
        if seen.count(0) == 4 and row == 0:
            serving.replace(model, "all", folders["newer"])
            assert generate(model, [[5]], 12, adapter_ids=["all"]) == alone(folders, "newer", [[5]], count=12)

    prompts, names = [[5], [5], [5]], ["all", "small", None]
    swapped = generate(model, prompts, 12, on_token=swap, adapter_ids=names)
    assert swapped == [alone(folders, name, [[5]], count=12)[0] for name in names]
    assert swapped[0] != alone(folders, "newer", [[5]], count=12)[0]
    for name in ("late", "newer", "all"):
        serving.replace(model, "all", folders[name])
        assert generate(model, [[5]], 12, adapter_ids=["all"]) == alone(folders, name, [[5]], count=12)
    assert model.served_adapters.capacity == 5  # weights that are gone leave their place to newer ones


def test_adapters_come_while_others_generate(folders):
    """Room grows in the middle of a generation, in ids and in ranks."""
    model = serve(folders, ["small"])

    def arrive(row, token):
        if serving.names(model) == ["small"]:
            serving.load(model, "all", folders["all"])
            serving.load(model, "patterned", folders["patterned"])

    assert generate(model, [[5]], 10, on_token=arrive, adapter_ids=["small"]) == alone(folders, "small", [[5]])
    assert serving.names(model) == ["small", "all", "patterned"]
    assert generate(model, [[5]], 10, adapter_ids=["patterned"]) == alone(folders, "patterned", [[5]])


def test_a_removed_adapter_leaves_nothing_behind(folders):
    model = serve(folders)
    serving.remove(model, "all")
    with pytest.raises(ValueError, match="no adapter named 'all' is served; the model serves: small, patterned, late"):
        generate(model, [[5]], 2, adapter_ids=["all"])
    serving.load(model, "newer", folders["late"])  # takes the free place, with fewer layers and a smaller rank
    assert generate(model, [[5]], 10, adapter_ids=["newer"]) == alone(folders, "late", [[5]])
    assert generate(model, [[5]], 10, adapter_ids=["small"]) == alone(folders, "small", [[5]])


def test_the_last_one_gives_the_layers_back(folders):
    model, plain = make_model(), make_model()
    before = {name: type(module) for name, module in model.named_modules()}
    serving.load(model, "all", folders["all"])
    assert any(isinstance(module, MultiLoraLinear) for module in model.modules())
    serving.remove(model, "all")
    assert {name: type(module) for name, module in model.named_modules()} == before and serving.names(model) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    adapters.load_adapter(model, folders["small"])
    assert generate(model, [[5]], 10) == alone(folders, "small", [[5]])


def test_factors_take_the_models_dtype_and_scaling_stays_in_float32(folders):
    model = serve(folders).bfloat16()
    layer = model.model.layers[0].self_attn.q_proj
    stack = layer.stack
    assert stack.lora_A.dtype == stack.lora_B.dtype == torch.bfloat16 and stack.scaling.dtype == torch.float32
    assert stack.ranks.tolist() == [8, 3, 12, 0] and stack.lora_A.shape == (4, 16, 64)
    assert stack.scaling.tolist() == [2.0, 4.0, torch.tensor(8 / 12**0.5).item(), 0.0]
    assert len(generate(model, PROMPTS, 4, adapter_ids=REQUESTS)[0]) == 4


@pytest.mark.parametrize(
    ("recorded", "computed"), [(torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_a_4_bit_base_says_nothing_of_the_factors_dtype(folders, recorded, computed):
    """It records what it was quantized from; they are in what the model computes in, and a layer whose input is neither casts."""
    model = make_model(dtype=recorded)
    quantize_model(model)
    model.to(computed)
    serving.load(model, "all", folders["all"], any_base=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == recorded and layer.stack.lora_A.dtype == layer.stack.lora_B.dtype == computed
    A, B, scaling = layer.stack.lora_A[0], layer.stack.lora_B[0], layer.stack.scaling[0]
    for dtype in (computed, torch.float16):
        x = torch.randn(3, 64).to(dtype)
        with model.served_adapters.rows(["all"], 1, x.device):
            y = layer(x)
        given = x, layer.base_layer.weight.dequantize(dtype), A.to(x), B.to(x)
        plain, exact = (x @ W.T + scaling * (x @ A.T) @ B.T for x, W, A, B in (given, map(torch.Tensor.double, given)))
        assert y.dtype == dtype
        assert_as_accurate(y, plain, exact)


@pytest.mark.parametrize("run", (generate, lambda *args, **options: engine.generate(*args, NgramDrafter(), **options)[0]))
def test_what_on_token_computes_is_no_part_of_the_batch(folders, run):
    """A generation and a forward without names go through the base there, one with names through those; the batch goes on."""
    model, ids, seen = serve(folders), torch.tensor([[9, 8, 7]]), []
    with torch.no_grad():
        logits = model(ids)

    def on_token(row, token):
        seen.append(generate(model, [[5], [40, 41]], 10) == alone(folders, None, [[5], [40, 41]]))
        seen.append(generate(model, [[5]], 10, adapter_ids=["small"]) == alone(folders, "small", [[5]]))
        seen.append(torch.equal(model(ids), logits))

    names, prompts = ["all", None, "late"], [[5], [9, 8, 7], [40, 41]]
    outputs = run(model, prompts, 10, on_token=on_token, adapter_ids=names)
    assert outputs == [alone(folders, name, [prompt])[0] for name, prompt in zip(names, prompts, strict=True)]
    assert seen and all(seen)


def test_a_model_that_serves_can_be_quantized(folders):
    """Nothing keeps the dense weights then; what is served stays and more is loaded."""
    model, expected = serve(folders, ["small"]), alone(folders, "small", [[5]], quantized=True)
    layers = model.model.layers[0]
    dense = [weakref.ref(layer.weight) for layer in (layers.mlp.up_proj, layers.self_attn.q_proj.base_layer)]
    quantize_model(model)
    gc.collect()
    assert [weight() for weight in dense] == [None, None]
    assert generate(model, [[5]], 10, adapter_ids=["small"]) == expected
    serving.load(model, "all", folders["all"])
    assert generate(model, [[5]], 10, adapter_ids=["all"]) == alone(folders, "all", [[5]], quantized=True)


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_a_copy_of_the_model_serves_by_itself(folders, copied):
    """Made in the middle of a generation, too: the copy has none under way."""
    model, copies = serve(folders), []
    expected = alone(folders, "all", [[5]])

    @torch.inference_mode(False)  # whose tensors could not be written to
    def copy_it(row, token):
        copies.append(copied(model))

    generate(model, [[5]], 1, on_token=copy_it, adapter_ids=["all"])
    twin = copies[0]
    serving.replace(model, "all", folders["newer"])
    assert generate(twin, [[5]], 10, adapter_ids=["all"]) == expected
    serving.remove(twin, "all")
    serving.load(twin, "all", folders["small"])
    assert generate(twin, [[5]], 10, adapter_ids=["all"]) == alone(folders, "small", [[5]])
    assert generate(model, [[5]], 10, adapter_ids=["all"]) == alone(folders, "newer", [[5]])


def test_two_threads_do_not_mix_their_requests(folders):
    model, results = serve(folders), {}

    def run(name):
        results[name] = generate(model, [[5]], 10, adapter_ids=[name])

    threads = [threading.Thread(target=run, args=(name,)) for name in ("all", "small")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {name: alone(folders, name, [[5]]) for name in ("all", "small")}


@pytest.mark.parametrize("quantized", (False, True))
@pytest.mark.parametrize("swap", ("replace", "load"))
def test_other_threads_requests_do_not_notice_a_swap(folders, swap, quantized):
    """Room grows in ids and in ranks while two threads generate with an adapter that nobody touches."""
    model, expected = serve(folders, ["late", "small"], quantized), alone(folders, "late", [[5]], quantized)
    results, errors, stop = [], [], threading.Event()

    def run():
        while not stop.is_set():
            try:
                results.append(generate(model, [[5]], 10, adapter_ids=["late"]))
            except (IndexError, ValueError, RuntimeError) as error:
                errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    [thread.start() for thread in threads]
    for i in range(6):
        if swap == "replace":
            serving.replace(model, "small", folders[("all", "patterned", "small")[i % 3]])
        else:
            serving.load(model, f"{i}", folders[("patterned", "all")[i % 2]])
    stop.set()
    [thread.join() for thread in threads]
    assert not errors and results and all(result == expected for result in results)


def test_an_adapter_that_comes_while_another_thread_generates_is_used(folders):
    """In 4 bits that generation had fused projections which the new adapter changes."""
    model, results = serve(folders, ["late"], quantized=True), []

    def arrive(row, token):
        if serving.names(model) == ["late"]:
            serving.load(model, "all", folders["all"])
            thread = threading.Thread(target=lambda: results.append(generate(model, [[5]], 10, adapter_ids=["all"])))
            thread.start()
            thread.join()

    generate(model, [[5]], 4, on_token=arrive, adapter_ids=["late"])
    assert results == [alone(folders, "all", [[5]], quantized=True)]


def test_an_adapter_in_use_is_not_removed(folders):
    model, errors = serve(folders), []

    def try_to_remove(row, token):
        try:
            serving.remove(model, "all")
        except ValueError as error:
            errors.append(str(error))

    generate(model, [[5]], 1, on_token=try_to_remove, adapter_ids=["all"])
    generate(model, [[5]], 1, on_token=lambda *_: serving.replace(model, "all", folders["newer"]), adapter_ids=["all"])
    assert len(errors) == 1 and "'all' is in use by a generation" in errors[0]
    serving.remove(model, "all")


@pytest.mark.parametrize("quantize", (None, "nf4"))
def test_the_offline_model(tmp_path, quantize):
    """A trained model of bytes. In float32 a mixed batch is each request alone. In its own bfloat16 the base's sums depend on the
    number of rows; there it is the same batch with all requests on that adapter, bit for bit."""
    names, text = ["one", None, "two"], [list(b"The "), list(b"Review: a good film"), list(b"A")]
    model = load(offline.path())
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        adapters.attach(model, LoraConfig(r=4 * (seed + 1), lora_alpha=2, init_lora_weights=False), name)
        adapters.save_adapter(model, tmp_path / name)
        adapters.delete_adapter(model, name)
    for dtype in ("fp32", "bf16"):
        model, single = (load(offline.path(), dtype=dtype, quantize=quantize) for _ in range(2))
        serving.load(model, "one", tmp_path / "one")
        serving.load(model, "two", tmp_path / "two")
        mixed = generate(model, text, 12, adapter_ids=names)
        for i, name in enumerate(names):
            if dtype == "bf16":
                assert generate(model, text, 12, adapter_ids=[name] * 3)[i] == mixed[i]
                continue
            if name is not None:
                adapters.load_adapter(single, tmp_path / name)
            assert generate(single, [text[i]], 12)[0] == mixed[i]
            if name is not None:
                adapters.delete_adapter(single, "default")
