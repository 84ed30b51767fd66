"""The exact systems against calculations that share nothing with them: autograd, Runge-Kutta, differences, scipy."""

import itertools
import math

import pytest
import scipy.integrate
import scipy.special
import torch
from torch import nn

from grsd_callbacks import testing as known

EDGES = [0.03, 0.1, 0.3, 0.9]
NETS = {
    "power law": lambda: known.PowerLawKernel(6, 1.2, 1.8, num_params=9),
    "transport": lambda: known.TransportKernel(5, 1.0, 1.6, velocity=4 / 3),
    "two-layer linear": lambda: known.TwoLayerLinear((1.5, 0.8, 0.4), initial=(0.1, 0.2, 0.9), num_hidden=4),
    "scalar": lambda: known.ScalarProduct(0.7, -0.2, 1.1),
    "diagonal": lambda: known.DiagonalLinear(5, 1.0, 2.0, scale=0.6),
    "overdetermined": lambda: known.RidgelessRegression(6, 4, noise=0.5),
    "underdetermined": lambda: known.RidgelessRegression(4, 6, noise=0.5),
    "random features": lambda: known.PowerLawRandomFeatures(9, 4, alpha=1.0, beta=0.7),
    "feature learning": lambda: known.TwoLayerFeatureLearning(5, rtol=1e-12),
}
SYSTEMS = NETS | {
    "rotating pair": lambda: known.RotatingPair(),
    "chain": lambda: known.CovariantChain(num_modes=5, coupling=0.8),
}
MONOTONE = ["transport", "two-layer linear", "diagonal"]
net_cases = pytest.mark.parametrize("net", [pytest.param(make(), id=name) for name, make in NETS.items()])
all_cases = pytest.mark.parametrize("system", [pytest.param(make(), id=name) for name, make in SYSTEMS.items()])


def close(actual, expected, tol=1e-9):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def slope_in_time(fn, t, step=2e-3):
    """Fourth-order central difference."""
    return (8 * (fn(t + step) - fn(t - step)) - (fn(t + 2 * step) - fn(t - 2 * step))) / (12 * step)


def runge_kutta(velocity, state, end, num_steps):
    """Classical fourth order, for velocity(t, state) of one tensor."""
    h = end / num_steps
    for k in range(num_steps):
        t = k * h
        a = velocity(t, state)
        b = velocity(t + h / 2, state + h / 2 * a)
        c = velocity(t + h / 2, state + h / 2 * b)
        state = state + h / 6 * (a + 2 * b + 2 * c + velocity(t + h, state + h * c))
    return state


def trained(net, end, num_steps=200):
    """The net's own model after gradient flow on `nn.MSELoss()`."""
    model = net.model()
    params = [p for p in model.parameters() if p.requires_grad]

    def velocity(_, vector):
        nn.utils.vector_to_parameters(vector, params)
        loss = nn.MSELoss()(model(net.inputs), net.targets)
        return -nn.utils.parameters_to_vector(torch.autograd.grad(loss, params))

    start = nn.utils.parameters_to_vector(params).detach()
    nn.utils.vector_to_parameters(runge_kutta(velocity, start, end, num_steps), params)
    return model


def model_residual(net, model):
    return math.sqrt(net.nu) * (model(net.inputs) - net.targets).detach().flatten()


# -- every system: dynamics, partition, budget ---------------------------------------------------------------------


@net_cases
@pytest.mark.parametrize("t", [0.0, 1.5])
def test_gradient_flow_of_the_model_is_the_stated_solution(net, t):
    model = trained(net, t) if t else net.model()
    close(model_residual(net, model), net.residual(t), 1e-8)
    close(known.dense_kernel(model, net.inputs, nu=net.nu), net.kernel(t), 1e-8)


