"""Do the intervals from half-samples of the probe cover? Many probes of systems whose values are known.

What is covered is the value that a probe of that size has: exact moments of n samples where there is a closed form
(block coherence, kernel speed, spread of gradients), the mean over the probes where there is none (couplings).
Run this file as a script for the table in docs/renormalizability.md.
"""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from grsd_callbacks import ConditionSettings, ShellGrid, block_incoherence
from grsd_callbacks.renormalizability import blocks, conditions, evolution, propagation
from grsd_callbacks.renormalizability.verdicts import Z
from grsd_callbacks.spectrum import eigendecomposition

DRAWS = 200


def coverage(values, errors, truth):
    """Share of the intervals that hold the true value, and their rms error over the probes' standard deviation."""
    known = np.isfinite(values) & np.isfinite(errors)
    assert known.mean() > 0.9
    values, errors = values[known], errors[known]
    width = float(np.sqrt(np.square(errors).mean()) / values.std(ddof=1))
    return float(np.mean(np.abs(values - truth) <= Z * errors)), width


def gaussian(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- block coherence of random features: M_l = x A_l x^T, x Gaussian ----


def forms(num_blocks=4, width=12, features=6):
    """A_l = W_l^T W_l / features of random W_l with decaying columns."""
    decay = torch.logspace(0, -1, width, dtype=torch.float64)
    weights = [gaussian((features, width), seed) * decay for seed in range(num_blocks)]
    return [W.T @ W / features for W in weights]


def share_of(A, n):
    """sum_{l != m} E tr(M_l M_m) / sum_l E |M_l|^2, by Wick: n (n - 1) tr AB + n (tr A tr B + 2 tr AB)."""
    moments = np.array([[float((a @ b).trace() * (n * (n + 1)) + n * a.trace() * b.trace()) for a in A] for b in A])
    return float(moments.sum() / np.trace(moments) - 1)


@lru_cache
def coherence(n, draws=DRAWS):
    A = forms()
    found = []
    for seed in range(draws):
        x = gaussian((n, 12), 1000 + seed)
        found.append(block_incoherence({str(k): x @ a @ x.T for k, a in enumerate(A)}, num_resamples=24, seed=seed))
    values, errors = (np.array([getattr(f, name) for f in found]) for name in ("cross_share", "cross_share_error"))
    return coverage(values, errors, share_of(A, n))


# ---- spread of gradients over depth: independent samples of lognormal norms ----


@lru_cache
def gradients(n, draws=DRAWS):
    scales, values, errors = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64), [], []
    for seed in range(draws):
        norms = scales * torch.exp(0.5 * gaussian((n, 3), 5000 + seed))
        values.append(propagation._spread(norms))
        errors.append(propagation._spread_error(norms, 24, seed))
    return coverage(np.array(values), np.array(errors), 1.0)


# ---- a power-law kernel on the circle whose motion is log-shift invariant but for frozen noise ----

NUM_MODES, DECAY = 512, 1.5


@lru_cache
def operators():
    """lambda, and M' = (lambda_k lambda_l) exp(-0.3 |ln lambda_k / lambda_l|) times noise, in Fourier modes."""
    lam = torch.arange(1, NUM_MODES + 1, dtype=torch.float64) ** -DECAY
    noise = gaussian((NUM_MODES, NUM_MODES), 7)
    distance = (lam.log()[:, None] - lam.log()[None, :]).abs()
    return lam, lam[:, None] * lam * torch.exp(-0.3 * distance) * (noise + noise.T) / math.sqrt(2)


