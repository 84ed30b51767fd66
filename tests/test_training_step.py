"""A module's own training step as function and loss, against plain autograd on the module itself."""

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from nets import randint, randn, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from grsd_callbacks import MeasurementWarning, ShellDynamicsCallback
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.guard import undisturbed
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import calibrate, resolve_loss
from grsd_callbacks.measure import measure
from grsd_callbacks.probe import Probe, probe_from
from grsd_callbacks.settings import Settings
from grsd_callbacks.training_step import (
    StepRunner,
    batch_type,
    check_step,
    observe_step,
    step_name,
    step_pair,
    step_source,
    warning_of_gap,
)

N = 6
X, Y = randn(N, 5, seed=1), randint(3, N, seed=2)
HOT = F.one_hot(Y, 3).double()


class Base(nn.Module):
    """A body, a head, and a training step that subclasses write."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Classes(Base):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Squares(Base):
    def training_step(self, batch):
        return {"loss": 3 * F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).to(batch[0])), "other": 1}


class Summed(Base):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        return nn.MSELoss(reduction="sum")(self(batch[0]), F.one_hot(batch[1], 3).to(batch[0]))


class Tokens(Base):
    """Logits (n T, classes) as language models flatten them, one target ignored."""

    def training_step(self, batch, batch_idx):
        x = batch[0].unsqueeze(1).repeat(1, 4, 1) * torch.arange(1, 5).to(batch[0])[:, None]
        labels = batch[1][:, None].repeat(1, 4)
        labels[:, 0] = -100
        return F.cross_entropy(self(x).view(-1, 3), labels.view(-1))


class Formula(Base):
    """No loss function, two outputs, one of them twice on the way to the loss."""

    def training_step(self, batch, batch_idx):
        h = self.body(batch[0])
        return (self.head(h) - F.one_hot(batch[1], 3)).square().mean() + 0.1 * h.square().mean()


class Twins(Base):
    """One module called twice, both calls in the loss."""

    def training_step(self, batch, batch_idx):
        return F.smooth_l1_loss(self(batch[0]), self(-batch[0]) + 1)


class Shared(Base):
    """One output given to two losses, and used by hand."""

    def training_step(self, batch, batch_idx):
        z = self(batch[0])
        return F.cross_entropy(z, batch[1]) + 0.1 * F.l1_loss(z, torch.zeros_like(z)) + 0.01 * z.logsumexp(1).mean()


class Viewed(Base):
    """A view of the output is given to a loss, the output itself used besides: only the module cuts both."""

    def training_step(self, batch, batch_idx):
        z = self(batch[0])
        return F.mse_loss(z.view(-1), F.one_hot(batch[1], 3).to(z).view(-1)) + z.abs().mean()


class TimeFirst(Base):
    """The sample axis of the output is the second one."""

    def training_step(self, batch, batch_idx):
        z = self(torch.stack([batch[0], 2 * batch[0]]))
        return F.huber_loss(z, F.one_hot(batch[1], 3).to(z).expand_as(z))


class Noisy(Base):
    def training_step(self, batch, batch_idx):
        x = batch[0]
        return F.mse_loss(self(x + 0.3 * torch.randn_like(x)), F.one_hot(batch[1], 3).to(x))


class Contrastive(Base):
    """The logits of a sample depend on all samples."""

    def training_step(self, batch, batch_idx):
        z = F.normalize(self(batch[0]), dim=1)
        return F.cross_entropy(z @ z.roll(1, 0).T / 0.5, torch.arange(len(z)))


class Penalty(Base):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).to(batch[0])) + 0.1 * self.head.weight.square().sum()


class Weighted(Base):
    """A class-weighted loss held as an attribute."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        return 0.5 * self.criterion(self(batch[0]), batch[1])


# kind, nu, outputs a sample
STEPS = {
    Classes: ("cross_entropy", 1 / N, 3),
    Squares: ("squared", 6 / (3 * N), 3),
    Summed: ("squared", 2.0, 3),
    Tokens: ("cross_entropy", 1 / (3 * N), 12),
    Formula: ("general", None, 10),
    Twins: ("general", None, 6),
    Shared: ("general", None, 3),
    Viewed: ("general", None, 3),
    TimeFirst: ("general", None, 6),
    Noisy: ("squared", 2 / (3 * N), 3),
    Contrastive: ("cross_entropy", 1 / N, N),
    Weighted: ("cross_entropy", None, 3),
}