@net_cases
def test_energies_sum_to_the_loss_and_dissipation_to_the_squared_gradient(net):
    model = trained(net, 0.8)
    loss = nn.MSELoss()(model(net.inputs), net.targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for width in (None, 0.7):
        close(net.energy(0.8, EDGES, width).sum(), loss.detach(), 1e-8)
        close(net.dissipation(0.8, EDGES, width).sum(), sum(g.square().sum() for g in gradients), 1e-8)
    close(net.loss(0.8), loss.detach(), 1e-8)


@all_cases
def test_residual_and_kernel_velocity_are_derivatives(system):
    close(slope_in_time(system.residual, 0.6), -system.kernel(0.6) @ system.residual(0.6), 1e-8)
    close(slope_in_time(system.kernel, 0.6), system.kernel_velocity(0.6), 1e-8)


@all_cases
def test_spectrum_is_that_of_the_kernel(system):
    spectrum = system.spectrum(0.6).sort().values
    dense = torch.linalg.eigvalsh(system.kernel(0.6))
    close(dense[-len(spectrum) :], spectrum, 1e-10)
    close(dense[: -len(spectrum)], 0 * dense[: -len(spectrum)], 1e-10)
    assert system.counts(0.6, EDGES).sum() == len(spectrum)


@all_cases
@pytest.mark.parametrize("width", [0.5, 2.0])
def test_smooth_budget_closes_and_flux_is_daletskii_krein(system, width):
    flux = system.flux(0.6, EDGES, width)
    dense = known.exact_flux(
        system.kernel, system.residual, 0.6, EDGES, width, kernel_velocity_fn=system.kernel_velocity
    )
    differenced = known.exact_flux(system.kernel, system.residual, 0.6, EDGES, width, eps=5e-3)
    gain = torch.cat([flux.new_zeros(1), flux]) - torch.cat([flux, flux.new_zeros(1)])
    energy_slope = slope_in_time(lambda t: system.energy(t, EDGES, width), 0.6)
    close(flux, dense)
    close(flux, differenced, 1e-8)
    close(energy_slope, gain - system.dissipation(0.6, EDGES, width), 1e-8)


@pytest.mark.parametrize("name", MONOTONE)
def test_sharp_budget_closes_over_crossings(name):
    system = NETS[name]()
    edges, times = [0.12, 0.25, 0.4, 0.8], torch.linspace(0.2, 8.0, 4001, dtype=torch.float64)
    carried = system.crossed_energy(0.2, 8.0, edges)
    lost = torch.trapezoid(torch.stack([system.dissipation(float(t), edges) for t in times]), times, dim=0)
    gain = torch.cat([carried.new_zeros(1), carried]) - torch.cat([carried, carried.new_zeros(1)])
    assert int((carried != 0).sum()) >= 2
    close(system.energy(8.0, edges) - system.energy(0.2, edges), gain - lost, 1e-3)


@pytest.mark.parametrize("name", MONOTONE)
def test_sharp_flux_oracle_sees_every_crossing(name):
    system = NETS[name]()
    edges, eps = [0.12, 0.25, 0.4, 0.8], 0.2
    for t in (0.5, 1.0, 2.0):
        mean = known.exact_flux(system.kernel, system.residual, t, edges, eps=eps)
        carried = system.crossed_energy(t - eps, t + eps, edges) / (2 * eps)
        assert (mean - carried).abs().max() < 0.2 * eps * system.dissipation(t, edges).sum() + 1e-12


def test_shells_are_closed_at_the_lower_end():
    assert known.shell_counts(torch.tensor([-1.0, 0.0, 1.0, 1.5, 4.0]), [1.0, 4.0]).tolist() == [2, 2, 1]
    smooth = known.shell_windows(torch.tensor([-1.0, 0.0, 1.0, 1.5, 4.0]), [1.0, 4.0], width=0.3)
    close(smooth.sum(0), torch.ones(5))
    close(smooth[0, :3], torch.tensor([1.0, 1.0, 0.5]))


# -- problem 1 -----------------------------------------------------------------------------------------------------


def test_power_law_continuum_is_within_one_percent_where_shells_have_a_hundred_modes():
    law = known.PowerLawKernel(200_000, 1.3, 1.7)
    edges = torch.logspace(-6, -1, 16, dtype=torch.float64)
    full = law.counts(0.0, edges)[1:-1] >= 100
    assert int(full.sum()) >= 8
    for t in (0.0, 3.0, 1e3, 1e5):
        exact, smooth = law.energy(t, edges)[1:-1][full], law.energy_continuum(t, edges)[1:-1][full]
        visible = exact > 1e-12 * exact.max()
        assert ((smooth / exact - 1)[visible]).abs().max() < 0.01
    close(law.energy_continuum(50.0, edges).sum(), law.loss(50.0), 1e-3)


def test_power_law_continuum_matches_scipy_and_an_integral():
    law, t, edges = known.PowerLawKernel(1000, 1.3, 1.7), 20.0, [0.01, 0.1]
    q, a = law.energy_exponent, 1.3
    gamma = [scipy.special.gammainc(q, 2 * t * e) * scipy.special.gamma(q) for e in edges]
    integral, _ = scipy.integrate.quad(lambda x: x ** (q - 1) * math.exp(-2 * t * x) / (2 * a), *edges, epsabs=1e-13)
    middle = law.energy_continuum(t, edges)[1]
    close(middle, (gamma[1] - gamma[0]) / (2 * a) * (2 * t) ** -q, 1e-12)
    close(middle, integral, 1e-10)


def test_power_law_exponents_loss_and_dissipation_weighted_mean():
    law = known.PowerLawKernel(1_000_000, 1.3, 1.7)
    q = law.energy_exponent
    for t in (3e2, 3e3):
        close(law.loss(t) + law.loss_tail, law.loss_continuum(t), 2e-3)
        lam, g = law.modes(t)
        dissipation = lam * g**2
        close((lam * dissipation).sum() / dissipation.sum() * 2 * t, q + 1, 2e-3)
    chi = -math.log((law.loss(3e3) + law.loss_tail) / (law.loss(3e2) + law.loss_tail)) / math.log(10)
    close(chi, law.loss_exponent, 3e-3)
    assert law.frontier_exponent == 1


def test_descent_residual_is_sgd_on_mse():
    law = known.PowerLawKernel(7, 1.0, 1.5, num_params=8, seed=3)
    model = law.model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.4)
    for _ in range(25):
        sgd.zero_grad()
        nn.MSELoss()(model(law.inputs), law.targets).backward()
        sgd.step()
    close(model_residual(law, model), law.descent_residual(0.4, 25), 1e-12)


