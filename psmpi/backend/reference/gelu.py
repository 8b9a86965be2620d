"""The cumulative distribution function of the standard normal distribution, for GELU (Hendrycks & Gimpel 2016)."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np

# Coefficients of (1 + a) (1 - Phi(a)) / exp(-a^2 / 2), a >= 0, as a polynomial in (a - 4) / (a + 4), constant first.
# Derived: interpolation at Chebyshev points in 80 digits. Omitted terms are below 1e-16.
TAIL = (
    0.47205320650984467, -0.09670347732652607, 0.013999634724430469, 0.02860036405357749, -0.03219783742831453,
    0.01793609747886859, -0.0050023785870514665, -0.00028562308680939413, 0.0006948970692570495, -9.443033944152223e-05,
    -8.785300442645791e-05, 2.1250446856208376e-05, 1.3626315192600401e-05, -3.433372216853275e-06,
    -2.6118464340168558e-06, 4.0671730125154447e-07, 5.507747965364098e-07, -1.237153366992197e-09,
    -1.1022354013739079e-07, -1.7932121916642413e-08, 1.7442583764419795e-08, 5.474708632048689e-09,
    -1.5456221598143852e-09, -6.763267210562454e-10,
)  # fmt: skip
# Arguments are limited to this size: beyond it the density would be a subnormal number.
FAR = {np.dtype(np.float32): 13.0, np.dtype(np.float64): 37.0}


def normal_law(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distribution function Phi(x) and the density phi(x) of x (n,), each (n,) of the dtype of x."""
    a = np.minimum(np.abs(x), FAR[x.dtype])
    t, tail = (a - 4) / (a + 4), np.full_like(a, TAIL[-1])
    for term in TAIL[-2::-1]:
        tail *= t
        tail += term
    density = np.exp(-0.5 * a * a)
    tail *= density / (1 + a)
    density *= 1 / sqrt(2 * pi)
    return np.where(x < 0, tail, 1 - tail), density
