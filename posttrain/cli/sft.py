"""Fine-tune LoRA adapters on JSON lines: on a 4-bit base with --quantize (QLoRA), else on the base as stored.

Each line holds TRL's columns: {"prompt", "completion"} or {"messages"}, as text or as chat messages, or {"text"}. Only
the completion (what the assistant says) is learned. The adapter is written in PEFT's format into --output, with
metrics.jsonl and loss.svg. Interrupted, the same command with --resume goes on to the same adapter, bit for bit.
"""

from __future__ import annotations

import argparse
import sys

from posttrain.cli.common import add_model_arguments, load_model, positive_int

HELP = "fine-tune a LoRA adapter on a JSONL file"
EXAMPLES = """\
examples:
  echo '{"prompt": "the sea is", "completion": " wide"}' > train.jsonl
  posttrain sft --model offline --data train.jsonl --output my-adapter --max-steps 20 --learning-rate 1e-3
  posttrain sft --model smollm2-135m --quantize nf4 --data train.jsonl --output my-adapter --epochs 2
  posttrain sft --model smollm2-135m --quantize nf4 --data train.jsonl --output my-adapter --epochs 2 --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, adapter=False)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines to learn from")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder for the adapter and its checkpoints")
    lora = parser.add_argument_group("adapter")
    lora.add_argument("--r", type=positive_int, default=8, help="rank (default %(default)s)")
    lora.add_argument("--lora-alpha", type=float, default=16, help="scaling = alpha / r (default %(default)s)")
    lora.add_argument("--lora-dropout", type=float, default=0.0, help="default %(default)s")
    lora.add_argument("--target-modules", default="all-linear", metavar="NAMES", help="comma-separated, or a regex")
    lora.add_argument("--use-rslora", action="store_true", help="scaling = alpha / sqrt(r)")
    training = parser.add_argument_group("training")
    training.add_argument("--max-steps", type=int, default=0, metavar="N", help="default: what --epochs makes")
    training.add_argument("--epochs", type=float, default=1.0, help="default %(default)s")
    training.add_argument("--batch-size", type=positive_int, default=4, metavar="N", help="rows at once (default 4)")
    training.add_argument("--accumulate", type=positive_int, default=1, metavar="N", help="batches a step (default 1)")
    training.add_argument("--learning-rate", type=float, default=2e-4, help="default %(default)s")
    training.add_argument("--warmup-ratio", type=float, default=0.03, help="of the steps (default %(default)s)")
    training.add_argument("--max-grad-norm", type=float, default=1.0, help="0 does not clip (default %(default)s)")
    training.add_argument("--max-length", type=positive_int, metavar="N", help="tokens in a row (default: the longest)")
    training.add_argument("--truncate", action="store_true", help="cut the start of prompts that exceed --max-length")
    training.add_argument("--no-packing", action="store_true", help="one example a row")
    training.add_argument("--activation-checkpointing", action="store_true", help="less memory, a third more work")
    training.add_argument("--seed", type=int, default=0, help="default %(default)s")
    training.add_argument("--save-steps", type=int, default=50, metavar="N", help="between checkpoints (default 50)")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")


def run(args: argparse.Namespace) -> None:
    from posttrain.adapters import LoraConfig
    from posttrain.data import load_dataset
    from posttrain.sft import sft
    from posttrain.trainer import TrainConfig

    config = TrainConfig(
        output_dir=args.output,
        max_steps=args.max_steps,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        warmup_ratio=args.warmup_ratio,
        max_grad_norm=args.max_grad_norm,
        activation_checkpointing=args.activation_checkpointing,
        seed=args.seed,
        save_steps=args.save_steps,
    )
    names = args.target_modules.split(",")
    lora = LoraConfig(
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=names if all(map(str.isidentifier, names)) else args.target_modules,
        use_rslora=args.use_rslora,
    )
    with open(args.data, "rb"):  # a wrong path is told before the model is loaded
        pass
    model, tokenizer = load_model(args)
    examples = load_dataset(args.data, tokenizer, args.max_length, "keep_end" if args.truncate else "error")
    learned = sum(example.num_labels for example in examples)
    print(f"{len(examples)} examples, {learned} tokens to learn", file=sys.stderr)
    pad_id = 0 if tokenizer.pad_id is None else tokenizer.pad_id
    try:
        sft(
            model,
            examples,
            config,
            lora,
            max_length=args.max_length,
            packing=not args.no_packing,
            pad_id=pad_id,
            resume=args.resume,
        )
    except KeyboardInterrupt:
        print("\nRun the same command with --resume: it goes on from the last checkpoint.", file=sys.stderr)
        raise
    print(args.output)