def test_power_law_has_no_flux_for_any_width_and_accepts_nu():
    law = known.PowerLawKernel(6, 1.2, 1.8, nu=0.3)
    assert not law.flux(1.0, EDGES).any() and not law.flux(1.0, EDGES, 0.5).any()
    close(known.dense_kernel(law.model(), law.inputs, nu=0.3), law.kernel(0.0), 1e-12)
    close(law.spectrum(0.0), known.PowerLawKernel(6, 1.2, 1.8).spectrum(5.0))


# -- problem 2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("velocity", [0.5, 1.0, 1.5])
def test_transport_loss_is_the_beta_function(velocity):
    chain = known.TransportKernel(1_000_000, 1.2, 1.6, velocity=velocity)
    q, t = chain.energy_exponent, 1e3
    beta = scipy.special.beta(q, 2 / velocity - q) * (velocity * t) ** -q / 2.4
    tail = 1_000_000**-0.6 / 1.2
    close(chain.loss_continuum(t), beta, 1e-12)
    close(chain.loss(t) + tail, beta, 1e-2)
    assert chain.loss_exponent == min(q, 2 / velocity)


def test_transport_flux_of_the_continuum():
    chain = known.TransportKernel(300_000, 1.2, 1.6, velocity=1.0)
    edges = torch.logspace(-4, -2, 5, dtype=torch.float64)
    flux = chain.flux_continuum(30.0, edges)
    close(chain.flux(30.0, edges, width=0.02) / flux, torch.ones(5), 2e-3)
    times = torch.linspace(30.0, 900.0, 3001, dtype=torch.float64)  # 500 and 250 modes cross these two edges
    integral = torch.trapezoid(torch.stack([chain.flux_continuum(float(t), [5e-4, 1e-3]) for t in times]), times, dim=0)
    close(chain.crossed_energy(30.0, 900.0, [5e-4, 1e-3]) / integral, torch.ones(2), 1e-2)
    assert (flux < 0).all()
    assert chain.flux_continuum(30.0, [0.2, 5.0]).tolist() == [0.0, 0.0]  # beyond 1/(c t), and beyond the first mode


def test_transport_loses_energy_downward_only():
    chain = known.TransportKernel(5, 1.0, 1.6, velocity=1.0)
    assert (chain.flux(0.5, EDGES, 0.5) < 0).all()


# -- problem 3 -----------------------------------------------------------------------------------------------------


def test_two_layer_linear_has_the_logistic_drift_and_degenerate_pairs():
    net = known.TwoLayerLinear((1.5, 0.8, 0.4), initial=(0.1, 0.2, 0.3), nu=1.0)
    spectrum, velocity = net.spectrum(0.7).reshape(3, 3), net.spectrum_velocity(0.7).reshape(3, 3)
    lam, sigma = spectrum.diagonal(), torch.tensor([1.5, 0.8, 0.4], dtype=torch.float64)
    close(velocity.diagonal(), lam * (2 * sigma - lam), 1e-12)
    assert torch.equal(spectrum, spectrum.mT)
    assert (net.flux(0.7, EDGES, 0.5) > 0).all()  # s < sigma: upward


