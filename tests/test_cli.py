"""The command line: help without torch, exit codes, one-line errors, and each command on the model that comes along."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import cli, offline

COMMANDS = (
    "quickstart", "fetch", "sft", "dpo", "reward", "ppo", "grpo", "adapters", "generate", "evaluate", "merge-adapter", "quantize",
    "doctor",
)  # fmt: skip


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def subprocess_run(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_runnable_examples(command, capsys) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    examples = re.findall(rf"^  .*posttrain {command} ?.*$", out, re.MULTILINE)
    assert 2 <= len(examples) <= 4
    for example in examples:
        arguments = re.sub(r"^.*?posttrain ", "", example)
        assert "--" in arguments or command in ("fetch", "doctor", "quickstart")


def test_examples_parse() -> None:
    """Every option that an example uses exists. Shell parts (pipes, variables, other programs) are cut off."""
    import shlex

    parser = cli.build_parser()
    seen = 0
    # doctor has no options to show
    for module in (getattr(cli, command.replace("-", "_")) for command in COMMANDS if command != "doctor"):
        for line in module.EXAMPLES.splitlines():
            if "posttrain " in line and "$(" not in line:
                words = shlex.split(line.partition("posttrain ")[2])
                assert parser.parse_args(words).run is not None
                seen += 1
    assert seen >= 16


def test_help_and_version_do_not_import_torch() -> None:
    script = "import sys; from posttrain.cli import main; code = main(['sft', '--help']); "
    script += "assert not {'torch', 'numpy', 'rich'} & set(sys.modules), sys.modules.keys(); sys.exit(code)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version = subprocess_run("--version")
    assert version.returncode == 0 and re.fullmatch(r"posttrain \d+\.\d+\.\d+\n", version.stdout)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-command"],
        ["generate", "--model", "offline"],
        ["generate", "--model", "offline", "--prompt", "a", "--chat", "b"],
        ["generate", "--model", "offline", "--prompt", "a", "--max-new-tokens", "0"],
        ["quantize", "--model", "offline", "--output", "x", "--quant-type", "int4"],
        ["quickstart", "--offline", "--model", "x"],
        ["sft", "--mod", "offline", "--data", "x", "--output", "y"],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("usage: posttrain")


def assert_one_error(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    lines = [line for line in err.splitlines() if ": error: " in line]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in lines[0], err


def model_with(tmp_path: Path, **changes: object) -> Path:
    """A copy of the offline model's folder with other values in its config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in offline.model_path().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_unknown_model_name(capsys) -> None:
    assert_one_error(run(capsys, "generate", "--model", "gpt-5", "--prompt", "a"), "no model folder at 'gpt-5'", "smollm2-135m")


def test_folder_that_is_no_model(capsys, tmp_path) -> None:
    assert_one_error(run(capsys, "generate", "--model", tmp_path, "--prompt", "a"), "no config.json")


def test_unknown_architecture(capsys, tmp_path) -> None:
    folder = model_with(tmp_path, architectures=["MambaForCausalLM"])
    result = run(capsys, "generate", "--model", folder, "--prompt", "a")
    assert_one_error(result, "MambaForCausalLM", "LlamaForCausalLM")


def test_prompt_longer_than_the_context(capsys, tmp_path) -> None:
    folder = model_with(tmp_path, max_position_embeddings=16)
    text = tmp_path / "long.txt"
    text.write_text("a long text " * 20)
    assert_one_error(run(capsys, "generate", "--model", folder, "--prompt", "long " * 9), "context of 16")
    assert_one_error(run(capsys, "evaluate", "--model", folder, "--text", text, "--window", 32), "context of 16")
    assert_one_error(run(capsys, "evaluate", "--model", folder, "--task", "offline", "--limit", 3), "context of 16")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data(capsys, tmp_path, content) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    output = tmp_path / "out"
    assert_one_error(run(capsys, "sft", "--model", "offline", "--data", data, "--output", output), "no examples")
    assert_one_error(run(capsys, "evaluate", "--model", "offline", "--data", data), "no items")
    assert not output.exists()


