"""Models that cannot be measured are refused before the first step, with the reason and the remedy."""

import re

import lightning_cases as cases
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from nets import cnn, mlp, randint, randn, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import nets as benchmark_nets
from grsd_callbacks import MeasurementWarning, NTKOperator, ShellDynamicsCallback, ShellMonitor
from grsd_callbacks.refusals import check_derivative, derivative_gap, explained


class Net(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(64, 6), nn.Linear(6, 10), between

    def forward(self, x):
        return self.b(self.between(self.a(x).tanh()))


def reentrant(h):
    return checkpoint(torch.exp, h, use_reentrant=True)


def by_numpy(h):
    return torch.from_numpy(np.sin(h.detach().cpu().numpy())).to(h)


def by_array(h):
    return torch.as_tensor(np.sin(np.asarray(h.detach()))).to(h) + 0.1 * h


def bare_numpy(h):
    return torch.from_numpy(np.sin(h.numpy()))


def straight_through(h):
    return h + (h.round() - h).detach()


class Squared(nn.Module):
    """w is detached in one factor of w^2: half of the derivative is missing."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.w * self.w.detach()


def drawn(h):
    return h + 0.1 * torch.rand_like(h)


REFUSED = {
    "reentrant checkpointing": (reentrant, "reentrant checkpointing.* pass use_reentrant=False"),
    "numpy of a detached tensor": (by_numpy, r"leaves torch by .numpy\(\).* write that part in torch"),
    "numpy by np.asarray": (by_array, r"leaves torch by .numpy\(\).*autograd misses \d+% of it"),
    "numpy": (bare_numpy, r"leaves torch by .numpy\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(name, tmp_path):
    between, message = REFUSED[name]
    cases.seed()
    module = cases.Module(Net(between), nn.CrossEntropyLoss())
    callback = ShellDynamicsCallback(num_probe=8)
    trainer = cases.quiet_trainer(tmp_path, [callback])
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, cases.classes())
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda net: torch.jit.script(net), "holds a torch.jit module.*use the original"),
        (lambda net: net.requires_grad_(False), r"no trainable parameters to measure \(none has any\)"),
        (
            lambda net: net.to(torch.complex64),
            "is complex; complex .* exclude it by params=",
        ),
    ],
)
def test_refused_in_setup(spoil, message, tmp_path):
    module = cases.Module(spoil(nn.Sequential(nn.Linear(64, 10))), nn.CrossEntropyLoss())
    callback = ShellDynamicsCallback(probe=(randn(4, 64).float(), randint(10, 4)))
    trainer = cases.quiet_trainer(tmp_path, [callback])
    with pytest.raises(ValueError, match=message):
        callback.setup(trainer, module, "fit")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="something else"), explained():
        raise RuntimeError("something else")
    with pytest.raises(ValueError, match="use the original module"), explained():
        raise RuntimeError("The stateless API can't be used with Jitted modules")


@pytest.mark.parametrize(
    "model, inputs",
    [
        (mlp(), randn(5, 5)),
        (cnn(nn.ReLU), randn(5, 1, 6, 6)),
        (cnn(nn.ReLU).float(), randn(5, 1, 6, 6).float()),
        (
            seeded(lambda: nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 2))),
            randint(6, 5, 3),
        ),
    ],
)
def test_right_derivatives_pass_also_with_kinks(model, inputs):
    op = NTKOperator(model, inputs)
    assert check_derivative(op) == "" and op.run(lambda: derivative_gap(op)) < 0.01


def test_kinks_of_a_deep_net_are_no_wrong_derivative():
    """A ResNet-20 on its first running statistics: a step of a thousandth crosses so many kinks that 5 % are missed."""
    net, x = benchmark_nets.build("resnet_bn"), benchmark_nets.batch("resnet_bn", n=16).inputs
    op = NTKOperator(net, x)
    assert op.run(lambda: derivative_gap(op)) > 0.05 > op.run(lambda: derivative_gap(op, 1e-4))
    assert check_derivative(op) == ""


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Net(straight_through), r"autograd's derivative is not that of the forward \(\d+% off"),
        (lambda: Net(drawn), "draws random numbers in eval mode"),
        (
            lambda: nn.Sequential(nn.Linear(64, 6), nn.ReLU(), Squared()),
            "autograd's derivative is not that of the forward",
        ),
    ],
)
def test_derivatives_that_are_none_are_told(make, message):
    found = check_derivative(NTKOperator(seeded(make), randn(5, 64)))
    assert re.search(message, found)


def test_the_warning_and_the_report(tmp_path, caplog):
    callback = ShellDynamicsCallback(num_probe=8, every_n_steps=4)
    cases.seed()
    module = cases.Module(Net(straight_through), nn.CrossEntropyLoss())
    with pytest.warns(MeasurementWarning, match="check of the model: autograd.s derivative is not that"):
        cases.fit(module, cases.classes(), tmp_path, [callback], logger=CSVLogger(tmp_path))
    assert "checks      autograd's derivative is not that of the forward" in callback.monitor.report
    assert len(callback.history) == 3
    assert callback.monitor.report in caplog.messages  # at INFO, once, as Lightning tells of its own


def test_the_report_says_what_is_measured_by_which_way_and_at_what_cost():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)), dtype=torch.bfloat16)
    model[0].requires_grad_(False)
    monitor = ShellMonitor(model, "cross_entropy", (randn(7, 5), randint(3, 7)), every_n_steps=3)
    lines = dict(line.strip().split("  ", 1) for line in monitor.report.splitlines()[1:] if line[2] != " ")
    lines = {title: text.strip() for title, text in lines.items()}
    assert lines["function"] == "forward of Sequential"
    assert lines["loss"].startswith("cross entropy: shell energies sum to half the Brier score")
    assert lines["probe"] == "7 samples x 3 outputs, m = 21"
    assert lines["parameters"] == "33 of 69 in 4 tensors, float32 on cpu"
    assert lines["precision"].startswith(
        "float32 copies of bfloat16 parameters, autocast off; eigenvalues down to 1e-12"
    )
    assert lines["method"].startswith("exact: exact kernel and eigendecomposition (about")
    assert lines["kernel"] == "bias 1, linear 2, norm 1" and " MB a measurement" in monitor.report
    assert lines["J w"] in ("double backward", "forward", "central")
    assert lines["schedule"] == "every 3 steps" and "checks" not in lines
    bag = seeded(lambda: nn.Sequential(nn.EmbeddingBag(6, 3), nn.Linear(3, 2)))
    report = ShellMonitor(bag, "mse", (randint(6, 5, 4), randn(5, 2)), every_n_steps=3).report
    assert "central" in report and "double_backward refused: " in report
