"""Exponents of real training runs against theory (THEORY, section 5). Windows and tolerances are stated at each test.

Every run is torch training measured by `ShellMonitor`; the systems only say what the exponents should be.
"""

import math
from functools import partial

import lightning_cases as cases
import numpy as np
import pytest
import torch
from known_runs import closures, series, shown, train
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from grsd_callbacks import ShellDynamicsCallback, ShellMonitor
from grsd_callbacks import testing as known
from grsd_callbacks.exponents import fit_loss, fit_scaling_law


def within(fit, expected, relative):
    return abs(fit.exponent - expected) <= relative * abs(expected)


# --- problem 1: a frozen kernel


def lazy_case(num_modes, a, q, lr, num_steps):
    monitor = train(known.PowerLawKernel(num_modes, a, 1 + a * q), lr, num_steps)
    return monitor, monitor.final_exponents(), a, q


LAZY = {"a = 3/2, q = 3/4": (300, 1.5, 0.75, 0.2, 2200), "a = 6/5, q = 1/2": (300, 1.2, 0.5, 0.1, 700)}


@pytest.fixture(scope="module", params=LAZY)
def lazy(request):
    return lazy_case(*LAZY[request.param])


def test_lazy_exponents_and_their_windows(lazy):
    """1 % on a, 3 % on chi (tail added) and both rho, q in its interval; window: frontier within the spectrum."""
    monitor, fits, a, q = lazy
    assert abs(shown("a", fits["a"], a).exponent - a) < 1e-6
    assert fits["q"].lower <= shown("q", fits["q"], q).exponent <= fits["q"].upper and within(fits["q"], q, 0.03)
    assert fits["q"].lower <= q <= fits["q"].upper
    assert within(shown("chi_tail", fits["chi_tail"], q), q, 0.03)
    for name in ("rho", "rho_contour"):
        assert within(shown(name, fits[name], 1.0), 1.0, 0.03)
    assert within(shown("densing", fits["densing"], 1 / a), 1 / a, 0.03)
    low, high = fits["chi_tail"].window
    smallest = float(monitor.history[0].eigenvalues[-1])
    assert low >= 3.0 and (2 * smallest * high) ** (q + 1) <= 0.05 * math.gamma(1 + q) * 1.1


def test_lazy_closures_hold_within_their_own_intervals(lazy):
    for name, found in closures(lazy[0]).items():
        if name != "covariance":  # nothing moves: there is no velocity
            print(f"{name}: {found.value:.3f} [{found.lower:.3f}, {found.upper:.3f}]")
            assert found.holds and found.upper - found.lower < 0.2
    assert "b" not in lazy[1] and "p" not in lazy[1]
    assert max(float(s.flux.abs().max()) for s in lazy[0].history[1:]) < 1e-12


def test_without_the_tail_a_finite_probe_steepens_the_loss(lazy):
    """By 6 % (q = 3/4) and 24 % (q = 1/2) in the same window; how much to expect is in the evidence of chi."""
    monitor, fits, _, q = lazy
    plain = fit_loss(*series(monitor), window=fits["chi_tail"].window)
    assert shown("chi, no tail", plain, q).exponent > 1.05 * q
    assert 0 < fits["chi"].evidence["finite_size_bias"]
    assert fits["chi_tail"].evidence["tail"] == monitor.run.trajectory.frozen.tail.value


# --- problem 2: transport


@pytest.fixture(scope="module")
def transport():
    """c = 1 (q < 2A = 2) and c = 4/3 (q > 2A = 3/2)."""
    return {
        "source": train(known.TransportKernel(220, 1.5, 1 + 1.5 * 0.75, 1.0), 0.5, 1200, per_decade=10),
        "transport": train(known.TransportKernel(120, 1.5, 1 + 1.5 * 3.0, 4 / 3), 0.5, 2000, per_decade=8),
    }


def test_transport_limits_the_loss(transport):
    """chi = min(q, 2A) within 5 %: windows t = 20 to 400 (tail added) and the last decade."""
    limited = transport["source"]
    tail = limited.run.trajectory.frozen.tail
    assert within(shown("chi", fit_loss(*series(limited), tail=tail, window=(20, 400)), 0.75), 0.75, 0.05)
    local = transport["transport"].final_exponents()["chi_local"]
    assert within(shown("chi, last decade", local, 1.5), 1.5, 0.02)


@pytest.mark.parametrize("case", ["source", "transport"])
def test_transport_velocity_is_lambda_squared_at_all_times(transport, case):
    """b = 2, p = 0 within 0.1, and the covariance residual zero within its interval."""
    fits = transport[case].final_exponents()
    assert abs(shown("b", fits["b"], 2.0).exponent - 2.0) < 0.1
    assert abs(shown("p", fits["p"], 0.0).exponent) < 0.1
    found = closures(transport[case])["covariance"]
    print(f"p - (b - 2) = {found.value:.3f} [{found.lower:.3f}, {found.upper:.3f}]")
    assert found.holds and found.upper - found.lower < 0.2
    assert fits["b"].evidence["same_sign"] > 0.95