def test_missing_files(capsys, tmp_path) -> None:
    gone = tmp_path / "gone"
    assert_one_error(run(capsys, "sft", "--model", "offline", "--data", gone, "--output", tmp_path / "o"), str(gone))
    assert_one_error(run(capsys, "evaluate", "--model", "offline", "--data", gone), str(gone))
    assert_one_error(run(capsys, "evaluate", "--model", "offline", "--text", gone), str(gone))
    adapter = ["--adapter", gone]
    assert_one_error(run(capsys, "generate", "--model", "offline", *adapter, "--prompt", "a"), str(gone))
    merge = run(capsys, "merge-adapter", "--model", "offline", *adapter, "--output", tmp_path / "m")
    assert_one_error(merge, str(gone))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "items.jsonl:2: not JSON"),
        ("[]", "items.jsonl:2: a JSON list"),
        ('{"prompt": "a"}', "items.jsonl:2: expected"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "items.jsonl:2"),
        ('{"prompt": "a", "choices": null, "answer": 0}', "items.jsonl:2"),
        ('{"prompt": "a", "choices": ["b"], "answer": "c"}', "items.jsonl:2"),
        ('{"prompt": "a", "choices": ["b"], "answer": 1}', "items.jsonl:2"),
        ('{"prompt": "a", "answer": "b"}', "two files"),
        ('{"prompt": "a", "answer": null}', "expected text or a number"),
    ],
)
def test_bad_evaluation_data_names_the_line(capsys, tmp_path, line, message) -> None:
    data = tmp_path / "items.jsonl"
    data.write_text('{"prompt": "a", "choices": [" b", " c"], "answer": " c"}\n' + line + "\n")
    assert_one_error(run(capsys, "evaluate", "--model", "offline", "--data", data), message)


def test_debug_shows_the_traceback() -> None:
    argv = ["generate", "--model", "nowhere", "--prompt", "a"]
    plain, debug = subprocess_run(*argv), subprocess_run(*argv, POSTTRAIN_DEBUG="1")
    assert plain.returncode == debug.returncode == 1
    assert plain.stderr.startswith("posttrain generate: error: no model folder") and plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr and "PosttrainError" in debug.stderr


def test_errors_that_torch_raises_are_one_line(capsys, monkeypatch) -> None:
    for problem, parts in (
        ("CUDA out of memory. Tried to allocate 2.00 GiB", ["out of memory; a smaller --batch-size", "2.00 GiB"]),
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory", ["out of memory; a smaller --batch-size"]),
        ("an operator\nand its trouble", ["an operator and its trouble", "POSTTRAIN_DEBUG=1 shows where"]),
    ):

        def trouble(problem: str = problem) -> None:
            raise RuntimeError(problem)

        monkeypatch.setattr(cli.doctor, "inspect_machine", trouble)
        assert_one_error(run(capsys, "doctor"), *parts)


def test_interrupt_is_exit_code_130(capsys, monkeypatch) -> None:
    """(A real SIGINT in the middle of training: tests/test_quickstart.py.)"""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "inspect_machine", interrupted)
    assert run(capsys, "doctor") == (130, "", "\nposttrain doctor: interrupted\n")


def test_closed_pipe_ends_quietly() -> None:
    script = f"{sys.executable} -m posttrain.cli doctor | true"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.stderr == ""


def test_doctor(capsys) -> None:
    import torch

    from posttrain.kernels.cpu import describe

    code, out, _ = run(capsys, "doctor")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert facts["torch"] == str(torch.__version__)
    assert facts["CPU engine"].startswith(describe()["engine"])
    assert facts["CPU threads"].startswith(str(torch.get_num_threads()))
    assert {"triton", "GPU", "C compiler", "cache", "disk", "memory"} <= facts.keys()


def test_generate_streams_what_the_library_generates(capsys) -> None:
    from posttrain.model.generate import generate
    from posttrain.model.loading import load
    from posttrain.model.tokenizer import Tokenizer

    argv = ["generate", "--model", "offline", "--prompt", "Review: ", "--max-new-tokens", 40]
    code, out, err = run(capsys, *argv, "--temperature", 0.9, "--top-p", 0.9, "--seed", 3)
    model, tokenizer = load(offline.model_path()), Tokenizer.load(offline.model_path())
    ids = tokenizer.encode("Review: ", add_special_tokens=True)
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    expected = generate(model, [ids], 40, temperature=0.9, top_p=0.9, stop_ids=stop, seed=3)[0]
    assert code == 0 and out == tokenizer.decode(expected) + "\n"
    assert f"{len(ids)} prompt tokens, {len(expected)} new in" in err


