"""`posttrain dpo` on the model that comes along: trains, measures on held-out pairs, resumes, refuses."""

from __future__ import annotations

import json

import pytest

from posttrain import cli


def run(capsys, *argv):
    code = cli.main(["dpo", "--model", "offline", *map(str, argv)])
    return code, *capsys.readouterr()


@pytest.fixture
def data(tmp_path):
    def write(name, *rows):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


GOOD = [{"prompt": f"The {thing} is", "chosen": " fine.", "rejected": " bad."} for thing in ("sea", "sky", "sun", "sand")]


def test_trains_measures_and_resumes(capsys, data, tmp_path):
    pairs, held_out = (
        data("pairs.jsonl", *GOOD),
        data("held_out.jsonl", {"prompt": "The air is", "chosen": " fine.", "rejected": " bad."}),
    )
    options = ["--data", pairs, "--eval-data", held_out, "--output", tmp_path / "out", "--max-steps", 4, "--batch-size", 2]
    code, out, err = run(capsys, *options, "--loss-type", "sigmoid,sft", "--loss-weights", "1,0.1", "--precompute-ref")
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "out") and "4 pairs to learn from, 1 pairs held out" in err
    assert out.startswith("by reward: 1.000 [") and "by likelihood: " in out
    assert {"adapter_model.safetensors", "metrics.jsonl", "reference_logps.safetensors"} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    code, _, err = run(capsys, *options)
    assert code == 1 and "holds checkpoint-4 of an earlier run" in err
    code, _, err = run(capsys, *options, "--resume")
    assert code == 1 and "belongs to another run: preference.loss_type was ['sigmoid', 'sft'] and is 'sigmoid'" in err


def test_an_adapter_goes_on(capsys, data, tmp_path):
    pairs = data("pairs.jsonl", *GOOD)
    assert run(capsys, "--data", pairs, "--output", tmp_path / "one", "--max-steps", 1)[0] == 0
    code, out, _ = run(capsys, "--adapter", tmp_path / "one", "--data", pairs, "--output", tmp_path / "two", "--max-steps", 1)
    assert code == 0 and (tmp_path / "two" / "reference_logps.safetensors").exists()


def test_completions_without_pairs(capsys, data, tmp_path):
    rows = [{"prompt": f"The {thing} is", "completion": " fine.", "label": thing != "sun"} for thing in ("sea", "sky", "sun")]
    options = ["--loss-type", "kto", "--output", tmp_path / "out", "--max-steps", 2, "--desirable-weight", 0.5]
    code, out, err = run(capsys, "--data", data("labelled.jsonl", *rows), *options)
    assert code == 0 and "3 completions to learn from" in err and out.strip() == str(tmp_path / "out")
    assert "kl" in json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    code, _, err = run(capsys, "--data", data("labelled.jsonl", *rows), "--output", tmp_path / "other")
    assert code == 1 and '"chosen", "rejected" missing' in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "0"], "beta is 0.0; expected a positive number"),
        (["--loss-type", "ppo"], "--loss-type ppo: expected cpo, kto, apo_zero_unpaired, or one or several of sigmoid, "),
        (["--loss-type", "sigmoid,sft", "--loss-weights", "1"], "loss_weights are 1"),
        (["--loss-weights", "much"], "--loss-weights 'much': expected numbers with commas between"),
        (["--loss-weights", "0"], "loss_weights are 0.0; expected"),
        (["--loss-type", "kto", "--loss-weights", "1"], "--loss-weights goes with losses of pairs"),
        (["--loss-type", "simpo", "--simpo-gamma", "nan"], "simpo_gamma is nan"),
        (["--eval-data", "/nope"], "--eval-data /nope: No such file or directory; expected a file of JSON lines or reviews:train"),
        (["--epochs", "1e308"], "--epochs is 1e+308; expected at most"),
        (["--method", "full", "--quantize", "nf4"], "--method full trains the weights"),
        (["--max-length", "3"], ":1: 17 tokens, and at most 3 fit"),
        (["--loss-type", "sigmoid,kto"], "'kto' is none of these that go with others"),
        (["--loss-type", "kto", "--simpo-gamma", "1"], "--simpo-gamma goes with losses of pairs"),
        (["--loss-type", "kto", "--ld-alpha", "0"], "--ld-alpha goes with losses of pairs"),
        (["--loss-type", "kto", "--use-weighting"], "--use-weighting goes with losses of pairs"),
        (["--loss-type", "kto", "--label-smoothing", "0"], "--label-smoothing goes with losses of pairs"),
        (["--loss-type", "kto", "--f-divergence-type", "forward_kl"], "--f-divergence-type goes with losses of pairs"),
        (["--simpo-gamma", "1"], "--simpo-gamma goes with --loss-type simpo"),
        (["--desirable-weight", "2"], "--desirable-weight goes with --loss-type kto or apo_zero_unpaired"),
        (["--loss-type", "orpo", "--precompute-ref"], "--precompute-ref goes with losses that compare with a reference"),
        (["--loss-type", "orpo", "--ref-model", "offline"], "--ref-model goes with losses that compare with a reference"),
        (["--adapter", "a", "--r", "64"], "--r goes with a new adapter"),
        (["--adapter", "a", "--method", "full"], "--method goes with a new adapter"),
        (["--eval-data", "reviews:dev"], "reviews:dev: expected reviews:train, reviews:validation, reviews:test"),
    ],
)
def test_refusals(capsys, data, tmp_path, options, message):
    code, _, err = run(capsys, "--data", data("pairs.jsonl", *GOOD), "--output", tmp_path / "out", *options)
    assert code == 1 and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
