"""Train a model to prefer the chosen of two completions: DPO and its family, by an adapter on the frozen base.

Each line of --data holds TRL's columns: {"prompt", "chosen", "rejected"}, as text or as chat messages; without "prompt" it is
what both begin with. For --loss-type kto and apo_zero_unpaired {"prompt", "completion", "label"}, or pairs. The name
reviews:train (or :validation, :test) stands for pairs derived from the scores of the fetched movie reviews, which nobody
compared.

The reference is the model with its adapter off, so that one copy of the base serves both, in 4 bits too (--method qlora). With
--adapter that adapter trains on as it is, without --method and its options, and the reference is the model as it comes.
--eval-data tells, before and after, how often the model is on the side of the chosen completion. Several losses: --loss-type
sigmoid,sft --loss-weights 1,0.5.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from posttrain.cli.common import (
    add_model_arguments,
    check_data,
    goes_with,
    in_options,
    load_model,
    positive_int,
    progress_bar,
    resolve_model,
)
from posttrain.cli.sft import ADAPTER_OPTIONS, adapter_of, add_adapter_arguments
from posttrain.cli.training import TRUNCATION, add_training_arguments, train_config
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from posttrain.model.tokenizer import Tokenizer

UNPAIRED = ("kto", "apo_zero_unpaired")
OF_PAIRS = ("label_smoothing", "f_divergence_type", "simpo_gamma", "ld_alpha", "use_weighting")
OF_LABELS = ("desirable_weight", "undesirable_weight")
DERIVED = "reviews:"
HELP = "learn from preferences: DPO and its family, KTO, on pairs of completions"
EXAMPLES = """\
examples:
  echo '{"prompt": "The sea is", "chosen": " wide.", "rejected": " a sea."}' > pairs.jsonl
  posttrain dpo --model offline --data pairs.jsonl --output my-dpo --max-steps 10
  posttrain dpo --model smollm2-135m --data reviews:train --eval-data reviews:test --output my-dpo --max-steps 120
  posttrain dpo --method qlora --model smollm2-135m --data pairs.jsonl --loss-type ipo --beta 0.2 --output my-ipo --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype=None)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines to learn from, or reviews:train")
    parser.add_argument("--eval-data", metavar="FILE", help="held-out pairs to measure on, before and after")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder for the adapter and its checkpoints")
    group = parser.add_argument_group("adapter", "each has a default by method; one that the method lacks is refused")
    add_adapter_arguments(group, default="lora")
    parser.set_defaults(method=None)  # lora, but for --adapter
    loss = parser.add_argument_group("loss", "names are TRL's; kernels/preference_losses.py lists the losses with their papers")
    loss.add_argument("--loss-type", default="sigmoid", metavar="NAMES", help="default sigmoid (DPO); also cpo, orpo, kto, ...")
    loss.add_argument("--loss-weights", metavar="NUMBERS", help="one a loss (default 1 each)")
    loss.add_argument("--beta", type=float, default=0.1, help="default %(default)s")
    loss.add_argument("--label-smoothing", type=float, help="share of pairs taken to be the wrong way round (default 0)")
    loss.add_argument(
        "--f-divergence-type", metavar="NAME", help="forward_kl, js_divergence, alpha_divergence (default reverse_kl)"
    )
    loss.add_argument("--simpo-gamma", type=float, help="margin of simpo (default 0.5)")
    loss.add_argument("--ld-alpha", type=float, help="weight of tokens beyond the shorter completion (LD-DPO)")
    loss.add_argument("--use-weighting", action="store_true", default=None, help="weigh pairs by the policy's likelihood (WPO)")
    loss.add_argument("--desirable-weight", type=float, help="kto, apo_zero_unpaired (default 1)")
    loss.add_argument("--undesirable-weight", type=float, help="kto, apo_zero_unpaired (default 1)")
    reference = parser.add_argument_group("reference")
    reference.add_argument("--ref-model", metavar="PATH", help="another model (default: this one, its adapter off)")
    reference.add_argument("--precompute-ref", action="store_true", help="once before training: cheaper steps over several epochs")
    reference.add_argument("--ref-cache", metavar="FILE", help="keep them there, for other runs on the same data and base")
    training = add_training_arguments(parser, "pairs at once", 8, "5e-4")
    training.add_argument("--max-length", type=positive_int, metavar="N", help="tokens of prompt and completion")
    training.add_argument(
        "--truncation", choices=("error", "keep_end", "keep_start"), default="error",
        help="of longer ones: keep_end cuts prompts, keep_start the ends of completions, never a whole one (default: refuse)",
    )  # fmt: skip


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise PosttrainError(f"{option} {text!r}: expected numbers with commas between, one a loss, such as 1,0.5") from error


