"""The collapse's score: perfect laws, wrong exponents, nulls, intervals, and what cannot be scored."""

import math

import numpy as np
import pytest

from grsd_callbacks.exponents import self_similar_collapse

T, LAM = np.geomspace(1, 300, 30), np.geomspace(1e-4, 1, 25)


def energies(q=0.5, rho=1.0, scatter=0.0, seed=0):
    """A self-similar run: frontier at t^-rho, loss as t^(-rho q)."""
    noise = np.random.default_rng(seed).standard_normal((len(T), len(LAM)))
    return LAM**q * np.exp(-2 * LAM * T[:, None] ** rho + scatter * noise)


@pytest.mark.parametrize("rho", [1.0, 1.4])
def test_a_self_similar_run_collapses_with_its_own_exponents_only(rho):
    right = self_similar_collapse(T, LAM, energies(rho=rho), chi=0.5 * rho, rho=rho)
    assert right.score.value > 0.99 and right.is_significant and right.spread < 0.08
    for chi, other in ((0.5 * rho + 0.3, rho), (0.5 * rho, rho - 0.4)):
        wrong = self_similar_collapse(T, LAM, energies(rho=rho), chi=chi, rho=other)
        assert wrong.score.value < right.score.lower - 0.02 and wrong.spread > 2 * right.spread
    assert right.x.shape == right.y.shape == right.time.shape


def test_units_change_neither_score_nor_null():
    one = self_similar_collapse(T, LAM, energies(scatter=0.1), chi=0.5)
    other = self_similar_collapse(1e3 * T, 1e-3 * LAM, 7 * energies(scatter=0.1), chi=0.5)
    assert (other.score.value, other.null) == pytest.approx((one.score.value, one.null), rel=1e-9)


def test_interval_and_null_follow_the_noise():
    scores = [
        self_similar_collapse(T, LAM, energies(scatter=0.3, seed=k), chi=0.5, num_permutations=19) for k in range(40)
    ]
    values = np.array([found.score.value for found in scores])
    covered = [found.score.lower <= values.mean() <= found.score.upper for found in scores]
    assert sum(covered) >= 23  # 95 % of 30 less four standard errors, and the mean is estimated too
    assert all(found.is_significant for found in scores)


def test_nothing_that_moves_is_not_significant():
    """Energies without any law: permuted times do as well."""
    rng = np.random.default_rng(3)
    significant = 0
    for _ in range(10):
        walk = np.exp(np.cumsum(0.3 * rng.standard_normal((len(T), len(LAM))), axis=1))
        significant += self_similar_collapse(T, LAM, walk, chi=0.5, num_permutations=39).is_significant
    assert significant <= 1


def test_what_cannot_be_scored_says_why():
    assert "times" in self_similar_collapse(T[:5], LAM, energies()[:5], chi=0.5).reason
    assert "points" in self_similar_collapse(T, LAM, np.zeros((30, 25)), chi=0.5).reason
    few = self_similar_collapse(T, LAM, energies(), chi=0.5, counts=np.ones(25))
    assert math.isnan(few.score.value) and not few.is_significant
    flat = self_similar_collapse(T, LAM, np.ones((30, 25)), chi=0.5)
    assert "no energy changes" in flat.reason


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((T, LAM, energies()[1:]), {"chi": 0.5}, r"energy must have shape \(30, 25\)"),
        ((T[::-1], LAM, energies()), {"chi": 0.5}, "flow_time must be positive and ascending"),
        ((T, -LAM, energies()), {"chi": 0.5}, "scales must be positive and ascending"),
        ((T, LAM, energies()), {"chi": math.nan}, "chi must lie in"),
        ((T, LAM, energies()), {"chi": 0.5, "num_permutations": 5}, "num_permutations must be at least 19"),
    ],
)
def test_wrong_values_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        self_similar_collapse(*arguments, **options)