@pytest.mark.parametrize("output", [".", ".."])
def test_a_model_is_not_written_over_the_current_folder(capsys, tmp_path, monkeypatch, output) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ["--model", "offline", "--output", output, "--force"]
    assert_one_error(run(capsys, "quantize", *options), "is the current folder", "give another")
    assert_one_error(run(capsys, "merge-adapter", *options, "--adapter", "none"), "is the current folder")
    assert run(capsys, "quantize", "--model", "offline", "--output", "q")[0] == 0
    assert (tmp_path / "here" / "q" / "tokenizer.json").is_file() and not (tmp_path / "here" / "tokenizer.json").exists()


def test_sft_merge_quantize_evaluate_together(capsys, tmp_path) -> None:
    """A few steps of training; the adapter, the merged folder and its 4-bit copy answer as they should."""
    data, adapter = tmp_path / "train.jsonl", tmp_path / "adapter"
    rows = [{"prompt": f"Review: {w} film\nSentiment:", "completion": " negative"} for w in ("a", "the", "one", "my")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = ["sft", "--model", "offline", "--data", data, "--output", adapter, "--learning-rate", 0.01]
    code, out, err = run(capsys, *training, "--max-steps", 8)
    assert code == 0 and out == f"{adapter}\n" and "4 examples" in err
    losses = [json.loads(line)["loss"] for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert_one_error(run(capsys, *training, "--max-steps", 8), "resume")
    assert run(capsys, *training, "--max-steps", 8, "--resume")[0] == 0

    merged, small = tmp_path / "merged", tmp_path / "nf4"
    merge = ["merge-adapter", "--model", "offline", "--adapter", adapter, "--output", merged, "--dtype", "fp32"]
    assert run(capsys, *merge)[0] == 0
    assert_one_error(run(capsys, *merge), "--force")
    weights = (merged / "model.safetensors").read_bytes()
    onto_itself = ["merge-adapter", "--model", merged, "--adapter", adapter, "--output", merged, "--any-base", "--force"]
    assert_one_error(run(capsys, *onto_itself), "is the model itself")
    assert_one_error(run(capsys, *merge, "--output", data, "--force"), "is a file; give a folder")
    assert (merged / "model.safetensors").read_bytes() == weights
    assert run(capsys, *merge, "--force")[0] == 0
    code, out, _ = run(capsys, "quantize", "--model", merged, "--output", small)
    bits = re.search(r"at (\d\.\d+) bits each", out)
    assert code == 0 and bits and 4.0 < float(bits[1]) < 4.5

    items = tmp_path / "items.jsonl"
    questions = [{"prompt": row["prompt"], "choices": [" positive", " negative"], "answer": " negative"} for row in rows]
    items.write_text("".join(json.dumps(question) + "\n" for question in questions))
    saved = tmp_path / "merged.jsonl"
    code, out, _ = run(capsys, "evaluate", "--model", merged, "--data", items, "--save", saved)
    assert code == 0 and "(4 of 4)" in out
    answers = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [answer.pop("item") for answer in answers] == list(dict.fromkeys(json.loads(x)["item"] for x in saved.open()))
    assert answers == [{"prediction": 1, "correct": True}] * 4
    with_adapter = ["evaluate", "--model", "offline", "--adapter", adapter, "--data", items, "--compare", saved]
    code, out, _ = run(capsys, *with_adapter)
    assert code == 0 and "no difference can be claimed" in out and "n = 4" in out
    lines = saved.read_text().splitlines(keepends=True)
    saved.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert_one_error(run(capsys, *with_adapter), "merged.jsonl:1: not this run's item 1")
    saved.write_text("".join(lines) + '{"item": "0", "prediction": 0, "correct": false}\n')
    assert_one_error(run(capsys, *with_adapter), "5 answers", "4")
    saved.write_text('{"prediction": 0, "correct": false}\n')
    assert_one_error(run(capsys, *with_adapter), '"item"', "write it again")

    # The adapter knows its base: another one is refused, unless it is said that any will do.
    other_base = ["generate", "--model", merged, "--adapter", adapter, "--prompt", "a", "--max-new-tokens", 1]
    assert_one_error(run(capsys, *other_base), "trained on")
    assert run(capsys, *other_base, "--any-base")[0] == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method", "ia3", "--r", 4], ["--method ia3: r is no setting of this method"]),
        (["--method", "full", "--bottleneck-size", 4], ["bottleneck_size", "the model's own weights"]),
        (["--method", "full", "--quantize", "nf4"], ["4-bit", "--quantize"]),
        (["--method", "ia3", "--init-text", "a"], ["--init-text is for --method prefix and prompt"]),
        (["--target-modules", "nothing"], ["matches no layer", "q_proj"]),
    ],
)
def test_settings_that_the_method_lacks(capsys, tmp_path, options, parts) -> None:
    data, output = tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    assert_one_error(run(capsys, "sft", "--model", "offline", "--data", data, "--output", output, *options), *parts)
    assert not output.exists()


