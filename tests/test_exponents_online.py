"""The estimators a run adds: tails, labels, modes, local slopes, counts; coverage of their intervals; bad input."""

import math

import numpy as np
import pytest

from grsd_callbacks.exponents import (
    Estimate,
    PowerLawFit,
    combine,
    compression_exponents,
    elasticity,
    energy_tail,
    finite_size_bias,
    fit_counts,
    fit_energy,
    fit_loss,
    local_slope,
    progress_contour,
    resolved_modes,
    resource_laws,
    shell_labels,
    unbiased_scale,
)

EDGES = np.logspace(-5, 0, 16)
A, Q, K = 1.5, 0.75, 2000
RANKS = np.arange(1.0, K + 1)
LAM, G2 = RANKS**-A, RANKS ** -(1 + A * Q)


def noise(rng, n, kind, sigma):
    draws = rng.standard_normal(n)
    if kind == "ar":
        for k in range(1, n):
            draws[k] = 0.6 * draws[k - 1] + 0.8 * draws[k]
    return sigma * draws * (np.exp(np.linspace(-1.1, 1.1, n)) if kind == "growing" else 1.0)


def shells(values, lam=LAM, edges=EDGES):
    return np.bincount(np.searchsorted(edges, lam, side="right"), values, len(edges) + 1)


# --- finite size


def test_tail_is_the_energy_that_a_longer_law_holds():
    usable = np.append(0, EDGES) >= LAM[-1]
    fit = fit_energy(EDGES, shells(G2 / 2), shells(np.ones(K)), usable)
    found = energy_tail(fit, math.log(EDGES[1] / EDGES[0]), LAM[-1])
    exact = K ** -(A * Q) / (2 * A * Q)
    assert found.value == pytest.approx(exact, rel=0.06) and found.lower < found.value < found.upper


def test_chi_with_the_tail_is_q_and_without_it_is_not():
    t = np.geomspace(5, 900, 30)
    loss = np.array([0.5 * G2 @ np.exp(-2 * LAM * now) for now in t])
    exact = K ** -(A * Q) / (2 * A * Q)
    x = 2 * LAM[-1] * t[-1]
    plain, corrected = fit_loss(t, loss), fit_loss(t, loss, tail=exact)
    assert corrected.exponent == pytest.approx(Q, rel=0.01)
    assert Q * (1 + 0.2 * finite_size_bias(Q, x)) < plain.exponent < Q * (1 + finite_size_bias(Q, x))
    assert finite_size_bias(Q, x, with_tail=True) < 0.05 < finite_size_bias(Q, x)
    level = unbiased_scale(Q, LAM[-1])
    assert finite_size_bias(Q, LAM[-1] / level, with_tail=True) == pytest.approx(0.05)
    unsure = fit_loss(t, loss, tail=Estimate(exact, 0.5 * exact, 2 * exact))
    assert unsure.lower < corrected.lower and unsure.upper > corrected.upper and unsure.exponent == corrected.exponent
    low, high = (fit_loss(t, loss, tail=end).exponent for end in (2 * exact, 0.5 * exact))
    assert unsure.lower <= low < high <= unsure.upper


def test_there_is_no_tail_without_a_law():
    refused = fit_energy(EDGES, np.zeros(17))
    assert math.isnan(energy_tail(refused, 0.7, 1e-4).value)
    flat = fit_energy(EDGES, np.exp(0.5 * np.random.default_rng(0).standard_normal(17)))
    assert flat.lower < 0 and math.isnan(energy_tail(flat, 0.7, 1e-4).value)


# --- the frozen basis


