"""The whole run on the model that comes along, with few steps; interrupted and run again; and the real one (`real`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posttrain import quickstart as qs
from posttrain.adapters import load_adapter
from posttrain.errors import PosttrainError
from posttrain.evaluate import Accuracy, choice_accuracy
from posttrain.model.loading import load
from posttrain.model.tokenizer import Tokenizer
from posttrain.statistics import compare

SHORT = replace(qs.OFFLINE, steps=3, test_items=24, shots=2, save_steps=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> qs.Results:
    return qs.quickstart(SHORT, tmp_path_factory.mktemp("run") / "output")


def test_every_phase_ran_and_was_measured(results) -> None:
    assert [phase.name for phase in results.phases] == [
        "fetch",
        "quantize to NF4",
        "zero-shot accuracy",
        "few-shot accuracy",
        "QLoRA training",
        "accuracy after",
        "reload from disk",
        "generate a sample",
    ]
    peaks = [phase.peak_bytes for phase in results.phases]
    assert all(phase.seconds > 0 for phase in results.phases) and peaks == sorted(peaks) and peaks[0] > 0
    assert results.seconds == sum(phase.seconds for phase in results.phases[1:])


def test_accuracies_and_comparisons_are_of_the_same_items(results) -> None:
    assert list(results.accuracies) == ["zero-shot", "2-shot", "fine-tuned"]
    assert all(accuracy.n == SHORT.test_items for accuracy in results.accuracies.values())
    tuned = results.accuracies["fine-tuned"].correct
    for name, comparison in zip(("zero-shot", "2-shot"), results.comparisons, strict=True):
        assert comparison == compare(results.accuracies[name].correct, tuned, name, "fine-tuned")


def test_the_saved_adapter_gives_the_reported_answers(results) -> None:
    model = load(results.model, quantize="nf4")
    load_adapter(model, results.adapter)
    items = qs.choice_items(results.splits, "test", Tokenizer.load(results.model))[: SHORT.test_items]
    again = choice_accuracy(model, items)
    assert again.predictions == results.accuracies["fine-tuned"].predictions
    assert again.logprobs == results.accuracies["fine-tuned"].logprobs and results.reload_error == 0.0


def test_questions_are_shots_and_prompt_and_one_choice_a_label() -> None:
    tokenizer = Tokenizer.load(qs._model(SHORT, None)[0])
    splits = qs.load_task("offline")
    plain, shown = (qs.choice_items(splits, "validation", tokenizer, shots)[0] for shots in (0, 2))
    review = splits.validation[0]
    text = f"Review: {review.text}\nSentiment:"
    assert tokenizer.decode(plain.prompt) == text
    shots = [next(r for r in splits.train if r.label == label) for label in ("negative", "positive")]
    before = "".join(f"Review: {shot.text}\nSentiment: {shot.label}\n\n" for shot in shots)
    assert tokenizer.decode(shown.prompt) == before + text
    assert [tokenizer.decode(choice) for choice in shown.choices] == [" negative", " positive"]
    assert shown.answer == ["negative", "positive"].index(review.label)


def test_reload_error_refuses_another_answer() -> None:
    before = Accuracy([0, 1], [True, True], [[-1.0, -2.0], [-3.0, -0.5]])
    moved = Accuracy([0, 1], [True, True], [[-1.0, -2.25], [-3.0, -0.5]])
    assert qs.reload_error(before, before) == 0.0
    assert qs.reload_error(before, moved) == 0.25
    with pytest.raises(PosttrainError, match=r"1 of 2 items differently \(first: item 1\)"):
        qs.reload_error(before, Accuracy([0, 0], [True, False], before.logprobs))


def test_storage_counts_every_parameter(results) -> None:
    """The linear layers at 4 bits and their share of absmax; the rest at 16."""
    dense, model = load(results.model), load(results.model, quantize="nf4")
    linear = sum(m.weight.numel() for m in dense.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.numel() for p in dense.parameters()) - linear
    held = sum(t.nbytes for t in model.state_dict().values())
    assert f"{linear / 1e6:.4g} M parameters at 4." in results.storage
    assert f"{8 * held / (linear + rest):.2f} bits a parameter" in results.storage


def test_run_again_keeps_the_adapter(results, capsys) -> None:
    """Nothing is trained a second time, and other settings are refused rather than mixed."""
    weights = (results.adapter / "adapter_model.safetensors").read_bytes()
    again = qs.quickstart(SHORT, results.output)
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == weights
    assert again.accuracies["fine-tuned"] == results.accuracies["fine-tuned"]
    assert [e["loss"] for e in again.training.metrics] == [e["loss"] for e in results.training.metrics]
    with pytest.raises(PosttrainError, match="learning_rate"):
        qs.quickstart(replace(SHORT, learning_rate=1e-4), results.output)
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == weights


def _steps_done(adapter: Path) -> int:
    return max((int(folder.name.partition("-")[2]) for folder in adapter.glob("checkpoint-*")), default=0)


def test_interrupted_training_goes_on_from_its_checkpoint(tmp_path) -> None:
    """SIGINT once a checkpoint is there: exit code 130, no traceback, and the same command goes on with the next step."""
    adapter = tmp_path / "run" / "adapter"
    command = [sys.executable, "-u", "-m", "posttrain.cli", "quickstart", "--offline", "--output", str(tmp_path / "run")]
    steps = 4000  # more than a machine can take while this process waits for its turn
    command += ["--steps", str(steps), "--test-items", "4"]
    first_steps = []
    # a shell that runs the tests in the background has its children ignore SIGINT
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    for _ in range(2):
        before = _steps_done(adapter)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **heeds) as process:
            first_steps.append(next(line for line in process.stderr if line.startswith("step ")).split("/")[0])
            while _steps_done(adapter) <= before and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            err = process.stderr.read()
        assert process.returncode == 130 and "Traceback" not in err and "Run the same command again" in err, err[-2000:]
        if before == 0:
            done = _steps_done(adapter)
    assert first_steps == ["step 1", f"step {done + 1}"] and 0 < done < _steps_done(adapter) < steps
    logged = [json.loads(line)["step"] for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, len(logged) + 1)) and len(logged) >= _steps_done(adapter)


@pytest.mark.real
@pytest.mark.skipif("POSTTRAIN_SLOW" not in os.environ, reason="the whole run takes minutes: set POSTTRAIN_SLOW=1")
def test_the_real_run_meets_its_bars(tmp_path) -> None:
    """Under 6 minutes after the downloads, under 2 GB, and significantly better than zero-shot on >= 1000 items."""
    command = [sys.executable, "-m", "posttrain.cli", "quickstart", "--output", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    summary = next(line for line in out.splitlines() if "after the downloads" in line)
    seconds, peak = float(summary.split()[0]), float(summary.split()[-2])
    assert seconds < 360 and peak < 2.0
    claim = next(line for line in out.splitlines() if "fine-tuned is better than zero-shot" in line)
    assert int(claim.rpartition("n = ")[2].rstrip(")")) >= 1000
    assert float(claim.rpartition("McNemar p = ")[2].split(",")[0]) < 0.01
