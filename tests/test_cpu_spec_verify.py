"""The native engine's verification and filters: every instruction set against the oracle, wide rows against the PyTorch engine, any
number of threads, and drafts without replacement from a distribution that is nearly all on one word."""

from __future__ import annotations

import math

import pytest
import torch
from spec_cases import DTYPES, chain_by_oracle, chi_square, draw, noise, ragged_case
from tolerance import assert_as_accurate

from posttrain.kernels import verify_draft_tokens, verify_draft_tree
from posttrain.kernels.cpu import pytorch_logit_filter, pytorch_spec_verify
from posttrain.reference import logit_filter as filter_oracle
from posttrain.reference import spec_verify as oracle

native = pytest.importorskip("posttrain.kernels.cpu.native", reason="the native extension was not built")
engine = pytest.importorskip("posttrain.kernels.cpu.native_spec_verify")
SETTINGS = ((1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.8, 40, 0.95), (1.0, 1, 0.5), (1.0, 0, 0.999))


# the rest of the levels differ in products only
@pytest.fixture(params=[name for name in native.levels() if name in ("portable", "avx2", "avx512", "neon")])
def level(request):
    native.set_isa(request.param)
    yield request.param
    native.set_isa()


def _rows(V: int, dtype: torch.dtype, spread: float = 4.0) -> torch.Tensor:
    """Rows as models give them, and with infinities, NaN, equals, and nothing finite; apart from each other by an odd stride."""
    logits = (spread * torch.randn(6, V + 1, generator=torch.Generator().manual_seed(V))).to(dtype)[:, :V]
    logits[1, : V // 3] = -torch.inf
    logits[2, V // 2 :] = torch.nan if V > 1 else 0.0
    logits[3] = logits[3].round()
    logits[4, V // 2] = torch.inf
    logits[5] = torch.tensor([-torch.inf, torch.nan]).repeat(V)[:V]
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", (1, 2, 63, 64, 65, 2049))
def test_filters(level, V, dtype):
    logits = _rows(V, dtype)
    for setting in SETTINGS:
        threshold, log_total = engine.logit_filter(logits, *setting, None)
        exact = [filter_oracle.filter_row(row.double().tolist(), *setting)[:2] for row in logits]
        tau, log_z = (torch.tensor(values, dtype=torch.float64) for values in zip(*exact, strict=True))
        assert torch.equal(threshold.double(), tau.float().double()), setting
        assert log_total[5] == -torch.inf and threshold[5] == -torch.inf
        z = pytorch_logit_filter.cleaned(logits[:4])
        plain = (z / setting[0]).masked_fill(z < threshold[:4, None], -torch.inf).logsumexp(1)
        assert_as_accurate(log_total[:4], plain, log_z[:4])


@pytest.mark.parametrize("spread", (4.0, 0.25))
def test_wide_rows_are_filtered_as_by_pytorch(spread):
    """Peaked rows, whose candidates are few, and flat ones, whose are most of the row; each under a setting of its own."""
    logits = (spread * torch.randn(6, 49_152, generator=torch.Generator().manual_seed(1))).bfloat16()
    settings = torch.tensor(SETTINGS, dtype=torch.float64)
    threshold, log_total = engine.logit_filter(logits, 1.0, 0, 1.0, settings)
    expected, _ = pytorch_logit_filter.logit_filter(logits.double(), 1.0, 0, 1.0, settings)
    assert torch.equal(threshold, expected.float())
    for row, tau, log_z, (t, _, _) in zip(logits, threshold, log_total, SETTINGS, strict=True):
        exact = (row.double() / t).masked_fill(row < tau, -torch.inf).logsumexp(0)
        assert_as_accurate(log_z, (row.float() / t).masked_fill(row < tau, -torch.inf).logsumexp(0), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chains(level, dtype):
    for seed in range(12):
        drafted, draft, target, num, setting = ragged_case(seed, dtype)
        made = noise(*drafted.shape, target.shape[2], generator=torch.Generator().manual_seed(seed))
        expected = chain_by_oracle(drafted, draft, target, num, setting, **made)
        ours = verify_draft_tokens(drafted, draft, target, num, *setting, **made)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), seed


def _wide(B: int = 5, K: int = 3, V: int = 5003, narrow: int = 7):
    generator = torch.Generator().manual_seed(V)
    target = (4 * torch.randn(B, K + 1, V + 3, generator=generator)).bfloat16()[..., :V]
    draft = (target[:, :K].float() + torch.randn(B, K, V, generator=generator)).half()[..., : V - narrow]
    drafted = draw(draft, generator=generator)
    drafted[0, 1] = -1
    return drafted, draft, target, torch.tensor([K, K, K, 0, 2])[:B]


@pytest.mark.parametrize("setting", ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 30, 0.9), (1.2, 0, 0.99)))
def test_made_noise_is_pytorch_s(level, setting):
    """Target rows in bfloat16, the draft's in float16 and narrower; the noise of either engine is the same words."""
    drafted, draft, target, num = _wide()
    seeds, offsets = torch.arange(5) * 2**61 + 9, torch.arange(5) * 2**33
    for rows in (draft, None):
        given = drafted, rows, target, num, *setting, None, None, None, 0, seeds, offsets
        ours, right = engine.verify_draft_tokens(*given), pytorch_spec_verify.verify_draft_tokens(*given)
        assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("setting", ((1.0, 0, 1.0), (0.8, 30, 0.9)))
def test_threads_and_batches_change_nothing(setting):
    drafted, draft, target, num = _wide(V=40_000)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(verify_draft_tokens(drafted, draft, target, num, *setting, seed=torch.arange(5), offsets=3))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for b in range(5):
        one = slice(b, b + 1)
        alone = verify_draft_tokens(drafted[one], draft[one], target[one], num[one], *setting, seed=torch.arange(5)[one], offsets=3)
        assert all(torch.equal(a[0], whole[b]) for a, whole in zip(alone, found[0], strict=True))


def test_words_left_after_a_sure_draft():
    """Drawn without replacement, and word 0 has all but 1e-9 of q: once it is refused, the second child, word 1, is all that q has
    left, and all that p has: it must be accepted. 1 - q(0) is 0 in float32, and then p itself would be drawn from."""
    N = 2_000
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, math.log(1e-9)])
    generator = torch.Generator().manual_seed(0)
    tokens, n, path = verify_draft_tree(
        torch.tensor([[0, 1]]).expand(N, 2), torch.tensor([-1, -1]), p.expand(N, 3, 2), q.expand(N, 3, 2), torch.full((N,), 2),
        with_replacement=False, max_depth=1, **noise(N, 2, 2, generator=generator),
    )  # fmt: skip
    assert (n == 1).all() and torch.equal(path[:, 0], tokens[:, 0])
    statistic, limit = chi_square(tokens[:, 0].bincount(minlength=2), torch.full((2,), N / 2).double())
    assert statistic < limit


def test_attention_of_a_wide_tree():
    parents = torch.tensor([[max(-1, i // 3 - 1) for i in range(100)], [i - 1 for i in range(100)]])
    mask, depth = engine.tree_attention(parents)
    for b in range(2):
        expected = oracle.tree_attention(parents[b].tolist())
        assert torch.equal(mask[b], torch.from_numpy(expected[0])) and torch.equal(depth[b], torch.from_numpy(expected[1]))


def test_no_word_to_draw():
    """NaN, -inf, and what is beyond 3e38; named by the first request that stops there."""
    dead = torch.full((3, 2, 70), -torch.inf)
    dead[0, 0, 5], dead[2, :, 1:] = 0.0, torch.nan
    dead[1] = -3.3e38
    with pytest.raises(ValueError, match="target_logits of request 0 hold no finite number after 1 accepted tokens"):
        verify_draft_tokens(torch.full((3, 1), 5), None, dead, torch.ones(3, dtype=torch.int64), uniforms=torch.zeros(3, 1))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="target_logits of request 0 hold no finite number after 0 accepted tokens"):
            verify_draft_tokens(torch.full((1, 1), 5), None, dead[1:2], torch.ones(1, dtype=torch.int64), temperature)