def test_labels_make_the_contour_of_a_frozen_kernel_exact():
    labels = shell_labels(EDGES, LAM, G2)
    held = ~np.isnan(labels)
    assert ((labels > EDGES[:-1]) & (labels < EDGES[1:]))[held].all() and held.sum() >= 12
    start = shells(G2)
    for label in labels[held][1:-1]:
        now = shells(G2 * np.exp(-2 * LAM * 0.5 / label))
        assert progress_contour(EDGES, start, now, labels=labels) == pytest.approx(label, rel=1e-6)
    t = np.geomspace(3, 3000, 40)
    contour = [progress_contour(EDGES, start, shells(G2 * np.exp(-2 * LAM * now)), labels=labels) for now in t]
    assert elasticity(t, contour).exponent == pytest.approx(1.0, abs=0.003)


def test_the_contour_steps_over_shells_without_modes():
    edges = np.logspace(-3, 0, 7)
    lam = np.array([2e-3, 0.5])
    labels = shell_labels(edges, lam, np.ones(2))
    found = progress_contour(edges, shells(np.ones(2), lam, edges), shells(np.exp(-8 * lam), lam, edges), labels=labels)
    assert found == pytest.approx(0.5 / 4, rel=1e-6)  # g_hat = lambda t


def test_resolved_modes_of_a_power_law_have_its_exponent():
    assert resolved_modes(LAM, LAM[[0, 9, 1999]]).round(9).tolist() == [1.0, 10.0, 2000.0]
    np.testing.assert_allclose(resolved_modes(LAM, 0.5 * (LAM[40] + LAM[41])), 41.5, rtol=1e-3)
    assert math.isnan(resolved_modes(LAM, 2.0)) and math.isnan(resolved_modes([0.0, 0.0], 0.1))
    assert resolved_modes([], [0.1, 0.2]).shape == (2,)


def test_counts_of_a_power_law_spectrum():
    usable = np.append(0, EDGES) >= LAM[-1]
    fit = fit_counts(EDGES, shells(np.ones(K)), usable)
    assert fit.exponent == pytest.approx(1 / A, abs=0.02) and fit.lower <= 1 / A <= fit.upper


# --- coverage: 95 % intervals hold the truth in 92 to 98 % of many repeats


def covered(draw, repeats, seed):
    rng = np.random.default_rng(seed)
    return sum(draw(rng) for _ in range(repeats)) / repeats


def slope_case(kind):
    x = np.geomspace(1, 1000, 48)

    def draw(rng):
        fit = local_slope(x, x**-0.8 * np.exp(noise(rng, 48, kind, 0.05)), compare=False)
        return fit.lower <= -0.8 <= fit.upper

    return draw


def tail_case(kind):
    """The tail itself is uncertain: its Estimate is the 95 % interval of the draw that replaces the true one."""
    t = np.geomspace(1, 300, 40)
    tail, true = 0.02, t**-0.6

    def draw(rng):
        guess = tail * math.exp(0.2 * rng.standard_normal())
        estimate = Estimate(guess, guess * math.exp(-0.392), guess * math.exp(0.392))
        fit = fit_loss(t, (true - tail) * np.exp(noise(rng, 40, kind, 0.04)), tail=estimate, compare=False)
        return fit.lower <= 0.6 <= fit.upper

    return draw


def count_case(_):
    """Poisson counts of a random spectrum."""
    edges = np.logspace(-4, 0, 13)
    centres = np.sqrt(edges[1:] * edges[:-1])

    def draw(rng):
        counts = np.concatenate([[0], rng.poisson(8 * centres**-0.6), [0]])
        fit = fit_counts(edges, counts, compare=False)
        return fit.lower <= 0.6 <= fit.upper

    return draw


def product_case(_):
    """Closures: a product of two independent Gaussian estimates."""

    def draw(rng):
        q, rho = 0.5 + 0.03 * rng.standard_normal(), 1.2 + 0.05 * rng.standard_normal()
        parts = Estimate(q, q - 0.0588, q + 0.0588), Estimate(rho, rho - 0.098, rho + 0.098)
        found = combine(lambda a, b: a * b, *parts)
        return found.lower <= 0.6 <= found.upper

    return draw


