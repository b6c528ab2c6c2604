"""How LoRA's tensors start, by the names PEFT gives to `init_lora_weights`.

    True, "gaussian"      A random, B zero: the layer starts as it was (Hu et al., arXiv:2106.09685, section 4.1)
    "orthogonal"          A and B random and not zero, B A = 0: the layer starts as it was; even ranks
    "pissa"               the r largest singular values of W: A = sqrt(S / s) V^T, B = U sqrt(S / s)
                          (Meng et al., arXiv:2404.02948, equation 2); "pissa_niter_<n>" finds them by n power iterations
    "olora"               the first r columns and rows of W = Q R: B = Q, A = R (Buyukakyuz, arXiv:2406.01775, algorithm 1)
    "loftq"               4 bits and a low rank that together are nearest to W (Li et al., arXiv:2310.08659, algorithm 1):
                          Q <- quantize(W - s B A), then A, B <- the r largest singular values of W - Q, loftq_iter times

PiSSA and OLoRA train A and B in W - s B0 A0 + s B A. Here W stays whole and the layer subtracts s B0 A0 (LoraLinear): the
base is not written to, deleting the adapter restores it exactly, and a 4-bit base is not quantized again, which would add a
second error that nothing compensates. The price is a low-rank product of twice the rank while such an adapter acts. A file
that PEFT saved without its conversion holds A and B alone; A0 and B0 are taken again from the same dense base ("pissa" and
"olora"; "pissa_niter_<n>" is random).

LoftQ is for a base that is dense still: it becomes the 4-bit one, as `quantize_model` makes it, and deleting the adapter
leaves it so. With loftq_iter 1 that base is the plain quantization of W, and the file a plain adapter for it. With
more, the base is Q = quantize(W - s B A) of the last step but one; the file carries these factors, and loading it on the
dense model quantizes the same again. A base that is in 4 bits already keeps its bytes: `init_loftq` fits an adapter to
what quantization took away, reading the dense weights from their files one at a time.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import PosttrainError
from posttrain.kernels import QuantizedWeight, quantize_weight
from posttrain.quantized import QuantizedLinear

from .dora import row_squares, weight_norm
from .lora_config import LoraConfig, check_rank


def dense_weight(base: nn.Linear | QuantizedLinear) -> Tensor:
    """The layer's weight (N, K) in float32 (float64 for that)."""
    weight = base.weight.detach() if isinstance(base.weight, Tensor) else base.weight.dequantize()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _largest(W: Tensor, r: int, scaling: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """(A, B) with scaling B A the nearest matrix of rank r to W, its singular values shared equally; B has the scaling's sign."""
    if iterations is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=iterations)
        Vh = V.t()
    root = (S[:r] / abs(scaling)).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * math.copysign(1.0, scaling) * root


def _olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A, B): the first r rows of R and columns of Q in W = Q R, which the first r columns of W decide."""
    Q, _ = torch.linalg.qr(W[:, :r])
    return Q.t() @ W, Q


def _orthogonal(N: int, K: int, r: int) -> tuple[Tensor, Tensor]:
    """(A, B) whose rows and columns lie in two halves of r dimensions that are orthogonal: B A = 0."""
    Q, _ = torch.linalg.qr(torch.randn(r, r).double())
    A = (torch.randn(K, r // 2).double() @ Q[0::2]).t() / 10
    return A, torch.randn(N, r // 2).double() @ Q[1::2] / 10


def _random(init: bool | str, N: int, K: int, r: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    A, B = torch.empty(r, K, dtype=dtype, device=device), torch.zeros(N, r, dtype=dtype, device=device)
    if init == "gaussian":
        nn.init.normal_(A, std=1 / r)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return A, B


def _check_finite(config: LoraConfig, name: str, base: nn.Linear | QuantizedLinear) -> None:
    """ValueError for a weight with NaN or infinities, which has no singular values and no QR decomposition."""
    if not torch.isfinite(dense_weight(base)).all():
        init = config.init_lora_weights
        raise ValueError(f"the weight of {name} holds NaN or infinite values, and init_lora_weights={init!r} decomposes it")


def taken(config: LoraConfig, name: str, base: nn.Linear | QuantizedLinear) -> tuple[Tensor, Tensor]:
    """(A0, B0) of the part scaling B0 A0 of the layer's weight that PiSSA and OLoRA start with."""
    _check_finite(config, name, base)
    W, r, init = dense_weight(base), config.rank(name), config.init_lora_weights
    niter = int(str(init).rpartition("_")[2]) if "niter" in str(init) else None
    return _olora(W, r) if init == "olora" else _largest(W, r, config.scaling(name), niter)


def loftq(W: Tensor, r: int, scaling: float, settings: dict[str, Any]) -> tuple[QuantizedWeight, Tensor, Tensor, Tensor, Tensor]:
    """(Q, A, B, A', B') of W (N, K), settings as LoraConfig.loftq: Q = quantize(W - scaling B' A') with A', B' the factors of
    the last step but one (zeros where there was one step), and A, B fitted to W - Q."""
    wide = torch.promote_types(W.dtype, torch.float32)
    A, B = W.new_zeros(r, W.shape[1], dtype=wide), W.new_zeros(W.shape[0], r, dtype=wide)
    for _ in range(settings["loftq_iter"]):
        before = A, B
        Q = quantize_less(W, A, B, scaling, settings)
        A, B = _largest(W.to(wide) - Q.dequantize(wide), r, scaling)
    return Q, A, B, *before


