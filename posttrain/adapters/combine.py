"""Several LoRA adapters of one model as one: the weighted sum of what they add to the weights.

    delta = sum_i w_i s_i B_i A_i = B A      A = [A_1; A_2; ...],  B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]

    "cat"       A and B as they stand: rank sum r_i, the sum exactly
    "linear"    the same delta in as few dimensions as it has: never more than min(sum r_i, N, K), fewer where adapters overlap
    "svd"       the nearest delta of rank r (Eckart and Young, 1936)

The products are summed, never the factors: (B_1 + B_2)(A_1 + A_2) has cross terms that no adapter has, which is what "linear"
is in other libraries. No N x K matrix is made: with B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of the
R x R matrix R_B R_A^T, R = sum r_i: 2 (N + K) R^2 flops for the two factorizations and O(R^3) for the core, in float64.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .interface import _attach, _check_new, adapter_configs, adapter_names
from .lora import KEYS, lora_layers
from .lora_config import LoraConfig
from .lora_embedding import LoraEmbedding
from .lora_linear import LoraLinear
from .peft_format import PREFIX

HOW = ("linear", "cat", "svd")


def compress(A: Tensor, B: Tensor, r: int | None = None) -> tuple[Tensor, Tensor]:
    """(A, B) of rank r with B A nearest to the given one (R, K), (N, R): float64. Without r, of the rank that the product has:
    singular values below the rounding of the sum, float64's eps times what its R terms measure, count as none. The factors'
    dtype has no say: what they hold is exact, and in half precision its eps times R would be as large as the update."""
    A, B = A.double(), B.double()
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.t())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    if r is None:
        rounding = torch.finfo(A.dtype).eps * (A.norm(dim=1) * B.norm(dim=0)).sum()
        r = max(1, int((S > rounding).sum()))
    root = S[:r].sqrt()
    return root[:, None] * (Vh[:r] @ Q_A.t()), (Q_B @ U[:, :r]) * root


def _factors(layer: LoraLinear, parts: Sequence[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    """(A, B) of the weighted sum of the adapters that are on the layer; B in float64, to be rounded once."""
    As, Bs = [], []
    for name, weight in parts:
        A, B = (factor.detach() for factor in layer.factors(name))
        As.append(A)
        Bs.append(B.double() * (weight * layer.scaling[name]))
    return torch.cat(As), torch.cat(Bs, 1)


def _check(model: nn.Module, names: Sequence[str], weights: Sequence[float], how: str, r: int | None) -> None:
    if how not in HOW:
        raise ValueError(f"how is {how!r}; expected one of {', '.join(HOW)}")
    if not names or len(names) != len(weights):
        raise ValueError(
            f"{len(names)} adapters and {len(weights)} weights; expected one weight an adapter, and one adapter at least"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"{list(names)} names an adapter twice; add up its weights")
    if not all(torch.isfinite(torch.tensor(float(weight))) for weight in weights):
        raise ValueError(f"weights are {list(weights)}; expected finite numbers")
    if (how == "svd") != (r is not None) or (r is not None and (not isinstance(r, int) or r < 1)):
        raise ValueError(f"how is {how!r} and r is {r!r}; 'svd' takes a rank r of at least 1, and the others take none")
    for name in names:
        if name not in adapter_names(model):
            raise ValueError(f"no adapter named {name!r}; the model has: {', '.join(adapter_names(model)) or 'none'}")
        config = adapter_configs(model)[name]
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{name!r} is an adapter of {type(config).__name__}; only LoRA adapters add up")
        beyond = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "modules_to_save": config.modules_to_save}
        beyond["bias"] = config.bias != "none"
        if used := [field for field, value in beyond.items() if value]:
            raise ValueError(
                f"{name!r} has {used[0]}={getattr(config, used[0])!r}, which is no sum of low-rank updates; leave it out"
            )


def combine(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], new_name: str, how: str = "linear", r: int | None = None
) -> list[str]:
    """Attach, as the active one, an adapter that adds to each weight the weighted sum of what `names` add. Returns where it acts.

    how: "linear", "cat" or "svd" (with its rank r) as above. The base does not matter, dense or quantized, as long as it is
    theirs; a layer that only some are on gets their part. The new adapter has scaling 1 and is trained, saved and merged like any
    other. ValueError for unknown names, for adapters that are more than low-rank updates (DoRA, trained biases or modules),
    and for ranks, weights and names that do not fit.
    """
    _check(model, names, weights, how, r)
    configs = [adapter_configs(model)[name] for name in names]
    _check_new(model, configs[0], new_name)
    tensors, ranks = {}, {}
    for layer_name, embedding in model.named_modules():
        if isinstance(embedding, LoraEmbedding) and any(name in embedding.scaling for name in names):
            raise ValueError(f"{layer_name} is an embedding with an update; only those of linear layers add up here")
    for layer_name, layer in lora_layers(model).items():
        parts = [(name, float(weight)) for name, weight in zip(names, weights, strict=True) if name in layer.lora_A]
        if not parts:
            continue
        A, B = _factors(layer, parts)
        dtype = A.dtype
        if r is not None and r > min(len(A), len(B), A.shape[1]):
            raise ValueError(f"r is {r}, and the sum on {layer_name} has rank {min(len(A), len(B), A.shape[1])} at most; lower r")
        if how != "cat":
            small = compress(A, B, r)
            A, B = small if len(small[0]) < len(A) else (A, B)  # as they are where nothing is saved: no rounding
        ranks[layer_name] = len(A)
        for table, factor in (("lora_A", A), ("lora_B", B)):
            tensors[f"{PREFIX}{layer_name}.{KEYS[table]}"] = factor.to(dtype).contiguous()
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=max(config.lora_dropout for config in configs),
    )
    return _attach(model, config, new_name, None, tensors)