CASES = {
    **{f"local slope, {kind}": slope_case(kind) for kind in ("white", "ar", "growing")},
    **{f"tail, {kind}": tail_case(kind) for kind in ("white", "ar", "growing")},
    "counts": count_case(""),
    "closure": product_case(""),
}


@pytest.mark.parametrize("case", ["local slope, white", "tail, white", "counts", "closure"])
def test_intervals_cover_small_run(case):
    assert covered(CASES[case], 60, 31) >= 0.95 - 5 * 0.028  # one standard error of 60 repeats is 2.8 points


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_95_percent(case):
    share = covered(CASES[case], 800, 32)
    print(f"coverage of nominal 95 %, {case}: {share:.3f}")
    assert 0.92 <= share <= 0.98


# --- bad input


def test_a_constant_series_a_gap_and_too_few_points_give_no_number_without_support():
    x = np.geomspace(1, 1000, 40)
    assert local_slope(x, np.full(40, 2.0)).verdict != "power_law"
    gap = np.where((x > 20) & (x < 400), math.nan, x**-0.5)
    assert local_slope(x, gap, min_points=5).refused or local_slope(x, gap).num_points >= 5
    for y in (np.zeros(40), -np.ones(40), np.full(40, math.nan)):
        fit = local_slope(x, y)
        assert fit.refused and fit.reason
    assert local_slope([], []).refused and local_slope([1.0], [1.0]).refused
    assert fit_counts(EDGES, np.zeros(17)).refused and fit_counts(EDGES, np.full(17, math.nan)).refused
    assert elasticity(x, np.full(40, math.nan)).refused
    laws = resource_laws(PowerLawFit(math.nan, math.nan, math.nan, 1, (1, 2), 0, 0, "undecided", "none"), 0.5)
    assert (
        math.isnan(laws.size.value)
        and math.isnan(laws.compute.value)
        and math.isnan(resource_laws(-1.0, 1.0).size.value)
    )


def test_times_out_of_order_are_the_same_points():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1000, 40)
    y = x**-0.5 * np.exp(0.05 * rng.standard_normal(40))
    order = rng.permutation(40)
    for function in (local_slope, fit_loss, elasticity):
        one, other = function(x, y), function(x[order], y[order])
        assert (one.exponent, one.lower, one.upper) == pytest.approx((other.exponent, other.lower, other.upper))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_loss([1.0, 2.0], [1.0, 1.0], tail=-1.0), "tail must lie in"),
        (lambda: fit_loss([1.0, 2.0], [1.0, 1.0], tail=math.nan), "tail must lie in"),
        (lambda: elasticity([-1.0, 2.0], [1.0, 1.0]), "flow_time must be finite and not negative"),
        (lambda: local_slope([-1.0, 2.0], [1.0, 1.0]), "x must not be negative"),
        (lambda: local_slope([1.0, 2.0], [1.0, 1.0], decades=0.0), "decades must lie in"),
        (lambda: finite_size_bias(-0.5, 0.1), "q must lie in"),
        (lambda: unbiased_scale(0.5, 0.0), "smallest must lie in"),
        (lambda: shell_labels(EDGES, LAM, -G2), "weights must not be negative"),
        (lambda: shell_labels(EDGES, LAM, G2[1:]), "weights must have 2000 entries"),
        (lambda: progress_contour(EDGES, np.ones(17), np.ones(17), labels=np.ones(3)), "labels must have 15 entries"),
        (lambda: fit_counts(EDGES[::-1], np.ones(17)), "strictly increasing"),
        (lambda: fit_counts(np.arange(1.0, 17.0), np.ones(17)), "uniform in log lambda"),
        (lambda: compression_exponents(LAM, G2, G2, 0.1, min_points=1), "min_points must be at least 3"),
    ],
)
def test_wrong_values_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_kinds_name_the_argument():
    with pytest.raises(TypeError, match="expected a PowerLawFit, an Estimate or a number, got str"):
        resource_laws("a", 1.0)
    with pytest.raises(TypeError, match="q must be a real number"):
        finite_size_bias("q", 0.1)