def modes(points):
    """sqrt 2 cos kx and sqrt 2 sin kx, orthonormal on the circle."""
    k = torch.arange(1, NUM_MODES // 2 + 1, dtype=torch.float64) * points[:, None]
    return math.sqrt(2) * torch.stack([k.cos(), k.sin()], 2).reshape(len(points), NUM_MODES)


def speed_of(n):
    """|M'| / |M|^2 of n points, each norm in the mean: pairs of different points, and the diagonal."""
    lam, moved = operators()
    phi = modes(torch.arange(4096, dtype=torch.float64) * (2 * math.pi / 4096))
    diagonals = [((phi * lam) * phi).sum(1), ((phi @ moved) * phi).sum(1)]
    totals = [float(lam.square().sum()), float(moved.square().sum())]
    size, change = (t * (n - 1) / n + float(d.square().mean()) / n for t, d in zip(totals, diagonals))
    return math.sqrt(change) / size


def circle(n, seed):
    """Values and errors on one probe: defect, zeta, locality, kernel speed."""
    lam, operator = operators()
    random = torch.Generator().manual_seed(seed)
    phi = modes(torch.rand(n, generator=random, dtype=torch.float64) * 2 * math.pi)
    kernel, moved, settings = phi * lam @ phi.T, phi @ operator @ phi.T, ConditionSettings(seed=seed)
    residual = phi @ (lam.sqrt() * gaussian((NUM_MODES,), 8)) / math.sqrt(n)
    shells = conditions._Shells(moved, residual, 1 / n, settings, eigendecomposition(kernel, 1 / n))
    grid = ShellGrid.logarithmic(1e-5, 100.0, 2)
    found = shells.couplings(grid, 0)
    errors = conditions._errors(kernel, shells, grid, 1, found.shells)
    speed = evolution._kernel_speed(kernel, moved, 1 / n)
    speed_error = evolution._half_sample_error(kernel, moved, 1 / n, 1, settings.num_resamples, seed)
    return [found.defect, found.zeta, found.locality, speed], [*errors.values(), speed_error]


@lru_cache
def couplings(n, draws=DRAWS):
    """Coverage by quantity."""
    values, errors = (np.array(x) for x in zip(*(circle(n, 9000 + seed) for seed in range(draws))))
    truth = [*np.nanmean(values[:, :3], 0), speed_of(n)]
    names = ("defect", "zeta", "locality", "kernel_speed")
    return {name: coverage(values[:, k], errors[:, k], truth[k]) for k, name in enumerate(names)}


# ---- what is asserted ----

#: least coverage of a nominal 95 %: 90 % less three standard errors of its estimate; widest error, in true ones
LEAST, WIDEST = 0.90 - 3 * math.sqrt(0.9 * 0.1 / DRAWS), 2.0


def covers(found):
    """Whether intervals hold enough, and are not too wide to say anything."""
    return found[0] >= LEAST and found[1] <= WIDEST


def test_closed_forms_are_those_of_large_probes():
    """Means over 200 large probes, within 5 standard errors."""
    A, n = forms(), 200
    shares, speeds = [], []
    for seed in range(200):
        x = gaussian((n, 12), seed)
        shares.append(block_incoherence({str(k): x @ a @ x.T for k, a in enumerate(A)}).cross_share)
    assert np.mean(shares) == pytest.approx(share_of(A, n), abs=5 * np.std(shares) / math.sqrt(200) + 0.01)
    for seed in range(20):
        phi = modes(torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 * math.pi)
        lam, operator = operators()
        speeds.append(evolution._kernel_speed(phi * lam @ phi.T, phi @ operator @ phi.T, 1 / n))
    assert np.mean(speeds) == pytest.approx(speed_of(n), abs=5 * np.std(speeds) / math.sqrt(20) + 0.005)


def test_resampled_error_is_the_student_interval():
    values = [0.0, 1.0, 2.0, 5.0]
    assert Z * blocks.resampled_error(values) == pytest.approx(3.18245 * np.std(values, ddof=1), rel=1e-4)
    assert math.isnan(blocks.resampled_error([1.0])) and math.isnan(blocks.resampled_error([]))


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 64])
def test_intervals_of_coherence_and_gradients_cover(n):
    assert covers(coherence(n)) and covers(gradients(n))


@pytest.mark.slow
@pytest.mark.parametrize("n", [96, 160])
def test_intervals_of_couplings_and_speed_cover(n):
    for name, found in couplings(n).items():
        assert covers(found), name


def main():
    for n in (32, 64):
        print(f"n = {n}: cross share {shown(coherence(n))}, spread {shown(gradients(n))}")
    for n in (96, 160):
        print(f"n = {n}: " + ", ".join(f"{name} {shown(found)}" for name, found in couplings(n).items()))


def shown(found):
    return f"{100 * found[0]:.1f} % (errors {found[1]:.2f} of the true ones)"


if __name__ == "__main__":
    main()
