"""Residual, scale and energy of each loss, against autograd of the loss itself and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import mlp, randint, randn
from torch import nn

from grsd_callbacks.losses import Loss, calibrate, check_pair, resolve_loss

X, Y = randn(7, 5, seed=1), randn(7, 3, seed=2)
CLASSES = randint(3, 7, seed=3)


def gradient_identity(loss, model, x, targets):
    """|grad L|^2 of the module, and nu r^T J J^T r from the residual."""
    value = loss.function(model(x), targets)
    grads = torch.autograd.grad(value, list(model.parameters()))
    f = model(x)
    at = loss.evaluate(f, targets)
    pulled = torch.autograd.grad(f, list(model.parameters()), math.sqrt(at.nu) * at.residual.view_as(f))
    for a, b in zip(grads, pulled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    return at, value


LOSSES = {
    "mse": ("mse", Y, 2 / 21),
    "mse sum": (nn.MSELoss(reduction="sum"), Y, 2.0),
    "functional": (F.mse_loss, Y, 2 / 21),
    "cross-entropy": ("cross_entropy", CLASSES, 1 / 7),
    "cross-entropy sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES, 1.0),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES, 1 / 7),
    "ignoring": (nn.CrossEntropyLoss(ignore_index=1), CLASSES, 1 / int((CLASSES != 1).sum())),
    "probabilities": (nn.CrossEntropyLoss(), Y.softmax(1), 1 / 7),
    "huber": (F.huber_loss, Y, 1 / 7),
    "given nu": (lambda f, y: (f - y).abs().pow(3).mean(), Y, 1 / 7),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_sqrt_nu_times_the_pulled_back_residual(name):
    given, targets, nu = LOSSES[name]
    at, value = gradient_identity(resolve_loss(given), mlp(), X, targets)
    assert at.nu == pytest.approx(nu, rel=1e-14)
    assert float(at.loss) == pytest.approx(value.item(), rel=1e-14)
    assert at.residual.dtype == torch.float64 and at.residual.shape == (21,)


@pytest.mark.parametrize("loss", ["mse", nn.MSELoss(reduction="sum")])
def test_half_the_squared_residual_is_the_squared_loss(loss):
    at = resolve_loss(loss).evaluate(mlp()(X), Y)
    assert float(at.residual @ at.residual) / 2 == pytest.approx(float(at.loss), rel=1e-13)


def test_residual_of_cross_entropy_is_half_the_brier_score():
    f = mlp()(X).detach()
    at = resolve_loss("cross_entropy").evaluate(f, CLASSES)
    error = f.softmax(1) - F.one_hot(CLASSES, 3)
    torch.testing.assert_close(at.residual, error.flatten() / math.sqrt(7), rtol=1e-13, atol=1e-15)
    assert float(at.residual @ at.residual) / 2 == pytest.approx(float(error.square().sum(1).mean()) / 2, rel=1e-13)


def test_class_weights_and_tokens():
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    at, _ = gradient_identity(resolve_loss(nn.CrossEntropyLoss(weight=weight)), mlp(), X, CLASSES)
    assert at.nu == pytest.approx(1 / float(weight[CLASSES].sum()), rel=1e-14)
    logits, tokens = randn(2, 4, 6), randint(4, 2, 6)
    tokens[0, :3] = -100
    at = resolve_loss("cross_entropy").evaluate(logits, tokens)
    assert at.nu == pytest.approx(1 / 9)
    assert float(at.residual.view(2, 4, 6)[0, :, :3].abs().max()) == 0.0
    assert resolve_loss("cross_entropy").scale(logits, torch.full_like(tokens, -100)) == 1.0


def test_single_precision_outputs_are_widened():
    f = randn(4, 2).float()
    at = resolve_loss("mse").evaluate(f, randn(4, 2, seed=5).float())
    assert at.residual.dtype == torch.float64
    weighted = resolve_loss(nn.CrossEntropyLoss(weight=torch.ones(2)))
    assert weighted.evaluate(f, randint(2, 4)).loss.dtype == torch.float64


# ---- callables: nu from the curvature ----


@pytest.mark.parametrize(
    "function, kind, nu",
    [
        (lambda f, y: 10 * F.mse_loss(f, y), "squared", 20 / 21),
        (lambda f, y: (f - y).square().sum() / 14, "squared", 1 / 7),
        (lambda f, y: (f - y).square().mean() + 1, "general", 2 / 21),
        (lambda f, y: (f - y).pow(4).mean(), "general", None),
        (lambda f, y: (f - y).abs().mean(), "general", None),
        (lambda f, y: -(f * y).sum(), "general", None),
    ],
)
def test_calibration(function, kind, nu):
    found = calibrate(resolve_loss(function), randn(7, 3), Y)
    assert found.kind == kind and found.energy_is_loss == (kind == "squared")
    assert found.nu == (nu if nu is None else pytest.approx(nu, rel=1e-9))


def test_calibration_leaves_the_rest_alone_and_draws_nothing_global():
    state = torch.get_rng_state()
    for loss in (resolve_loss("mse"), resolve_loss(lambda f, y: f.sum(), nu=3.0)):
        assert calibrate(loss, randn(7, 3), Y) is loss
    calibrate(resolve_loss(lambda f, y: f.square().sum()), randn(7, 3), Y)
    assert torch.equal(state, torch.get_rng_state())


def test_nu_of_a_callable():
    assert resolve_loss(lambda f, y: f.sum(), nu=0.25).evaluate(randn(3, 2), None).nu == 0.25
    assert resolve_loss(F.l1_loss).evaluate(randn(3, 2), randn(3, 2, seed=4)).nu == pytest.approx(1 / 3)


def test_a_resolved_loss_stays():
    loss = Loss(F.mse_loss, "general", 1.0)
    assert resolve_loss(loss) is loss


def test_module_losses_are_copied():
    given = nn.CrossEntropyLoss(weight=torch.ones(3))
    assert resolve_loss(given).function is not given and given.weight.dtype == torch.float32


# ---- alignment targets ----


def test_target_vectors():
    f = randn(7, 3)
    assert torch.equal(resolve_loss("mse").target_vector(f, Y), Y.flatten())
    indicators = F.one_hot(CLASSES, 3).double()
    expected = (indicators - 1 / 3).flatten()
    torch.testing.assert_close(resolve_loss("cross_entropy").target_vector(f, CLASSES), expected)
    torch.testing.assert_close(resolve_loss("cross_entropy").target_vector(f, indicators), expected)
    assert resolve_loss(F.l1_loss).target_vector(f, Y) is None
    assert resolve_loss("mse").target_vector(f, Y[:2]) is None


# ---- refusals ----


@pytest.mark.parametrize(
    "loss, nu, error, message",
    [
        ("hinge", None, ValueError, "got 'hinge'"),
        (nn.MSELoss(reduction="none"), None, ValueError, "reduction='none'"),
        (3, None, TypeError, "or a callable, got int"),
        ("mse", 0.0, ValueError, "nu must be a positive number, got 0.0"),
        ("mse", math.nan, ValueError, "nu must be"),
        ("mse", "2", ValueError, "nu must be"),
    ],
)
def test_losses_that_are_none(loss, nu, error, message):
    with pytest.raises(error, match=message):
        resolve_loss(loss, nu)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda f, y: f, "scalar tensor, got shape \\(4, 2\\)"),
        (lambda f, y: 1.0, "scalar tensor, got float"),
        (lambda f, y: torch.zeros(()), "does not depend differentiably"),
    ],
)
def test_callables_that_are_no_loss(function, message):
    with pytest.raises(ValueError, match=message):
        resolve_loss(function).evaluate(randn(4, 2), None)


@pytest.mark.parametrize(
    "loss, outputs, targets, message",
    [
        ("mse", randn(4, 2), randn(4), "outputs' shape \\(4, 2\\) for a squared loss, got \\(4,\\)"),
        ("mse", randn(4, 2), None, "got NoneType"),
        ("cross_entropy", randn(4, 2), None, "must be a tensor"),
        ("cross_entropy", randn(4), randint(2, 4), "shape \\(n, classes"),
        ("cross_entropy", randn(4, 2), randn(4, 3), "class probabilities"),
        ("cross_entropy", randn(4, 2), randint(2, 4, 1), "must have shape \\(4,\\)"),
        ("cross_entropy", randn(4, 2), torch.tensor([0, 1, 2, 0]), "indices in \\[0, 2\\), got values from 0 to 2"),
    ],
)
def test_pairs_that_do_not_fit(loss, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        check_pair(resolve_loss(loss), outputs, targets)


def test_pairs_that_fit():
    check_pair(resolve_loss("mse"), Y, Y)
    check_pair(resolve_loss("cross_entropy"), Y, CLASSES)
    check_pair(resolve_loss("cross_entropy"), Y, Y.softmax(1))
    check_pair(resolve_loss(F.l1_loss), Y, "anything")


def test_ignored_targets_are_no_targets():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, -100, 2, -100, 1])
    vector = resolve_loss("cross_entropy").target_vector(logits, labels).reshape(6, 3)
    assert not vector[[2, 4]].any() and vector[[0, 1, 3, 5]].any(1).all()


def test_another_scale_than_the_losss_own_has_no_energy_meaning():
    assert resolve_loss("mse", nu=1.0).kind == "general"


def test_a_callable_without_second_derivative_keeps_the_default_scale():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f):
            ctx.save_for_backward(f)
            return f.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    loss = resolve_loss(lambda f, y: Once.apply(f - y))
    f, y = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    calibrated = calibrate(loss, f, y)
    assert calibrated.kind == "general" and calibrated.scale(f, y) == 0.25


def test_a_callable_that_holds_float32_tensors_is_taken_in_float32():
    scales = torch.ones(2, 2)
    at = resolve_loss(lambda f, y: ((f - y) @ scales).square().mean()).evaluate(torch.randn(4, 2), torch.zeros(4, 2))
    assert at.residual.dtype == torch.float64 and bool(at.residual.isfinite().all())


def test_one_number_a_sample_is_calibrated_too():
    f, y = torch.randn(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    fixed = calibrate(resolve_loss(lambda a, b: 3 * (a - b).square().mean()), f, y)
    assert fixed.kind == "squared" and fixed.nu == pytest.approx(1.0, rel=1e-12)
