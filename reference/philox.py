"""Oracle of the counter-based generator that dropout masks come from: Philox4x32-10. Salmon, Moraes, Dror, Shaw 2011,
"Parallel random numbers: as easy as 1, 2, 3" (SC '11), section 3.3: a bijection of 128-bit counters, keyed by 64 bits. Element i
of a stream is a function of (seed, i) alone, so a mask need not be stored: whoever needs it computes it again.
"""

import numpy as np

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # table 2, N = 4, W = 32
WEYL = 0x9E3779B9, 0xBB67AE85  # the golden ratio and sqrt(3) - 1, what each round adds to the key
ROUNDS = 10
WORD = 2**32


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Four 32-bit words of a counter of four words under a key of two.

    A round splits both products into high and low words: (c0, c1, c2, c3) becomes
    (high(M1 c2) ^ c1 ^ k0, low(M1 c2), high(M0 c0) ^ c3 ^ k1, low(M0 c0)).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = divmod(MULTIPLIERS[0] * c0, WORD)
        high1, low1 = divmod(MULTIPLIERS[1] * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) % WORD, (k1 + WEYL[1]) % WORD
    return c0, c1, c2, c3


def word(i: int, seed: int) -> int:
    """Word i of the stream of `seed` (64 bits): word i mod 4 of counter i div 4."""
    high, low = divmod(i // 4, WORD)
    return philox4x32((low, high, 0, 0), (seed % WORD, seed // WORD % WORD))[i % 4]


def keep(shape: tuple[int, ...], dropout: float, seed: int) -> np.ndarray:
    """bool of `shape`: element i (row-major) is kept iff its word reaches floor(dropout 2^32), so with probability 1 - dropout
    to within 2^-32."""
    threshold = int(dropout * WORD)
    kept = np.zeros(int(np.prod(shape)), bool)
    for i in range(kept.size):
        kept[i] = word(i, seed) >= threshold
    return kept.reshape(shape)
