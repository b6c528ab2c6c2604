"""Measure a model: accuracy with a 95 % interval, or perplexity. Two runs on the same items are compared in pairs.

--task reviews   the quickstart's task: is a movie review positive or negative? ("offline": its made-up reviews)
--data FILE      JSON lines {"prompt", "choices", "answer"}: the choice of largest log-probability counts as the answer;
                 or {"prompt", "answer"}: what greedy decoding writes counts. `answer` is text, or a choice's index.
--text FILE      perplexity of a plain text, read through windows that overlap

--save writes what was answered, item by item. --compare reads such a file and says whether this model differs from
that one (McNemar's exact test), or how many items it would take to tell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.atomic import atomic_write, check_writable
from posttrain.cli.common import (
    add_model_arguments,
    goes_with,
    load_model,
    positive_int,
    progress_bar,
    resolve_model,
    with_defaults,
)
from posttrain.data import read_jsonl
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from posttrain.evaluate import Accuracy, ChoiceItem
    from posttrain.model.tokenizer import Tokenizer

ITEMS = '"prompt", "answer" and, for a choice, "choices"'
SAVED = '"item", "prediction" and "correct"'
DEFAULTS_OF_WRITTEN = {"match": "exact", "max_new_tokens": 16}  # answers that the model writes
HELP = "measure accuracy or perplexity, compare two models"
EXAMPLES = """\
examples:
  posttrain evaluate --model smollm2-135m --quantize nf4 --task reviews --save before.jsonl
  posttrain evaluate --model smollm2-135m --quantize nf4 --adapter my-adapter --task reviews --compare before.jsonl
  posttrain evaluate --model offline --text README.md --window 256 --stride 128
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=("reviews", "offline"))
    what.add_argument("--data", metavar="FILE", help="JSON lines with prompt, answer and, for a choice, choices")
    what.add_argument("--text", metavar="FILE", help="plain text in UTF-8")
    parser.add_argument("--split", choices=("validation", "test"), help="of --task (default: test)")
    parser.add_argument("--shots", type=int, metavar="K", help="of --task: examples shown first (default 0)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="of --task and --data: only the first N items")
    parser.add_argument("--match", choices=("exact", "prefix", "contains"), help="of --data without choices (default: exact)")
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", help="of --data without choices (default: 16)")
    parser.add_argument("--window", type=positive_int, metavar="N", help="of --text (default: 1024, or the context)")
    parser.add_argument("--stride", type=positive_int, metavar="N", help="of --text (default: half the window)")
    parser.add_argument("--save", metavar="FILE", help="write each item's answer as JSON lines")
    parser.add_argument("--compare", metavar="FILE", help="a file that --save wrote for another model, on these items")


def run(args: argparse.Namespace) -> None:
    goes_with(args, args.text is None, "--task and --data: a perplexity has no items", "limit", "save", "compare")
    goes_with(args, args.task is not None, "--task", "split", "shots")
    goes_with(args, args.data is not None, "--data without choices", *DEFAULTS_OF_WRITTEN)
    goes_with(args, args.text is not None, "--text", "window", "stride")
    if args.text is not None:
        return _perplexity(args)
    with_defaults(args, {"split": "test", "shots": 0})
    if args.shots < 0:
        raise PosttrainError(f"--shots {args.shots}: expected 0 or more")
    if args.save is not None:
        check_writable(args.save)
    rows = [] if args.data is None else read_rows(args.data)[: args.limit]
    goes_with(args, bool(rows) and "choices" not in rows[0], "--data without choices", *DEFAULTS_OF_WRITTEN)
    with_defaults(args, DEFAULTS_OF_WRITTEN)
    asked = [_digest(row) for row in rows] if args.task is None else _task_digests(args)
    before = None if args.compare is None else read_answers(args.compare, asked)
    model, tokenizer = load_model(args)
    from posttrain import evaluate

    name = args.task or Path(args.data).name
    with progress_bar(name) as progress:
        if args.task is not None:
            result = evaluate.choice_accuracy(model, _task_items(args, tokenizer), progress=progress)
        elif "choices" in rows[0]:
            result = evaluate.choice_accuracy(model, choice_items(rows, tokenizer), progress=progress)
        else:
            prompts = [tokenizer.encode(row["prompt"], add_special_tokens=True) for row in rows]
            answers = [str(row["answer"]) for row in rows]
            how = {"max_new_tokens": args.max_new_tokens, "match": args.match, "folder": resolve_model(args.model)}
            result = evaluate.generation_accuracy(model, tokenizer, prompts, answers, **how, progress=progress)
    print(f"{name}: accuracy {result} (95 % interval)")
    if before is not None:
        from posttrain.statistics import compare

        print(compare(before, result.correct, Path(args.compare).stem, "this model"))
    if args.save is not None:
        _save_answers(args.save, asked, result)


def _perplexity(args: argparse.Namespace) -> None:
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PosttrainError(f"{args.text}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    model, tokenizer = load_model(args)
    from posttrain.evaluate import perplexity

    ids = tokenizer.encode(text, add_special_tokens=True)
    with progress_bar(Path(args.text).name, "tokens") as progress:
        result = perplexity(model, ids, args.window, args.stride, progress)
    print(f"{Path(args.text).name}: perplexity {result}")


def read_rows(path: str) -> list[dict[str, Any]]:
    """The items of a JSONL file: all with choices, or all without. Errors name the line."""
    rows: list[dict[str, Any]] = []
    for number, row in read_jsonl(path, ITEMS):
        where = f"{path}:{number}"
        if not isinstance(row.get("prompt"), str) or "answer" not in row:
            raise PosttrainError(f'{where}: expected "prompt" (text) and "answer", found {sorted(row)}')
        if "choices" in row:
            choices = row["choices"]
            if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
                raise PosttrainError(f'{where}: "choices" must be a list of texts, none of them empty')
            answer = row["answer"]
            if isinstance(answer, str) and answer in choices:
                row["answer"] = choices.index(answer)
            elif not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
                raise PosttrainError(f'{where}: "answer" is {answer!r}; expected one of the choices, or its index')
        elif isinstance(row["answer"], bool) or not isinstance(row["answer"], str | int | float):
            raise PosttrainError(f'{where}: "answer" is {json.dumps(row["answer"])}; expected text or a number to be written')
        if rows and ("choices" in row) != ("choices" in rows[0]):
            raise PosttrainError(f'{where}: some items have "choices" and some do not; put them into two files')
        rows.append(row)
    if not rows:
        raise PosttrainError(f"{path} holds no items")
    return rows


def read_answers(path: str, asked: Sequence[str]) -> list[bool]:
    """`correct` of each line of a file that --save wrote. PosttrainError where it answers other items than `asked`, by their
    digests: pairs of different questions would be compared."""
    answers: list[bool] = []
    for number, row in read_jsonl(path, SAVED):
        if not isinstance(row.get("correct"), bool) or not isinstance(row.get("item"), str):
            raise PosttrainError(f"{path}:{number}: expected {SAVED} as --save writes it; write it again")
        if len(answers) < len(asked) and row["item"] != asked[len(answers)]:
            raise PosttrainError(f"{path}:{number}: not this run's item {len(answers) + 1}; compare answers to the same items")
        answers.append(row["correct"])
    if len(answers) != len(asked):
        raise PosttrainError(f"{path} has {len(answers)} answers and this run {len(asked)}: other items")
    return answers


def _digest(question: Any) -> str:
    """What tells one question from another, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def choice_items(rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[ChoiceItem]:
    """Token ids of prompts and choices, encoded apart: the choice continues the prompt's text as written."""
    from posttrain.evaluate import ChoiceItem

    return [
        ChoiceItem(
            tokenizer.encode(row["prompt"], add_special_tokens=True),
            [tokenizer.encode(choice) for choice in row["choices"]],
            row["answer"],
        )
        for row in rows
    ]


def _task_digests(args: argparse.Namespace) -> list[str]:
    """Of the reviews alone: runs with and without shots answer the same questions."""
    from posttrain import quickstart

    reviews = getattr(quickstart.load_task(args.task), args.split)[: args.limit]
    return [_digest([review.text, review.label]) for review in reviews]


def _task_items(args: argparse.Namespace, tokenizer: Tokenizer) -> list[ChoiceItem]:
    from posttrain import quickstart

    splits = quickstart.load_task(args.task)
    return quickstart.choice_items(splits, args.split, tokenizer, args.shots)[: args.limit]


def _save_answers(path: str, asked: Sequence[str], result: Accuracy) -> None:
    lines = [
        json.dumps({"item": item, "prediction": prediction, "correct": correct})
        for item, prediction, correct in zip(asked, result.predictions, result.correct, strict=True)
    ]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
