"""Speculative verification of chains: hand-worked cases, the engines against the oracle, the emitted distribution against the
target's, and every known mistake against the check that finds it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spec_cases import DTYPES, chain_by_oracle, chi_square, draw, noise, probabilities, ragged_case
from spec_mutants import MISTAKES, Process, verifier

from posttrain.kernels import verify_draft_tokens
from posttrain.kernels.cpu import pytorch_spec_verify as engine
from posttrain.reference import spec_verify as oracle


def _verify(drafted, draft, target, num, temperature=1.0, top_k=0, top_p=1.0, **noise):
    return verify_draft_tokens(drafted, draft, target, num, temperature, top_k, top_p, **noise)


def test_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): word 1 is kept below u = 1/2, else replaced by what p has more of, word 0."""
    p, q = np.log([[0.5, 0.25, 0.25]] * 2), np.log([[0.25, 0.5, 0.25]])
    setting, flat = (1.0, 0, 1.0), [0.0, 0.0, 0.0]
    assert oracle.verify_chain([1], q, p, 1, *setting, [0.499], flat) == ([1, 0], 1)
    assert oracle.verify_chain([1], q, p, 1, *setting, [0.501], flat) == ([0], 0)
    assert oracle.verify_chain([1], q, p, 1, *setting, [0.501], [-9.0, 9.0, 9.0]) == ([0], 0)
    # chosen, not drawn: kept below u = 1/4; then word 1 is out, and log 1/2 < log 1/4 + 1
    assert oracle.verify_chain([1], None, p, 1, *setting, [0.249], flat) == ([1, 0], 1)
    assert oracle.verify_chain([1], None, p, 1, *setting, [0.251], [0.0, 9.0, 1.0]) == ([2], 0)
    # no draft: a draw from p; the greedy argmax, the first of equals; top_k = 1 leaves one word
    assert oracle.verify_chain([], None, p[:1], 0, *setting, [], [0.0, 0.0, 1.0]) == ([2], 0)
    assert oracle.verify_chain([2], None, np.log([[0.25, 0.5, 0.5]] * 2), 1, 0.0, 0, 1.0, [0.0], flat) == ([1], 0)
    assert oracle.verify_chain([1], None, p, 1, 1.0, 1, 1.0, [0.0], [0.0, 9.0, 9.0]) == ([0], 0)


def test_the_oracle_s_noise_is_philox():
    """Published vectors of the generator under it are in test_reference_philox.py; here the streams, and the inversions."""
    words = {oracle.noise_word(3, offset, stream, i) for offset in range(4) for stream in range(3) for i in range(9)}
    assert len(words) == 4 * 3 * 9
    assert oracle.uniform(3, 5, 1) == (oracle.noise_word(3, 5, 0, 1) >> 8) / 2**24
    v = (oracle.noise_word(3, 5, 1, 7) + 0.5) / 2**32
    assert oracle.gumbel(3, 5, 7) == -math.log(-math.log1p(-v))


@pytest.mark.parametrize("seed", range(40))
def test_float64_is_the_oracle_s(seed):
    drafted, draft, target, num, setting = ragged_case(seed)
    made = noise(*drafted.shape, target.shape[2])
    expected = chain_by_oracle(drafted, draft, target, num, setting, **made)
    for ours, right in zip(_verify(drafted, draft, target, num, *setting, **made), expected, strict=True):
        assert torch.equal(ours, right)


@given(st.integers(0, 2**32), st.sampled_from(DTYPES))
def test_any_case_in_any_dtype(seed, dtype):
    """Rounded logits are the same numbers to engine and oracle; sums in float32 decide otherwise only where a rounding decides,
    as in no case here."""
    drafted, draft, target, num, setting = ragged_case(seed, dtype)
    made = noise(*drafted.shape, target.shape[2], generator=torch.Generator().manual_seed(seed))
    tokens, n = _verify(drafted, draft, target, num, *setting, **made)
    expected, m = chain_by_oracle(drafted, draft, target, num, setting, **made)
    assert torch.equal(tokens, expected) and torch.equal(n, m)


