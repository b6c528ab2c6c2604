"""posttrain reward, ppo and grpo on the model that comes along: adapters, held-out comparisons, resuming, errors."""

from __future__ import annotations

import json

import pytest

from posttrain import cli


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("practice")
    pairs = [{"prompt": f"{i} is", "chosen": " good.", "rejected": " bad."} for i in range(6)]
    prompts = [{"prompt": f"Review: {i}\nSentiment:", "answer": " good"} for i in range(6)]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


STEPS = ("--model", "offline", "--max-steps", 2, "--batch-size", 2)
SHORT = ("--max-completion-length", 3, "--eval-limit", 3)


def test_from_pairs_to_a_reward_model_to_a_policy(files, capsys):
    pairs, prompts = files / "pairs.jsonl", files / "prompts.jsonl"
    code, out, err = run(capsys, "reward", *STEPS, "--data", pairs, "--eval-data", pairs, "--output", files / "reward")
    assert code == 0, err
    assert "the chosen completion scores higher: " in out and "of 6 pairs (chance 0.5, p " in out
    assert json.loads((files / "reward" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    given = (
        "ppo",
        *STEPS,
        *SHORT,
        "--data",
        prompts,
        "--eval-data",
        prompts,
        "--reward-model",
        files / "reward",
        "--num-ppo-epochs",
        1,
    )
    code, out, err = run(capsys, *given, "--output", files / "ppo")
    assert code == 0, err
    assert "mean reward " in out and "KL to the base " in out and "3 held out" in err
    tensors = json.loads((files / "ppo" / "adapter_config.json").read_text())
    assert tensors["modules_to_save"] is None and tensors["task_type"] == "CAUSAL_LM"
    code, _, err = run(capsys, "grpo", *STEPS, "--data", prompts, "--reward-model", files / "ppo", "--output", files / "x")
    assert code == 1 and "has no score head, so it is no reward model" in err


def test_grpo_and_its_resumption(files, capsys):
    prompts = files / "prompts.jsonl"
    given = ("grpo", *STEPS, *SHORT, "--quantize", "nf4", "--data", prompts, "--num-generations", 2, "--reward-regex", r"\w")
    given = (*given, "--output", files / "grpo")
    code, out, err = run(capsys, *given)
    assert code == 0 and out.strip() == str(files / "grpo"), err
    code, _, err = run(capsys, *given)
    assert code == 1 and "of an earlier run; resume it (--resume)" in err
    assert run(capsys, *given, "--resume")[0] == 0
    code, _, err = run(capsys, *given, "--resume", "--beta", 0.5)
    assert code == 1 and "belongs to another run" in err


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--data", "sentiment:exam"), "expected sentiment:train, sentiment:validation, sentiment:test"),
        (("--data", "no-such.jsonl"), "--data no-such.jsonl: No such file or directory; expected a file of JSON lines or sent"),
        (("--eval-data", "."), "--eval-data .: Is a directory; expected"),
        (("--reward-regex", "("), "is no regular expression"),
        (("--num-generations", 1), "a group needs at least 2"),
        (("--temperature", 0), "a policy that explores"),
        (("--stop", "a long stop"), "expected one"),
    ),
)
def test_errors(files, capsys, options, message):
    code, _, err = run(capsys, "grpo", *STEPS, *SHORT, "--data", files / "prompts.jsonl", "--output", files / "y", *options)
    assert code == 1 and message in err
