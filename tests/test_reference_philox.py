"""The oracle of the generator: the vectors its authors publish, and how a stream is laid out over counters."""

from __future__ import annotations

import pytest

from posttrain.reference import philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123, kat_vectors, "philox4x32 10": zeros, ones, digits of pi
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    assert philox.philox4x32(counter, key) == words


def test_a_stream_is_its_counters_words_in_order():
    assert tuple(philox.word(i, 0) for i in range(4)) == philox.philox4x32((0, 0, 0, 0), (0, 0))
    seed = 0x299F31D0A4093822
    assert philox.word(9, seed) == philox.philox4x32((2, 0, 0, 0), (0xA4093822, 0x299F31D0))[1]
    assert philox.word(4 * 2**32 * 5 + 3, seed) == philox.philox4x32((0, 5, 0, 0), (0xA4093822, 0x299F31D0))[3]


def test_keep_is_the_threshold():
    words = [philox.word(i, 7) for i in range(6)]
    for i, at in enumerate(words):
        kept = philox.keep((2, 3), at / 2**32, 7).flatten()  # at / 2^32 is exact in float64
        assert kept[i] and kept.tolist() == [w >= at for w in words]
        assert not philox.keep((2, 3), (at + 1) / 2**32, 7).flatten()[i]


def test_the_share_kept_is_that_asked_for():
    """4096 draws: within five standard deviations, sqrt(p (1 - p) / n)."""
    for dropout in (0.05, 0.5, 0.9):
        share = philox.keep((64, 64), dropout, 3).mean()
        assert abs(share - (1 - dropout)) < 5 * (dropout * (1 - dropout) / 4096) ** 0.5
    assert philox.keep((8,), 0.0, 3).all()
