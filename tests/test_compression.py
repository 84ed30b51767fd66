"""Pruning against closed forms and against nets cut by hand; rounding against the law of small perturbations."""

import math

import numpy as np
import pytest
import torch
from known_runs import shown, train
from nets import randn, seeded

from grsd_callbacks import Settings, compression_exponents, quantisation_exponents
from grsd_callbacks import testing as known
from grsd_callbacks.exponents import Estimate

RANKS = np.arange(1.0, 1001.0)
LAM, A, Q = RANKS**-1.5, 1.5, 0.6
G = RANKS ** -((1 + A * Q) / 2)
TAIL = 0.5 * 1000 ** -(A * Q) / (A * Q)


def test_pruned_loss_is_that_of_the_truncated_function():
    rng = np.random.default_rng(0)
    lam, start, now = rng.uniform(0.1, 1.0, 6), rng.standard_normal(6), rng.standard_normal(6)
    found = compression_exponents(lam, start, now, 0.01)
    for cut, loss in zip(found.cuts, found.loss, strict=True):
        by_hand = np.where(lam > cut, now, start)  # below the cut training is undone
        assert loss == pytest.approx(0.5 * by_hand @ by_hand, rel=1e-12)
    assert found.pi_c.refused and math.isnan(found.chi_over_pi_c.value) and not found.invariant.holds


def test_pruning_exponent_is_q_and_the_invariant_is_rho():
    t, rho = 300.0, 1.25
    found = compression_exponents(
        LAM, G, G * np.exp(-LAM * t), 0.5 / t, tail=TAIL, chi=Estimate(Q * rho, 0.7, 0.8), rho=Estimate(rho, 1.2, 1.3)
    )
    assert found.pi_c.exponent == pytest.approx(Q, rel=0.02) and found.pi_c.verdict == "power_law"
    assert found.pi_c.window[0] >= 4 * 0.5 / t
    assert found.chi_over_pi_c.value == pytest.approx(rho, rel=0.03) and found.invariant.holds
    assert found.chi_over_pi_c.lower < rho < found.chi_over_pi_c.upper


def test_pruning_says_what_it_cannot_know_and_names_wrong_arguments():
    assert "no frontier" in compression_exponents(LAM, G, G, math.nan).pi_c.reason
    assert "needed" in compression_exponents(LAM[:4], G[:4], G[:4], 1e-9).pi_c.reason
    assert compression_exponents(np.zeros(9), np.ones(9), np.ones(9), 0.1).pi_c.refused
    with pytest.raises(ValueError, match="start must have 1000 entries"):
        compression_exponents(LAM, G[1:], G, 0.1)
    with pytest.raises(ValueError, match="must be finite"):
        compression_exponents(LAM, G, G * math.nan, 0.1)
    with pytest.raises(ValueError, match="tail must lie in"):
        compression_exponents(LAM, G, G, 0.1, tail=-1.0)


def test_a_run_ends_with_what_pruning_costs():
    """Trained for real: pi_c = q within 3 %, and the invariant with rho = 1 in its interval."""
    monitor = train(known.PowerLawKernel(200, 1.5, 1 + 1.5 * 0.75), 0.2, 900)
    fits = monitor.final_exponents()
    assert abs(shown("pi_c", fits["pi_c"], 0.75).exponent - 0.75) < 0.03 * 0.75
    learned = monitor.run.compression(fits)
    gap = learned.invariant
    print(f"chi/pi_c - rho = {gap.value:.3f} [{gap.lower:.3f}, {gap.upper:.3f}]")
    assert gap.holds and gap.upper - gap.lower < 0.15


def test_the_invariant_holds_where_features_are_learned():
    """rho = 4/3 in problem 9: chi / pi_c within 10 % of it, and of the rho measured within its interval."""
    monitor = train(known.TwoLayerFeatureLearning(160), 0.04, 500)
    learned = monitor.run.compression(monitor.final_exponents())
    print(f"chi/pi_c = {learned.chi_over_pi_c.value:.3f}, pi_c = {learned.pi_c.exponent:.3f}")
    assert abs(learned.pi_c.exponent - 0.5) < 0.03 and abs(learned.chi_over_pi_c.value - 4 / 3) < 0.1 * 4 / 3
    assert learned.invariant.holds


def net():
    return seeded(lambda: torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.Tanh(), torch.nn.Linear(40, 4)))


def test_rounding_moves_stiff_modes_by_the_square_of_the_step():
    """Energy ~ step^2, and ~ lambda a mode, as for noise that is isotropic in the weights."""
    found = quantisation_exponents(net(), "mse", (randn(60, 12), randn(60, 4, seed=1)))
    assert abs(shown("step", found.step, 2.0).exponent - 2) < 0.15
    assert abs(shown("spread", found.spread, 1.0).exponent - 1) < 0.2
    np.testing.assert_allclose(found.shell_energy.sum(1), found.energy, rtol=1e-12)
    assert (np.diff(found.energy) < 0).all()  # more bits, less


def test_rounding_against_weights_rounded_by_hand_and_the_net_left_alone():
    model, x, y = net(), randn(20, 12), randn(20, 4, seed=1)
    before = [p.detach().clone() for p in model.parameters()]
    found = quantisation_exponents(model, "mse", (x, y), bits=[4])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    f = model(x).detach()
    with torch.no_grad():
        for p in model.parameters():
            step = p.abs().max() / 7
            p.copy_((p / step).round() * step)
    moved = model(x).detach()
    assert found.loss[0] == pytest.approx(float(torch.nn.functional.mse_loss(moved, y)), rel=1e-12)
    assert found.energy[0] == pytest.approx(float((moved - f).square().mean()), rel=1e-9)
    assert found.step.refused


@pytest.mark.parametrize("bits", [[], [1, 4], [4.0], [True, 4]])
def test_rounding_refuses_what_is_no_number_of_bits(bits):
    with pytest.raises(ValueError, match="bits must be whole numbers of at least 2"):
        quantisation_exponents(net(), "mse", (randn(5, 12), randn(5, 4)), bits=bits)


def test_rounding_needs_every_mode():
    with pytest.raises(ValueError, match="settings.method must be 'exact'"):
        quantisation_exponents(net(), "mse", (randn(5, 12), randn(5, 4)), settings=Settings(method="krylov"))
