"""Train a draft for speculative decoding on text that the model itself writes, and measure it on held-out text.

--kind     trains
  draft    a few of the model's own layers, distilled from the whole: an ordinary model folder with the same tokenizer
  medusa   heads that guess several tokens ahead from one hidden state
  eagle    one decoder layer that goes on with the model's hidden states

First the model continues prompts: reviews, chat messages that it makes up itself (Magpie), or --prompts, a JSONL file of {"prompt":
text or chat messages}. That is most of the time, and the text is kept in --data for the next kind. Heads say only the --vocab-size
tokens that are most frequent there; what lies outside is never drafted, and never wrong for it. The same command and seed give the
same weights, also when interrupted and begun again with --resume. `posttrain generate --speculative` uses the folder printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from posttrain.cli.common import (
    add_model_arguments,
    goes_with,
    in_options,
    load_model,
    positive_int,
    progress_bar,
    resolve_model,
    with_defaults,
)
from posttrain.errors import PosttrainError

KINDS = ("draft", "medusa", "eagle")
HELP = "train a truncated draft, Medusa heads or an EAGLE head for a model"
EXAMPLES = """\
examples:
  posttrain speculative train-draft --kind medusa --model offline --output offline-medusa --epochs 3
  posttrain speculative train-draft --kind medusa --model smollm2-135m --data smollm2.jsonl --output medusa
  posttrain speculative train-draft --kind eagle --model smollm2-135m --data smollm2.jsonl --output eagle --resume
  posttrain speculative train-draft --kind draft --model smollm2-135m --data smollm2.jsonl --output draft --layers 4