def test_settings_of_each_request():
    drafted, draft, target, num, _ = ragged_case(17)
    settings = [0.0, 0.7, 1.0, 1.3, 0.5][: len(num)], [0, 3, 0, 5, 1][: len(num)], [1.0, 1.0, 0.8, 0.9, 1.0][: len(num)]
    assert len(num) == 5
    made = noise(*drafted.shape, target.shape[2])
    ours = _verify(drafted, draft, target, num, *map(torch.tensor, settings), **made)
    for a, b in zip(ours, chain_by_oracle(drafted, draft, target, num, settings, **made), strict=True):
        assert torch.equal(a, b)


# The emitted distribution.


@pytest.mark.parametrize("case", ("drawn", "chosen", "filtered", "narrow"))
def test_whole_sequences_are_the_target_s(case):
    _check_sequences(_verify, case, 10_000)
    _check_sequences(verifier(), case, 10_000)


def _check_sequences(verify, case: str, N: int) -> None:
    setting = {"temperature": 0.8, "top_k": 4, "top_p": 0.9} if case == "filtered" else {}
    process = Process(5, 3 if case == "narrow" else 5, 1, chosen=case == "chosen", **setting)
    statistic, limit = process.statistic(verify, N)
    assert statistic < limit


@pytest.mark.parametrize("mistake", MISTAKES)
def test_whole_sequences_find(mistake):
    cases = {
        "q without the filters": "filtered", "p unfiltered in the draw": "filtered", "chosen drafts as if drawn": "chosen",
        "words behind the draft's vocabulary cut off": "narrow",
    }  # fmt: skip
    case = cases.get(mistake, "drawn")
    with pytest.raises(AssertionError):
        _check_sequences(verifier(mistake), case, 10_000)


@pytest.mark.parametrize("verify", (_verify, verifier(), verifier("q = 0 accepted")), ids=("ours", "textbook", "mistake"))
def test_a_draft_that_cannot_have_been_drawn_changes_nothing(verify, request):
    """Word 2, which q excludes, is drafted always: what is emitted is p's all the same."""
    N, p = 4_000, torch.tensor([0.5, 0.3, 0.2]).double()
    q = torch.tensor([0.5, 0.5, 0.0]).double()
    rows = (t.log().expand(N, n, 3) for t, n in ((q, 1), (p, 2)))
    tokens, _ = verify(torch.full((N, 1), 2), *rows, torch.ones(N, dtype=torch.int64), **noise(N, 1, 3))
    statistic, limit = chi_square(tokens[:, 0].bincount(minlength=3), N * p)
    assert (statistic > limit) == request.node.name.endswith("[mistake]")


def test_wide_vocabulary():
    """First words and acceptance of 1,000 requests at V = 4,096: total variation and share of accepted drafts, each below five
    standard deviations of what the target's own draws and sum min(p, q) give."""
    N, V = 1_000, 4_096
    generator = torch.Generator().manual_seed(2)
    target = 3 * torch.randn(V, generator=generator)
    draft = target + torch.randn(V, generator=generator)
    p, q = probabilities(target), probabilities(draft)
    rows = draft.expand(N, 1, V), target.expand(N, 2, V)
    drafted = draw(rows[0], generator=generator)
    tokens, n = verify_draft_tokens(drafted, *rows, torch.ones(N, dtype=torch.int64), seed=5)
    statistic, limit = chi_square(tokens[:, 0].bincount(minlength=V), N * p)
    assert statistic < limit
    accept = torch.minimum(p, q).sum().item()
    assert abs(n.double().mean().item() - accept) < 5 * math.sqrt(accept * (1 - accept) / N)
    own = torch.multinomial(p, N, replacement=True, generator=generator).bincount(minlength=V)
    distance = [(counts / N - p).abs().sum().item() / 2 for counts in (tokens[:, 0].bincount(minlength=V), own)]
    assert distance[0] < distance[1] + 5 * math.sqrt(1 / (4 * N))  # McDiarmid: one draw moves the distance by at most 1 / N