def quantize_less(W: Tensor, A: Tensor, B: Tensor, scaling: float, settings: dict[str, Any]) -> QuantizedWeight:
    """quantize(W - scaling B A), as a weight of W's dtype."""
    residual = torch.addmm(W.to(A.dtype), B, A, alpha=-scaling)
    how = settings["quant_type"], settings["block_size"], settings["double_quant"]
    return replace(quantize_weight(residual, *how), dtype=W.dtype)


def initial(
    config: LoraConfig, name: str, base: nn.Linear | QuantizedLinear, dtype: torch.dtype | None
) -> tuple[nn.Linear | QuantizedLinear, dict[str, Tensor]]:
    """(base, tensors by LoraLinear's tables) of a new adapter on the layer of that name; the base is another with LoftQ.

    ValueError for a rank above the layer's smaller dimension, and for LoftQ on a base in 4 bits.
    """
    N, K, r, scaling, init = base.out_features, base.in_features, config.rank(name), config.scaling(name), config.init_lora_weights
    check_rank(config, name, N, K)
    weight = base.weight
    device = weight.device if isinstance(weight, Tensor) else weight.packed.device
    dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
    extra = {}
    if init == "loftq":
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"{name} is in 4 bits already, and init_lora_weights='loftq' needs the weight before: attach to the dense model, "
                "or attach with init_lora_weights=True and call init_loftq(model, path of the dense model)"
            )
        _check_finite(config, name, base)
        Q, A, B, A0, B0 = loftq(weight.detach(), r, scaling, config.loftq)
        base = QuantizedLinear(Q, base.bias)
        if config.own_base:
            extra = {"loftq_A": A0, "loftq_B": B0}
    elif config.takes_weight:
        A, B = taken(config, name, base)
        extra = {"lora_A0": A, "lora_B0": -B}
    elif init == "orthogonal":
        A, B = _orthogonal(N, K, r)
    else:
        A, B = _random(init, N, K, r, dtype, device)
    # Each its own memory: A trains, and A0 stays.
    tensors = {k: t.to(device, dtype, copy=True).contiguous() for k, t in {"lora_A": A, "lora_B": B, **extra}.items()}
    if config.use_dora:
        # With its start subtracted a PiSSA or OLoRA update is zero, and so adds nothing to the norm.
        update = tensors["lora_B"] if not config.takes_weight else torch.zeros_like(tensors["lora_B"])
        norm = weight_norm(base.weight, row_squares(base.weight), tensors["lora_A"], update, scaling, weight.dtype)
        tensors["lora_magnitude_vector"] = norm.to(dtype)
    if config.lora_bias:
        tensors["lora_bias"] = torch.zeros(N, dtype=dtype, device=device)
    return base, tensors


def init_loftq(model: nn.Module, path: str | os.PathLike, name: str | None = None) -> None:
    """Set a new adapter (the active one unless named) to the best fit to what quantizing took from the 4-bit base.

    path: the folder of the dense model, Hugging Face's layout; its weights are read one at a time. The base keeps its bytes, so
    that the adapter is a plain one for it. PosttrainError where a layer's dense weight is not in `path`; ValueError for an
    adapter that starts otherwise, or a layer that is dense.
    """
    from posttrain.model.checkpoint import Checkpoint

    from .interface import active_adapter, adapter_configs
    from .lora import lora_layers

    name = name or active_adapter(model) or ""
    config = adapter_configs(model).get(name)
    if not isinstance(config, LoraConfig) or config.takes_weight or config.use_dora:
        raise ValueError(f"init_loftq fits a plain LoRA adapter; {name!r} is {config}")
    layers = {n: layer for n, layer in lora_layers(model).items() if name in layer.lora_A}
    if dense := [n for n, layer in layers.items() if isinstance(layer.base_layer.weight, Tensor)]:
        raise ValueError(f"{dense[0]} is dense: quantizing took nothing from it")
    fitted = {}
    with Checkpoint(Path(path)) as checkpoint:
        known = set(checkpoint.names())
        for layer_name, layer in layers.items():
            key = f"{layer_name}.weight"
            if key not in known or checkpoint.entry(key).shape != tuple(layer.base_layer.weight.shape):
                raise PosttrainError(f"{path} holds no {key} of {tuple(layer.base_layer.weight.shape)}; is it this model, dense?")
            A = layer.lora_A[name]
            quantized = layer.base_layer.weight.dequantize(torch.float32)  # type: ignore[call-arg]
            error = checkpoint.read(key).to(quantized.device, torch.float32) - quantized
            fitted[layer] = _largest(error, A.shape[0], layer.scaling[name])
    with torch.no_grad():
        for layer, (A, B) in fitted.items():
            layer.lora_A[name].copy_(A)
            layer.lora_B[name].copy_(B)
