"""What several commands share: naming a model, loading it, a progress bar. Light until a function is called."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from collections.abc import Callable

    from posttrain.model.decoder import CausalLM
    from posttrain.model.tokenizer import Tokenizer

FETCHABLE_MODELS = ("smollm2-135m",)
QUANT_TYPES = ("nf4", "fp4")


def cache_folder() -> Path:
    """$POSTTRAIN_CACHE, else ~/.cache/posttrain."""
    from posttrain.fetch import cache_dir

    return cache_dir()


def add_model_arguments(parser: argparse.ArgumentParser, adapter: bool = True, dtype: str | None = "bf16") -> None:
    """--model, --adapter, --quantize, --dtype (`dtype` None: the command decides), --device."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a Hugging Face folder, or a name: smollm2-135m (fetched), offline (comes with posttrain)",
    )
    if adapter:
        parser.add_argument("--adapter", metavar="PATH", help="an adapter's folder, in PEFT's format")
        parser.add_argument("--any-base", action="store_true", help="load --adapter even on another base than its own")
    else:
        parser.set_defaults(adapter=None)
    parser.add_argument("--quantize", choices=QUANT_TYPES, help="hold the linear layers in 4 bits (default: as stored)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default=dtype, help=f"default {dtype or 'bf16'}")
    add_device_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N, or auto: the GPU where there is one, else cpu (default %(default)s)"
    )


def resolve_device(name: str) -> str:
    """What --device means on this machine; "auto" is the first GPU that torch can use, else "cpu".

    Raises PosttrainError for a name that is none of the choices, or for a GPU that is not here.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not index.isdecimal())):
        raise PosttrainError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= count:
        raise PosttrainError(
            f"--device {name}: torch {torch.__version__} sees {count} GPUs here; use --device cpu, or see posttrain doctor"
        )
    return name


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, given {text}")
    return value


def goes_with(args: argparse.Namespace, holds: bool, what: str, *options: str) -> None:
    """PosttrainError for the first of these options that was given where what they go with does not hold: none is passed over in
    silence. An option that was not given is None (a flag may be False), so its default is set by `with_defaults` afterwards."""
    given = [option for option in options if getattr(args, option) is not None and getattr(args, option) is not False]
    if given and not holds:
        raise PosttrainError(f"--{given[0].replace('_', '-')} goes with {what}; leave it out here")


def with_defaults(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Give the options that are still None their defaults."""
    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)


@contextmanager
def in_options(names: dict[str, str]) -> Iterator[None]:
    """Errors that name a setting as Python has it name the option instead. names: what a message says, and what to show."""
    try:
        yield
    except (PosttrainError, ValueError) as error:
        text = str(error)
        for name, option in names.items():
            text = text.replace(name, option)
        raise PosttrainError(text) from error


def check_data(args: argparse.Namespace, made: tuple[str, ...] = ()) -> None:
    """PosttrainError where --data or --eval-data cannot be read: a wrong path is told before the model is loaded.

    made: what names that are no files begin with, such as "reviews:".
    """
    for option in ("data", "eval_data"):
        name = getattr(args, option, None)
        if name is None or name.startswith(made):
            continue
        try:
            with open(name, "rb"):
                pass
        except OSError as error:
            expected = " or ".join(["a file of JSON lines", *(f"{start}train, ..." for start in made)])
            raise PosttrainError(f"--{option.replace('_', '-')} {name}: {error.strerror}; expected {expected}") from error


def resolve_model(name: str) -> Path:
    """The folder of a local model, of a fetched one, or of the one that comes with posttrain."""
    if name in FETCHABLE_MODELS:
        from posttrain.fetch import fetch

        return fetch(name)
    if name == "offline":
        from posttrain import offline

        return offline.model_path()
    folder = Path(name)
    if not folder.is_dir():
        raise PosttrainError(
            f"no model folder at {name!r}, and it is not a known name ({', '.join(FETCHABLE_MODELS)}, offline); "
            "give the path of a Hugging Face folder (config.json, *.safetensors, tokenizer.json)"
        )
    if not (folder / "config.json").is_file():
        raise PosttrainError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    return folder


def load_model(args: argparse.Namespace) -> tuple[CausalLM, Tokenizer]:
    """The model with its adapter attached, and its tokenizer, as --model, --adapter, --quantize and --dtype say."""
    from posttrain.model.loading import load
    from posttrain.model.tokenizer import Tokenizer

    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    model = load(folder, dtype=args.dtype, quantize=args.quantize, device=resolve_device(args.device))
    if args.adapter is not None:
        from posttrain.adapters import load_adapter

        load_adapter(model, args.adapter, any_base=args.any_base)
    return model.eval(), tokenizer


@contextmanager
def progress_bar(label: str, unit: str = "items") -> Iterator[Callable[[int, int], None]]:
    """Yield update(done, total), which draws one line on stderr: a live one on a terminal, else one at the end."""
    start = time.perf_counter()
    live = sys.stderr.isatty()
    last = [0.0, 0, 0]  # when drawn, done, total

    def line(done: int, total: int, seconds: float) -> str:
        cells = 24 * done // max(total, 1)
        left = f", {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
        return f"{label}  {'█' * cells}{'·' * (24 - cells)}  {done}/{total} {unit}, {seconds:.1f} s{left}"

    def update(done: int, total: int) -> None:
        now = time.perf_counter()
        last[1:] = [done, total]
        if live and (now - last[0] > 0.1 or done == total):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            sys.stderr.write("\r\x1b[K" + line(done, total, now - start)[: columns - 1])
            sys.stderr.flush()
            last[0] = now

    try:
        yield update
    finally:
        if last[2]:
            text = line(int(last[1]), int(last[2]), time.perf_counter() - start)
            sys.stderr.write(("\r\x1b[K" if live else "") + text + "\n")
            sys.stderr.flush()