def observed(kind, at="", params=None, **options):
    module = seeded(kind)
    probe = Probe(*step_pair([X, Y]))
    return module, probe, observe_step(ModelFunction(module, params=params), probe, at, **options)


def gradient_norm(module, runner):
    """|grad L|^2 of the step by plain autograd on the module's own parameters."""
    with undisturbed(module):
        loss = runner([X, Y])
        grads = torch.autograd.grad(loss, list(module.parameters()))
    return float(loss.detach()), float(sum(g.square().sum() for g in grads))


@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.__name__)
def test_the_step_is_measured_and_its_identities_close(kind):
    module, probe, found = observed(kind)
    expected_kind, nu, width = STEPS[kind]
    assert found.loss.kind == expected_kind and found.gap < 1e-20 and warning_of_gap(found) == ""
    if nu is not None:
        assert found.loss.nu == pytest.approx(nu, rel=1e-12)
    loss, norm = gradient_norm(module, found.outputs.runner)
    op = NTKOperator(module, probe.inputs, outputs=found.outputs)
    assert op.num_outputs == width
    fixed = op.run(lambda: calibrate(found.loss, op.outputs, probe.targets))
    instant = measure(module, probe, fixed, Settings(outputs=found.outputs, method="exact"))
    assert found.outputs.interacting == (kind in (Noisy, Contrastive))
    assert instant.loss == pytest.approx(loss, rel=1e-12)
    assert instant.grad_norm_sq == pytest.approx(norm, rel=1e-12)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(norm, rel=1e-9)
    if fixed.energy_is_loss:
        assert float(instant.budget.energy.sum()) == pytest.approx(loss, rel=1e-9)
    v = randn(op.shape[0], seed=3)
    assert float(v @ (op @ v)) == pytest.approx(float(op.vjp(v).square().sum()), rel=1e-9)


@pytest.mark.parametrize("kind", [Classes, Squares, Summed])
def test_the_function_found_is_forward(kind):
    """Kernel and residual are those of forward with the loss named by hand."""
    module, probe, found = observed(kind)
    assert torch.equal(NTKOperator(module, probe.inputs, outputs=found.outputs).outputs, module(X))
    named = {"cross_entropy": nn.CrossEntropyLoss(), "squared": nn.MSELoss()}[found.loss.kind]
    by_hand = measure(module, Probe(X, Y if kind is Classes else HOT), resolve_loss(named))
    by_step = measure(module, probe, found.loss, Settings(outputs=found.outputs))
    scale = by_step.loss / by_hand.loss
    torch.testing.assert_close(by_step.eigenvalues, scale * by_hand.eigenvalues)
    torch.testing.assert_close(by_step.state.residual.abs(), scale**0.5 * by_hand.state.residual.abs())


class Picked(Base):
    """A mask picks as many rows of each sample as its first input says."""

    def training_step(self, batch, batch_idx):
        z = self(batch[0].unsqueeze(1) * torch.arange(1, 5).to(batch[0])[:, None])
        mask = torch.arange(4) < batch[0][:, :1]
        return F.cross_entropy(z[mask], batch[1][:, None].expand(mask.shape)[mask])


def test_rows_that_a_mask_has_picked_are_no_samples():
    """2 n rows in all, n of the first half, but not two of each."""
    x = X.clone()
    x[:, 0] = torch.tensor([3.0, 1.0, 2.0, 1.0, 2.0, 3.0])
    module, probe = seeded(Picked), Probe(*step_pair([x, Y]))
    found = observe_step(ModelFunction(module), probe)
    assert found.outputs.interacting
    instant = measure(module, probe, found.loss, Settings(outputs=found.outputs, method="exact"))
    with undisturbed(module):
        loss = found.outputs.runner([x, Y])
        norm = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(module.parameters())))
    assert float(instant.budget.dissipation.sum()) == pytest.approx(norm, rel=1e-9)


