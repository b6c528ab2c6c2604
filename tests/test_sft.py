"""Fine-tuning: the head on labelled positions alone, packing that changes nothing, kills that change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import random_model
from small_run import STEPS, examples, settings, small_run
from tolerance import assert_as_accurate

from posttrain import token_logprobs
from posttrain.adapters import LoraConfig, PromptTuningConfig, adapter_parameters, attach, load_adapter
from posttrain.data import Example
from posttrain.errors import PosttrainError
from posttrain.packing import collate, pack
from posttrain.quantized import quantize_model
from posttrain.sft import loss_sum, sft


def plain_loss(model, example):
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
    return torch.nn.functional.cross_entropy(model(ids)[0, :-1], labels[1:], reduction="sum")


def assert_same_loss(name, targets, batch, some):
    """The loss of `batch` and its gradient, beside each sequence on its own through the whole head."""

    def run(dtype, ours):
        torch.manual_seed(0)
        model = random_model(name, dtype)
        attach(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False), dtype=torch.float64)
        loss = loss_sum(model, batch) if ours else torch.stack([plain_loss(model, e) for e in some]).sum()
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])

    (loss, exact_gradient), (exact_loss, _) = run(torch.float64, False), run(torch.float64, True)
    # In float64 both agree far beyond what fp32 can tell; in fp32 the gradient is as accurate as the plain one.
    assert abs(loss - exact_loss) < torch.finfo(torch.float32).eps / 2 * loss
    assert_as_accurate(run(torch.float32, True)[1], run(torch.float32, False)[1], exact_gradient)


@pytest.mark.parametrize("name", ["smollm2", "llama2"])  # tied and not
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_are_those_of_whole_logits(name, packed):
    some = examples(6)
    batch = collate(pack(some, 30) if packed else [[e] for e in some])
    assert (batch.segment_ids is not None) == packed
    assert_same_loss(name, "all-linear", batch, some)


def test_the_head_sees_labelled_positions_alone(monkeypatch):
    some = examples(3)
    batch, rows = collate([[e] for e in some]), []
    real = token_logprobs.linear_logprobs
    monkeypatch.setattr(token_logprobs, "linear_logprobs", lambda hidden, *rest: rows.append(len(hidden)) or real(hidden, *rest))
    loss_sum(random_model(), batch)
    assert rows == [batch.normalizer] == [sum(e.num_labels for e in some)]


def test_a_head_with_an_adapter_is_trained_through(monkeypatch):
    """The other way to the loss, chunk by chunk through the head, gives what whole logits give."""
    monkeypatch.setattr(token_logprobs, "CHUNK", 7)
    some = examples(5)
    assert_same_loss("llama2", ["lm_head", "q_proj"], collate([[e] for e in some]), some)


def final(folder):
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    small_run(folder)
    yield final(folder)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("where", "number", "left"), [("step", 5, 4), ("save", 4, 2), ("step", 1, None)])
def test_killed_and_resumed_ends_in_the_same_bits(tmp_path, undisturbed, where, number, left):
    tests = Path(__file__).parent
    command = [sys.executable, str(tests / "small_run.py"), str(tmp_path), where, str(number)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tests)}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    found = [p.name for p in sorted(tmp_path.glob("checkpoint-*"))]
    assert found[-1:] == ([f"checkpoint-{left}"] if left else [])
    small_run(tmp_path, resume=True)
    assert final(tmp_path) == undisturbed
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


class Stopped(Exception):
    pass


def test_stopped_after_any_step_and_resumed_ends_in_the_same_bits(tmp_path, undisturbed):
    """Over and over in one folder: each run gets one step further than the last checkpoint, then stops."""

    def stop_at(number):
        def on_step(entry):
            if entry["step"] == number:
                raise Stopped

        return on_step

    for number in range(1, STEPS + 1):
        with pytest.raises(Stopped):
            small_run(tmp_path, resume=True, on_step=stop_at(number))
    small_run(tmp_path, resume=True)
    assert final(tmp_path) == undisturbed
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*/*")}
    small_run(tmp_path, resume=True)  # nothing is left to do
    assert final(tmp_path) == undisturbed and before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*/*")}


def test_a_line_cut_short_in_the_metrics_is_written_again(tmp_path, undisturbed):
    small_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-7")
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-40])
    small_run(tmp_path, resume=True)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(1, STEPS + 1))
    assert final(tmp_path) == undisturbed


def test_another_run_is_not_resumed_and_not_overwritten(tmp_path):
    small_run(tmp_path, max_steps=2)
    with pytest.raises(PosttrainError, match=r"holds checkpoint-2 of an earlier run; resume it"):
        small_run(tmp_path, max_steps=2)
    with pytest.raises(PosttrainError, match=r"belongs to another run: max_steps was 2 and is 3; seed was 0 and is 1"):
        small_run(tmp_path, max_steps=3, seed=1, resume=True)
    torch.manual_seed(9)
    with pytest.raises(PosttrainError, match="base was 'sha256:"):
        small_run(tmp_path, max_steps=2, resume=True, model=random_model())
    with pytest.raises(PosttrainError, match=r"adapter.lora_dropout was 0.2 and is 0.0; adapter\.r was 2 and is 3; .*data was"):
        sft(random_model(), examples(3), settings(tmp_path, max_steps=2), LoraConfig(r=3), resume=True, quiet=True)


def held_in(dtype=torch.bfloat16, **quantization):
    """small_run's model, held otherwise."""
    torch.manual_seed(0)
    model = random_model(dtype=torch.bfloat16, num_hidden_layers=1)
    if quantization:
        quantize_model(model, **quantization)
    return model.to(dtype)


