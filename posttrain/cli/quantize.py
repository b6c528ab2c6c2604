"""Write a 4-bit copy of a model: a Hugging Face folder in bitsandbytes' layout, which transformers loads too.

The linear layers of the decoder go to 4 bits; embeddings, norms and the output head stay in --dtype. The source is read
shard by shard, so the whole model is never in memory in 16 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain.atomic import check_folder_writable
from posttrain.cli.common import QUANT_TYPES, resolve_model
from posttrain.errors import PosttrainError

HELP = "write a 4-bit copy of a model"
EXAMPLES = """\
examples:
  posttrain quantize --model smollm2-135m --output smollm2-nf4
  posttrain quantize --model offline --output offline-fp4 --quant-type fp4 --block-size 128
  posttrain generate --model smollm2-nf4 --chat "Name three rivers."
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="a folder, or smollm2-135m, offline")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder to write")
    parser.add_argument("--quant-type", choices=QUANT_TYPES, default="nf4", help="default %(default)s")
    parser.add_argument("--block-size", type=int, default=64, help="weights per absmax (default %(default)s)")
    parser.add_argument("--no-double-quant", action="store_true", help="keep absmax in float32")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default %(default)s")
    parser.add_argument("--force", action="store_true", help="replace --output if it exists")


def run(args: argparse.Namespace) -> None:
    from posttrain.model.loading import load, save
    from posttrain.quickstart import storage

    folder = resolve_model(args.model)
    output = new_folder(args.output, args.force, folder)
    model = load(
        folder,
        dtype=args.dtype,
        quantize=args.quant_type,
        block_size=args.block_size,
        double_quant=not args.no_double_quant,
    )
    save(model, output, tokenizer=folder)
    print(f"{output}: {storage(model)}")


def new_folder(path: str, force: bool, source: Path) -> Path:
    """`path`, checked before any work is done for it. PosttrainError where it cannot be written or replaced, is `source`, the model
    that is read, or holds what cannot stay beside a model."""
    from posttrain.model.checkpoint import check_kept

    folder = Path(path)
    check_folder_writable(folder)
    if folder.exists() and folder.samefile(source):
        raise PosttrainError(f"{folder} is the model itself, which would be lost; choose another --output")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise PosttrainError(f"{folder} exists; choose another --output, or give --force to replace it")
    check_kept(folder)
    return folder
