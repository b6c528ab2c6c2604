"""Serving: what is refused and what fails, after which nothing has changed."""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import random_model
from serving_cases import alone, make_model, save_adapters, serve, unchanged

from posttrain import adapters
from posttrain.adapters import LoraConfig, serving
from posttrain.adapters.serving import MultiLoraLinear
from posttrain.errors import PosttrainError
from posttrain.model import generate
from posttrain.speculative import engine
from posttrain.speculative.ngram import NgramDrafter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["all", "nobody"], "no adapter named 'nobody' is served; the model serves: all, small, patterned, late"),
        (["all"], r"adapter_ids is \['all'\]; expected a list of 2, a name or None for each prompt"),
        ("all", "adapter_ids is 'all'; expected a list"),
    ],
)
def test_wrong_names_are_errors_never_the_base(folders, ids, message):
    model = serve(folders)
    with pytest.raises(ValueError, match=message):
        generate(model, [[1], [2]], 2, adapter_ids=ids)
    assert generate(model, [[5]], 10, adapter_ids=["all"]) == alone(folders, "all", [[5]])


@pytest.mark.parametrize(("prompts", "count"), [([[5]], 0), ([], 3)])
def test_a_wrong_name_is_an_error_where_there_is_nothing_to_generate(folders, prompts, count):
    model = serve(folders, ["all"])
    for run in (generate, lambda *args, **options: engine.generate(*args, NgramDrafter(), **options)):
        with pytest.raises(ValueError, match="'nobody' is served|expected a list of 0"):
            run(model, prompts, count, adapter_ids=["nobody"])


def test_a_name_is_text(folders):
    model = make_model()
    unchanged(model, lambda: serving.load(model, None, folders["all"]), TypeError, "name is None; expected text")


def test_a_model_that_serves_takes_no_attached_adapter(folders):
    model = serve(folders, ["all", "small"])
    for act in (
        lambda: adapters.attach(model, LoraConfig(r=2)),
        lambda: adapters.attach(model, adapters.PromptTuningConfig(num_virtual_tokens=2)),
        lambda: adapters.load_adapter(model, folders["late"]),
    ):
        unchanged(model, act, ValueError, r"the model serves adapters \(all, small\), and none can be attached")


def test_a_model_that_serves_nothing_refuses_names(folders):
    with pytest.raises(ValueError, match="the model serves no adapters; load them with posttrain.adapters.serving.load"):
        generate(make_model(), [[1]], 2, adapter_ids=["all"])
    for act in (lambda m: serving.replace(m, "all", folders["all"]), lambda m: serving.remove(m, "all")):
        with pytest.raises(ValueError, match="the model serves no adapters; load one"):
            act(make_model())


@pytest.mark.parametrize("method", ("grow", "put"))
@pytest.mark.parametrize("call", (1, 2, 5))
@pytest.mark.parametrize("act", ("first", "another", "replace"))
def test_memory_that_runs_out_changes_nothing(folders, monkeypatch, act, call, method):
    """In whichever layer, while there is made room or written to it."""
    model, whole, calls = serve(folders, [] if act == "first" else ["small", "late"]), getattr(MultiLoraLinear, method), []

    def failing(self, *args):
        calls.append(self)
        if len(calls) == call:
            raise torch.OutOfMemoryError("no memory is left")
        return whole(self, *args)

    def write():
        with monkeypatch.context() as patch:
            patch.setattr(MultiLoraLinear, method, failing)
            (serving.replace if act == "replace" else serving.load)(model, "small" if act == "replace" else "new", folders["all"])

    fingerprint = model.fingerprint
    unchanged(model, write, torch.OutOfMemoryError, "no memory is left")
    if act == "first":
        assert model.fingerprint is fingerprint
        adapters.attach(model, LoraConfig(r=2))
        return
    for name in ("small", "late"):
        assert generate(model, [[5]], 10, adapter_ids=[name]) == alone(folders, name, [[5]])
    serving.load(model, "new", folders["all"])
    for name, folder in (("small", "small"), ("late", "late"), ("new", "all")):
        assert generate(model, [[5]], 10, adapter_ids=[name]) == alone(folders, folder, [[5]])


def test_an_adapter_of_another_base_is_refused(folders):
    torch.manual_seed(8)
    other = random_model("smollm2")
    unchanged(
        other, lambda: serving.load(other, "all", folders["all"]), PosttrainError, r"trained on the base sha256:\w+.*any_base"
    )
    serving.load(other, "all", folders["all"], any_base=True)
    assert serving.names(other) == ["all"]


def test_a_taken_name_and_attached_adapters_are_refused(folders):
    model = serve(folders, ["all"])
    unchanged(model, lambda: serving.load(model, "all", folders["small"]), ValueError, "'all' is served already")
    attached = make_model()
    adapters.load_adapter(attached, folders["all"], "mine")
    unchanged(attached, lambda: serving.load(attached, "x", folders["all"]), ValueError, r"attached adapters \(mine\)")


def test_adapters_that_cannot_be_stacked_are_refused(tmp_path, folders):
    one_with, ia3, bottleneck = "one with base_model.*", adapters.IA3Config(), adapters.BottleneckConfig()
    for config, what in (
        (LoraConfig(r=2, use_dora=True), one_with), (LoraConfig(r=2, lora_bias=True), one_with), (ia3, "IA3Config"),
        (bottleneck, "BottleneckConfig"),
    ):  # fmt: skip
        model = make_model()
        adapters.attach(model, config)
        adapters.save_adapter(model, tmp_path / "one")
        served = serve(folders, ["all"])
        message = f"is {what}, and only LoRA's factors are served side by side"
        unchanged(served, lambda m=served: serving.load(m, "one", tmp_path / "one"), PosttrainError, message)


def test_numbers_beyond_the_models_dtype_are_refused(tmp_path):
    """float16 ends at 65504; in float32 the same adapter is served."""
    model = make_model()
    adapters.attach(model, LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B["default"].fill_(-1e5)
    adapters.save_adapter(model, tmp_path / "one")
    half = make_model(dtype=torch.float16)
    message = r"holds 100000 in base_model.model.*layers.1.self_attn.v_proj.lora_B.weight, .* torch.float16, which ends at 65504"
    unchanged(half, lambda: serving.load(half, "one", tmp_path / "one", any_base=True), PosttrainError, message)
    served = serve({"one": tmp_path / "one"}, ["one"])
    assert served.model.layers[1].self_attn.v_proj.stack.lora_B[0].amin() == -1e5


def test_broken_folders_are_refused(tmp_path, folders):
    model = serve(folders, ["all"])
    unchanged(model, lambda: serving.load(model, "x", tmp_path / "none"), PosttrainError, "holds no adapter_config.json")
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((folders["small"] / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    (broken / "adapter_model.safetensors").write_bytes((folders["small"] / "adapter_model.safetensors").read_bytes())
    for act in (serving.load, serving.replace):
        unchanged(model, lambda act=act: act(model, "x" if act is serving.load else "all", broken), PosttrainError, "does not fit")