class Field(nn.Module):
    """A physics-informed net: the residual of u_t = u_xx inside, and values on the boundary."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def residual(self, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)
        return g[:, 1] - h[:, 0]


class Residual(Field):
    def training_step(self, batch):
        return (self.residual(batch[0]) ** 2).mean()


class Transforms(Field):
    """The same by torch.func."""

    def residual(self, x):
        def u(point):
            return self.net(point.unsqueeze(0)).squeeze()

        g, h = torch.func.vmap(torch.func.grad(u))(x), torch.func.vmap(torch.func.hessian(u))(x)
        return g[:, 1] - h[:, 0, 0]

    training_step = Residual.training_step


class Boundary(Field):
    """Two terms on points of their own."""

    def training_step(self, batch):
        return self.residual(batch[0]).pow(2).mean() + 0.5 * F.mse_loss(self.net(batch[1]), batch[2])


class ByHand(Field):
    """Nothing but torch's own squares, one of them a product."""

    def training_step(self, batch):
        r, gap = self.residual(batch[0]), self.net(batch[1]) - batch[2]
        return r.square().mean() + 0.5 * torch.mean(gap * gap)


POINTS = [torch.rand(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, once
@pytest.mark.parametrize("kind", [Residual, Transforms, Boundary, ByHand])
@pytest.mark.parametrize("method", ["exact", "krylov"])
def test_steps_that_differentiate_their_own_outputs(kind, method):
    """Residuals (and boundary values) are the function: rows J = d r / d theta, weighted as in the loss."""
    module = seeded(kind)
    batch = [*POINTS, POINTS[1].sin().sum(1, keepdim=True)]
    probe = Probe(*step_pair(batch))
    found = observe_step(ModelFunction(module), probe)
    assert found.gap < 1e-20 and not found.outputs.interacting and not found.direct
    op = NTKOperator(module, probe.inputs, outputs=found.outputs)
    fixed = op.run(lambda: calibrate(found.loss, op.outputs, probe.targets))
    instant = measure(module, probe, fixed, Settings(outputs=found.outputs, method=method, num_matvecs=12))
    leaves = list(module.parameters())
    loss = module.training_step(batch)
    norm = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None)
    assert fixed.kind == "squared" and float(instant.budget.energy.sum()) == pytest.approx(loss.item(), rel=1e-9)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(norm, rel=1e-9)
    r = module.residual(batch[0])
    rows = [torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) for value in r]
    J = torch.stack([torch.cat([torch.zeros(p.numel()).double() if g is None else g.flatten()
                                for g, p in zip(row, leaves)]) for row in rows])  # fmt: skip
    K = op.gram()[:: op.num_outputs, :: op.num_outputs]
    torch.testing.assert_close(K, J @ J.T, rtol=1e-9, atol=1e-12)


class SamePoints(Field):
    """The values are those of the same forward that is differentiated, and what is not needed may be missing."""

    def training_step(self, batch):
        x = batch[0].clone().requires_grad_()
        u = self.net(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True, allow_unused=True)
        return (g[:, 1] - u[:, 0]).pow(2).mean() + F.mse_loss(u, batch[2])


