"""Losses of samples and projections in the stead of outputs, against gradients of single samples by plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from nets import jacobian, mlp, randint, randn, relative
from test_training_step import Formula, Penalty, Scheduled, Squares, Tokens, X, Y, observed
from torch import nn

from grsd_callbacks import ShellDynamicsCallback, ShellMonitor
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.losses import resolve_loss
from grsd_callbacks.measure import measure
from grsd_callbacks.observation import MAX_ROWS, Sketch, choose_observe
from grsd_callbacks.observation import observed as reduce
from grsd_callbacks.probe import Probe
from grsd_callbacks.settings import Settings

N = 7
INPUTS, CLASSES = randn(N, 5, seed=1), randint(3, N, seed=2)
WEIGHT = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
IGNORED = torch.where(torch.arange(N) == 2, -100, CLASSES)
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), CLASSES),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "weighted, smoothed": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), CLASSES),
    "one ignored": (nn.CrossEntropyLoss(WEIGHT), IGNORED),
    "probabilities": (nn.CrossEntropyLoss(), randn(N, 3, seed=3).softmax(1)),
    "squares": (nn.MSELoss(), randn(N, 3, seed=4)),
    "sum of squares": (nn.MSELoss(reduction="sum"), randn(N, 3, seed=4)),
}


def shares(model, criterion, targets):
    """l_i, the share of each sample in L: its own loss, weighted by what torch divides by."""
    f = model(INPUTS)
    own = []
    for i in range(N):
        value = (criterion if criterion.reduction == "sum" else type(criterion)(**options(criterion)))(
            f[i : i + 1], targets[i : i + 1]
        )
        own.append(value)
    total = criterion(f, targets)
    values = torch.stack(own)
    return (values if criterion.reduction == "sum" else values / normaliser(criterion, f, targets)), total


def options(criterion):
    if isinstance(criterion, nn.MSELoss):
        return {"reduction": "sum"}
    names = ("weight", "label_smoothing", "ignore_index")
    return {"reduction": "sum", **{name: getattr(criterion, name) for name in names}}


def normaliser(criterion, f, targets):
    if isinstance(criterion, nn.MSELoss):
        return f.numel()
    if targets.is_floating_point():
        return len(f)
    kept = targets[targets != -100]
    return len(kept) if criterion.weight is None else criterion.weight[kept].sum()


def gradients(values, model):
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in values]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def reduced(model, loss, targets, how, **options):
    return reduce(ModelFunction(model), Probe(INPUTS, targets), resolve_loss(loss), how, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients(name):
    """M_ij = <grad n l_i, grad n l_j> / n; D sums to |grad L|^2, E to one half."""
    model, (criterion, targets) = mlp(), LOSSES[name]
    found = reduced(model, criterion, targets, "loss_gradient")
    instant = measure(model, found.probe, found.loss, Settings(outputs=found.outputs))
    own, total = shares(model, criterion, targets)
    assert float(own.sum().detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    g = N * gradients(own, model)
    torch.testing.assert_close(instant.eigenvalues, torch.linalg.eigvalsh(g @ g.T / N).flip(0), rtol=1e-9, atol=1e-12)
    assert instant.loss == pytest.approx(float(total.detach()), rel=1e-12)
    assert instant.grad_norm_sq == pytest.approx(float(g.mean(0).square().sum()), rel=1e-10)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(instant.grad_norm_sq, rel=1e-9)
    assert float(instant.budget.energy.sum()) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"one ignored"}))
def test_root_losses_are_a_squared_loss(name):
    """Energies sum to the loss, dissipation to |grad L|^2, and r moves by -lr M r under gradient descent."""
    model, (criterion, targets) = mlp(), LOSSES[name]
    found = reduced(model, criterion, targets, "root_loss")
    instant = measure(model, found.probe, found.loss, Settings(outputs=found.outputs))
    _, total = shares(model, criterion, targets)
    assert found.loss.energy_is_loss
    assert float(instant.budget.energy.sum()) == pytest.approx(float(total.detach()), rel=1e-10)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(instant.grad_norm_sq, rel=1e-9)
    before = instant.state
    kernel = before.vectors * before.eigenvalues @ before.vectors.T
    lr = 1e-6 / float(before.eigenvalues.max())
    for p, g in zip(model.parameters(), torch.autograd.grad(total, list(model.parameters()))):
        p.data -= lr * g
    after = measure(model, found.probe, found.loss, Settings(outputs=found.outputs)).state
    assert relative((after.residual - before.residual) / lr, -kernel @ before.residual) < 1e-4


def test_a_sample_without_loss_has_a_zero_row():
    model = mlp()
    found = reduced(model, nn.CrossEntropyLoss(), IGNORED, "root_loss")
    instant = measure(model, found.probe, found.loss, Settings(outputs=found.outputs))
    assert float(instant.eigenvalues[-1]) == pytest.approx(0.0, abs=1e-12)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(instant.grad_norm_sq, rel=1e-9)


@pytest.mark.parametrize("kind", [Squares, Tokens])
@pytest.mark.parametrize("how", ["loss_gradient", "root_loss"])
def test_training_steps(kind, how):
    module, probe, step = observed(kind)
    function = ModelFunction(module, outputs=step.outputs)
    found = reduce(function, probe, step.loss, how)
    instant = measure(module, found.probe, found.loss, Settings(outputs=found.outputs))
    plain = measure(module, probe, step.loss, Settings(outputs=step.outputs))
    assert (instant.num_outputs, instant.num_samples) == (1, 6)
    assert instant.loss == pytest.approx(plain.loss, rel=1e-12)
    assert instant.grad_norm_sq == pytest.approx(plain.grad_norm_sq, rel=1e-12)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(plain.grad_norm_sq, rel=1e-9)
    own = torch.stack([function.run(lambda i=i: step.outputs.runner([X[i : i + 1], Y[i : i + 1]])) for i in range(6)])
    if how == "root_loss":
        assert float(instant.budget.energy.sum()) == pytest.approx(plain.loss, rel=1e-9)
        torch.testing.assert_close(instant.state.residual**2 / 2, own.detach() / 6)


def test_a_projection_is_that_of_jacobian_and_residual():
    model, k = mlp(), 2
    criterion, targets = LOSSES["cross-entropy"]
    found = reduced(model, criterion, targets, "projection", num_projections=k, seed=3)
    instant = measure(model, found.probe, found.loss, Settings(outputs=found.outputs))
    R = Sketch.draw(3, k, 3)(torch.eye(3, dtype=torch.float64))  # (C, k)
    J = torch.einsum("icp,ck->ikp", jacobian(model, INPUTS).view(N, 3, -1), R).reshape(N * k, -1)
    r = N**-0.5 * (model(INPUTS).softmax(1) - F.one_hot(targets, 3)).detach() @ R
    torch.testing.assert_close(instant.eigenvalues, torch.linalg.eigvalsh(J @ J.T / N).flip(0), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(instant.state.residual, r.flatten())
    gradient = torch.autograd.grad(criterion(model(INPUTS), targets), list(model.parameters()))
    assert instant.grad_norm_sq == pytest.approx(float(sum(g.square().sum() for g in gradient)), rel=1e-10)
    assert not instant.closes and float(instant.budget.dissipation.sum()) != pytest.approx(instant.grad_norm_sq)
    assert instant.loss == pytest.approx(criterion(model(INPUTS), targets).item(), rel=1e-12)


def test_projected_trace_and_norm_are_unbiased():
    """Over 400 sketches, within five standard errors."""
    J, r = randn(4 * 12, 9, seed=5).view(4, 12, 9), randn(4, 12, seed=6)
    draws = []
    for seed in range(400):
        R = Sketch.draw(12, 3, seed)
        rows = torch.stack([R(J[..., p]) for p in range(9)], -1)
        draws.append([float(rows.square().sum()), float(R(r).square().sum())])
    draws = torch.tensor(draws)
    exact = torch.tensor([float(J.square().sum()), float(r.square().sum())])
    error = draws.std(0) / 20
    assert bool(((draws.mean(0) - exact).abs() < 5 * error).all()) and bool((error < 0.05 * exact).all())


def test_auto_takes_loss_gradients_only_where_outputs_are_many_and_losses_known():
    known, unknown = resolve_loss("cross_entropy"), resolve_loss(lambda f, y: (f - y).abs().sum())
    assert choose_observe("auto", known, MAX_ROWS) is None
    assert choose_observe("auto", known, MAX_ROWS + 1) == "loss_gradient"
    assert choose_observe("auto", unknown, MAX_ROWS + 1) is None
    assert choose_observe(None, known, MAX_ROWS + 1) is None


def test_a_monitor_observes_and_resumes(tmp_path):
    wide = nn.Linear(5, 1000, dtype=torch.float64)
    targets = randint(1000, N, seed=7)

    def make(**options):
        return ShellMonitor(wide, "cross_entropy", (INPUTS, targets), every_n_steps=1, on_error="raise", **options)

    auto = make()
    snapshot = auto.step(0, lr=0.1)
    assert (snapshot.num_samples, snapshot.num_outputs) == (N, 1)
    assert "observed: loss gradient, kernel of per-sample loss gradients" in auto.report
    assert abs(snapshot.closures["dissipation"]) < 1e-9
    again = make()
    again.load_state_dict(auto.state_dict())
    assert float(again.step(1, lr=0.1).grad_norm_sq) == pytest.approx(snapshot.grad_norm_sq, rel=1e-12)
    everything = make(observe=None, method="krylov", num_matvecs=4, num_density_matvecs=2)
    assert everything.step(0, lr=0.1).num_outputs == 1000
    projected = make(observe="projection", num_projections=5)
    snapshot = projected.step(0, lr=0.1)
    assert snapshot.num_outputs == 5 and "dissipation" not in snapshot.closures
    assert "a fixed random projection of 1000 outputs a sample on 5 numbers" in projected.report


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ShellDynamicsCallback(observe="some"),
            "observe must be None or one of .* got 'some'",
        ),
        (lambda: ShellDynamicsCallback(num_projections=0), "num_projections must be a positive integer, got 0"),
        (
            lambda: ShellMonitor(mlp(), lambda f, y: f.abs().sum(), (INPUTS, CLASSES), observe="root_loss"),
            "observe='root_loss' needs a loss that is a mean squared error or a cross-entropy",
        ),
        (
            lambda: ShellMonitor(mlp(), "cross_entropy", (INPUTS, CLASSES + 5), observe="loss_gradient"),
            "class indices in",
        ),
    ],
)
def test_wrong_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_with_an_unknown_loss_can_be_projected():
    module, probe, step = observed(Formula)
    found = reduce(ModelFunction(module, outputs=step.outputs), probe, step.loss, "projection", num_projections=4)
    instant = measure(module, found.probe, found.loss, Settings(outputs=found.outputs))
    assert instant.num_outputs == 4
    assert instant.grad_norm_sq == pytest.approx(
        measure(module, probe, step.loss, Settings(outputs=step.outputs)).grad_norm_sq, rel=1e-9
    )
    module, probe, step = observed(Penalty)
    found = reduce(ModelFunction(module, outputs=step.outputs), probe, step.loss, "loss_gradient")
    instant = measure(module, found.probe, found.loss, Settings(outputs=found.outputs))
    assert float(instant.budget.dissipation.sum()) == pytest.approx(instant.grad_norm_sq, rel=1e-9)


@pytest.mark.parametrize("how, nu", [("loss_gradient", None), ("root_loss", None), ("root_loss", 0.3)])
def test_losses_of_samples_follow_a_factor_of_the_loss(how, nu):
    """Twice the squared error at the start, half of it later."""
    module, probe, found = observed(Scheduled, nu=nu)
    function = ModelFunction(module, outputs=found.outputs)
    instead = reduce(function, probe, found.loss, how)
    if nu is None:
        module.factor = 0.5
    instant = measure(module, instead.probe, instead.loss, Settings(outputs=instead.outputs))
    hot = F.one_hot(Y, 3).double()
    total = module.factor * F.mse_loss(module(X), hot)
    g = gradients([total], module)
    assert instant.loss == pytest.approx(total.item(), rel=1e-12)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(float(g.square().sum()), rel=1e-9)
    energy = 0.5 if how == "loss_gradient" else total.item()
    assert float(instant.budget.energy.sum()) == pytest.approx(energy, rel=1e-9)


@pytest.mark.parametrize("name", ["cross-entropy", "squares"])
def test_losses_of_samples_do_not_depend_on_a_scale_that_was_asked_for(name):
    model, (criterion, targets) = mlp(), LOSSES[name]
    found = reduce(ModelFunction(model), Probe(INPUTS, targets), resolve_loss(criterion, nu=0.3), "root_loss")
    instant = measure(model, found.probe, found.loss, Settings(outputs=found.outputs))
    total = criterion(model(INPUTS), targets).item()
    assert instant.loss == pytest.approx(total, rel=1e-12)
    assert float(instant.budget.energy.sum()) == pytest.approx(total, rel=1e-9)
