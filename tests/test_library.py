"""What holds of every registered op: it computes in the dtypes that it is given, whatever torch.autocast would choose; on its
tensor's device; and compiled, numbers that change from call to call are no constants."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from posttrain.kernels import (
    _library,
    linear_logprobs,
    lora_linear,
    lora_linear_group,
    multi_lora_linear,
    quantize_weight,
    quantized_linear,
    rms_norm,
    swiglu,
    verify_draft_tokens,
)

W, A, B = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((96, 64), (4, 64), (96, 4)))
LABELS = torch.arange(40)
VERIFIED = torch.tensor([[1, 2]]), None, torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(2)), torch.tensor([2])
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


def test_a_seed_is_compiled_once():
    counter = CompileCounter()
    verify = torch.compile(lambda seed: verify_draft_tokens(*VERIFIED, seed=seed), backend=counter, fullgraph=True)
    torch.manual_seed(0)
    for seed in (11, 22, 33, 44):
        for got, expected in zip(verify(seed), verify_draft_tokens(*VERIFIED, seed=seed), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count <= 2  # the first as a constant, the others as a symbol


def test_a_gpu_op_runs_with_its_tensors_device_as_the_current_one(monkeypatch):
    """triton launches on the current device. Of an op whose first argument is a list of tensors, the first of them decides."""
    entered = []

    @contextlib.contextmanager
    def on_device_of(tensor):
        entered.append(tensor)
        yield
        entered.append(None)

    monkeypatch.setattr(_library, "on_device_of", on_device_of)
    x, dys = torch.zeros(2), [torch.ones(3), torch.ones(4)]
    assert _library._on_its_device(lambda *given: (entered[-1] is given[0], *given))(x, 5) == (True, x, 5)
    assert entered == [x, None]
    assert _library._on_its_device(lambda given: entered[-1] is given[0])(dys)


def test_a_derivative_in_forward_mode_is_refused():
    """Not lost: it would be zero."""
    x, w = torch.randn(3, 64), quantize_weight(torch.randn(8, 64))
    with pytest.raises(RuntimeError, match="quantized_linear has no derivative in forward mode"):
        torch.func.jvp(lambda x: quantized_linear(x, w), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="swiglu has no derivative in forward mode"):
            swiglu(forward_ad.make_dual(x, x), x)
        assert swiglu(x, x).shape == x.shape  # no tangent
