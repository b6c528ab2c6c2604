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
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.common import add_model_arguments, load_model, positive_int, progress_bar
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from posttrain.evaluate import Accuracy, ChoiceItem
    from posttrain.model.tokenizer import Tokenizer

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
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="of --task (default: test)")
    parser.add_argument("--shots", type=int, default=0, metavar="K", help="of --task: examples shown first (default 0)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N items")
    parser.add_argument("--match", choices=("exact", "prefix", "contains"), default="exact", help="of generation")
    parser.add_argument("--max-new-tokens", type=positive_int, default=16, metavar="N", help="for generated answers")
    parser.add_argument("--window", type=positive_int, metavar="N", help="of --text (default: 1024, or the context)")
    parser.add_argument("--stride", type=positive_int, metavar="N", help="of --text (default: half the window)")
    parser.add_argument("--save", metavar="FILE", help="write each item's answer as JSON lines")
    parser.add_argument("--compare", metavar="FILE", help="a file that --save wrote for another model, on these items")


def run(args: argparse.Namespace) -> None:
    if args.text is not None:
        if args.save or args.compare:
            raise PosttrainError("--save and --compare are for --task and --data: a perplexity has no items to pair")
        return _perplexity(args)
    rows = [] if args.data is None else read_rows(args.data)[: args.limit]
    before = None if args.compare is None else read_answers(args.compare)
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
            result = evaluate.generation_accuracy(
                model, tokenizer, prompts, answers, args.max_new_tokens, args.match, progress=progress
            )
    print(f"{name}: accuracy {result} (95 % interval)")
    if before is not None:
        from posttrain.statistics import compare

        if len(before) != result.n:
            raise PosttrainError(f"{args.compare} has {len(before)} answers and this run {result.n}: other items")
        print(compare(before, result.correct, Path(args.compare).stem, "this model"))
    if args.save is not None:
        _save_answers(args.save, result)


def _perplexity(args: argparse.Namespace) -> None:
    text = Path(args.text).read_text(encoding="utf-8")
    model, tokenizer = load_model(args)
    from posttrain.evaluate import perplexity

    ids = tokenizer.encode(text, add_special_tokens=True)
    with progress_bar(Path(args.text).name, "tokens") as progress:
        result = perplexity(model, ids, args.window, args.stride, progress)
    print(f"{Path(args.text).name}: perplexity {result}")


def read_rows(path: str) -> list[dict[str, Any]]:
    """The items of a JSONL file: all with choices, or all without. Errors name the line."""
    rows: list[dict[str, Any]] = []
    for number, row in _json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(row.get("prompt"), str) or "answer" not in row:
            raise PosttrainError(f'{where}: expected "prompt" (text) and "answer", found {sorted(row)}')
        choices = row.get("choices")
        if choices is not None:
            if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
                raise PosttrainError(f'{where}: "choices" must be a list of texts, none of them empty')
            answer = row["answer"]
            if isinstance(answer, str) and answer in choices:
                row["answer"] = choices.index(answer)
            elif not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
                raise PosttrainError(f'{where}: "answer" is {answer!r}; expected one of the choices, or its index')
        if rows and ("choices" in row) != ("choices" in rows[0]):
            raise PosttrainError(f'{where}: some items have "choices" and some do not; put them into two files')
        rows.append(row)
    if not rows:
        raise PosttrainError(f"{path} holds no items")
    return rows


def read_answers(path: str) -> list[bool]:
    """`correct` of each line of a file that --save wrote."""
    answers = []
    for number, row in _json_lines(path):
        if not isinstance(row.get("correct"), bool):
            raise PosttrainError(f'{path}, line {number}: expected {{"prediction", "correct"}} as --save writes it')
        answers.append(row["correct"])
    return answers


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


def _task_items(args: argparse.Namespace, tokenizer: Tokenizer) -> list[ChoiceItem]:
    from posttrain import quickstart

    splits = quickstart.load_task(args.task)
    return quickstart.choice_items(splits, args.split, tokenizer, args.shots)[: args.limit]


def _save_answers(path: str, result: Accuracy) -> None:
    from posttrain.atomic import atomic_write

    lines = [
        json.dumps({"prediction": prediction, "correct": correct})
        for prediction, correct in zip(result.predictions, result.correct, strict=True)
    ]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _json_lines(path: str):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise PosttrainError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise PosttrainError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
                yield number, row