def test_every_method_has_a_recipe_and_a_count(capsys) -> None:
    from posttrain.adapters.counts import trainable_parameters
    from posttrain.adapters.recipes import RECIPES
    from posttrain.model.config import ModelConfig

    assert cli.sft.METHODS == tuple(RECIPES)
    code, out, _ = run(capsys, "adapters", "--model", "offline")
    total, _, *rows = out.splitlines()
    config = ModelConfig.from_hf(json.loads((offline.model_path() / "config.json").read_text()))
    assert code == 0 and total == f"{trainable_parameters(config, None):,} parameters"
    counted = {row.split()[0]: int(row.split()[1].replace(",", "")) for row in rows}
    assert counted == {name: trainable_parameters(config, recipe.adapter()) for name, recipe in RECIPES.items()}
    code, out, _ = run(capsys, "adapters", "--model", "offline", "--method", "adapter", "--bottleneck-size", 3)
    smaller = trainable_parameters(config, RECIPES["adapter"].adapter(bottleneck_size=3))
    assert code == 0 and out.splitlines()[2].split()[1] == f"{smaller:,}" and smaller < counted["adapter"]


def test_full_training_leaves_a_model(capsys, tmp_path) -> None:
    """Resumable like an adapter; then the folder is a base of its own, with another fingerprint."""
    from posttrain.fingerprint import fingerprint
    from posttrain.model.loading import load

    data, output = tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "Review: a film\\nSentiment:", "completion": " negative"}\n')
    training = ["sft", "--method", "full", "--model", "offline", "--data", data, "--output", output, "--max-steps", 6]
    training += ["--learning-rate", 1e-3]
    code, out, _ = run(capsys, *training)
    assert code == 0 and out == f"{output / 'model'}\n"
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert run(capsys, *training, "--resume")[0] == 0
    before, after = load(offline.model_path()), load(output / "model", dtype="fp32")
    assert fingerprint(after) != fingerprint(before)
    moved = {name for name, p in after.named_parameters() if not p.equal(before.get_parameter(name).float())}
    assert moved == {name for name, _ in before.named_parameters()}
    code, out, _ = run(capsys, "generate", "--model", output / "model", "--prompt", "Review: ", "--max-new-tokens", 3)
    assert code == 0 and out


def test_evaluate_generation_and_perplexity(capsys, tmp_path) -> None:
    from posttrain.evaluate import perplexity
    from posttrain.model.loading import load
    from posttrain.model.tokenizer import Tokenizer

    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "Review: fine\\nSentiment:", "answer": ""}\n')
    code, out, _ = run(capsys, "evaluate", "--model", "offline", "--data", items, "--match", "contains")
    assert code == 0 and "(1 of 1)" in out  # every text contains the empty one
    text = tmp_path / "text.txt"
    text.write_text("The film was good and the people were kind. " * 8)
    code, out, _ = run(capsys, "evaluate", "--model", "offline", "--text", text, "--window", 64, "--stride", 32)
    model, tokenizer = load(offline.model_path()), Tokenizer.load(offline.model_path())
    expected = perplexity(model, tokenizer.encode(text.read_text(), add_special_tokens=True), 64, 32)
    assert code == 0 and out == f"text.txt: perplexity {expected}\n"
    assert_one_error(run(capsys, "evaluate", "--model", "offline", "--text", text, "--save", "x"), "--save")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_nobody(closed) -> None:
    """Nothing that belongs to it goes elsewhere, and the work is done."""
    generate = [sys.executable, "-m", "posttrain.cli", "generate", "--model", "offline", "--prompt", "-", "--max-new-tokens", "2"]
    nothing = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *generate], capture_output=True, text=True)
    assert nothing.returncode == 1 and "the prompt is empty" in nothing.stderr
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *generate], input="a", capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert bool(done.stdout) == (closed != ">&-") and bool(done.stderr) == (closed != "2>&-")
    assert "tokens/s" not in done.stdout