def test_two_layer_linear_time_and_spectrum_scale_with_nu():
    slow, unit = (known.TwoLayerLinear((1.5, 0.4), initial=0.1, nu=nu) for nu in (0.25, 1.0))
    close(slow.spectrum(4.0), 0.25 * unit.spectrum(1.0))
    close(slow.loss(4.0), 0.25 * unit.loss(1.0))


# -- problem 4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.3, -0.6, 0.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.5, -0.5), (2.0, 0.1), (-0.3, 0.8), (0.4, 0.0)])
def test_scalar_product_in_closed_form(weights, target):
    product = known.ScalarProduct(*weights, target, nu=1.0)

    def velocity(_, ab):
        return -(ab[0] * ab[1] - target) * ab.flip(0)

    a, b = runge_kutta(velocity, torch.tensor(weights, dtype=torch.float64), 2.0, 400)
    close(product.output(2.0), (a * b)[None], 1e-9)
    close(product.spectrum(2.0), (a**2 + b**2)[None], 1e-9)
    close(product.conserved, a**2 - b**2, 1e-9)


def test_diagonal_net_exponents():
    for scale, exponent in ((30.0, "lazy_exponent"), (1e-3, "rich_exponent")):
        net = known.DiagonalLinear(400, 1.0, 1.6, scale=scale)
        final = net.final_eigenvalues
        close(math.log(final[9] / final[399]) / math.log(40), getattr(net, exponent), 1e-3)
        close(net.spectrum(1e9 / scale**2), final, 1e-6)
    assert (net.lazy_exponent, net.rich_exponent) == (1.0, 1.3)


# -- problem 5 -----------------------------------------------------------------------------------------------------


def test_rotating_pair_prints_the_numbers_of_the_theory():
    pair = known.RotatingPair()
    close(pair.mode_transfer(1.0)[0, 1], 0.0501245, 1e-7)
    close(pair.mode_dissipation(1.0), torch.tensor([0.133893, 0.022977], dtype=torch.float64), 1e-6)
    close(pair.flux(1.0, [1.0]), torch.tensor([0.0501245], dtype=torch.float64), 1e-7)


def test_rotating_pair_against_integration_in_the_laboratory_frame():
    pair = known.RotatingPair()
    end = runge_kutta(lambda t, r: -pair.kernel(t) @ r, pair.residual(0.0), 1.0, 400)
    close(pair.residual(1.0), end, 1e-10)


def test_upward_flux_raises_the_upper_energy():
    pair = known.RotatingPair()
    upper = slope_in_time(lambda t: pair.energy(t, [1.0]), 1.0)[1]
    close(upper + pair.dissipation(1.0, [1.0])[1], 0.0501245, 1e-7)


def test_reversing_the_rotation_reverses_the_flux_only_while_coefficients_agree():
    there, back = (known.RotatingPair(frequency=w) for w in (0.7, -0.7))
    close(there.flux(0.0, [1.0]), -back.flux(0.0, [1.0]))
    close(there.flux(0.0, [1.0]), [0.7 * 1.0 * 0.8])


# -- problem 6 -----------------------------------------------------------------------------------------------------


def test_chain_coupling_ratio_is_that_of_the_kernel_velocity():
    chain = known.CovariantChain(num_modes=6, coupling=-1.7, spacing=0.9)
    basis, scale = chain.basis(3.0), chain.eigenvalues.sqrt()
    close(
        (basis.mT @ chain.kernel_velocity(3.0) @ basis).abs() / torch.outer(scale, scale), chain.coupling_ratio(), 1e-12
    )
    close(basis.mT @ basis, torch.eye(6), 1e-12)
    centre = (chain.eigenvalues[1:] * chain.eigenvalues[:-1]).log() / 2
    close(chain.coupling_ratio().diagonal(1).log().diff() / centre.diff(), torch.ones(4), 1e-10)  # zeta 1, defect 0


def test_chain_against_integration_in_the_laboratory_frame():
    chain = known.CovariantChain(num_modes=5, coupling=1.5)
    end = runge_kutta(lambda t, r: -chain.kernel(t) @ r, chain.residual(0.0), 4.0, 400)
    close(chain.residual(4.0), end, 1e-8)


@pytest.mark.parametrize("coupling", [0.0, 1.0, 3.0])
def test_chain_loss_falls_with_q_after_a_transient(coupling):
    chain = known.CovariantChain(num_modes=30, coupling=coupling, energy_exponent=0.5)
    chi = math.log10(chain.loss(1e4) / chain.loss(1e5))
    close(chi, chain.loss_exponent, 5e-3)
    assert chain.counts(0.0, chain.edges).tolist() == [1] * 30


