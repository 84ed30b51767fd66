"""Flow time is the sum of the learning rates that were really used."""

import math
from functools import partial

import lightning_cases as cases
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from grsd_callbacks import ShellDynamicsCallback
from grsd_callbacks.optimizer import NO_STEP_SIZE, StepSizes, step_size


def parameter(size=1):
    return nn.Parameter(torch.zeros(size))


@pytest.mark.parametrize(
    ("make", "lr", "flow"),
    [
        (partial(SGD, lr=0.3), 0.3, 0.3),
        (partial(SGD, lr=0.1, momentum=0.9), 0.1, 1.0),
        (partial(SGD, lr=0.1, momentum=0.5, nesterov=True), 0.1, 0.2),
        (partial(SGD, lr=0.1, momentum=0.5, dampening=0.5), 0.1, 0.1),
        (partial(SGD, lr=torch.tensor(0.25)), 0.25, 0.25),
    ],
)
def test_descent_has_an_exact_flow_time(make, lr, flow):
    size = step_size(make([parameter()]))
    assert (size.lr, size.flow) == (pytest.approx(lr), pytest.approx(flow)) and not size.nominal and size.why == ""


@pytest.mark.parametrize("kind", [Adam, AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_adaptive_optimizers_are_nominal(kind):
    size = step_size(kind([parameter()], lr=0.01))
    assert size.flow == 0.01 and size.nominal and kind.__name__ in size.why


def test_sizes_read_at_every_step_follow_what_changes():
    """Learning rate, momentum and kind of optimizer, a tensor written in place, and a group that is added."""
    sizes, optimizer = StepSizes(), SGD([parameter()], lr=0.5)
    assert sizes.of(optimizer) is sizes.of(optimizer) and sizes.of(optimizer) == step_size(optimizer)
    for changes in ({"lr": 0.25}, {"momentum": 0.5}, {"dampening": 0.5}, {"lr": torch.tensor(0.125)}):
        optimizer.param_groups[0].update(changes)
        assert sizes.of(optimizer) == step_size(optimizer)
    optimizer.param_groups[0]["lr"].fill_(2.0)
    assert sizes.of(optimizer).lr == 2.0
    optimizer.add_param_group({"params": [parameter(2)], "lr": 0.1})
    assert sizes.of(optimizer) == step_size(optimizer) and sizes.of(optimizer).nominal
    same = [kind([parameter()], lr=0.1) for kind in (SGD, torch.optim.RMSprop)]
    assert [sizes.of(o).nominal for o in same] == [False, True]


def test_several_learning_rates_are_weighed_by_parameters():
    size = step_size(SGD([{"params": [parameter(3)], "lr": 0.1}, {"params": [parameter(1)], "lr": 0.5}], lr=1.0))
    assert size.lr == pytest.approx(0.2) and size.nominal and size.why == "several learning rates"


def test_equal_groups_are_exact():
    size = step_size(SGD([{"params": [parameter(3)]}, {"params": [parameter(1)]}], lr=0.1))
    assert size.lr == 0.1 and not size.nominal


def test_several_optimizers_are_nominal():
    size = step_size([SGD([parameter(1)], lr=0.1), SGD([parameter(1)], lr=0.1)])
    assert size.lr == 0.1 and size.nominal and size.why == "several optimizers"


def test_wrappers_with_param_groups_will_do():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    size = step_size(Wrapper(SGD([parameter()], lr=0.1, momentum=0.9)))
    assert size.flow == pytest.approx(1.0) and not size.nominal


def test_nothing_to_optimize_is_no_step_size():
    assert step_size([]) is NO_STEP_SIZE


def test_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match="optimizers must be a torch optimizer with param_groups.*got float"):
        step_size([0.1])


# ---- in a Lightning run ----


class Scheduled(cases.Module):
    """A learning-rate schedule, and a record of the rates in force at each optimizer step."""

    def __init__(self, optimizer, scheduler, interval="step"):
        super().__init__(cases.mlp(), nn.CrossEntropyLoss(), optimizer)
        self.scheduler, self.interval, self.used = scheduler, interval, []

    def on_before_optimizer_step(self, optimizer):
        self.used.append([group["lr"] for group in optimizer.param_groups])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": self.interval}]


def flow_times(module, folder, **options):
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=4)
    cases.seed()
    cases.fit(module, cases.classes(), folder, [callback], **options)
    return callback.history


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "interval", "options"),
    [
        (partial(SGD, lr=0.1), partial(StepLR, step_size=3, gamma=0.5), "step", {}),
        (partial(SGD, lr=0.1), partial(StepLR, step_size=1, gamma=0.1), "epoch", {}),
        (partial(SGD, lr=0.1), partial(OneCycleLR, max_lr=0.3, total_steps=10, cycle_momentum=False), "step", {}),
        (partial(Adam, lr=1e-3), partial(OneCycleLR, max_lr=0.01, total_steps=10), "step", {}),
        (partial(SGD, lr=0.1), partial(StepLR, step_size=1, gamma=0.5), "step", {"accumulate_grad_batches": 2}),
    ],
    ids=["StepLR", "StepLR by epoch", "OneCycle", "OneCycle with Adam", "accumulation"],
)
def test_flow_time_is_the_sum_of_the_rates_used(tmp_path, optimizer, scheduler, interval, options):
    module = Scheduled(optimizer, scheduler, interval)
    history = flow_times(module, tmp_path, **options)
    expected = [sum(rate for (rate,) in module.used[: s.step]) for s in history]
    assert [s.flow_time for s in history] == pytest.approx(expected, rel=1e-12) and expected[-1] > 0
    assert [s.summary["lr"] for s in history[:-1]] == [rate for (rate,) in module.used]  # of the coming step
    adaptive = optimizer.func is Adam
    assert {s.health["nominal_flow_time"] for s in history} == {float(adaptive)}


