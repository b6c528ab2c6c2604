"""Merge an adapter into its base and write a plain Hugging Face folder.

For methods that change weights: LoRA and DoRA (W + scaling B A, computed in float32 and rounded once to --dtype) and
(IA)^3. A base in 4 bits is dequantized first, so that the result is dense; the adapter's fingerprint must be that
of the base.
"""

from __future__ import annotations

import argparse

from posttrain.cli.common import resolve_model

HELP = "merge an adapter into its base model"
EXAMPLES = """\
examples:
  posttrain merge-adapter --model smollm2-135m --adapter quickstart-output/adapter --output merged
  posttrain merge-adapter --model offline --adapter my-adapter --output merged --dtype fp32
  posttrain evaluate --model merged --task reviews
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="the base: a folder, or smollm2-135m, offline")
    parser.add_argument("--adapter", required=True, metavar="PATH", help="an adapter's folder, in PEFT's format")
    parser.add_argument("--any-base", action="store_true", help="merge even into another base than the adapter's own")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder to write")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default %(default)s")
    parser.add_argument("--force", action="store_true", help="replace --output if it exists")


def run(args: argparse.Namespace) -> None:
    from posttrain.adapters import load_adapter, merge_and_unload
    from posttrain.cli.quantize import new_folder
    from posttrain.model.loading import load, save

    folder = resolve_model(args.model)
    output = new_folder(args.output, args.force, folder)
    model = load(folder, dtype=args.dtype)
    load_adapter(model, args.adapter, any_base=args.any_base)
    merge_and_unload(model)
    save(model, output, tokenizer=folder)
    print(output)