@pytest.mark.parametrize("stream", (engine.DRAFT, engine.DRAW))
def test_made_noise_is_independent_of_the_drafts(stream):
    """Drafts drawn by a race of their own stream under the request's very seed and offset; by the stream of the draw they are not
    independent, and it shows. draft = -target refuses most."""
    N, V = 12_000, 16
    target = torch.linspace(-1.5, 1.5, V, dtype=torch.float64)
    seeds = torch.arange(N) * 7919
    offsets = torch.full((N,), 3)
    drafted = (-target + engine.gumbel_noise(V, offsets, seeds, torch.float64, stream)).argmax(1, keepdim=True)
    rows = (-target).expand(N, 1, V), target.expand(N, 2, V)
    tokens, _ = verify_draft_tokens(drafted, *rows, torch.ones(N, dtype=torch.int64), seed=seeds, offsets=offsets)
    statistic, limit = chi_square(tokens[:, 0].bincount(minlength=V), N * target.softmax(0))
    assert (statistic < limit) == (stream == engine.DRAFT)


def test_made_noise_is_the_oracle_s():
    drafted, draft, target, num, setting = ragged_case(5)
    (B, K), V = drafted.shape, target.shape[2]
    seeds, offsets = torch.arange(B) * 2**61 + 9, torch.arange(B) * 2**33
    uniforms = [[oracle.uniform(int(s), int(o), i) for i in range(K)] for s, o in zip(seeds, offsets, strict=True)]
    gumbel = [[oracle.gumbel(int(s), int(o), i) for i in range(V)] for s, o in zip(seeds, offsets, strict=True)]
    expected = chain_by_oracle(drafted, draft, target, num, setting, torch.tensor(uniforms), torch.tensor(gumbel))
    ours = verify_draft_tokens(drafted, draft, target, num, *setting, seed=seeds, offsets=offsets)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_alone_or_in_any_batch():
    generator = torch.Generator().manual_seed(3)
    B, K, V = 6, 3, 50
    target = torch.randn(B, K + 1, V, generator=generator)
    draft = target[:, :K] + 0.5 * torch.randn(B, K, V, generator=generator)
    drafted, num = draw(draft, generator=generator), torch.randint(0, K + 1, (B,), generator=generator)
    given = drafted, draft, target, num
    seeds, offsets = torch.randint(2**62, (B,), generator=generator), torch.arange(B)
    whole = verify_draft_tokens(*given, top_p=0.9, seed=seeds, offsets=offsets)
    for b in (0, 3, 5):
        alone = verify_draft_tokens(*(t[b : b + 1] for t in given), top_p=0.9, seed=seeds[b : b + 1], offsets=offsets[b : b + 1])
        assert torch.equal(alone[0][0], whole[0][b]) and torch.equal(alone[1][0], whole[1][b])
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    mixed = verify_draft_tokens(*(t[order] for t in given), top_p=0.9, seed=seeds[order], offsets=offsets[order])
    assert torch.equal(mixed[0], whole[0][order])


def test_the_winning_tail_of_the_noise():
    """Words 0, 1, 2 are the largest noise there is, and far apart; -log(-log u) in float32 gives them one value, 16.6."""
    tail = engine.gumbel_of(torch.tensor([0, 1, 2]), torch.float32)
    exact = torch.tensor([-math.log(-math.log1p(-(w + 0.5) / 2**32)) for w in range(3)])
    assert torch.allclose(tail, exact, rtol=4 * torch.finfo(torch.float32).eps)
    assert engine.gumbel_of(torch.tensor([2**32 - 1]), torch.float32).isfinite()
    u = 1 - (torch.tensor([0, 1, 2], dtype=torch.float32) + 0.5) / 2**32
    assert (-(-u.log()).log()).isinf().all()


