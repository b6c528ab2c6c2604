"""multi_lora_linear's Triton kernels: interpreted, compiled and run in the emulator, on a GPU."""

from __future__ import annotations

import importlib

import four_bit
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from multi_lora_cases import MIXES, SHAPES, Case, mix

from posttrain.kernels import check_adapter_ids, segment_rows
from posttrain.kernels._multi_lora import multi_lora_add_triton
from posttrain.kernels._segments import count_slots, segment_rows_triton, tile_rows
from posttrain.reference import multi_lora_linear as oracle

DTYPES = four_bit.DTYPES


def _check_segments(ids: torch.Tensor, n: int, per_id: int = 1) -> None:
    """Every row with an adapter lies in one tile, with its own and in order, as the oracle has it; unknown ids come last, as n."""
    rows = ids.repeat_interleave(per_id)
    order, tiles = (t.cpu() for t in segment_rows_triton(ids, n, len(rows)))
    known = torch.where((rows < -1) | (rows >= n), n, rows).tolist()
    expected, runs = oracle.segments(known, n + 1)
    assert tiles.shape == (3, count_slots(len(rows), n))
    assert order[: len(expected)].tolist() == expected.tolist()
    step = tile_rows(len(rows))
    cut = [(i, first + at, min(step, count - at)) for i, first, count in runs for at in range(0, count, step)]
    assert sorted(map(tuple, tiles.T[tiles[2] > 0].tolist())) == cut


SEGMENTED = [(1, 1), (5, 3), (40, 300), (127, 2), (200, 3), (200, 150)]


@pytest.mark.interpret
@pytest.mark.parametrize("kind", MIXES)
def test_interpreted_segments(kind):
    for rows, n in SEGMENTED:
        _check_segments(mix(kind, rows, n), n)
    _check_segments(torch.tensor([1, -5, 0, 2, 7, -1, 1]), 2)
    _check_segments(mix(kind, 6, 4), 4, per_id=25)


def _launch(case: Case, rows=slice(None), ids=None) -> torch.Tensor:
    """What runs on a GPU, given this machine's tensors."""
    multi = importlib.import_module("posttrain.kernels.multi_lora_linear")
    ids = case.ids[rows] if ids is None else ids
    base = (case.dense, None, None, None, 0)
    form = (*case.dense.shape, 0, "none")
    rest = (case.A, case.B, case.scaling, case.ranks, ids, None, None, case.bias)
    return multi._multi_lora_linear_cuda(case.x[rows], *base, *rest, *form)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))  # bf16 dots go wrong in the interpreter
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted(shape, dtype):
    for ranked in (True, False):
        case = Case(*shape, dtype, ranked=ranked)
        case.check(_launch(case))


@pytest.mark.interpret
@settings(max_examples=8)
@given(M=st.integers(1, 20), N=st.integers(1, 9), K=st.integers(1, 40), n=st.integers(1, 4), r=st.integers(1, 40))
def test_interpreted_any_shape(M, N, K, n, r):
    case = Case(M, N, K, n, r, torch.float16)
    case.check(_launch(case))


def _check_unknown_ids(device="cpu") -> None:
    case = Case(5, 6, 8, 2, 4, torch.float32, ranked=False, device=device)
    case.ids[1], case.ids[3] = 2, -7
    y, known = _launch(case), torch.tensor([0, 2, 4])
    assert y[[1, 3]].isnan().all()
    assert torch.equal(y[known], _launch(case, ids=case.ids.where((case.ids > -2) & (case.ids < 2), -1))[known])


@pytest.mark.interpret
def test_interpreted_unknown_ids_are_nan():
    _check_unknown_ids()


EMULATED = [  # M, N, K, n, r, dtype, mix, ranked
    (5, 160, 1104, 3, 16, torch.bfloat16, "some base", True),
    (32, 80, 528, 40, 8, torch.bfloat16, "distinct", False),
    (33, 130, 65, 2, 72, torch.float16, "zipf", True),
    (150, 64, 528, 3, 16, torch.bfloat16, "heavy and light", True),
    (4, 20, 40, 3, 5, torch.float32, "some base", True),
]


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(("M", "N", "K", "n", "r", "dtype", "kind", "ranked"), EMULATED)
def test_emulated(arch, M, N, K, n, r, dtype, kind, ranked):
    four_bit.activate(arch)
    case = Case(M, N, K, n, r, dtype, kind, ranked=ranked)
    _check_segments(case.ids, n)
    case.check(_launch(case))


@pytest.mark.emulated
def test_emulated_unknown_ids_are_nan_and_nothing_is_read_for_them():
    four_bit.activate(80)
    _check_unknown_ids()


@pytest.mark.emulated
@pytest.mark.parametrize("arch", (80, 90))
def test_emulated_low_rank_term_does_not_depend_on_the_batch(arch):
    """Few rows (parts of K by different programs) and many (all by one), any order of programs: the same bits."""
    four_bit.activate(arch)
    case = Case(140, 48, 1104, 3, 16, torch.bfloat16, "zipf", bias=False)
    case.w.zero_()
    whole = _launch(case)
    assert whole.any() and torch.equal(_launch(case), whole)
    for rows in (torch.randperm(140)[:20], torch.tensor([77]), torch.arange(3, 70)):
        assert torch.equal(_launch(case, rows), whole[rows])


@pytest.mark.emulated
@pytest.mark.parametrize(("kind", "n"), [("distinct", 32), ("identical", 1), ("uniform", 8)])
def test_emulated_work(kind, n):
    """Adapters, x and y are moved once: at most 1.1 times the least bytes, without a bank conflict."""
    from gpuemu import counters

    counters.start(80)
    M, N, K, r = 32, 1024, 2048, 16
    case = Case(M, N, K, n, r, torch.bfloat16, kind, ranked=False)
    order, tiles = segment_rows_triton(case.ids, n, M)
    y = F.linear(case.x, case.w, case.bias)
    with counters.record() as recorded:
        multi_lora_add_triton(y, case.x, case.A, case.B, case.scaling, None, order, tiles)
    case.check(y)
    shrink, expand = recorded.launches
    present, s = len(case.ids.unique()), 4 * M * r * (K // 512)
    assert shrink["dram"] <= 1.1 * (2 * present * r * K + 2 * M * K + s)
    assert expand["dram"] <= 1.1 * (2 * present * r * N + 4 * M * N + s)
    assert all(work["spill"] == 0 and (work["conflict"] or 1.0) < 1.1 for work in (shrink, expand))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", (False, True))
@pytest.mark.parametrize("shape", [*SHAPES, (32, 4096, 4096, 32, 16), (600, 576, 576, 8, 16)])
def test_on_a_gpu(shape, quantized, dtype):
    case = Case(*shape, dtype, quantized=quantized, device="cuda")
    case.check(case.run())
    assert torch.equal(case.run(ids=segment_rows(case.ids, shape[3])), case.run())
    _check_segments(case.ids, shape[3])


@pytest.mark.gpu
def test_unknown_ids_on_a_gpu():
    _check_unknown_ids("cuda")
    with pytest.raises(ValueError, match=r"adapter_ids\[1\] is 9"):
        check_adapter_ids(torch.tensor([0, 9], device="cuda"), 2)
