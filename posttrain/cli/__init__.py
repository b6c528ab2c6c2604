"""`posttrain`: one command a file. Parsing is light; a command imports torch only when it runs.

Exit codes: 0 done, 1 an error (one line on stderr; POSTTRAIN_DEBUG=1 shows the traceback), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence

import posttrain
from posttrain.cli import (
    adapters,
    doctor,
    dpo,
    evaluate,
    fetch,
    generate,
    grpo,
    merge_adapter,
    ppo,
    quantize,
    quickstart,
    reward,
    sft,
    speculative,
)
from posttrain.errors import PosttrainError

_EPILOG = """\
start here:
  posttrain quickstart                 fine-tune a real model in 4 bits, measured before and after
  posttrain quickstart --offline       the same steps on a 2 MB model, without a network
  posttrain doctor                     which engine runs here, and what is missing

`posttrain COMMAND --help` has runnable examples of each command.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="posttrain",
        description="Post-training from the kernel up: 4-bit fine-tuning of language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"posttrain {posttrain.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        quickstart, fetch, sft, dpo, reward, ppo, grpo, adapters, generate, speculative, evaluate, merge_adapter, quantize, doctor,
    ):  # fmt: skip
        command = commands.add_parser(
            module.__name__.rpartition(".")[2].replace("_", "-"),
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, prog=command.prog)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_streams()
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as exit_:  # argparse: --help and --version leave with 0, wrong usage with 2
        return int(exit_.code or 0)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{args.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PosttrainError, ValueError, TypeError, OSError, MemoryError, ImportError, RuntimeError) as error:
        if os.environ.get("POSTTRAIN_DEBUG"):
            raise
        print(f"{args.prog}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _open_streams() -> None:
    """Where the caller closed a standard stream (>&-, as daemons do), Python has None: read nothing there, and write to nobody."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.strerror}; what was written before is whole: make room and run it again (training: with --resume)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or re.search("out of memory|not enough memory|can't allocate memory", text):
        return f"out of memory; a smaller --batch-size, --max-length or --window needs less, and so does --quantize nf4 ({text})"
    if isinstance(error, RuntimeError) and not isinstance(error, PosttrainError):  # torch's, about what nobody here foresaw
        return f"{text} (POSTTRAIN_DEBUG=1 shows where)"
    return text