# --- problem 4: diagonal net, lazy and rich


@pytest.mark.parametrize(("scale", "lr", "rich"), [(5.0, 0.03, False), (1e-3, 0.4, True)])
def test_diagonal_net_keeps_a_if_lazy_and_turns_it_into_the_mean_with_delta_if_rich(scale, lr, rich):
    """Spectrum exponent a = 1 to (a + delta)/2 = 3/2, within 2 % over ranks 1 to 20 once their modes are learned."""
    net = known.DiagonalLinear(100, 1.0, 2.0, scale)
    monitor = train(net, lr, 2500, per_decade=2)
    fits = monitor.final_exponents()
    expected = net.rich_exponent if rich else net.lazy_exponent
    assert within(shown("a at the end", fits["a"], expected), expected, 0.02)
    if not rich:
        assert within(shown("a at the start", fits["a_start"], 1.0), 1.0, 0.01)


# --- problem 9: feature learning


def feature_learning(num_modes, lr, num_steps, q=0.5):
    net = known.TwoLayerFeatureLearning(num_modes, energy_exponent=q)
    monitor = train(net, lr, num_steps)
    fits = monitor.final_exponents()
    return {
        "chi": (shown("chi, tail added", fits["chi_tail"], net.loss_exponent), net.loss_exponent),
        "rho": (shown("rho, contour", fits["rho_contour"], net.frontier_exponent), net.frontier_exponent),
        "median": (shown("rho, median", fits["rho"], net.frontier_exponent), net.frontier_exponent),
        "closure": closures(monitor)["chi_minus_rho_q"],
    }


def test_feature_learning_runs_ahead_of_time():
    """rho = 2/(1 + q) = 4/3 and chi = q rho = 2/3 within 10 %, K = 160, window of the frontier (t = 0.9 to 12)."""
    found = feature_learning(160, 0.04, 700)
    for name in ("chi", "rho", "median"):
        fit, expected = found[name]
        assert within(fit, expected, 0.1)
        assert fit.num_decades > 1
    assert found["rho"][0].lower > 1.1 and found["closure"].holds


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.3, 0.5])
def test_feature_learning_with_400_modes(q):
    found = feature_learning(400, 0.03, 1500, q)
    for name in ("chi", "rho", "median"):
        assert within(*found[name], 0.1)
    assert found["closure"].holds


# --- problem 8: power-law random features


def random_features(alpha, beta, num_modes, num_features, num_steps, num_draws=3):
    """a of the first draw, and chi (floor fitted) of the mean loss of some draws of the projection."""
    losses, a = [], None
    for seed in range(num_draws):
        law = known.PowerLawRandomFeatures(num_modes, num_features, alpha, beta, seed=seed)
        monitor = train(law, 0.2, num_steps, per_decade=8)
        a = a or monitor.final_exponents()["a"]
        t, loss = series(monitor)
        losses.append(loss)
    late = t > 2  # lambda_max is about 1: the transient is over
    chi = fit_scaling_law(t[late], np.mean(losses, 0)[late])
    shown("a", a, law.spectrum_exponent)
    shown("chi", chi, law.energy_exponent)
    return law, a, chi


def test_random_features_small():
    """Easy phase (beta < 1/2), three draws of 75 features on 150 modes: a within 10 %, chi within 15 % of q."""
    law, a, chi = random_features(0.75, 0.4, 150, 75, 1200)
    assert within(a, law.spectrum_exponent, 0.1) and within(chi, law.energy_exponent, 0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "beta"), [(0.75, 0.4), (1.0, 0.3)])
def test_random_features_in_easy_phases(alpha, beta):
    """Three draws of 200 features on 400 modes: a within 5 %, chi within 15 % of q."""
    law, a, chi = random_features(alpha, beta, 400, 200, 3000)
    assert within(a, law.spectrum_exponent, 0.05) and within(chi, law.energy_exponent, 0.15)


@pytest.mark.slow
def test_random_features_in_the_distorted_phase():
    """beta > 1/2: the loss leaves slope q = 1.3 for 1/2 and a floor; over 2.5 decades the mean slope is in between.

    25 % of q: finite size and one draw's coefficients bend it by that much.
    """
    law, a, chi = random_features(1.0, 0.8, 400, 200, 4000)
    assert within(a, law.spectrum_exponent, 0.05)
    assert law.distortion_exponent < chi.exponent < law.energy_exponent
    assert within(chi, law.energy_exponent, 0.25)
    easy = random_features(1.0, 0.3, 400, 200, 3000)[2]
    assert chi.exponent > easy.exponent + 0.15  # the phases differ by their exponents


# --- problem 7: double descent