def preference_of(args: argparse.Namespace) -> Any:
    """The PreferenceConfig, or for completions without pairs the KtoConfig, that the options say. PosttrainError where they do not
    go together."""
    from posttrain.preference.paired import PreferenceConfig
    from posttrain.preference.unpaired import KtoConfig

    names = args.loss_type.split(",")
    paired = args.loss_type not in UNPAIRED
    _check_names(names)
    goes_with(args, paired, "losses of pairs", "loss_weights", *OF_PAIRS)
    goes_with(args, not paired, "--loss-type kto or apo_zero_unpaired", *OF_LABELS)
    goes_with(args, "simpo" in names, "--loss-type simpo", "simpo_gamma")
    options = OF_PAIRS if paired else OF_LABELS
    given = {name: getattr(args, name) for name in ("beta", *options) if getattr(args, name) is not None}
    try:
        if not paired:
            return KtoConfig(args.loss_type, **given)
        weights = None if args.loss_weights is None else _numbers("--loss-weights", args.loss_weights)
        preference = PreferenceConfig(names[0] if len(names) == 1 else names, weights, **given)
    except ValueError as error:
        raise PosttrainError(str(error)) from error
    compared = preference.needs_reference
    goes_with(args, compared, f"losses that compare with a reference, and {args.loss_type} has none", "precompute_ref", "ref_cache")
    goes_with(args, compared or args.eval_data is not None, "losses that compare with a reference, or --eval-data", "ref_model")
    return preference


def _check_names(names: list[str]) -> None:
    """PosttrainError for a loss that there is not, or not beside others."""
    from posttrain.kernels.preference_losses import LOSSES
    from posttrain.preference.paired import PAPERS

    paired = [name for name, loss in LOSSES.items() if not loss.unpaired]
    alone = [name for name in (*PAPERS, *UNPAIRED) if name not in paired]
    if unknown := [name for name in names if name not in paired and (len(names) > 1 or name not in alone)]:
        raise PosttrainError(
            f"--loss-type {','.join(names)}: expected {', '.join(alone)}, or one or several of {', '.join(paired)}; "
            f"{unknown[0]!r} is none of these" + (" that go with others" if unknown[0] in alone else "")
        )


def read(name: str, tokenizer: Tokenizer, args: argparse.Namespace, paired: bool = True) -> list[Any]:
    """Pairs (or labelled completions) of a file, or derived from the reviews."""
    from posttrain.preference.data import encode_pair, fit_pair, load_preferences, load_unpaired, unpair

    if not name.startswith(DERIVED):
        load = load_preferences if paired else load_unpaired
        return load(name, tokenizer, args.max_length, args.truncation)  # type: ignore[return-value]
    from posttrain.fetch import fetch
    from posttrain.review_pairs import NOTE, review_pairs
    from posttrain.reviews import Splits, load_reviews

    split = name.removeprefix(DERIVED)
    if split not in Splits._fields:
        raise PosttrainError(f"{name}: expected {', '.join(DERIVED + field for field in Splits._fields)}")
    splits = load_reviews(fetch("reviews"))
    print(f"{name}: {NOTE}", file=sys.stderr)
    rows = map(vars, review_pairs(getattr(splits, split)))
    pairs = [fit_pair(encode_pair(row, tokenizer), args.max_length, args.truncation, tokenizer.bos_id) for row in rows]
    return pairs if paired else unpair(pairs)


def run(args: argparse.Namespace) -> None:
    from posttrain.adapters.recipes import RECIPES
    from posttrain.model.checkpoint import copy_tokenizer
    from posttrain.preference.accuracy import pair_accuracy
    from posttrain.preference.paired import dpo, pair_logps
    from posttrain.preference.unpaired import kto
    from posttrain.trained_model import model_folder

    new = "a new adapter, and --adapter trains on as it is (for 4 bits: --quantize nf4)"
    goes_with(args, args.adapter is None, new, "method", *ADAPTER_OPTIONS)
    args.method = args.method or "lora"
    adapter = None if args.adapter else adapter_of(args.method, args)
    preference = preference_of(args)
    if args.method == "full" and args.quantize:
        raise PosttrainError("--method full trains the weights, and 4-bit ones are frozen; drop --quantize, or use qlora")
    args.quantize = args.quantize or RECIPES[args.method].quantize
    args.dtype = args.dtype or ("fp32" if args.method == "full" else "bf16")
    config = train_config(args, 3e-5 if args.method == "full" else 5e-4)
    check_data(args, (DERIVED,))
    model, tokenizer = load_model(args)
    paired = args.loss_type not in UNPAIRED
    with in_options(TRUNCATION):
        data = read(args.data, tokenizer, args, paired)
        held_out = read(args.eval_data, tokenizer, args) if args.eval_data else []
    print(f"{len(data)} {'pairs' if paired else 'completions'} to learn from, {len(held_out)} pairs held out", file=sys.stderr)
    ref_model = _ref_model(args)
    before = None
    if held_out:
        with progress_bar("reference on held-out pairs") as progress:
            before = pair_logps((ref_model or model).eval(), held_out, progress=progress)
    try:
        (dpo if paired else kto)(
            model,
            data,
            config,
            adapter,
            preference,
            ref_model=ref_model,
            precompute_ref=args.precompute_ref,
            ref_cache=args.ref_cache,
            max_length=args.max_length,
            resume=args.resume,
        )
    except KeyboardInterrupt:
        print("\nRun the same command with --resume: it goes on from the last checkpoint.", file=sys.stderr)
        raise
    if before is not None:
        with progress_bar("policy on held-out pairs") as progress:
            print(pair_accuracy(model, held_out, before, progress=progress))
    if adapter is None and not args.adapter:
        copy_tokenizer(resolve_model(args.model), model_folder(config))
        print(model_folder(config))
    else:
        print(args.output)


def _ref_model(args: argparse.Namespace) -> Any:
    if args.ref_model is None:
        return None
    from posttrain.cli.common import resolve_device
    from posttrain.model.loading import load

    return load(resolve_model(args.ref_model), dtype=args.dtype, quantize=args.quantize, device=resolve_device(args.device))
