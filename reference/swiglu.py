"""Oracle of SwiGLU: Shazeer, 2020, arXiv:2002.05202, eq. 6 without its products, in float64 loops.

y = g s(g) u,  s(g) = 1 / (1 + exp(-g))       (Swish with beta = 1, that is SiLU, times the gated half)
dL/du = dy g s                                (1)
dL/dg = dy u s (1 + g (1 - s))                (2)  since s' = s (1 - s)
"""

import math

import numpy as np


def sigmoid(g: float) -> float:
    """s(g), by an exponential that cannot overflow."""
    e = math.exp(-abs(g))
    return 1 / (1 + e) if g >= 0 else e / (1 + e)


def swiglu(gate, up) -> np.ndarray:
    """gate, up (n,) -> y (n,)."""
    return np.array([float(g) * sigmoid(float(g)) * float(u) for g, u in zip(gate, up, strict=True)])


def swiglu_backward(dy, gate, up) -> tuple[np.ndarray, np.ndarray]:
    """(dgate (n,), dup (n,)), by equations 1 and 2; 1 - s(g) is s(-g)."""
    dgate, dup = np.zeros(len(gate)), np.zeros(len(gate))
    for i, (d, g, u) in enumerate(zip(dy, gate, up, strict=True)):
        d, g, u = float(d), float(g), float(u)
        dup[i] = d * g * sigmoid(g)
        dgate[i] = d * u * sigmoid(g) * (1 + g * sigmoid(-g))
    return dgate, dup