def test_chain_coefficients_survive_six_decades_of_time():
    chain = known.CovariantChain(num_modes=12, coupling=3.0)
    generator = chain.rotation_rates - chain.eigenvalues.diag()
    rates, vectors = torch.linalg.eig(generator)
    start = torch.linalg.solve(vectors, chain.initial_coefficients.to(vectors.dtype))
    for t in (1.0, 1e3, 1e6):
        close(chain.coefficients(t), (vectors @ (torch.exp(rates * t) * start)).real, 1e-9)


@pytest.mark.parametrize("system", [known.RotatingPair(), known.CovariantChain(num_modes=6, coupling=1.2)])
def test_sharp_transfer_and_flux_agree_with_the_oracles(system):
    edges, now = [0.04, 0.5], (system.kernel(0.9), system.kernel_velocity(0.9), system.residual(0.9))
    transfer = system.transfer(0.9, edges)
    close(known.exact_transfer(*now, edges), transfer, 1e-10)
    close(transfer, -transfer.mT)
    close(system.flux(0.9, edges), torch.stack([transfer[b:, :b].sum() for b in (1, 2)]), 1e-12)
    error = [
        (known.exact_flux(system.kernel, system.residual, 0.9, edges, eps=eps) - system.flux(0.9, edges)).abs().max()
        for eps in (0.02, 0.01)
    ]
    assert 3.8 < error[0] / error[1] < 4.2 and error[1] < 1e-4


# -- problem 7 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_params", [5, 9])
def test_ridgeless_bias_and_variance_against_dense_matrices(num_params):
    data = known.RidgelessRegression(7, num_params, noise=0.4, nu=1 / 7)
    x, t = data.inputs, 2.5
    second_moment = x.mT @ x / 7
    decay = torch.linalg.matrix_exp(-t * second_moment)
    times = torch.linspace(0, t, 2001, dtype=torch.float64)
    fit = torch.trapezoid(torch.linalg.matrix_exp(-times[:, None, None] * second_moment), times, dim=0) @ x.mT / 7
    close(data.bias(t), (decay @ decay).trace() / num_params, 1e-10)
    close(data.variance(t), 0.4**2 * fit.square().sum(), 1e-5)
    weights = fit @ data.targets[:, 0]
    close(data.fitted_weights(t), weights, 1e-5)
    close(data.excess_risk(t), (weights - data.weights).square().sum(), 1e-5)


def test_ridgeless_limits_are_the_mean_over_data():
    draws = [known.RidgelessRegression(20, 40, noise=0.7, seed=seed) for seed in range(200)]
    for values, limit in zip(
        ([d.bias(math.inf) for d in draws], [d.variance(math.inf) for d in draws]), draws[0].mean_limits()
    ):
        values = torch.tensor(values)
        assert (values.mean() - limit).abs() <= 5 * values.std() / math.sqrt(200) + 1e-6
    risk = torch.tensor([d.excess_risk(math.inf) for d in draws])
    assert (risk.mean() - sum(draws[0].mean_limits())).abs() < 5 * risk.std() / math.sqrt(200)


def test_double_descent_peaks_at_the_interpolation_threshold():
    risks = {p: known.RidgelessRegression(40, p, noise=0.5) for p in (10, 40, 160)}
    risks = {p: data.bias(math.inf) + data.variance(math.inf) for p, data in risks.items()}
    assert risks[40] > 3 * max(risks[10], risks[160])
    assert known.RidgelessRegression(40, 40, noise=0.5).mean_limits()[1] == math.inf
    assert known.RidgelessRegression(40, 10).mean_limits() == (0.0, 0.0)


# -- problem 8 -----------------------------------------------------------------------------------------------------


