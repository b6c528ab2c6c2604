"""Training against a reference model: which model that is, where its log-probabilities come from, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.adapters import active_adapter, base_fingerprint
from posttrain.errors import PosttrainError
from posttrain.model.decoder import CausalLM
from posttrain.quantized import held_as
from posttrain.trained_model import attach_for_training, check_lengths, free_weights, save_trained
from posttrain.trainer import TrainConfig, TrainResult, train

from .reference_logps import FILE, cached, identity_of, reference_of


def train_against_reference(
    model: CausalLM,
    data: Sequence[Any],
    config: TrainConfig,
    adapter: Any,
    settings: dict[str, Any],
    *,
    collate: Callable[[list[Any]], Any],
    loss: Callable[[Any, Any], Any],
    measure: Callable[[CausalLM], Tensor],
    about: dict[str, str],
    longest: int,
    max_length: int | None,
    needs_reference: bool,
    ref_model: CausalLM | None,
    precompute_ref: bool,
    ref_cache: str | Path | None,
    resume: bool,
    quiet: bool,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> TrainResult:
    """`train` with items (one of `data`, the reference's log-probabilities of it or None), and the result saved.

    measure(reference) -> float32 (items, completions of an item), where they are computed once; `about` names what they depend on
    beside the reference. settings: what a resumed run must share beside data, adapter, base and reference. longest: tokens of
    the longest sequence. The rest as in posttrain.preference.dpo.
    """
    check_lengths(model, adapter, longest, max_length)
    _check_reference(model, ref_model, needs_reference)
    is_base = adapter is not None and active_adapter(model) is None
    trained = attach_for_training(model, adapter, config.seed)
    as_it_is = ref_model is None and not is_base
    about = about | {"reference": identity_of(ref_model or model, as_it_is) if needs_reference else "none"}
    refs: Sequence[Tensor | None] = [None] * len(data)
    if needs_reference and (precompute_ref or ref_cache is not None or as_it_is):

        def compute() -> Tensor:
            with reference_of(model, model if as_it_is else ref_model) as reference:
                return measure(reference)

        refs = list(cached(ref_cache or Path(config.output_dir) / FILE, about, len(data), compute))
    base = {"base": base_fingerprint(model), "held": held_as(model)}
    identity = about | settings | base | {"adapter": asdict(trained) if trained else None}
    if trained is None:
        free_weights(model)
    items = list(zip(data, refs, strict=True))
    result = train(
        model, items, collate, loss, config,
        resume=resume, identity=identity, quiet=quiet, on_step=on_step, unit="mean of the batch's losses",
    )  # fmt: skip
    save_trained(model, trained, config)
    return result


def _check_reference(model: CausalLM, ref_model: CausalLM | None, needed: bool) -> None:
    if ref_model is None:
        return
    if not needed:
        raise PosttrainError("this loss needs no reference model; leave ref_model out")
    if ref_model is model:
        raise PosttrainError("ref_model is the model to train; leave it out: the reference is then the model as it is now")
    if ref_model.config.vocab_size != model.config.vocab_size:
        sizes = f"{ref_model.config.vocab_size} tokens and the model {model.config.vocab_size}"
        raise PosttrainError(f"ref_model knows {sizes}; expected a model with the same tokenizer")