"""
# kind -> (epochs, learning rate)
RECIPES = {"draft": (4.0, 1e-3), "medusa": (10.0, 2e-3), "eagle": (10.0, 1e-3)}

# Options of some kinds alone, and what they are where they are not given.
SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("draft",): ("layers",),
    ("medusa",): ("heads", "own_heads"),
    ("eagle",): ("version", "unroll", "noise"),
    ("medusa", "eagle"): ("vocab_size",),
}
MAKES_TEXT = ("prompts", "own_prompts", "reviews", "max_new_tokens")
DEFAULTS = {
    "layers": 4, "heads": 4, "version": 1, "unroll": 3, "noise": 0.0, "vocab_size": 8192, "reviews": 96, "max_new_tokens": 96,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=KINDS, required=True)
    add_model_arguments(parser, adapter=False)
    parser.add_argument("--output", required=True, metavar="PATH", help="folder for the draft, its checkpoints and its loss")
    text = parser.add_argument_group("what the model continues")
    text.add_argument("--data", metavar="FILE", help="its continuations; made where absent (default OUTPUT/continuations.jsonl)")
    text.add_argument("--prompts", metavar="FILE", help="JSON lines with a prompt each, instead of these two:")
    text.add_argument("--own-prompts", type=int, metavar="N", help="chat messages it makes up (default 160; offline: 0)")
    text.add_argument("--reviews", type=int, metavar="N", help="film reviews (default 96)")
    text.add_argument("--max-new-tokens", type=positive_int, metavar="N", help="of each (default 96)")
    draft = parser.add_argument_group("the draft")
    draft.add_argument("--layers", type=_layers, metavar="N", help="draft: how many, or which: 0,1,29 (default 4)")
    draft.add_argument("--heads", type=positive_int, metavar="N", help="medusa: how many (default 4)")
    draft.add_argument("--own-heads", action="store_true", help="medusa: train a copy of the model's head for each (large)")
    draft.add_argument("--version", type=int, choices=(1, 3), help="eagle: EAGLE-1 or EAGLE-3 (default 1)")
    draft.add_argument("--unroll", type=positive_int, metavar="N", help="eagle: steps a loss (default 3)")
    draft.add_argument("--noise", type=float, help="eagle: on the features, over their size (default 0)")
    draft.add_argument("--vocab-size", type=int, metavar="N", help="medusa, eagle; 0: all (default 8192)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=float, help="default: 4, 10 for heads")
    training.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="texts a step (default %(default)s)")
    training.add_argument("--learning-rate", type=float, help="default: 1e-3, 2e-3 for medusa")
    training.add_argument("--seed", type=int, default=0, help="default %(default)s")
    training.add_argument("--save-steps", type=int, default=100, metavar="N", help="between checkpoints (default %(default)s)")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")


def _layers(text: str) -> int | tuple[int, ...]:
    """A number of layers, or their indices after commas."""
    try:
        return tuple(map(int, text.split(","))) if "," in text else positive_int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number of layers, or their indices such as 0,1,29, given {text}") from error


def run(args: argparse.Namespace) -> None:
    from posttrain.speculative.train_draft import DraftConfig, train_draft
    from posttrain.speculative.truncated import spread_layers
    from posttrain.trainer import TrainConfig

    for kinds, options in SHAPES.items():
        goes_with(args, args.kind in kinds, f"--kind {' or '.join(kinds)}", *options)
    goes_with(args, args.prompts is None, "prompts of the command's own, and --prompts stands for them", "own_prompts", "reviews")
    _say_what_is_there(args)
    with_defaults(args, DEFAULTS | {"own_prompts": 0 if args.model == "offline" else 160})
    if args.vocab_size < 0 or args.own_prompts < 0 or args.reviews < 0:
        raise PosttrainError("--vocab-size, --own-prompts and --reviews must be 0 or more")
    if args.kind == "draft" and args.quantize:
        raise PosttrainError("--kind draft is cut out of dense weights; drop --quantize (the draft can be quantized afterwards)")
    model, tokenizer = load_model(args)
    layers = args.layers
    if args.kind == "draft" and isinstance(layers, int):
        layers = tuple(spread_layers(model.config.num_hidden_layers, layers))
    draft = DraftConfig(
        kind=args.kind,
        layers=layers if args.kind == "draft" else (),
        num_heads=args.heads,
        own_heads=args.own_heads,
        version=args.version,
        unroll=args.unroll,
        noise=args.noise,
        vocab_size=args.vocab_size or None,
    )
    epochs, rate = RECIPES[args.kind]
    with in_options({"num_train_epochs": "--epochs", "learning_rate is": "--learning-rate is"}):
        config = TrainConfig(
            output_dir=args.output,
            num_train_epochs=epochs if args.epochs is None else args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=rate if args.learning_rate is None else args.learning_rate,
            seed=args.seed,
            save_steps=args.save_steps,
        )
    examples = continuations(args, model, tokenizer)
    print(f"{len(examples)} continuations, {sum(e.num_labels for e in examples)} tokens to learn", file=sys.stderr)
    try:
        path, measured, _ = train_draft(model, examples, draft, config, resume=args.resume)
    except KeyboardInterrupt:
        print("\nRun the same command with --resume: it goes on from the last checkpoint.", file=sys.stderr)
        raise
    if args.kind == "draft":
        from posttrain.model.checkpoint import copy_tokenizer

        copy_tokenizer(resolve_model(args.model), path)
    print(described(measured), file=sys.stderr)
    print(path)


def _continuations_file(args: argparse.Namespace) -> Path:
    return Path(args.data or Path(args.output) / "continuations.jsonl")


def _say_what_is_there(args: argparse.Namespace) -> None:
    """A line where the text was made before: the same options may stand in the command for every kind, and make nothing now."""
    given = [f"--{name.replace('_', '-')}" for name in MAKES_TEXT if getattr(args, name) is not None]
    if given and _continuations_file(args).exists():
        print(f"{_continuations_file(args)} is there and is learned as it is; {', '.join(given)}: no new text", file=sys.stderr)


def continuations(args: argparse.Namespace, model: Any, tokenizer: Any) -> list:
    """What the model is to learn from, out of --data or made and put there."""
    from posttrain.speculative.continuations import (
        ContinuationConfig,
        continue_prompts,
        own_prompts,
        read_continuations,
        recipe,
        review_prompts,
        write_continuations,
    )

    path = _continuations_file(args)
    if path.exists():
        return read_continuations(path, model)[0]
    config = ContinuationConfig(max_new_tokens=args.max_new_tokens, seed=args.seed)
    if args.prompts:
        prompts = given_prompts(args.prompts, tokenizer)
    else:
        prompts = review_prompts(_reviews(args), tokenizer) if args.reviews else []
        if args.own_prompts:
            with progress_bar("making up prompts", "prompts") as update:
                prompts = own_prompts(model, tokenizer, args.own_prompts, args.seed, on_batch=update) + prompts
    if not prompts:
        raise PosttrainError("no prompts: give --prompts, --own-prompts or --reviews")
    room = model.context_length - config.max_new_tokens
    if room < 1:
        raise PosttrainError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the model's context of {model.context_length}"
        )
    prompts = [prompt[:room] for prompt in prompts]
    with progress_bar("continuing prompts", "prompts") as update:
        examples = continue_prompts(model, prompts, config, () if tokenizer.eos_id is None else (tokenizer.eos_id,), update)
    write_continuations(path, examples, recipe(model, prompts, config), tokenizer)
    return examples


def given_prompts(path: str, tokenizer: Any) -> list[list[int]]:
    """The prompts of a JSONL file: text, or messages through the chat template. PosttrainError with file and line."""
    from posttrain.data import read_jsonl

    prompts = []
    for number, row in read_jsonl(path, '"prompt", text or messages'):
        prompt = row.get("prompt")
        try:
            ids = tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else tokenizer.chat(prompt)
        except (TypeError, KeyError, ValueError) as error:
            raise PosttrainError(f'{path}:{number}: "prompt" is {json.dumps(prompt)[:60]}; expected text or messages') from error
        if not ids:
            raise PosttrainError(f'{path}:{number}: "prompt" is empty')
        prompts.append(ids)
    return prompts


def _reviews(args: argparse.Namespace) -> list[str]:
    """Texts of reviews for training: made-up ones for the offline model, the fetched ones else."""
    if args.model == "offline":
        from posttrain.offline import load_task

        splits = load_task()
    else:
        from posttrain.fetch import fetch
        from posttrain.reviews import load_reviews

        splits = load_reviews(fetch("reviews"))
    return [review.text for review in splits.train[: args.reviews]]


def described(measured: dict[str, Any]) -> str:
    """What was measured on held-out text, in lines."""
    if "accuracy" not in measured:
        return "held out: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
    lines = ["held out: the next token of each depth is the draft's most probable, or among its 3, its 10"]
    for depth, ranks in enumerate(measured["accuracy"], 1):
        lines.append(f"  depth {depth}   {ranks[0]:.3f}   {sum(ranks[:3]):.3f}   {sum(ranks[:10]):.3f}")
    return "\n".join(lines)