def test_random_features_floor_and_sample_moments():
    law = known.PowerLawRandomFeatures(60, 12, alpha=1.0, beta=0.4)
    best = torch.linalg.lstsq(law.inputs, law.targets).solution
    close(law.floor, law.nu / 2 * (law.inputs @ best - law.targets).square().sum(), 1e-10)
    assert law.loss(1e9) - law.floor < 1e-6 * law.loss(0.0)
    features, targets = law.sample(40_000, torch.Generator().manual_seed(1))
    products = (features[:, 0] - features[:, 1]) * targets[:, 0]
    population = law.nu * (law.inputs[:, 0] - law.inputs[:, 1]) @ law.targets[:, 0]
    assert (products.mean() - population).abs() < 5 * products.std() / 200


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.3), (1.0, 0.8)])
def test_random_features_exponents_hold_roughly_at_finite_size(alpha, beta):
    small, large = (known.PowerLawRandomFeatures(1600, d, alpha, beta) for d in (40, 160))
    measured = math.log(small.floor / large.floor) / math.log(4)
    close(measured, large.floor_exponent, 0.3)
    chi = math.log((large.loss(3.0) - large.floor) / (large.loss(30.0) - large.floor)) / math.log(10)
    close(chi, large.energy_exponent, 0.2)
    assert large.distortion_exponent == 0.5
    lam = large.eigenvalues
    close(math.log(lam[1] / lam[20]) / math.log(21 / 2), large.spectrum_exponent, 0.15)
    assert large.source_exponent == 1 + large.spectrum_exponent * large.energy_exponent


# -- problem 9 -----------------------------------------------------------------------------------------------------


def test_feature_learning_state_is_that_of_the_model():
    net = known.TwoLayerFeatureLearning(4, 1.2, 0.6, strength=2.0, rtol=1e-11)
    first, second = (p.detach() for p in trained(net, 1.0, 400).parameters())
    state = net.state(1.0)
    close(first.mT @ second[0], net.learned_weights(1.0), 1e-8)
    close(first.mT @ first, state.h, 1e-8)
    close(second.square().sum(), state.s, 1e-8)


def test_feature_learning_does_not_depend_on_what_was_asked_before():
    forward, alone = (known.TwoLayerFeatureLearning(20) for _ in range(2))
    for t in (0.003, 0.7, 2.0, 5.0):
        forward.loss(t)
    assert torch.equal(forward.residual(3.3), alone.residual(3.3))


def test_feature_learning_error_follows_rtol():
    reference = known.TwoLayerFeatureLearning(30, rtol=1e-10).residual(8.0)
    for rtol in (1e-5, 1e-7):
        error = (known.TwoLayerFeatureLearning(30, rtol=rtol).residual(8.0) - reference).norm() / reference.norm()
        assert error < 100 * rtol


def check_anomalous_exponents(net, first, last):
    times = [first * 10 ** (k / 4) for k in range(int(4 * math.log10(last / first)) + 1)]
    frontier = [net.frontier(t) for t in times]
    losses = [net.loss(t) + net.loss_tail for t in times[: len(times) - 1]]
    for values, exponent in ((frontier, net.frontier_exponent), (losses, net.loss_exponent)):
        slopes = [-math.log10(b / a) * 4 for a, b in itertools.pairwise(values)]
        assert all(abs(s / exponent - 1) < 0.1 for s in slopes), slopes


def test_feature_learning_frontier_is_anomalous():
    check_anomalous_exponents(known.TwoLayerFeatureLearning(200, 1.5, 0.5), 5.0, 50.0)


@pytest.mark.slow
def test_feature_learning_frontier_is_anomalous_over_more_than_a_decade():
    check_anomalous_exponents(known.TwoLayerFeatureLearning(600, 1.5, 0.5), 5.0, 160.0)


def test_feature_learning_frontier_is_nan_where_there_is_none():
    net = known.TwoLayerFeatureLearning(3)
    assert math.isnan(net.frontier(0.0)) and math.isnan(net.frontier(40.0))
    assert known.TwoLayerFeatureLearning(3, energy_exponent=1.5).frontier_exponent == 1.0


# -- problem 10: nulls ---------------------------------------------------------------------------------------------


def test_frozen_features_keep_their_kernel_and_have_no_flux():
    net = known.FrozenFeatures(num_inputs=3, num_features=8, num_outputs=2, seed=4)
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.sin(inputs[:, :2])
    features = net.features(inputs).detach()
    start = known.dense_kernel(net, inputs, nu=0.2)
    close(start, 0.2 * torch.kron(features @ features.mT, torch.eye(2, dtype=torch.float64)), 1e-12)
    sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(10):
        sgd.zero_grad()
        nn.MSELoss()(net(inputs), targets).backward()
        sgd.step()
    assert torch.equal(known.dense_kernel(net, inputs, nu=0.2), start)
    residual = math.sqrt(0.2) * (net(inputs) - targets).detach().flatten()
    edges = [0.01, 0.1, 0.5]
    flux = known.exact_flux(
        lambda t: start, lambda t: torch.linalg.matrix_exp(-t * start) @ residual, 0.1, edges, eps=1e-3
    )
    assert flux.abs().max() < 1e-12
    assert not known.smooth_flux(start, 0 * start, residual, edges, width=0.5).any()


