"""Fine-tune a model on JSON lines, by an adapter on the frozen base or, with --method full, in all its weights.

--method     trains
  lora       low-rank updates of every linear layer; with a 4-bit base that is qlora (--quantize nf4 is then implied)
  dora       the same, with the magnitude of each output apart
  adapter    bottlenecks after attention and MLP of every layer, and the norms (Houlsby et al.)
  prefix     keys and values before the text's, in every layer
  prompt     embeddings before the text's
  p-tuning   the same, made by an encoder that trains in their place
  ia3        vectors that rescale keys, values and the MLP's inner activations
  full       every weight, in float32 unless --dtype says otherwise; --output/model is then a model of its own

Each line of --data holds TRL's columns: {"prompt", "completion"} or {"messages"}, as text or as chat messages, or
{"text"}. Only the completion (what the assistant says) is learned. The adapter is written in PEFT's format into --output,
with metrics.jsonl and loss.svg. Interrupted, the same command with --resume goes on to the same adapter, bit for bit.
`posttrain adapters --model PATH` says how much each method would train.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from typing import Any

from posttrain.cli.common import add_model_arguments, check_data, in_options, load_model, positive_int, resolve_model
from posttrain.cli.training import LENGTH, add_training_arguments, train_config
from posttrain.errors import PosttrainError

METHODS = ("lora", "qlora", "dora", "adapter", "prefix", "prompt", "p-tuning", "ia3", "full")
HELP = "fine-tune on a JSONL file: LoRA, QLoRA and other adapters, or all weights"
EXAMPLES = """\
examples:
  echo '{"prompt": "the sea is", "completion": " wide"}' > train.jsonl
  posttrain sft --model offline --data train.jsonl --output my-adapter --max-steps 20 --learning-rate 1e-3
  posttrain sft --method qlora --model smollm2-135m --data train.jsonl --output my-adapter --epochs 2 --resume
  posttrain sft --method qlora --init-lora-weights loftq --loraplus-lr-ratio 16 --data train.jsonl --model smollm2-135m --output q
  posttrain sft --method ia3 --model smollm2-135m --quantize nf4 --data train.jsonl --output my-ia3 --epochs 2
"""


ADAPTER_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules", "bottleneck_size",
    "num_virtual_tokens",
)  # fmt: skip


def add_adapter_arguments(group: argparse._ArgumentGroup, default: str | None) -> None:
    """--method and what shapes its adapter."""
    group.add_argument("--method", choices=METHODS, default=default, help=f"default {default or 'all'}")
    group.add_argument("--r", type=positive_int, help="rank: lora, dora, qlora (default 8)")
    group.add_argument("--lora-alpha", type=float, help="scaling = alpha / r (default 16)")
    group.add_argument("--lora-dropout", type=float, help="default 0")
    group.add_argument("--use-rslora", action="store_true", default=None, help="scaling = alpha / sqrt(r)")
    group.add_argument(
        "--init-lora-weights", type=_init, metavar="START", help="pissa, olora, loftq, orthogonal, gaussian, true (default)"
    )
    group.add_argument("--target-modules", type=_names, metavar="NAMES", help="comma-separated, or a regex: lora, ia3")
    group.add_argument("--bottleneck-size", type=positive_int, metavar="N", help="adapter (default 64)")
    group.add_argument("--num-virtual-tokens", type=positive_int, metavar="N", help="prefix, prompt, p-tuning (default 20)")


def _names(text: str) -> str | list[str]:
    """Names, or a regular expression (and "all-linear")."""
    names = [name for part in text.split(",") if (name := part.strip())]
    return names if names and all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def _init(text: str) -> str | bool:
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def adapter_of(method: str, args: argparse.Namespace | None) -> Any:
    """The method's adapter as the options say, or by default without them. PosttrainError for an option that it lacks."""
    from posttrain.adapters.recipes import RECIPES

    given: dict[str, Any] = {}
    if args is not None:
        given = {name: getattr(args, name) for name in ADAPTER_OPTIONS if getattr(args, name) is not None}
        if getattr(args, "init_text", None) is not None:
            given |= _init_text(method, args)
    try:
        return RECIPES[method].adapter(**given)
    except ValueError as error:
        raise PosttrainError(f"--method {method}: {error}") from error


def _init_text(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """What --init-text means for the method. PosttrainError where it means nothing."""
    tokenizer = {"tokenizer_name_or_path": str(resolve_model(args.model))}
    if method == "prefix":
        return tokenizer | {"init_text": args.init_text, "init_weights": None}
    if method == "prompt":
        return tokenizer | {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": args.init_text}
    raise PosttrainError(f"--init-text is for --method prefix and prompt, and this is {method}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter=False, dtype=None)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines to learn from")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder for the adapter and its checkpoints")
    group = parser.add_argument_group("adapter", "each has a default by method; one that the method lacks is refused")
    add_adapter_arguments(group, default="lora")
    group.add_argument("--init-text", metavar="TEXT", help="prefix, prompt: start as if the model had read this")
    training = add_training_arguments(parser, "rows at once", 4, "by method, 1e-3 for lora")
    training.add_argument("--max-length", type=positive_int, metavar="N", help="tokens in a row (default: the longest)")
    training.add_argument("--truncate", action="store_true", help="cut the start of prompts that exceed --max-length")
    training.add_argument("--no-packing", action="store_true", help="one example a row")


def run(args: argparse.Namespace) -> None:
    from posttrain.adapters.recipes import RECIPES
    from posttrain.data import load_dataset
    from posttrain.model.checkpoint import copy_tokenizer
    from posttrain.sft import sft
    from posttrain.trained_model import model_folder

    recipe = RECIPES[args.method]
    adapter = adapter_of(args.method, args)
    if args.method == "full" and args.quantize:
        raise PosttrainError("--method full trains the weights, and 4-bit ones are frozen; drop --quantize, or use qlora")
    args.quantize = args.quantize or recipe.quantize
    if args.init_lora_weights == "loftq":
        adapter = replace(adapter, loftq_config={"quant_type": args.quantize or "nf4"})
        args.quantize = None  # LoftQ needs the weights before, and leaves them in 4 bits
    args.dtype = args.dtype or ("fp32" if args.method == "full" else "bf16")
    config = train_config(args, recipe.learning_rate)
    check_data(args)
    model, tokenizer = load_model(args)
    with in_options(LENGTH | {"truncation='keep_end'": "--truncate"}):
        examples = load_dataset(args.data, tokenizer, args.max_length, "keep_end" if args.truncate else "error")
    learned = sum(example.num_labels for example in examples)
    print(f"{len(examples)} examples, {learned} tokens to learn", file=sys.stderr)
    pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id
    try:
        sft(
            model,
            examples,
            config,
            adapter,
            max_length=args.max_length,
            packing=not args.no_packing,
            pad_id=pad_id,
            resume=args.resume,
        )
    except KeyboardInterrupt:
        print("\nRun the same command with --resume: it goes on from the last checkpoint.", file=sys.stderr)
        raise
    if adapter is None:
        copy_tokenizer(resolve_model(args.model), model_folder(config))
        print(model_folder(config))
    else:
        print(args.output)