class Penalised(SamePoints):
    """A penalty on as many rows of weights as could be samples."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, N), nn.Tanh(), nn.Linear(N, 1))

    def training_step(self, batch):
        return super().training_step(batch) + 1e-5 * (2 * self.net[0].weight).square().sum()


@pytest.mark.parametrize("kind", [SamePoints, Penalised])
def test_values_that_are_differentiated_and_compared(kind):
    module = seeded(kind)
    found = observe_step(ModelFunction(module), Probe(*step_pair([*POINTS, POINTS[0].sum(1, keepdim=True)])))
    assert len(found.outputs.places) == 2 and all(place.kind != "module" for place in found.outputs.places)
    assert found.gap < (1e-20 if kind is SamePoints else 1e-3) and bool(found.direct) == (kind is Penalised)


class Ritz(Field):
    """An energy that is no function of residuals."""

    def training_step(self, batch):
        x = batch[0].clone().requires_grad_()
        u = self.net(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (0.5 * g.square().sum(1) - 3 * u[:, 0]).mean()


def test_what_cannot_be_taken_apart_is_no_wrong_use():
    """An error that a run survives, with the remedy."""
    module = seeded(Ritz)
    with pytest.raises(RuntimeError, match="does not run with its outputs replaced by constants; name the submodule"):
        observe_step(ModelFunction(module), Probe(*step_pair([*POINTS])))


class Annealed(pl.LightningModule):
    """The weight of one term grows with the steps, and another number is squared in some of them, for a log."""

    def __init__(self):
        super().__init__()
        self.net, self.factor = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)), 1.0

    def training_step(self, batch):
        x = batch[0].clone().requires_grad_()
        u = self.net(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        loss = (g[:, 1] - 1).pow(2).mean()
        if self.global_step % 2:
            self.log("size", u.pow(2).mean())
        gap = self.net(batch[1]) - batch[2]
        loss = loss + (1 + self.global_step) * (gap * gap).mean()
        self.log("train_loss", loss)
        return self.factor * loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_weights_of_a_sum_of_squares_may_change_during_training(tmp_path):
    callback = ShellDynamicsCallback(max_overhead=None, num_probe=8, on_error="raise")
    _, plain = fit(tmp_path, "plain", [], Annealed, points)
    _, image = fit(tmp_path, "measured", [callback], Annealed, points)
    assert cases.differences(plain, image) == [] and len(callback.history) > 4
    for snapshot in callback.history:
        assert abs(snapshot.closures["dissipation"]) < 1e-5 and abs(snapshot.closures["energy"]) < 1e-5


def test_a_factor_of_a_sum_of_squares_may_change_during_training():
    class TenTimes(Base):
        factor = 10.0

        def training_step(self, batch, batch_idx):
            return self.factor * (self(batch[0]) - F.one_hot(batch[1], 3)).square().mean()

    module, probe, found = observed(TenTimes)
    op = NTKOperator(module, probe.inputs, outputs=found.outputs)
    fixed = op.run(lambda: calibrate(found.loss, op.outputs, probe.targets))
    module.factor = 3.0
    instant = measure(module, probe, fixed, Settings(outputs=found.outputs))
    assert instant.nu == pytest.approx(6 / (3 * N), rel=1e-9)
    assert float(instant.budget.energy.sum()) == pytest.approx(instant.loss, rel=1e-9)


class Drawn(Field):
    """As many random points as the batch has samples."""

    def training_step(self, batch):
        return self.residual(torch.rand_like(batch[0])).square().mean()


def test_points_that_the_step_draws_itself():
    module, probe = seeded(Drawn), Probe(*step_pair([*POINTS]))
    found = observe_step(ModelFunction(module), probe)
    assert found.gap < 1e-20 and found.outputs.interacting
    assert "training_step draws random numbers: one fixed draw is measured" in found.notes


class NormOfWeights(Base):
    """As many rows of weights as could be samples."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, N), nn.Tanh()), nn.Linear(N, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1]) + (2 * self.body[0].weight).square().mean()


def test_squares_of_weights_are_no_outputs():
    _, _, found = observed(NormOfWeights)
    assert found.loss.kind == "cross_entropy" and found.direct == ["body.0.weight"] and found.gap > 0.001
    assert "on body.0.weight directly" in warning_of_gap(found)


