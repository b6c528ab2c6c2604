"""From logits to a token: the one definition of temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.logit_filter import check_sampling, logit_filter

__all__ = ["check_sampling", "filter_logits", "sample"]


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., V) divided by the temperature (> 0) in at least float32, and -inf on the tokens that the filters
    exclude.

    top_k keeps the k largest. top_p then keeps the fewest most probable tokens whose probabilities, over what top_k kept,
    reach top_p (nucleus sampling, arXiv:1904.09751); the token that crosses is kept. Both keep whatever equals the last
    they keep: a filter is a threshold, and the same one as in `posttrain.kernels.verify_draft_tokens`.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not 0 < top_k < logits.shape[-1] and top_p == 1:
        return wide / temperature
    threshold, _ = logit_filter(logits, temperature, top_k, top_p)
    return (wide / temperature).masked_fill(wide < threshold[..., None], -torch.inf)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids int64 (N,) drawn from logits (N, V); the most probable (the first of equals) when temperature is 0.

    ValueError for a row that has none: its logits hold NaN or inf, or exceed float32 once divided by the temperature.
    """
    if temperature == 0:
        chosen = logits.argmax(-1)  # of a row with NaN, that one
        _check_finite(logits.gather(-1, chosen[:, None]), temperature)
        return chosen
    probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    _check_finite(probabilities[:, :1], temperature)  # where a row's sum is NaN, all of it is
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _check_finite(values: Tensor, temperature: float) -> None:
    """ValueError naming the rows of `values` (N, 1) that are not finite."""
    if bad := (~values.isfinite()).flatten().nonzero().flatten().tolist():
        raise ValueError(
            f"the model's logits give no token at temperature {temperature} (row {bad[0]} of the batch, {len(bad)} in all): they "
            "are not finite, or not once divided by that. Load it in bf16 or fp32 if that was fp16; otherwise its weights or its "
            "adapter are damaged"
        )