def test_no_residual_no_flux():
    pair, zero = known.RotatingPair(), torch.zeros(2, dtype=torch.float64)
    assert not known.exact_flux(pair.kernel, lambda t: zero, 0.4, [1.0], eps=1e-3).any()
    assert not known.exact_flux(pair.kernel, lambda t: zero, 0.4, [1.0], 0.5, eps=1e-3).any()
    assert not known.exact_transfer(pair.kernel(0.4), pair.kernel_velocity(0.4), zero, [1.0]).any()


@pytest.mark.parametrize("size", [2, 8])
def test_rotated_outputs_change_eigenvectors_only(size):
    rng = torch.Generator().manual_seed(5)
    draw = torch.randn(size, size, generator=rng, dtype=torch.float64)
    rotation = torch.linalg.qr(draw)[0].contiguous()
    inputs, targets = (torch.randn(4, n, generator=rng, dtype=torch.float64) for n in (3, 2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    turned, turned_targets = known.rotate_outputs(model, targets, rotation)
    full = torch.kron(torch.eye(8 // size, dtype=torch.float64), rotation)
    kernel, turned_kernel = known.dense_kernel(model, inputs), known.dense_kernel(turned, inputs)
    close(turned_kernel, full @ kernel @ full.mT, 1e-12)
    loss, turned_loss = nn.MSELoss()(model(inputs), targets), nn.MSELoss()(turned(inputs), turned_targets)
    close(loss.detach(), turned_loss.detach(), 1e-12)
    for a, b in zip(
        torch.autograd.grad(loss, model.parameters()), torch.autograd.grad(turned_loss, model.parameters())
    ):
        close(a, b, 1e-12)


def test_rotated_outputs_keep_the_shape_of_targets():
    targets = torch.arange(12.0).reshape(2, 3, 2)
    _, turned = known.rotate_outputs(nn.Identity(), targets, torch.eye(6).flip(0))
    assert torch.equal(turned.reshape(2, 6), targets.reshape(2, 6).flip(1))


# -- dense oracles -------------------------------------------------------------------------------------------------


def test_dense_jacobian_rows_are_sample_major_and_columns_follow_params():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval()
    inputs = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = ["2.bias", "0.weight"]
    jacobian = known.dense_jacobian(model, inputs, names)
    params = [model.get_parameter(name) for name in names]
    for n, o in itertools.product(range(4), range(2)):
        row = torch.autograd.grad(model(inputs)[n, o], params)
        close(jacobian[2 * n + o], torch.cat([g.flatten() for g in row]), 1e-12)
    model[0].bias.requires_grad_(False)
    assert known.dense_jacobian(model, inputs).shape == (8, 6 + 3 + 3 + 6 + 2)


def test_dense_jacobian_takes_several_arguments():
    class Gated(nn.Linear):
        def forward(self, inputs, gate):
            return gate * super().forward(inputs)

    jacobian = known.dense_jacobian(Gated(2, 1), (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])))
    close(jacobian, [[3.0, 6.0, 3.0]])


def test_smooth_flux_bears_equal_eigenvalues_and_a_null_space():
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    kernel = basis @ torch.tensor([0.0, 0.5, 0.5, 2.0]).double().diag() @ basis.mT
    velocity = basis @ torch.tensor([0.0, 0.1, 0.1, 0.4]).double().diag() @ basis.mT
    residual = torch.ones(4, dtype=torch.float64)
    g = basis.mT @ residual
    step = 0.25 / 0.5  # slope of sigmoid(log(lambda) - log(edge)) at the edge is 1/(4 lambda)
    other = torch.sigmoid(torch.tensor(4.0).log()) * torch.sigmoid(-torch.tensor(4.0).log()) / 2
    expected = (step * 0.1 * (g[1] ** 2 + g[2] ** 2) + other * 0.4 * g[3] ** 2) / 2
    close(known.smooth_flux(kernel, velocity, residual, [0.5], 1.0), expected[None], 1e-7)


# -- wrong use -----------------------------------------------------------------------------------------------------

LAW = {"num_modes": 4, "spectrum_exponent": 1.0, "source_exponent": 2.0}
FEATURES = {"num_modes": 9, "num_features": 4, "alpha": 1.0, "beta": 0.7}
SQUARE = torch.eye(2)
WRONG = {
    "num_modes": lambda: known.PowerLawKernel(0, 1.0, 2.0),
    "spectrum_exponent": lambda: known.PowerLawKernel(4, -1.0, 2.0),
    "num_params": lambda: known.PowerLawKernel(**LAW, num_params=3),
    "nu": lambda: known.PowerLawKernel(**LAW, nu=0.0),
    "t must": lambda: known.PowerLawKernel(**LAW).residual(-1.0),
    "t must be": lambda: known.CovariantChain().coefficients(math.nan),
    "lr": lambda: known.PowerLawKernel(**LAW).descent_residual(0.0, 3),
    "num_steps": lambda: known.PowerLawKernel(**LAW).descent_residual(0.1, -1),
    "source_exponent": lambda: known.PowerLawKernel(4, 1.0, 1.0).energy_continuum(1.0, [0.1]),
    "source_exponent must": lambda: known.PowerLawKernel(4, 1.0, 0.5).loss_tail,
    "velocity": lambda: known.TransportKernel(**LAW, velocity=0.0),
    "velocity must be 2 - 2/D": lambda: known.TransportKernel(**LAW, velocity=0.9).model(),
    "velocity must be 2": lambda: known.TransportKernel(**LAW, velocity=2.5).model(),
    "source_exponent and velocity": lambda: known.TransportKernel(**LAW, velocity=2.0).loss_continuum(3.0),
    "width must be given": lambda: known.TransportKernel(**LAW, velocity=1.0).flux(1.0, [0.1]),
    "width must be given: eigenvalues": lambda: known.TwoLayerFeatureLearning(3).flux(1.0, [0.1]),
    "end must not": lambda: known.TransportKernel(**LAW, velocity=1.0).crossed_energy(2.0, 1.0, [0.1]),
    "singular_values": lambda: known.TwoLayerLinear((1.0, -1.0)),
    "initial": lambda: known.TwoLayerLinear((1.0, 2.0), initial=(0.1, 0.1, 0.1)),
    "num_hidden": lambda: known.TwoLayerLinear((1.0, 2.0), num_hidden=1),
    "nu must be": lambda: known.ScalarProduct(1.0, 0.0, 1.0, nu=-1.0),
    "scale": lambda: known.DiagonalLinear(**LAW, scale=0.0),
    "initial must have two": lambda: known.RotatingPair(initial=(1.0,)),
    "eigenvalues_pair": lambda: known.RotatingPair(eigenvalues_pair=(1.0, 1.0)),
    "spacing": lambda: known.CovariantChain(spacing=0.0),
    "largest": lambda: known.CovariantChain(largest=-1.0),
    "num_samples": lambda: known.RidgelessRegression(0, 3),
    "noise": lambda: known.RidgelessRegression(3, 3, noise=-0.1),
    "num_features": lambda: known.PowerLawRandomFeatures(**FEATURES | {"num_features": 0}),
    "num_modes must": lambda: known.PowerLawRandomFeatures(**FEATURES | {"num_features": 10}),
    "alpha": lambda: known.PowerLawRandomFeatures(**FEATURES | {"alpha": 0.5}),
    "beta": lambda: known.PowerLawRandomFeatures(**FEATURES | {"beta": -0.5}),
    "energy_exponent": lambda: known.TwoLayerFeatureLearning(3, energy_exponent=0.0),
    "strength": lambda: known.TwoLayerFeatureLearning(3, strength=0.0),
    "rtol": lambda: known.TwoLayerFeatureLearning(3, rtol=0.0),
    "num_outputs": lambda: known.FrozenFeatures(2, 3, num_outputs=0),
    "rotation must be square": lambda: known.rotate_outputs(nn.Identity(), torch.ones(3, 2), torch.eye(3)),
    "rotation must be orthogonal": lambda: known.rotate_outputs(nn.Identity(), torch.ones(3, 2), 2 * SQUARE),
    "params": lambda: known.dense_jacobian(nn.Linear(2, 1), SQUARE, ["no such"]),
    "params must name": lambda: known.dense_jacobian(nn.Linear(2, 1).requires_grad_(False), SQUARE),
    "edges": lambda: known.shell_windows(torch.ones(2), [2.0, 1.0]),
    "edges must": lambda: known.shell_windows(torch.ones(2), []),
    "edges must be": lambda: known.exact_transfer(SQUARE, SQUARE, SQUARE[0], [-1.0]),
    "width": lambda: known.smooth_flux(SQUARE, SQUARE, SQUARE[0], [1.0], width=0.0),
    "width must": lambda: known.shell_windows(torch.ones(2), [1.0], width=-1.0),
    "eps": lambda: known.exact_flux(lambda t: SQUARE, lambda t: SQUARE[0], 0.0, [1.0], eps=0.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
