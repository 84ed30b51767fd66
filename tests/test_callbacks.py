"""The callback end to end: closures on real nets, the probe it finds by itself, the loss it recognises, its hooks."""

import math
import warnings
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset, SubsetRandomSampler

import grsd_callbacks.callbacks
from grsd_callbacks import MeasurementWarning, ShellDynamicsCallback
from grsd_callbacks.callbacks import auto_loss, unused_path

DOUBLE = torch.float64
IMAGES, LABELS = cases.digits(16, DOUBLE)
TARGETS = cases.one_hot(LABELS, DOUBLE)


def train(module, targets, folder, num_steps=2, probe=None, trainer=None, **options):
    """A few full-batch steps in float64, measured before each; returns the callback."""
    callback = ShellDynamicsCallback(probe=probe or (IMAGES, targets), **{"every_n_steps": 1, **options})
    data = cases.loader(IMAGES, targets, 16, shuffle=False)
    cases.fit(module, data, folder, [callback], max_epochs=num_steps, **(trainer or {}))
    assert callback.monitor.num_failed == 0 and len(callback.history) == num_steps + 1
    return callback


def closures(callback, name):
    return max(abs(snapshot.closures[name]) for snapshot in callback.history)


# ---- identities ----


class Sequences(nn.Module):
    """Outputs of shape (n, classes, 3): three tokens a sample."""

    def __init__(self):
        super().__init__()
        self.body = cases.mlp(8, num_out=30, dtype=DOUBLE)

    def forward(self, x):
        return self.body(x).view(-1, 10, 3)


NETS = {
    "mlp": partial(cases.mlp, dtype=DOUBLE),
    "cnn, group norm": lambda: cases.cnn(nn.GroupNorm(2, 4), DOUBLE),
    "cnn, batch norm": lambda: cases.cnn(nn.BatchNorm2d(4), DOUBLE),
    "transformer": lambda: cases.Transformer().double(),
}
SEVERAL = torch.stack([LABELS, (LABELS + 1) % 10, LABELS.flip(0)], 1)
IGNORED = torch.where(torch.arange(48).view(16, 3) % 5 == 0, -100, SEVERAL)
WEIGHT = torch.linspace(0.5, 2.0, 10, dtype=DOUBLE)
CROSS_ENTROPIES = {
    "plain": (nn.CrossEntropyLoss(), LABELS),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "class weights": (nn.CrossEntropyLoss(WEIGHT), LABELS),
    "label smoothing": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), LABELS),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=3), LABELS),
    "soft targets": (nn.CrossEntropyLoss(), torch.softmax(3 * TARGETS, 1)),
    "tokens": (nn.CrossEntropyLoss(), SEVERAL),
    "tokens, some ignored": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), IGNORED),
}


@pytest.mark.parametrize("method", ["exact", "krylov"])
@pytest.mark.parametrize("net", NETS)
def test_energy_is_the_loss_and_dissipation_the_gradient(tmp_path, net, method):
    cases.seed()
    module = cases.Module(NETS[net](), nn.MSELoss(), partial(torch.optim.SGD, lr=0.05))
    callback = train(module, TARGETS, tmp_path, method=method, num_matvecs=10)
    assert closures(callback, "energy") <= 1e-10 and closures(callback, "dissipation") <= 1e-8
    for snapshot in callback.history:
        assert float(snapshot.energy.sum()) == pytest.approx(snapshot.loss, rel=1e-10)
        assert float(snapshot.dissipation.sum()) == pytest.approx(snapshot.grad_norm_sq, rel=1e-8)