class Root(Base):
    """A root mean square: its derivative is that of c times the squared error, but itself it is not."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).to(batch[0])).sqrt()


class Focal(Base):
    def training_step(self, batch, batch_idx):
        value = F.cross_entropy(self(batch[0]), batch[1])
        return (1 - (-value).exp()) ** 2 * value


@pytest.mark.parametrize("kind", [Root, Focal])
def test_a_curved_function_of_a_known_loss_is_no_multiple_of_it(kind):
    module, probe, found = observed(kind)
    loss, norm = gradient_norm(module, found.outputs.runner)
    instant = measure(module, probe, found.loss, Settings(outputs=found.outputs))
    assert found.loss.kind == "general"
    assert instant.loss == pytest.approx(loss, rel=1e-12)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(norm, rel=1e-9)


class Scheduled(Base):
    """A factor of the loss that changes as training goes on."""

    factor = 2.0

    def training_step(self, batch, batch_idx):
        return self.factor * F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).to(batch[0]))


def test_the_scale_follows_a_factor_of_the_loss():
    module, probe, found = observed(Scheduled)
    module.factor = 0.5
    instant = measure(module, probe, found.loss, Settings(outputs=found.outputs))
    assert instant.nu == pytest.approx(2 * 0.5 / (3 * N), rel=1e-12)
    assert instant.loss == pytest.approx(0.5 * F.mse_loss(module(X), HOT).item(), rel=1e-12)
    assert float(instant.budget.energy.sum()) == pytest.approx(instant.loss, rel=1e-9)


def test_ten_times_a_squared_error_by_hand_is_calibrated():
    class TenTimes(Base):
        def training_step(self, batch, batch_idx):
            return 10 * (self(batch[0]) - F.one_hot(batch[1], 3)).square().mean()

    module, probe, found = observed(TenTimes)
    op = NTKOperator(module, probe.inputs, outputs=found.outputs)
    fixed = op.run(lambda: calibrate(found.loss, op.outputs, probe.targets))
    assert fixed.kind == "squared" and fixed.nu == pytest.approx(20 / (3 * N), rel=1e-9)


@pytest.mark.parametrize("at, width", [("head", 3), ("body", 7)])
def test_a_submodule_can_be_named(at, width):
    params = None if at == "head" else "body.*"
    module, probe, found = observed(Classes, at, params)
    op = NTKOperator(module, probe.inputs, outputs=found.outputs, params=params)
    assert op.num_outputs == width and found.gap < 1e-20
    assert torch.equal(op.outputs, module.get_submodule(at)(X if at == "body" else module.body(X)))


def test_dependence_that_bypasses_the_function_is_told_with_its_size():
    module, probe, found = observed(Penalty)
    grads = torch.autograd.grad(0.1 * module.head.weight.square().sum(), module.head.weight)
    loss, norm = gradient_norm(module, found.outputs.runner)
    assert found.gap == pytest.approx(float(grads[0].square().sum()) / norm, rel=1e-9)
    assert found.loss.kind == "squared" and found.direct == ["head.weight"]
    message = warning_of_gap(found)
    assert "but also on head.weight directly" in message and "give loss= a callable" in message
    instant = measure(module, probe, found.loss, Settings(outputs=found.outputs))
    assert instant.loss == pytest.approx(F.mse_loss(module(X), HOT).item(), rel=1e-12)  # what is measured closes
    assert float(instant.budget.energy.sum()) == pytest.approx(instant.loss, rel=1e-9)
    assert float(instant.budget.dissipation.sum()) == pytest.approx(instant.grad_norm_sq, rel=1e-9)


def test_a_penalty_that_outweighs_the_loss_is_told_and_the_loss_measured():
    """As where training has nearly converged: the gradients of both are large, that of their sum is small."""

    class Heavy(Base):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1]) + 100 * self.head.weight.square().sum()

    for at in ("", "head"):
        _, _, found = observed(Heavy, at)
        assert found.gap > 0.95 and found.loss.kind == "cross_entropy" and found.direct == ["head.weight"]
        assert "on head.weight directly" in warning_of_gap(found)


def test_a_submodule_that_does_not_cut_is_told():
    _, _, found = observed(Classes, "body")
    assert 0.01 < found.gap < 1 and "head.weight" in found.direct
    assert "the output of body alone" in warning_of_gap(found)


def test_notes_and_description():
    assert observed(Noisy)[2].notes == ["training_step draws random numbers: one fixed draw is measured"]
    assert "interact" in observed(Contrastive)[2].notes[0]
    lines = observed(Classes, why="no loss was found")[2].outputs.description
    assert lines[0] == "training_step: the output of forward, what F.cross_entropy is given"
    assert lines[1] == "because no loss was found" and lines[2].startswith("all dependence on the parameters passes")


def test_single_precision_and_one_sample():
    module = seeded(Classes, dtype=torch.float32)
    probe = Probe(*step_pair([X.float()[:1], Y[:1]]))
    found = observe_step(ModelFunction(module), probe)
    instant = measure(module, probe, found.loss, Settings(outputs=found.outputs))
    assert found.gap < 1e-12 and instant.num_samples == 1
    assert float(instant.budget.dissipation.sum()) == pytest.approx(instant.grad_norm_sq, rel=1e-5)


# ---- refusals ----


class Without(Base):
    training_step = None


class Vector(Base):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


class Nothing(Base):
    def training_step(self, batch, batch_idx):
        return None


class Detached(Base):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).detach(), HOT)


class OnlyPenalty(Base):
    def training_step(self, batch, batch_idx):
        return self.head.weight.square().sum()


class Iterator(Base):
    def training_step(self, dataloader_iter):
        return None


class Manual(Base):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(
    "kind, at, message",
    [
        (Without, "", "Without has no training_step; give loss="),
        (Manual, "", "Manual optimizes manually, so its training_step would move the parameters; give loss="),
        (Iterator, "", "takes a dataloader_iter, not a batch"),
        (Classes, "tail", "Classes has no submodule 'tail'; it has body, body.0, body.1, head"),
    ],
)
def test_what_cannot_be_a_step_is_refused_before_any_data(kind, at, message):
    with pytest.raises(ValueError, match=message):
        check_step(seeded(kind), at)


@pytest.mark.parametrize(
    "kind, at, message",
    [
        (Vector, "", r"must return a scalar loss, or a dict with 'loss', got shape \(6,\)"),
        (Nothing, "", "must return a scalar loss, or a dict with 'loss', got NoneType"),
        (Detached, "", "loss does not depend on the measured parameters; name the submodule"),
        (OnlyPenalty, "", "no output with one row per sample was found between parameters and loss"),
    ],
)
def test_steps_without_a_function_are_refused(kind, at, message):
    with pytest.raises(ValueError, match=message):
        observed(kind, at)


def test_a_submodule_off_the_way_is_refused():
    class Aside(Classes):
        def __init__(self):
            super().__init__()
            self.aside = nn.Linear(5, 2)

        def training_step(self, batch, batch_idx):
            self.aside(batch[0])
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="what 'aside' returns does not reach the loss; name another submodule"):
        observed(Aside, "aside")


def test_names_and_batches():
    assert step_name(None) is None and step_name(len) is None
    assert step_name("training_step") == "" and step_name("training_step:net.head") == "net.head"
    with pytest.raises(ValueError, match="outputs must be a function, 'training_step' or .* got 'f'"):
        step_name("f")
    assert batch_type({"x": X}) is None and batch_type([X]) is None
    inputs, targets = step_pair([X, Y])
    assert inputs is targets
    probe = probe_from(step_source((X, Y)), 2)
    assert probe.targets is probe.inputs and torch.equal(probe.inputs[0], X[:2])
    with pytest.raises(ValueError, match="outputs='training_step' takes loss and batch as training_step has them"):
        ShellDynamicsCallback(outputs="training_step", loss="mse")
    with pytest.raises(ValueError, match="leave unpack= out"):
        ShellDynamicsCallback(outputs="training_step", unpack=lambda batch: batch)


# ---- in a Trainer ----


class Lit(pl.LightningModule):
    """No loss attribute, a batch of three, logging of every kind, a metric, a list of outputs, random numbers."""

    def __init__(self):
        super().__init__()
        self.net, self.accuracy, self.seen = cases.bn_dropout(), MulticlassAccuracy(10), []

    def training_step(self, batch, batch_idx):
        x, weight, y = batch
        logits = self.net(x.to(self.dtype) + 0.01 * torch.randn_like(x))
        loss = (F.cross_entropy(logits, y, reduction="none") * weight).mean()
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True)
        self.log("train_loss", loss)
        self.logger.experiment.log_metrics({"by hand": loss.item()}, step=self.global_step)
        self.seen.append(loss.item())
        self.print("seen", len(self.seen))
        return {"loss": loss, "log": self.logger.log_dir}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def triples():
    x, y = cases.digits()
    return cases.DataLoader(TensorDataset(x, 0.5 + torch.rand(len(x)), y), batch_size=16, shuffle=True)


def fit(tmp_path, name, callbacks, make=Lit, data=triples, **options):
    cases.seed()
    module, loader = make(), data()
    trainer = cases.fit(module, loader, tmp_path / name, callbacks, logger=CSVLogger(tmp_path / name), **options)
    return module, cases.image(trainer, module)


def test_a_plain_callback_measures_any_module_and_leaves_it_bit_identical(tmp_path, capsys):
    module, plain = fit(tmp_path, "plain", [])
    printed = capsys.readouterr().out
    callback = ShellDynamicsCallback(every_n_steps=2, num_probe=8, on_error="raise")
    measured, image = fit(tmp_path, "measured", [callback])
    assert cases.differences(plain, image) == [] and measured.seen == module.seen
    assert capsys.readouterr().out == printed
    assert len(callback.history) == 5 and callback.monitor.num_failed == 0
    assert "training_step: the output of net" in callback.monitor.report
    assert "because loss='auto' found no nn.MSELoss" in callback.monitor.report
    for snapshot in callback.history:
        assert abs(snapshot.closures["dissipation"]) < 1e-5


class Physics(pl.LightningModule):
    """A step, and another forward that differentiates its own net, never meant for `no_grad`."""

    residual = Field.residual

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        return torch.stack([self.net(x)[:, 0], self.residual(x)], 1)

    def training_step(self, batch):
        loss = (self.residual(batch[0]) ** 2).mean() + F.mse_loss(self.net(batch[1]), batch[2])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def points():
    inside, edge = (torch.rand(24, 2, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    return DataLoader(TensorDataset(inside, edge, edge.sin().sum(1, keepdim=True)), batch_size=8)


@pytest.mark.parametrize("options", [{}, {"loss": "mse", "unpack": lambda b: (b[0], torch.zeros(len(b[0]), 2))}])
def test_physics_informed_nets_in_a_trainer(tmp_path, options):
    _, plain = fit(tmp_path, "plain", [], Physics, points)
    callback = ShellDynamicsCallback(every_n_steps=2, num_probe=8, on_error="raise", **options)
    module, image = fit(tmp_path, "measured", [callback], Physics, points)
    assert cases.differences(plain, image) == []
    assert len(callback.history) > 1 and callback.monitor.num_failed == 0
    for snapshot in callback.history:
        assert abs(snapshot.closures["dissipation"]) < 1e-5 and abs(snapshot.closures["energy"]) < 1e-5


class Graph(pl.LightningModule):
    """Nodes of one graph, its edges beside them, labels for some."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, edges):
        adjacent = torch.eye(len(x)).to(x).index_put(tuple(edges), torch.ones(edges.shape[1]).to(x))
        return adjacent @ self.b(torch.tanh(adjacent @ self.a(x)))

    def training_step(self, batch):
        x, edges, y, labelled = batch
        loss = F.cross_entropy(self(x, edges)[labelled], y[labelled])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def graph(nodes=120):
    def draw(seed):
        return torch.Generator().manual_seed(seed)

    x, edges = torch.randn(nodes, 4, generator=draw(1)), torch.randint(nodes, (2, 3 * nodes), generator=draw(2))
    y = torch.randint(3, (nodes,), generator=draw(3))
    return DataLoader([(x, edges, y, torch.arange(nodes) < nodes // 2)] * 4, batch_size=None)


FORWARD = {"loss": "cross_entropy", "unpack": lambda batch: ((batch[0], batch[1]), batch[2])}


@pytest.mark.filterwarnings("ignore:the structured kernel is not complete for this model:RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"num_probe": 20}, {"method": "exact"}, {**FORWARD, "method": "krylov"}, {**FORWARD, "method": "exact"}],
)
def test_nodes_of_a_graph_are_a_probe_together(tmp_path, options):
    _, plain = fit(tmp_path, "plain", [], Graph, graph)
    callback = ShellDynamicsCallback(max_overhead=None, on_error="raise", **options)
    with pytest.warns(MeasurementWarning, match=r"does not run on \d+ of the 120 samples of a batch alone"):
        module, image = fit(tmp_path, "measured", [callback], Graph, graph)
    assert cases.differences(plain, image) == []
    assert len(callback.history) > 1 and callback.monitor.num_failed == 0
    assert all(s.num_samples == 120 and abs(s.closures["dissipation"]) < 1e-5 for s in callback.history)
    x, edges, y, labelled = next(iter(graph()))
    labelled = labelled | bool(options.get("loss"))
    loss = F.cross_entropy(module(x, edges)[labelled], y[labelled])
    assert callback.history[-1].loss == pytest.approx(loss.item(), rel=0.1)  # a step before


def test_a_resumed_run_keeps_its_graph(tmp_path):
    """Though another number of samples was asked for than the probe has."""

    def graphs(first):
        return lambda: DataLoader([next(iter(graph(60 + k))) for k in range(first, first + 3)], batch_size=None)

    def ours():
        return ShellDynamicsCallback(max_overhead=None, num_probe=20, on_error="raise")

    with pytest.warns(MeasurementWarning, match="does not run on 20 of the 60 samples"):
        first = ours()
        cases.fit(Graph(), graphs(0)(), tmp_path / "a", [first], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    second = ours()
    cases.fit(Graph(), graphs(5)(), tmp_path / "b", [second], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert [s.num_samples for s in second.history] == [60] * len(second.history)
    assert second.history[0].step == 0 and second.history[-1].step > first.history[-1].step


def test_forward_that_does_not_fit_the_batches_gives_way_to_the_step(tmp_path):
    class Holds(Lit):
        def __init__(self):
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

    callback = ShellDynamicsCallback(every_n_steps=4, num_probe=8, on_error="raise")
    fit(tmp_path, "holds", [callback], Holds)
    assert "because probe: cannot tell inputs from targets in a list of 3 items" in callback.monitor.report


def test_an_explicit_probe_and_the_penalty_warning(tmp_path):
    class Decayed(Lit):
        def training_step(self, batch, batch_idx):
            penalty = 1e-2 * sum(p.square().sum() for p in self.parameters())
            return super().training_step(batch, batch_idx)["loss"] + penalty

    x, y = cases.digits(8)
    callback = ShellDynamicsCallback(
        every_n_steps=4, probe=(x, torch.ones(8), y), outputs="training_step:net", on_error="raise"
    )
    with pytest.warns(MeasurementWarning, match="not through the output of net, what .* but also on net.4.bias"):
        fit(tmp_path, "decayed", [callback], Decayed)
    assert callback.history[0].num_samples == 8
    assert abs(callback.history[-1].closures["dissipation"]) < 1e-5


def test_a_resumed_run_keeps_the_probe(tmp_path):
    callback = ShellDynamicsCallback(every_n_steps=2, num_probe=8, on_error="raise")
    cases.seed()
    trainer = cases.fit(Lit(), triples(), tmp_path, [callback], max_epochs=1, logger=CSVLogger(tmp_path))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = ShellDynamicsCallback(every_n_steps=2, num_probe=8, on_error="raise")
    cases.fit(
        Lit(), triples(), tmp_path, [again], max_epochs=2, logger=CSVLogger(tmp_path), ckpt_path=tmp_path / "last.ckpt"
    )
    assert [s.step for s in again.history][:3] == [0, 2, 4] and len(again.history) > len(callback.history)
    assert torch.equal(again.monitor.probe.inputs[0], callback.monitor.probe.inputs[0])
    assert again.monitor.probe.targets is again.monitor.probe.inputs


def test_mixed_batches_of_other_types_are_rebuilt(tmp_path):
    from collections import UserDict

    class Batch(UserDict):
        pass

    class Mapped(Lit):
        def training_step(self, batch, batch_idx):
            assert isinstance(batch, Batch)
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def data():
        x, y = cases.digits()
        return DataLoader(list(zip(x, y)), 16, collate_fn=lambda rows: Batch(zip("xy", map(torch.stack, zip(*rows)))))

    callback = ShellDynamicsCallback(every_n_steps=4, num_probe=20, on_error="raise")
    fit(tmp_path, "mapped", [callback], Mapped, data)
    assert callback.history[0].num_samples == 20
    assert StepRunner(Mapped(), Batch).rebuild is Batch
