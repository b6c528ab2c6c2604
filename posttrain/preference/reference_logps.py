"""Log-probabilities of the reference model: by the policy with its adapter off, by a second model, or once, kept on disk.

A file of them holds float32 (items, completions of an item) in safetensors, with what they are of in its metadata: the data's
digest and the reference's identity, which is its base's fingerprint, how its weights are held, and its adapter. Written whole or
not at all; a file of other data or of another model is refused, never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from posttrain.adapters import active_adapter, adapter_parameters, base_fingerprint, disabled
from posttrain.atomic import atomic_write
from posttrain.completion_batch import CompletionBatch
from posttrain.errors import PosttrainError
from posttrain.model.decoder import CausalLM
from posttrain.model.eval_mode import eval_mode
from posttrain.model.safetensors_file import SafetensorsReader, write_safetensors
from posttrain.quantized import QuantizedLinear
from posttrain.token_logprobs import completion_logprobs

FILE = "reference_logps.safetensors"
_TENSOR = "ref_logps"
Progress = Callable[[int, int], None]  # called with (items done, items in all)


@contextlib.contextmanager
def reference_of(model: CausalLM, ref_model: CausalLM | None) -> Iterator[CausalLM]:
    """The reference within the block: the second model, or the policy with its adapter off. No autograd, no dropout."""
    reference = ref_model or model
    with torch.no_grad(), contextlib.nullcontext() if ref_model is not None else disabled(model), eval_mode(reference):
        yield reference


def reference_logprobs(model: CausalLM, batch: CompletionBatch, ref_model: CausalLM | None) -> Tensor:
    """The reference's log-probability of each labelled token, float32 (N,)."""
    with reference_of(model, ref_model) as reference:
        return completion_logprobs(reference, batch)


def identity_of(model: CausalLM, with_adapter: bool) -> str:
    """What a reference's log-probabilities depend on: base, how its weights are held, and the adapter's values where it acts."""
    held = sorted({m.weight.quant_type for m in model.modules() if isinstance(m, QuantizedLinear)})
    storage = "-".join([*held, str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")])
    identity = f"{base_fingerprint(model)} in {storage}"
    if not with_adapter or active_adapter(model) is None:
        return identity
    content = hashlib.sha256()
    for key, parameter in sorted(adapter_parameters(model).items()):
        content.update(key.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{identity} with adapter {content.hexdigest()[:16]}"


@torch.no_grad()
def measure(
    lengths: Sequence[int],
    sums_of: Callable[[list[int]], Tensor],
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
) -> Tensor:
    """sums_of(indices) -> (len(indices), columns), called for batches of items of like length: float32 (items, columns).

    lengths: tokens of each item, all its completions together. PosttrainError names the items whose result is not finite.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found: list[Tensor] = []
    while (done := sum(map(len, found))) < len(order):
        take = max(1, tokens_per_batch // lengths[order[done]])
        while take > 1 and sum(lengths[i] for i in order[done : done + take]) > tokens_per_batch:
            take -= 1
        found.append(sums_of(order[done : done + take]).float().cpu())
        if progress:
            progress(min(done + take, len(order)), len(order))
    result = torch.empty(len(order), found[0].shape[1])
    result[order] = torch.cat(found)
    if bad := (~result.isfinite()).any(1).nonzero().flatten().tolist():
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise PosttrainError(
            f"log-probabilities of {len(bad)} items of the data are not finite (items {shown}, from 0); "
            "look at those, or load the model in bfloat16 or float32"
        )
    return result


def cached(path: str | os.PathLike, about: dict[str, str], items: int, compute: Callable[[], Tensor]) -> Tensor:
    """The log-probabilities in the file `path`, or what `compute` gives, which is then written there.

    about: what they are of, by name. PosttrainError naming both where the file says otherwise.
    """
    path = Path(path)
    if path.exists():
        return _read(path, about, items)
    result = compute()
    with atomic_write(path) as temporary:
        write_safetensors(temporary, [(_TENSOR, result)], {"about": json.dumps(about)})
    return result


def _read(path: Path, about: dict[str, str], items: int) -> Tensor:
    with SafetensorsReader(path) as file:
        theirs = json.loads(file.metadata.get("about", "{}"))
        if different := [key for key in about if theirs.get(key) != about[key]]:
            what = "; ".join(f"{key} is {theirs.get(key)!r} there and {about[key]!r} here" for key in different)
            raise PosttrainError(
                f"{path} holds reference log-probabilities of something else: {what}. Delete it, or give another path"
            )
        result = file.read(_TENSOR)
    if len(result) != items:
        raise PosttrainError(f"{path} holds {len(result)} items and the data has {items}; delete it, or give another path")
    return result