@pytest.mark.parametrize("net", NETS)
def test_gradient_and_loss_are_those_of_loss_backward(tmp_path, net):
    """At the end of a run, against .backward() on the module itself."""
    cases.seed()
    module = cases.Module(NETS[net](), nn.MSELoss(), partial(torch.optim.SGD, lr=0.05))
    last = train(module, TARGETS, tmp_path).history[-1]
    module.eval().zero_grad()
    loss = F.mse_loss(module(IMAGES), TARGETS)
    loss.backward()
    assert last.loss == pytest.approx(loss.item(), rel=1e-12)
    assert last.grad_norm_sq == pytest.approx(sum(p.grad.square().sum().item() for p in module.parameters()), rel=1e-10)


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_dissipation_closes_for_every_cross_entropy(tmp_path, name):
    loss, targets = CROSS_ENTROPIES[name]
    cases.seed()
    net = Sequences() if name.startswith("tokens") else cases.mlp(8, dtype=DOUBLE)
    callback = train(cases.Module(net, loss, partial(torch.optim.SGD, lr=1e-3)), targets, tmp_path)
    assert closures(callback, "dissipation") <= 1e-8
    assert "energy" not in callback.history[0].closures
    count = {
        "sum": 1.0,
        "class weights": float(WEIGHT[LABELS].sum()),
        "label smoothing": float(WEIGHT[LABELS].sum()),
        "ignore_index": int((LABELS != 3).sum()),
        "tokens": 48,
        "tokens, some ignored": float(WEIGHT[IGNORED[IGNORED >= 0]].sum()),
    }.get(name, 16)
    assert callback.history[0].nu == pytest.approx(1 / count, rel=1e-12)


def test_energy_of_cross_entropy_is_half_the_brier_score(tmp_path):
    cases.seed()
    module = cases.Module(cases.mlp(dtype=DOUBLE), nn.CrossEntropyLoss())
    last = train(module, LABELS, tmp_path).history[-1]
    brier = (module(IMAGES).softmax(1) - TARGETS).square().sum(1).mean()
    assert float(last.energy.sum()) == pytest.approx(brier.item() / 2, rel=1e-12)


def test_a_general_callable(tmp_path):
    cases.seed()
    huber = partial(F.huber_loss, delta=0.3)
    callback = train(cases.Module(cases.mlp(dtype=DOUBLE), huber), TARGETS, tmp_path, loss=huber)
    assert closures(callback, "dissipation") <= 1e-8 and callback.history[0].nu == 1 / 16
    assert callback.monitor.loss.kind == "general" and "energy" not in callback.history[0].closures


def test_a_scaled_squared_loss_is_recognised(tmp_path):
    def ten_times(outputs, targets):
        return 10 * F.mse_loss(outputs, targets)

    cases.seed()
    module = cases.Module(cases.mlp(dtype=DOUBLE), ten_times, partial(torch.optim.SGD, lr=0.01))
    callback = train(module, TARGETS, tmp_path, loss=ten_times)
    assert callback.history[0].nu == pytest.approx(20 / 160, rel=1e-10)
    assert closures(callback, "energy") <= 1e-10 and closures(callback, "dissipation") <= 1e-8


@pytest.mark.parametrize(("reduction", "nu"), [("mean", 2 / 160), ("sum", 2.0)])
def test_scale_of_squared_losses(tmp_path, reduction, nu):
    cases.seed()
    module = cases.Module(cases.mlp(dtype=DOUBLE), nn.MSELoss(reduction=reduction), partial(torch.optim.SGD, lr=1e-3))
    callback = train(module, TARGETS, tmp_path)
    assert callback.history[0].nu == pytest.approx(nu) and closures(callback, "energy") <= 1e-10


def test_transport_sums_to_zero_and_flux_is_its_sum_from_above(tmp_path):
    cases.seed()
    module = cases.Module(cases.mlp(dtype=DOUBLE), nn.MSELoss(), partial(torch.optim.SGD, lr=0.5))
    history = train(module, TARGETS, tmp_path, num_steps=4).history
    for after in history[1:]:
        moved = after.transport.abs().sum()
        assert moved > 0 and abs(after.transport.sum()) <= 1e-10 * moved
        assert after.summary["dt"] == pytest.approx(0.5)
        assert torch.allclose(after.flux, after.transport.flip(0).cumsum(0).flip(0)[1:], atol=1e-15)


# ---- the step that follows a measurement ----


