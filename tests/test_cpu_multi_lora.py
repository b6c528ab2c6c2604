"""The native CPU engine's low-rank term at every instruction set of the machine, beside the PyTorch engine's."""

from __future__ import annotations

import pytest
import torch
from multi_lora_cases import MIXES, Case
from tolerance import assert_as_accurate

from posttrain.kernels.cpu import pytorch_multi_lora

native = pytest.importorskip("posttrain.kernels.cpu.native", reason="the native extension was not built")
native_linear = pytest.importorskip("posttrain.kernels.cpu.native_linear")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 1, 1), (9, 17, 31, 3, 4), (33, 300, 1100, 3, 17), (70, 31, 64, 2, 33), (20, 272, 96, 30, 8)]


LEVELS = native.levels()
# the two highest levels differ from avx512 in bfloat16 alone
PRODUCTS = [(isa, dtype) for isa in LEVELS for dtype in DTYPES if dtype == torch.bfloat16 or isa not in ("avx512_bf16", "amx")]


@pytest.fixture(params=LEVELS)
def isa(request):
    before = native.ISA
    yield native.set_isa(request.param)
    native.set_isa(before)


def _add(engine, case: Case, y: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.nn.functional.linear(case.x, case.w, case.bias) if y is None else y.clone()
    engine.multi_lora_add(y, case.x, case.A, case.B, case.scaling, case.ranks, case.ids)
    return y


@pytest.mark.parametrize(("isa", "dtype"), PRODUCTS, indirect=["isa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_level_is_as_accurate_as_the_plain_expression(isa, shape, dtype):
    for kind in ("some base", "identical"):
        case = Case(*shape, dtype, kind)
        case.check(_add(native, case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pytorch_engine(shape, dtype):
    for kind in MIXES:
        case = Case(*shape, dtype, kind)
        case.check(_add(pytorch_multi_lora, case))


def test_the_pytorch_engine_in_groups_of_tiles(monkeypatch):
    """However few tiles are gathered at a time, each is computed by itself."""
    case = Case(60, 24, 48, 9, 8, torch.float32)
    whole = _add(pytorch_multi_lora, case)
    monkeypatch.setattr(pytorch_multi_lora, "_GATHERED", 1)
    case.check(_add(pytorch_multi_lora, case))
    assert torch.equal(_add(pytorch_multi_lora, case)[case.ids < 0], whole[case.ids < 0])


def test_results_do_not_depend_on_threads_or_company(isa):
    """Any number of threads, any subset of the rows, in any order: the same bits."""
    case = Case(50, 600, 640, 5, 16, torch.bfloat16, "zipf")
    y = torch.randn(50, 600).bfloat16()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_add(native, case, y))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results) and not torch.equal(results[0], y)
    order = torch.randperm(50)[:23]
    part = Case(50, 600, 640, 5, 16, torch.bfloat16)
    part.A, part.B, part.scaling, part.ranks = case.A, case.B, case.scaling, case.ranks
    part.x, part.ids = case.x[order], case.ids[order]
    assert torch.equal(_add(native, part, y[order]), results[0][order])


@pytest.mark.parametrize("engine", (native, pytorch_multi_lora))
def test_a_wrong_id_or_rank_changes_nothing(engine):
    case = Case(5, 6, 8, 2, 4, torch.float32)
    y = torch.randn(5, 6)
    case.ids[4] = 2
    for setting, message in ((case.ids, r"adapter_ids\[4\] is 2"), (case.ranks, r"ranks\[1\] is 5")):
        after = y.clone()
        with pytest.raises(ValueError, match=message):
            engine.multi_lora_add(after, case.x, case.A, case.B, case.scaling, case.ranks, case.ids)
        assert torch.equal(after, y)
        case.ids[4] = 1
        if setting is case.ids:
            case.ranks[1] = 5


@pytest.mark.parametrize(("of_A", "of_B"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_factors_in_a_dtype_that_the_engine_would_misread_are_refused(of_A, of_B):
    case = Case(5, 6, 8, 2, 4, torch.bfloat16)
    case.A, case.B = case.A.to(of_A), case.B.to(of_B)
    with pytest.raises(TypeError, match=rf"lora_A is {of_A} and lora_B {of_B}; expected both in x's dtype, torch.bfloat16, or"):
        _add(native, case)


def test_infinities_and_nan_stay_in_their_rows(isa):
    case = Case(6, 40, 64, 3, 4, torch.bfloat16, "uniform", ranked=False, bias=False)
    case.x[1, 3], case.x[4, 60] = torch.nan, torch.inf
    y = torch.zeros(6, 40).bfloat16()
    result = _add(native, case, y)
    assert result[[0, 2, 3, 5]].isfinite().all()
    assert result[1].isnan().all() and not result[4].isfinite().any()


@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 16, 32), (7, 48, 96), (16, 80, 64), (17, 176, 1056), (32, 32, 32), (33, 32, 32), (5, 24, 40)]
)
@pytest.mark.parametrize("bias", (True, False))
def test_the_dense_base(isa, M, N, K, bias):
    x, w, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16() if bias else None
    y = native_linear.dense_linear(x, w, b)
    exact = torch.nn.functional.linear(x.double(), w.double(), b.double() if bias else None)
    assert y.dtype == x.dtype
    assert_as_accurate(y, torch.nn.functional.linear(x, w, b), exact)


@pytest.mark.skipif("amx" not in LEVELS, reason="this machine has no AMX")
def test_the_dense_base_does_not_depend_on_the_batch():
    """With AMX: whatever the number of rows, up to 32, and of threads, and NaN stays in its row and its column."""
    x, w = torch.randn(32, 640).bfloat16(), torch.randn(1040, 640).bfloat16()
    before, isa = torch.get_num_threads(), native.set_isa("amx")
    assert isa == "amx"
    torch.set_num_threads(3)
    whole = native_linear.dense_linear(x, w, None)
    torch.set_num_threads(1)
    assert all(torch.equal(native_linear.dense_linear(x[:M], w, None), whole[:M]) for M in (1, 2, 15, 16, 17, 31))
    torch.set_num_threads(before)
    x[3, 5], w[17, 600] = torch.nan, torch.nan
    poisoned = native_linear.dense_linear(x, w, None)
    expected = torch.zeros(32, 1040, dtype=torch.bool)
    expected[3], expected[:, 17] = True, True
    assert torch.equal(poisoned.isnan(), expected) and torch.equal(poisoned[~expected], whole[~expected])