def double_descent(ratio, num_steps, num_samples=200, noise=0.5):
    """The system, its monitor, and the risk |theta - beta|^2 of the weights at each measurement."""
    data = known.RidgelessRegression(num_samples, round(ratio * num_samples), noise, seed=1)
    model, risks = data.model(), []
    monitor = ShellMonitor(
        model, "mse", (data.inputs, data.targets), work=False, figures=False, method="exact", max_overhead=None,
        per_decade=4, total_steps=num_steps, on_error="raise",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / float(data.eigenvalues[0]))
    for step in range(num_steps + 1):
        if monitor.step(step, optimizer=optimizer) is not None:
            risks.append(float((model.weight.detach().flatten() - data.weights).square().sum()))
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(model(data.inputs), data.targets).backward()
        optimizer.step()
    return data, monitor, np.array(risks)


def shells_below(data, monitor):
    """What the shells say of noise: the crossing lambda, noise share below and above it, learned noise |theta|^2.

    A mode at lambda holds lambda/(2p) of signal and sigma^2 nu / 2 of noise: they cross at `p sigma^2 nu`. Learning a
    shell moves the weights by `theta_a = (g_a(0) - g_a) / lambda_a^(1/2)`.
    """
    first, last = monitor.history[0], monitor.history[-1]
    crossing = data.num_params * data.noise**2 * first.nu
    lam, counts = first.grid.centers, first.counts
    floor = data.noise**2 * first.nu / 2
    inner = torch.arange(first.grid.num_shells) > 0  # without the null space
    below, above = inner & (lam < crossing / 2), inner & (lam > 2 * crossing)
    expected = counts * (floor + lam / (2 * data.num_params))
    ratio = [
        float(first.energy[part].sum() / e[part].sum()) for part in (below, above) for e in (expected, floor * counts)
    ]
    learned = float((2 * (first.energy.sqrt() - last.energy.sqrt()) ** 2 / lam)[below].sum())
    return crossing, ratio, float(counts[below].sum()), learned


@pytest.mark.parametrize(
    ("ratios", "num_steps"),
    [((0.4, 1.0, 2.5), 2000), pytest.param((0.4, 0.7, 1.0, 1.4, 2.5), 4000, marks=pytest.mark.slow)],
)
def test_shells_show_the_noise_crossing_at_as_many_parameters_as_samples(ratios, num_steps):
    """Risk of trained weights and the noise that shells say was learned: both peak at p/n = 1, alike within 40 %.

    There the shells hold the noise and signal expected of them (below the crossing mostly noise, above it mostly
    signal), and the risk turns up when the frontier passes the crossing (within a factor of 3).
    """
    final, shells = [], []
    for ratio in ratios:
        data, monitor, risks = double_descent(ratio, num_steps)
        crossing, energy, num_below, learned = shells_below(data, monitor)
        final.append(risks[-1])
        shells.append(learned)
        print(f"p/n = {ratio}: risk {risks[-1]:.3g}, learned noise {learned:.3g}, {num_below:.0f} modes below crossing")
        if ratio == 1.0:
            print("  energy over signal + noise, over noise (below, above):", [round(e, 2) for e in energy])
            tolerance = 3 * math.sqrt(2 / num_below)  # three standard errors of so many squared Gaussians
            assert num_below >= 30 and abs(energy[0] - 1) < tolerance and energy[3] > 2 * energy[1]
            turn = monitor.run.trajectory.contour[int(np.argmin(risks))]
            print(f"  least risk with the frontier at {turn:.3g}, crossing at {crossing:.3g}")
            assert crossing / 3 < turn < 3 * crossing
    assert ratios[int(np.argmax(final))] == ratios[int(np.argmax(shells))] == 1.0
    assert max(final) > 3 * max(final[0], final[-1]) and abs(max(shells) / max(final) - 1) < 0.4


# --- the same through Lightning


def test_the_callback_writes_the_exponents_of_a_run_as_metrics(tmp_path):
    """Problem 1 with a = 2, q = 3/5 in a Trainer: the final values, within 5 %."""
    system = known.PowerLawKernel(120, 2.0, 1 + 2 * 0.6)
    ours = ShellDynamicsCallback(
        loss="mse", probe=(system.inputs, system.targets), method="exact", max_overhead=None, per_decade=12
    )
    module = cases.Module(system.model(), torch.nn.MSELoss(), partial(torch.optim.SGD, lr=0.2))
    data = DataLoader(TensorDataset(system.inputs, system.targets), batch_size=120)
    trainer = cases.fit(module, data, tmp_path, [ours], max_epochs=500, logger=CSVLogger(tmp_path))
    found = {tag: float(value) for tag, value in trainer.callback_metrics.items() if tag.startswith("grsd_final/")}
    for name, expected in (("a", 2.0), ("chi_tail", 0.6), ("rho", 1.0), ("rho_contour", 1.0), ("densing", 0.5)):
        value = found[f"grsd_final/{name}"]
        print(f"{name}: {value:.3f}, theory {expected}")
        assert abs(value - expected) < 0.05 * expected
        assert found[f"grsd_final/{name}_lower"] <= value <= found[f"grsd_final/{name}_upper"]
    for name in ("chi_minus_rho_q", "count_slope", "densing"):
        assert found[f"grsd_final/closure_{name}_lower"] <= 0 <= found[f"grsd_final/closure_{name}_upper"]
    assert "densing - rho/a" in ours.summary() and "holds" in ours.summary()