@pytest.mark.parametrize("net", ["mlp", "cnn, group norm"])
def test_effective_rate_is_one_in_every_shell_under_full_batch_descent(tmp_path, net):
    cases.seed()
    module = cases.Module(NETS[net](), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1))
    for snapshot in train(module, TARGETS, tmp_path, num_steps=3).history[:-1]:
        known = snapshot.dissipation > 1e-9 * snapshot.dissipation.sum()
        assert int(known.sum()) >= 8
        assert snapshot.effective_lr[known].tolist() == pytest.approx([1.0] * int(known.sum()), abs=1e-6)
        assert snapshot.summary["effective_lr"] == pytest.approx(1.0, abs=1e-9)
        assert snapshot.closures["probe"] == pytest.approx(1.0, abs=1e-9)
    assert bool(train(module, TARGETS, tmp_path, num_steps=1).history[-1].work.isnan().all())  # no step has followed


@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)],
    ids=["adam", "heavy ball with decay"],
)
def test_work_is_the_first_order_decrease_of_the_loss(tmp_path, optimizer):
    cases.seed()
    module = cases.Module(cases.mlp(dtype=DOUBLE), nn.MSELoss(), optimizer)
    weights = cases.Weights()
    callback = ShellDynamicsCallback(probe=(IMAGES, TARGETS), every_n_steps=1)
    data = cases.loader(IMAGES, TARGETS, 16, shuffle=False)
    cases.fit(module, data, tmp_path, [weights, callback], max_epochs=3)
    for snapshot in callback.history[:-1]:
        before, after = weights.at[snapshot.step], weights.at[snapshot.step + 1]
        module.load_state_dict(before)
        loss = F.mse_loss(module(IMAGES), TARGETS)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        direct = -sum((g * (after[n] - before[n])).sum().item() for n, g in zip(names, gradients, strict=True))
        assert float(snapshot.work.sum()) == pytest.approx(direct, rel=1e-9)
        assert snapshot.summary["effective_lr"] == pytest.approx(
            direct / (snapshot.summary["lr"] * snapshot.grad_norm_sq), rel=1e-9
        )


def test_work_can_be_left_out(tmp_path):
    cases.seed()
    callback = train(cases.Module(cases.mlp(dtype=DOUBLE), nn.MSELoss()), TARGETS, tmp_path, work=False)
    assert all(bool(s.work.isnan().all()) and "effective_lr" not in s.summary for s in callback.history)


# ---- the probe ----


class Recorded(cases.Module):
    """Remembers the inputs of its first training batch."""

    def training_step(self, batch, batch_idx):
        if not hasattr(self, "first"):
            self.first = batch[0].clone()
        return super().training_step(batch, batch_idx)


def probe_of(folder, data, module=None, **options):
    cases.seed()
    module = module or Recorded(cases.mlp(), nn.CrossEntropyLoss())
    callback = ShellDynamicsCallback(**{"every_n_steps": 4, "json_lines": str(folder / "own.jsonl"), **options})
    cases.fit(module, data, folder, [callback], max_epochs=1)
    assert callback.monitor.num_failed == 0
    return callback.monitor.probe, module


def test_probe_is_cloned_from_the_first_training_batch(tmp_path):
    probe, module = probe_of(tmp_path, cases.classes(), num_probe=12)
    assert torch.equal(probe.inputs, module.first[:12]) and probe.inputs.data_ptr() != module.first.data_ptr()


