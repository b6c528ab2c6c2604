"""Dense products of few rows by the CPU engine, where generating wants them.

Of a bfloat16 weight on a CPU, `dense_linear` reads W about twice as fast as the vendor's product does, and with AMX gives a row the
same bits however many there are (up to 32). It has no gradient: layers use it while `dense_few_rows` is open.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.kernels.cpu import dense_linear


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (..., K); for a bfloat16 weight on a CPU and without gradients, by the engine."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or torch.is_grad_enabled() or x.numel() == 0:
        return F.linear(x, weight, bias)
    y = dense_linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return few_rows_linear(x, layer.weight, layer.bias)


@contextmanager
def dense_few_rows(model: nn.Module) -> Iterator[None]:
    """While open, the model's dense bfloat16 layers on a CPU are `few_rows_linear`; those whose forward was replaced are left."""
    plain = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in module.__dict__]
    layers = [layer for layer in plain if layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu"]
    try:
        for layer in layers:
            layer.__dict__["forward"] = functools.partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
