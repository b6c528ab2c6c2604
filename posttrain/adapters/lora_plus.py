"""LoRA+: B learns faster than A.

Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv:2402.12354): in wide layers one rate for both
factors leaves B's change too small, so B's rate is `ratio` times A's (their section 4; 16 in their experiments). Everything
else that trains, DoRA's magnitudes among it, keeps A's rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_groups(parameters: Mapping[str, nn.Parameter], ratio: float | None = None) -> list[dict[str, Any]]:
    """An optimizer's groups of `parameters` by their keys in an adapter's file, each with its `lr_scale`: what its rate is of the
    run's. One group without a ratio. ValueError for a ratio where there is no B."""
    fast = {key: p for key, p in parameters.items() if ".lora_B." in key}
    if ratio is None:
        return [{"params": list(parameters.values()), "lr_scale": 1.0}]
    if not fast:
        raise ValueError(f"loraplus_lr_ratio is {ratio}, and nothing that trains is a LoRA adapter's B; leave it out")
    slow = [p for key, p in parameters.items() if key not in fast]
    return [{"params": slow, "lr_scale": 1.0}, {"params": list(fast.values()), "lr_scale": ratio}]
