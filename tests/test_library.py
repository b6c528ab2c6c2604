"""What holds of every registered op: it computes in the dtypes that it is given, whatever torch.autocast would choose."""

from __future__ import annotations

import pytest
import torch

from posttrain.kernels import (
    linear_logprobs,
    lora_linear,
    lora_linear_group,
    multi_lora_linear,
    quantize_weight,
    quantized_linear,
    rms_norm,
    swiglu,
)

W, A, B = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((96, 64), (4, 64), (96, 4)))
LABELS = torch.arange(40)
OPS = {
    "quantized_linear": lambda x: quantized_linear(x, quantize_weight(W)),
    "lora_linear": lambda x: lora_linear(x, W, A, B, 2.0),
    "lora_linear_4bit": lambda x: lora_linear(x, quantize_weight(W), A, B, 2.0, dropout=0.5, seed=3),
    "lora_linear_group": lambda x: torch.cat(lora_linear_group(x, [(W, A, B, 2.0, None)] * 2)),
    "linear_logprobs": lambda x: linear_logprobs(x, W, LABELS),
    "linear_logprobs_trained": lambda x: linear_logprobs(x, W.clone().requires_grad_(), LABELS),
    "rms_norm": lambda x: rms_norm(x, torch.ones(64)),
    "swiglu": lambda x: swiglu(x, x + 1),
}


@pytest.mark.parametrize("name", OPS)
def test_autocast_does_not_reach_inside(name):
    x = torch.randn(40, 64).requires_grad_()

    def results():
        y = OPS[name](x)
        return y.detach(), *torch.autograd.grad(y.sum(), x)

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal((x @ x.T).detach(), (x @ x.T).bfloat16().detach())  # it is on
        cast = results()
        assert torch.is_autocast_enabled("cpu")  # and still on behind the ops
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def test_autocast_does_not_reach_inside_a_served_batch():
    x, given = torch.randn(40, 64), (W, A[None], B[None], torch.ones(1), torch.zeros(40, dtype=torch.int64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = multi_lora_linear(x, *given)
    assert cast.dtype == torch.float32 and torch.equal(cast, multi_lora_linear(x, *given))


def test_compiled_under_autocast():
    x = torch.randn(40, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(lambda x: lora_linear(x, W, A, B, 2.0), fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.float32 and torch.equal(y, lora_linear(x, W, A, B, 2.0))