def test_heavy_ball_under_a_schedule(tmp_path):
    module = Scheduled(partial(SGD, lr=0.1, momentum=0.75), partial(StepLR, step_size=2, gamma=0.5))
    history = flow_times(module, tmp_path)
    assert history[-1].flow_time == pytest.approx(4 * sum(rate for (rate,) in module.used), rel=1e-12)


def test_two_optimizers_advance_flow_time_by_their_share(tmp_path):
    callback = ShellDynamicsCallback(loss="mse", unpack=lambda b: (b[0], b[0]), num_probe=2, every_n_steps=2)
    cases.seed()
    module = cases.Adversarial()
    cases.fit(module, cases.classes(), tmp_path, [callback], max_epochs=1)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (module.generator, module.critic)]
    mean = (sizes[0] * 0.1 + sizes[1] * 1e-3) / sum(sizes)
    assert [s.flow_time for s in callback.history] == pytest.approx([0.0, 2 * mean, 4 * mean], rel=1e-12)
    assert {s.health["nominal_flow_time"] for s in callback.history} == {1.0}
    assert [s.summary["lr"] for s in callback.history] == pytest.approx([mean] * 3, rel=1e-12)
    before = callback.history[0]  # the effective rate is relative to the mean rate, not to the last optimizer's
    assert before.summary["effective_lr"] == pytest.approx(
        float(before.work.sum()) / (mean * float(before.dissipation.sum())), rel=1e-12
    )


class SkipsSteps(cases.Module):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:grsd. measuring every 1 steps costs")
def test_a_step_that_moves_nothing_takes_no_flow_time(tmp_path):
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=4)
    cases.seed()
    module = SkipsSteps(cases.mlp(), nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="returned `None`"):
        cases.fit(module, cases.classes(), tmp_path, [callback], max_epochs=1)
    assert [s.flow_time for s in callback.history] == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.2])
    assert callback.history[2].reasons["flux"].startswith("no flow time has passed")


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params, **defaults):
        super().__init__(params, defaults)


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_optimizers_without_a_learning_rate_have_no_step_size(defaults):
    size = step_size(WithoutRate([torch.nn.Parameter(torch.zeros(2))], **defaults))
    assert math.isnan(size.flow) and size.nominal and "no learning rate" in size.why
