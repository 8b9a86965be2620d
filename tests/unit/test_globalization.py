"""Line searches, the trust region and the momentum against the numbers of their formulas."""

from math import inf, isnan, nan, sqrt

import pytest

from psmpi.optim.globalization import LARGEST, SMALLEST, Extrapolation, TrustRegion, armijo


def test_line_searches_of_the_specification():
    assert armijo(lambda b: (b - 3) ** 2, 9.0, -6.0)[0] == pytest.approx(3.375)
    assert armijo(lambda b: (40 * b - 1) ** 2, 1.0, -80.0)[0] == pytest.approx((2 / 3) ** 8)
    assert armijo(lambda b: (b - 3) ** 2, 9.0, -6.0, extend=False) == (1.0, 4.0)
    assert armijo(lambda b: 1 + b, 1.0, -1.0) is None
    assert armijo(lambda b: nan, 1.0, -1.0) is None
    assert armijo(lambda b: 0.0, 1.0, 1.0) is None
    steps = []
    armijo(lambda b: steps.append(b) or inf, 1.0, -1.0)
    assert len(steps) == 47 and steps[-1] < 1e-8 < steps[-2]


def test_the_radius_follows_the_ratio():
    region = TrustRegion()
    assert region.judge(1.0, 0.5, 0.5, 0.9) and region.radius == 2
    assert region.judge(1.0, 0.5, 0.5, 0.9) and region.radius == 2, "the step was short of the radius"
    assert region.judge(1.0, 0.9, 0.5, 2.0) and region.radius == 2, "the decrease was less than promised"
    assert not region.judge(1.0, 1.1, 0.5, 2.0) and region.radius == 1
    assert not region.judge(1.0, nan, 0.5, 2.0) and region.radius == 0.5
    assert not region.judge(1.0, 0.5, 0.0, 2.0) and region.radius == 0.25
    for _ in range(60):
        region.judge(1.0, nan, 1.0, 1.0)
    assert region.radius == SMALLEST
    for _ in range(60):
        region.judge(1.0, 0.0, 1.0, region.radius)
    assert region.radius == LARGEST and not isnan(region.radius)


def test_the_momentum_of_the_specification():
    m = Extrapolation(adaptive=True)
    values = []
    for _ in range(3):
        mu = m.next()
        values += [mu, m.theta]
    expected = [0.0, 0.618036753, 0.281749929, 0.455891741, 0.434034823]
    assert values[:5] == pytest.approx(expected, abs=1e-9)
    for _ in range(200000):
        mu = m.next()
    assert mu == pytest.approx((1 - sqrt(1e-5)) / (1 + sqrt(1e-5)), abs=1e-6)
    m.fail()
    assert m.next() == 0
    assert Extrapolation(adaptive=False).next() == 0.9