# One mistake, one case.


def _once(verify, p, x, u, q=None, num=1, gumbel=None, dtype=torch.float64, temperature=1.0):
    """The first token and the count of one request whose only row of the target is p."""
    V = len(p)
    target = torch.tensor([p, [0.0] * V], dtype=dtype)[None]
    draft = None if q is None else torch.tensor([[q]], dtype=dtype)
    made = {"uniforms": torch.tensor([[u]], dtype=dtype), "gumbel": torch.tensor([gumbel or [0.0] * V], dtype=dtype)}
    tokens, n = verify(torch.tensor([[x]]), draft, target, torch.tensor([num]), temperature, **made)
    return int(tokens[0, 0]), int(n[0])


INF = math.inf
CASES = {  # the case, what is right, the mistake that gives something else
    "a word of probability 0 is refused at u = 0": (([0.0, -INF], 1, 0.0), (0, 0), "u q <= p"),
    "p = q is accepted however small": (([0.0, -19.0], 1, 0.99, [0.0, -19.0]), (1, 1), "probabilities in float16"),
    "an empty remainder gives p": (([-INF, 0.0, -INF], 1, 1.0), (1, 0), "an empty remainder gives the first word"),
    "where all lanes tie, no padding wins": (([-INF, 0.0, -INF], 1, 1.0), (1, 0), "padded words may win"),
    "a placeholder is no word": (([5.0, 0.0], -1, 0.0), (0, 0), "placeholders are words"),
    "what lies behind the last draft is no draft": (([5.0, 0.0], 0, 0.0, None, 0), (0, 0), "padding is a draft"),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    arguments, right, mistake = CASES[case]
    assert _once(_verify, *arguments) == right
    assert _once(verifier(), *arguments) == right
    assert _once(verifier(mistake), *arguments) != right


def test_greedy_is_plain_decoding():
    """Whatever is drafted, the tokens are the argmaxes; placeholders are refused and the argmax still given."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(7, 4, 11, generator=generator)
    target[2, 1, [3, 8]] = 9.0  # equals: the first
    target[3, 0, 5] = torch.nan
    best = target.nan_to_num(-torch.inf).argmax(2)
    drafted = torch.where(
        torch.rand(7, 3, generator=generator) < 0.7, best[:, :3], torch.randint(-1, 11, (7, 3), generator=generator)
    )
    num = torch.tensor([0, 1, 2, 3, 3, 3, 3])
    for draft in (None, torch.randn(7, 3, 11, generator=generator)):
        tokens, n = verify_draft_tokens(drafted, draft, target, num, 0.0)
        for b in range(7):
            agreed = 0
            while agreed < num[b] and drafted[b, agreed] == best[b, agreed]:
                agreed += 1
            assert n[b] == agreed
            assert tokens[b].tolist() == best[b, : agreed + 1].tolist() + [-1] * (3 - agreed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_drafting_for_oneself_is_always_accepted(dtype):
    generator = torch.Generator().manual_seed(5)
    B, K, V = 60, 4, 300
    target = (4 * torch.randn(B, K + 1, V, generator=generator)).to(dtype)
    for setting in ((1.0, 0, 1.0), (0.7, 20, 1.0), (1.3, 0, 0.8)):
        drafted = draw(target[:, :K], *setting, generator)
        made = {"uniforms": torch.full((B, K), 1 - 2**-24), "gumbel": torch.zeros(B, V)}
        _, n = verify_draft_tokens(drafted, target[:, :K], target, torch.full((B,), K), *setting, **made)
        assert (n == K).all()


def test_near_equal_rows_lose_nothing():
    """p - q cancels where they are near. Emitted is min(p, q) and, as often as a draft is refused, the remainder: formed in
    float32 as the engine forms it, their sum is p within a few roundings, though the remainder itself is noise."""
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(500, generator=generator)
    p, q = z.softmax(0), (z + 1e-6 * torch.randn(500, generator=generator)).softmax(0)
    remainder = (p - q).clamp(min=0)
    refused = (q - p).clamp(min=0).double().sum()
    emitted = torch.minimum(p, q).double() + refused * (remainder / remainder.sum()).double()
    assert (emitted - p.double()).abs().max() <= 8 * torch.finfo(torch.float32).eps * p.max()


def test_rows_without_a_distribution():
    """NaN counts as -inf. A row where nothing is left is an error where something must be drawn from it, and nowhere else."""
    p = torch.tensor([[torch.nan, 1.0, -INF], [0.0, 0.0, 0.0]])[None]
    one = torch.tensor([1])
    made = {"uniforms": torch.tensor([[0.0]]), "gumbel": torch.tensor([[99.0, 0.0, 99.0]])}
    assert verify_draft_tokens(torch.tensor([[0]]), None, p, one, **made)[0].tolist() == [[1, -1]]
    assert verify_draft_tokens(torch.tensor([[1]]), torch.full((1, 1, 3), torch.nan), p, one, **made)[0].tolist() == [[1, -1]]
    p[0, 1] = -INF
    assert verify_draft_tokens(torch.tensor([[2]]), None, p, one, **made)[0].tolist() == [[1, -1]]
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="request 0 hold no finite number after 1 accepted tokens"):
            verify_draft_tokens(torch.tensor([[1]]), None, p, one, temperature, **made)


def test_a_vocabulary_of_one():
    tokens, n = verify_draft_tokens(torch.zeros(2, 3, dtype=torch.int64), None, torch.zeros(2, 4, 1), torch.tensor([3, 1]), seed=0)
    assert tokens.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]] and n.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, "temperature is -0.5; expected 0"),
        ({"temperature": torch.tensor([1.0, math.nan])}, ValueError, "temperature is nan"),
        ({"top_p": 0.0}, ValueError, r"top_p is 0.0; expected a number in \(0, 1\]"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"top_k": torch.tensor([1, 2, 3])}, ValueError, r"top_k has the shape \(3,\)"),
        ({"num_draft": torch.tensor([1, 4])}, ValueError, r"num_draft is \[1, 4\]; expected 0 to 3"),
        ({"num_draft": torch.tensor([1.0, 4.0])}, TypeError, "num_draft is torch.float32; expected int64"),
        ({"target_logits": torch.zeros(2, 3, 5)}, ValueError, r"target_logits are \(2, 3, 5\); expected \(2, 4, V\)"),
        ({"draft_logits": torch.zeros(2, 3, 6)}, ValueError, r"draft_logits are \(2, 3, 6\)"),
        ({"target_logits": torch.zeros(2, 4, 5, dtype=torch.int32)}, TypeError, "target_logits are torch.int32"),
        ({"uniforms": torch.zeros(2, 2)}, ValueError, r"uniforms is torch.float32 \(2, 2\)"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed is torch.int64 \(3,\)"),
    ],
)
def test_errors(change, error, message):
    given = {
        "draft_tokens": torch.zeros(2, 3, dtype=torch.int64), "draft_logits": torch.zeros(2, 3, 5),
        "target_logits": torch.zeros(2, 4, 5), "num_draft": torch.tensor([3, 1]),
    }  # fmt: skip
    verify_draft_tokens(**given)
    with pytest.raises(error, match=message):
        verify_draft_tokens(**(given | change))


def test_opcheck():
    drafted, draft, target, num, _ = ragged_case(17, torch.float32)
    made = noise(*drafted.shape, target.shape[2])
    op = torch.ops.posttrain.verify_draft_tokens
    for noises in ((made["uniforms"], made["gumbel"], 0, None, None), (None, None, 3, None, torch.ones(5, dtype=torch.int64))):
        torch.library.opcheck(op, (drafted, draft, target, num, 0.8, 0, 0.9, None, *noises))