@pytest.mark.parametrize(("num", "expected"), [(40, [i * 64 // 40 for i in range(40)]), (64, list(range(64)))])
def test_a_larger_probe_takes_each_sample_of_the_data_once(tmp_path, num, expected):
    probe, _ = probe_of(tmp_path, cases.classes(), num_probe=num)
    assert torch.equal(probe.inputs, cases.digits()[0][expected])
    assert torch.equal(probe.targets, cases.digits()[1][expected])


def test_default_size_aims_at_320_rows(tmp_path):
    assert probe_of(tmp_path, cases.classes())[0].num_samples == 32  # 10 outputs each


def test_samples_of_the_data_set_are_only_those_trained_on(tmp_path):
    x, y = cases.digits()
    data = DataLoader(torch.utils.data.TensorDataset(x, y), 8, sampler=SubsetRandomSampler(range(1, 64, 2)))
    probe, _ = probe_of(tmp_path, data, num_probe=32)
    assert torch.equal(probe.inputs, x[1::2])
    probe, _ = probe_of(tmp_path, DataLoader(Subset(data.dataset, range(0, 64, 2)), 8), num_probe=32)
    assert torch.equal(probe.inputs, x[::2])


class Transfers(Recorded):
    """The user's transfer hooks belong to the data."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [2 * batch[0], batch[1]]


@pytest.mark.parametrize("num", [8, 64])
def test_samples_are_prepared_as_the_training_batches_are(tmp_path, num):
    probe, module = probe_of(
        tmp_path, cases.classes(shuffle=False), Transfers(cases.mlp(), nn.CrossEntropyLoss()), num_probe=num
    )
    assert torch.equal(probe.inputs, 2 * (cases.digits()[0][:num] + 1))
    assert torch.equal(probe.inputs[:8], module.first[:8])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*cases.digits(), strict=True))

    def __len__(self):
        return cases.NUM_TRAIN


class Unreadable(torch.utils.data.TensorDataset):
    def __getitem__(self, index):
        if not isinstance(index, str):
            raise KeyError(index)
        return super().__getitem__(int(index))


def batched_by_hand():
    data = torch.utils.data.TensorDataset(*cases.digits())
    return DataLoader(data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), 16, drop_last=False))


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("data", [lambda: DataLoader(Stream(), 16), batched_by_hand], ids=["stream", "own batches"])
def test_where_data_cannot_be_indexed_the_first_batch_is_the_probe(tmp_path, data):
    probe, module = probe_of(tmp_path, data())
    assert torch.equal(probe.inputs, module.first)


def test_a_data_set_that_refuses_our_index_costs_a_warning(tmp_path):
    data = DataLoader(Unreadable(*cases.digits()), 16, sampler=[str(i) for i in range(64)])
    with pytest.warns(MeasurementWarning, match="first batch alone .16 samples.*cannot be read by index .KeyError"):
        probe, module = probe_of(tmp_path, data, every_n_steps=100)
    assert torch.equal(probe.inputs, module.first)


def test_probe_from_a_loader(tmp_path):
    probe, _ = probe_of(tmp_path, cases.classes(), probe=cases.classes(shuffle=False, batch_size=5), num_probe=12)
    assert torch.equal(probe.inputs, cases.digits()[0][:12])


def test_the_probe_does_not_change_with_its_source(tmp_path):
    x, y = cases.digits(8)[0].clone(), cases.digits(8)[1]

    class Spoils(pl.Callback):
        def on_train_batch_end(self, *args):
            x.zero_()

    callback = ShellDynamicsCallback(probe=(x, y), every_n_steps=1)
    cases.seed()
    module = cases.Module(cases.mlp(), nn.CrossEntropyLoss())
    cases.fit(module, cases.classes(), tmp_path, [Spoils(), callback], max_epochs=1)
    assert torch.equal(callback.monitor.probe.inputs, cases.digits(8)[0]) and not bool(x.any())


@pytest.mark.parametrize("probe", ["auto", "pair", "loader"])
def test_num_probe_larger_than_the_data_is_one_warning(tmp_path, probe):
    sources = {"auto": "auto", "pair": cases.digits(20), "loader": cases.loader(*cases.digits(20))}
    size = {"auto": 64, "pair": 20, "loader": 20}[probe]
    with pytest.warns(MeasurementWarning) as caught:
        found, _ = probe_of(tmp_path, cases.classes(), probe=sources[probe], num_probe=100, every_n_steps=100)
    ours = [str(w.message) for w in caught if w.category is MeasurementWarning]
    assert len(ours) == 1 and f"num_probe=100, but the data have only {size} samples" in ours[0]
    assert found.num_samples == size


# ---- the loss ----


class Holds(nn.Module):
    def __init__(self, **losses):
        super().__init__()
        for name, loss in losses.items():
            setattr(self, name, loss)


@pytest.mark.parametrize(
    "losses",
    [
        {"criterion": nn.MSELoss()},
        {"a": nn.CrossEntropyLoss(), "b": nn.CrossEntropyLoss()},
        {"a": nn.CrossEntropyLoss(), "b": F.cross_entropy, "net": nn.Linear(1, 1)},
        {"a": nn.CrossEntropyLoss(torch.ones(2)), "b": nn.CrossEntropyLoss(torch.ones(2))},
    ],
)
def test_loss_is_recognised(losses):
    assert auto_loss(Holds(**losses)) in losses.values()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "found no nn.MSELoss or nn.CrossEntropyLoss attribute on Holds; give loss='mse'"),
        ({"criterion": nn.L1Loss()}, "found no nn.MSELoss"),
        ({"a": nn.MSELoss(), "b": nn.CrossEntropyLoss()}, r"found several losses \(a, b\)"),
        ({"a": nn.MSELoss(), "b": nn.MSELoss(reduction="sum")}, "several losses"),
        ({"a": nn.CrossEntropyLoss(), "b": nn.CrossEntropyLoss(label_smoothing=0.1)}, "several losses"),
        ({"a": nn.CrossEntropyLoss(), "b": nn.CrossEntropyLoss(torch.ones(2))}, "several losses"),
        ({"a": nn.CrossEntropyLoss(), "b": nn.CrossEntropyLoss(ignore_index=0)}, "several losses"),
    ],
)
def test_loss_that_cannot_be_told_is_asked_for(losses, message):
    with pytest.raises(ValueError, match=message):
        auto_loss(Holds(**losses))


# ---- hooks ----


def test_works_under_both_names_of_lightning(tmp_path):
    """A module and a Trainer of pytorch_lightning, the same package under its other name."""

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = cases.mlp(), nn.CrossEntropyLoss()

        forward, configure_optimizers = cases.Module.forward, cases.Module.configure_optimizers
        training_step, make_optimizer = cases.Module.training_step, partial(torch.optim.SGD, lr=0.1)

    callback = ShellDynamicsCallback(every_n_steps=2, num_probe=4)
    trainer = pytorch_lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Other(), cases.classes())
    assert [s.step for s in callback.history] == [0, 2, 4]


def test_pairs_give_the_flux_over_a_single_step(tmp_path):
    cases.seed()
    callback = ShellDynamicsCallback(every_n_steps=4, pair=True, num_probe=4)
    cases.fit(cases.Module(cases.mlp(), nn.CrossEntropyLoss()), cases.classes(), tmp_path, [callback])
    assert [s.step for s in callback.history] == [0, 1, 4, 5, 8]
    assert [s.summary["dt"] for s in callback.history[1:]] == pytest.approx([0.1, 0.3, 0.1, 0.3])


def test_only_some_parameters_are_measured(tmp_path):
    cases.seed()
    callback = ShellDynamicsCallback(every_n_steps=4, num_probe=4, params="net.2.*")
    cases.fit(cases.Module(cases.mlp(), nn.CrossEntropyLoss()), cases.classes(), tmp_path, [callback], max_epochs=1)
    assert callback.history[0].summary["num_parameters"] == 170 and closures(callback, "dissipation") <= 1e-4


def test_exception_in_training_keeps_what_was_measured(tmp_path):
    class Fails(cases.Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("out of data")
            return super().training_step(batch, batch_idx)

    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=4, json_lines=str(tmp_path / "x.jsonl"))
    with pytest.raises(KeyError, match="out of data"):
        cases.fit(Fails(cases.mlp(), nn.CrossEntropyLoss()), cases.classes(), tmp_path, [callback])
    lines = grsd_callbacks.read_json_lines(tmp_path / "x.jsonl")
    assert {line["step"] for line in lines} == {s.step for s in callback.history} == {0, 1, 2, 3}


def test_validation_and_sanity_check_are_not_measured(tmp_path):
    class Validates(cases.Module):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.criterion(self(batch[0]), batch[1]))

        def val_dataloader(self):
            return cases.classes(shuffle=False)

    callback = ShellDynamicsCallback(every_n_steps=2, num_probe=4)
    module = Validates(cases.mlp(), nn.CrossEntropyLoss())
    cases.fit(module, cases.classes(), tmp_path, [callback], num_sanity_val_steps=1, val_check_interval=1)
    assert [s.step for s in callback.history] == [0, 2, 4, 6, 8] and callback.monitor.num_failed == 0


def test_state_and_history_before_any_training():
    callback = ShellDynamicsCallback()
    assert callback.history == [] and callback.state_dict() == {}
    assert callback.summary() == "grsd: nothing has been measured"


def test_default_schedule_measures_the_start_and_the_end(tmp_path):
    cases.seed()
    callback = ShellDynamicsCallback(num_probe=4)
    cases.fit(cases.Module(cases.mlp(), nn.CrossEntropyLoss()), cases.classes(), tmp_path, [callback], max_epochs=3)
    steps = [s.step for s in callback.history]
    assert steps[:2] == [0, 1] and steps[-1] == 12 and 2 not in steps
    assert callback.monitor.schedule.total_steps == 12


def test_length_of_a_run_is_unknown_for_a_stream(tmp_path):
    class Endless(Stream):
        __len__ = None

    callback = ShellDynamicsCallback(num_probe=4)
    module = cases.Module(cases.mlp(), nn.CrossEntropyLoss())
    cases.fit(module, DataLoader(Endless(), 16), tmp_path, [callback], max_epochs=2)
    assert callback.monitor.schedule.total_steps is None and callback.history[-1].step == 8
    assert math.isfinite(callback.history[-1].cost["overhead_percent"])


def test_no_logger_is_one_warning_unless_json_lines_are_given(tmp_path):
    with pytest.warns(MeasurementWarning, match="no logger; measurements are kept in callback.history only"):
        probe_of(tmp_path, cases.classes(), json_lines="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="lightning")
        probe_of(tmp_path, cases.classes())
    assert (tmp_path / "own.jsonl").exists()


def test_a_new_run_does_not_append_to_another_runs_lines(tmp_path):
    assert unused_path(tmp_path / "grsd.jsonl") == tmp_path / "grsd.jsonl"
    (tmp_path / "grsd.jsonl").touch()
    assert unused_path(tmp_path / "grsd.jsonl") == tmp_path / "grsd_1.jsonl"


class Squeezed(cases.Module):
    """A net that only runs on batches: one sample alone would lose its dimension."""

    def forward(self, x):
        return self.net(x).squeeze()


@pytest.mark.filterwarnings("ignore:the structured kernel is not complete for this model .the model does not run on 1")
@pytest.mark.parametrize("method", ["auto", "exact", "krylov"])
def test_a_net_that_does_not_run_on_one_sample_is_measured(tmp_path, method):
    net = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))
    module = Squeezed(net.double(), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1))
    train(module, IMAGES[:, :3].sum(1), tmp_path, method=method)


def test_testing_a_checkpoint_does_not_resume_the_next_fit(tmp_path):
    cases.seed()
    callback = ShellDynamicsCallback(every_n_steps=2, num_probe=4, loss="cross_entropy", json_lines=None)
    callback.load_state_dict({"probe": {"inputs": [torch.zeros(4, 64)], "targets": [torch.zeros(4).long()]}})
    cases.fit(cases.Module(cases.mlp(), nn.CrossEntropyLoss()), cases.classes(), tmp_path, [callback], max_epochs=1)
    assert callback.history[0].step == 0 and bool(callback.monitor.probe.inputs.any())


def test_sharding_strategies_are_refused_on_every_rank(tmp_path):
    class FSDPStrategy:
        pass

    trainer = SimpleNamespace(strategy=FSDPStrategy(), is_global_zero=False)
    with pytest.raises(ValueError, match="strategy FSDPStrategy shards the parameters"):
        ShellDynamicsCallback().setup(trainer, nn.Linear(1, 1), "fit")