def test_a_base_held_otherwise_is_not_gone_on_with(tmp_path):
    """Its fingerprint is the dense model's, whatever its precision."""
    small_run(tmp_path, max_steps=2, model=held_in(quant_type="nf4"))
    for model, changed in (
        (held_in(), "in_4_bits was '7 layers nf4 in blocks of 64, absmax 8 bits' and is 'none'"),
        (held_in(quant_type="fp4"), "in_4_bits was .* and is '7 layers fp4 "),
        (held_in(quant_type="nf4", block_size=128), "in_4_bits was .* in blocks of 128"),
        (held_in(quant_type="nf4", double_quant=False), "in_4_bits was .* and is .*, absmax float32'"),
        (held_in(torch.float32, quant_type="nf4"), r"dtype was 'bfloat16' and is 'float32'\."),
    ):
        with pytest.raises(PosttrainError, match=rf"belongs to another run: held\.{changed}"):
            small_run(tmp_path, max_steps=2, resume=True, model=model)


def test_the_saved_adapter_is_the_trained_model(tmp_path):
    torch.manual_seed(0)
    model = random_model()
    quantize_model(model)
    sft(model, examples(), settings(tmp_path, max_steps=2), LoraConfig(r=2), quiet=True)
    torch.manual_seed(0)
    again = random_model()
    quantize_model(again)
    load_adapter(again, tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids), model.eval()(ids))


def test_packing_fills_rows(tmp_path):
    torch.manual_seed(0)
    some = examples()
    result = sft(random_model(), some, settings(tmp_path, max_steps=0), LoraConfig(r=2), max_length=60, quiet=True)
    tokens = sum(len(e.input_ids) for e in some)
    assert result.tokens == tokens and result.steps < -(-len(some) // 4)


def test_sequences_that_do_not_fit(tmp_path):
    model = random_model()
    with pytest.raises(PosttrainError, match="holds no examples"):
        sft(model, [], settings(tmp_path), LoraConfig())
    for length, limit in ((65, None), (20, 19)):
        ids = list(range(3, 3 + length))
        with pytest.raises(PosttrainError, match=rf"the longest example has {length} tokens; max_length is {limit or 'not given'}"):
            sft(model, [Example(ids, ids)], settings(tmp_path), LoraConfig(), max_length=limit)
    with pytest.raises(ValueError, match=r"example 1 holds token ids from 1 to 97; the vocabulary has 0 to 96\. Is this"):
        sft(model, [Example([1, 96], [1, 96]), Example([1, 97], [1, 97])], settings(tmp_path), LoraConfig())
    ids = list(range(3, 10))
    with pytest.raises(PosttrainError, match="context holds 0 beside 70 virtual ones. Take fewer"):
        sft(model, [Example(ids, ids)], settings(tmp_path), PromptTuningConfig(num_virtual_tokens=70))
