"""Optimization by hand: what has to be given; several optimizers, and gradients gathered by hand, are measured."""

import re

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from grsd_callbacks import ShellDynamicsCallback
from grsd_callbacks.between import BetweenSteps

LR = 0.1


class Automatic(pl.LightningModule):
    """A functional loss, so that nothing says what it is."""

    num_steps = 0

    def __init__(self):
        super().__init__()
        self.net = cases.mlp(dtype=torch.float64)

    def forward(self, x):
        return self.net(x.double())

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


class ByHand(Automatic):
    """Two optimizers step after every second batch (`every`), together."""

    def __init__(self, every=2):
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch, batch_idx):
        self.num_steps += 1
        self.manual_backward(super().training_step(batch, batch_idx) / self.every)
        if (batch_idx + 1) % self.every == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        first, *rest = self.parameters()
        return [torch.optim.SGD([first], lr=LR), torch.optim.SGD(rest, lr=LR)]


def fit(module, folder, callbacks=(), **options):
    cases.seed()
    module = module()
    logger = CSVLogger(folder, name="", version=0)
    trainer = cases.fit(module, cases.classes(), folder, callbacks, logger=logger, max_epochs=1, **options)
    return trainer, module


def callback(**options):
    return ShellDynamicsCallback(**{"loss": "cross_entropy", "num_probe": 8, "method": "exact", **options})


def refusal(folder, **options):
    module = ByHand()
    with pytest.raises(ValueError) as error:
        cases.fit(module, cases.classes(), folder, [ShellDynamicsCallback(**options)])
    assert module.num_steps == 0
    return str(error.value)


def test_the_loss_is_asked_for_before_any_batch_is_seen():
    trainer = cases.quiet_trainer(None)
    with pytest.raises(ValueError, match="ByHand optimizes manually.* give loss= and let forward be measured, as in"):
        ShellDynamicsCallback().setup(trainer, ByHand(), "fit")


def test_the_lines_in_the_message_work(tmp_path):
    message = refusal(tmp_path)
    assert "found no nn.MSELoss or nn.CrossEntropyLoss attribute on ByHand" in message
    assert "outputs='training_step'" not in message and "outputs='training_step'" in refusal(
        tmp_path, outputs="training_step"
    )
    lines = re.findall(r"ShellDynamicsCallback\(.*?\)(?= or |$)", message)
    assert len(lines) == 2
    for line in lines:
        given = eval(line)
        cases.seed()
        targets = F.one_hot(cases.digits(64)[1], 10).double() if "lambda" in line else cases.digits(64)[1]
        module = ByHand()
        cases.fit(module, cases.loader(cases.digits(64)[0], targets, 16), tmp_path, [given], max_epochs=1)
        assert given.monitor.num_failed == 0 and given.history[0].step == 0


def test_several_optimizers_and_gathered_gradients_leave_training_bit_identical(tmp_path):
    plain = cases.image(*fit(ByHand, tmp_path / "plain"))
    ours = callback(every_n_steps=1)
    assert cases.differences(cases.image(*fit(ByHand, tmp_path / "ours", [ours])), plain) == []
    assert ours.monitor.num_failed == 0


@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_gathering_by_hand_is_measured_as_gathering_by_lightning(tmp_path, every_n_steps):
    """On the batches between two steps nothing moves: the measurement before them is completed by the step itself."""
    ours, other = callback(every_n_steps=every_n_steps), callback(every_n_steps=1)
    fit(ByHand, tmp_path / "by hand", [ours])
    fit(Automatic, tmp_path / "automatic", [other], accumulate_grad_batches=2)
    assert [s.step for s in ours.history] == [0, 2, 4] and [s.step for s in other.history] == [0, 1, 2]
    for by_hand, automatic in zip(ours.history, other.history):
        for name in ("flow_time", "loss", "energy", "flux", "work", "effective_lr"):
            torch.testing.assert_close(getattr(by_hand, name), getattr(automatic, name), equal_nan=True, msg=name)
    assert all(float(s.work.abs().sum()) > 0 for s in ours.history[:-1])


def test_batches_after_the_last_step_are_no_measurement(tmp_path):
    """Four batches, steps after each third one."""
    ours = callback(every_n_steps=1)
    _, module = fit(lambda: ByHand(every=3), tmp_path, [ours])
    assert module.num_steps == 4 and [s.step for s in ours.history] == [0, 3]
    assert float(ours.history[0].work.abs().sum()) > 0 and bool(ours.history[1].work.isnan().all())


def test_optimizers_that_lightning_has_not_wrapped(tmp_path):
    """It counts none of their steps, so that flow time stands still; every batch is measured all the same."""

    class Bare(ByHand):
        def training_step(self, batch, batch_idx):
            loss = Automatic.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers(use_pl_optimizer=False):
                optimizer.step()
                optimizer.zero_grad()

    ours = callback(every_n_steps=1)
    trainer, _ = fit(Bare, tmp_path, [ours])
    assert trainer.global_step == 0 and [s.step for s in ours.history] == [0, 1, 2, 3, 4]
    assert len({s.loss for s in ours.history}) == 5


def test_optimizers_that_take_turns(tmp_path):
    """Every batch steps one of two optimizers: each is an update, and flow time goes on by its share."""

    class Turns(ByHand):
        def training_step(self, batch, batch_idx):
            loss = Automatic.training_step(self, batch, batch_idx)
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    ours = callback(every_n_steps=1)
    _, module = fit(Turns, tmp_path, [ours])
    first, *rest = (p.numel() for p in module.parameters())
    shares = [first / (first + sum(rest)), sum(rest) / (first + sum(rest))]
    assert [s.step for s in ours.history] == [0, 1, 2, 3, 4]
    times = [s.flow_time for s in ours.history]
    assert times == pytest.approx([0, *(LR * s for s in (shares[0], 1, 1 + shares[0], 2))], rel=1e-12)
    assert all(float(s.work.abs().sum()) > 0 for s in ours.history[:-1])


def test_an_optimizer_of_any_one_parameter_is_seen_to_move_the_net():
    """Also of those whose counters are not looked at at every step."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    watch = BetweenSteps(net)
    for p in net.parameters():
        before = watch.writes
        with torch.no_grad():
            p.add_(1.0)
        assert watch.writes > before
