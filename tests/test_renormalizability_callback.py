"""The conditions on real runs: training unchanged, failures harmless, verdicts written, cost kept."""

import importlib
import json
from functools import partial

import lightning_cases as cases
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from nets import randn, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from grsd_callbacks import (
    Conditions,
    ConditionSettings,
    MeasurementWarning,
    MemorySink,
    RenormalizabilityCallback,
    RenormalizabilityMonitor,
    ShellDynamicsCallback,
    ShellGrid,
    measure_conditions,
    tags,
)
from grsd_callbacks import renormalizability_monitor as module
from grsd_callbacks.figures import conditions_figure
from grsd_callbacks.monitor import stopwatch
from grsd_callbacks.renormalizability import DEFINITIONS

pytestmark = [pytest.mark.filterwarnings("ignore:grsd. measuring every"), pytest.mark.usefixtures("unrendered")]


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


QUICK = {"num_null": 19, "num_resamples": 4}


def net(activation=nn.Tanh):
    hidden = [nn.Linear(64, 12), activation(), nn.Linear(12, 12), nn.Dropout(0.2), activation()]
    return nn.Sequential(*hidden, nn.Linear(12, 12), nn.BatchNorm1d(12), activation(), nn.Linear(12, 10))


def lightning_run(folder, callbacks=(), criterion=None, data=cases.regression, make=net, **options):
    cases.seed()
    lightning = cases.Module(make(), criterion or nn.MSELoss(), partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    loggers = [CSVLogger(folder, name="", version=0), TensorBoardLogger(folder, name="events")]
    trainer = cases.fit(lightning, data(), folder, callbacks, logger=loggers, **options)
    return cases.image(trainer, lightning), trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return lightning_run(tmp_path_factory.mktemp("plain"))[0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    callback = RenormalizabilityCallback(num_probe=6, every_n_steps=3, **QUICK)
    shells = ShellDynamicsCallback(num_probe=4, every_n_steps=4, figures=False)
    image, _ = lightning_run(folder, [callback, shells])
    return image, callback, folder


# ---- Lightning ----


def test_training_is_bit_identical(plain, measured):
    image, callback, _ = measured
    assert cases.differences(plain, image) == []
    assert callback.monitor.num_failed == 0
    assert [c.step for c in callback.conditions] == [0, 3, 6, 8] == [s.step for s in callback.history]


def test_verdicts_come_out_at_the_end(measured):
    _, callback, folder = measured
    verdict = callback.verdict
    assert [v.condition for v in verdict.verdicts] == list(DEFINITIONS)
    assert callback.conditions[-1].errors and not callback.conditions[0].errors
    assert callback.monitor.final_seconds > 0
    assert verdict.table() in callback.summary() and "% of the training time" in callback.summary()
    assert verdict.regime.signs["kernel_drift"] > 0
    lines = [json.loads(line) for line in next(folder.rglob("grsd_renorm.jsonl")).read_text().splitlines()]
    assert [line["step"] for line in lines if "kind" not in line][-1] == 8
    assert any(tags.VERDICTS in line.get("texts", {}) for line in lines)


def test_tags_are_the_stated_ones(measured):
    _, _, folder = measured
    events = EventAccumulator(str(next((folder / "events").iterdir()))).Reload()
    ours = {t for t in events.Tags()["scalars"] if t.startswith(("grsd_renorm/", "grsd_verdict/"))}
    known = {*tags.CONDITION_TAGS, tags.CONDITIONS_FAILED, *tags.VERDICT_TAGS.values()}
    assert ours <= known and set(tags.VERDICT_TAGS.values()) <= ours
    assert {"grsd_renorm/kernel_speed", "grsd_renorm/cross_share", "grsd_renorm/spectral_norm"} <= ours
    assert [e.step for e in events.Scalars("grsd_renorm/kernel_speed")] == [0, 3, 6, 8]
    assert [e.step for e in events.Scalars("grsd_loss/probe")] == [0, 4, 8]  # the other callback's, once
    texts = {t.removesuffix("/text_summary") for t in events.Tags()["tensors"]}
    assert {tags.VERDICTS, tags.CONDITIONS_MEANING} <= texts
    assert tags.CONDITIONS_FIGURE in events.Tags()["images"]
    assert all(f"`{tag}`" in tags.conditions_card() and f"`{tag}`" in tags.meaning_card() for tag in known)


@pytest.mark.parametrize("options", [{"criterion": nn.CrossEntropyLoss(), "data": cases.classes}])
def test_other_losses(tmp_path, options):
    callback = RenormalizabilityCallback(num_probe=6, every_n_steps=4, **QUICK)
    lightning_run(tmp_path, [callback], **options)
    assert callback.verdict is not None and callback.monitor.num_failed == 0


def test_a_failing_measurement_is_one_warning(plain, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(module, "conditions_at", broken)
    callback = RenormalizabilityCallback(num_probe=6, every_n_steps=3, **QUICK)
    with pytest.warns(MeasurementWarning) as caught:
        image, _ = lightning_run(tmp_path, [callback])
    assert len([w for w in caught if "no kernel today" in str(w.message)]) == 1
    assert cases.differences(plain, image) == [] and callback.conditions == [] and callback.verdict is None
    assert callback.monitor.num_failed == 4 and "no verdict" in callback.summary()


def test_a_failing_verdict_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "judge", lambda *args, **options: 1 / 0)
    callback = RenormalizabilityCallback(num_probe=6, every_n_steps=4, **QUICK)
    with pytest.warns(MeasurementWarning, match="ZeroDivisionError"):
        lightning_run(tmp_path, [callback])
    assert len(callback.conditions) == 3 and callback.verdict is None


def test_wrong_use_fails_before_the_first_step(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'net.7.x' is no module"):
        lightning_run(tmp_path, [RenormalizabilityCallback(num_probe=6, blocks=["net.0", "net.7.x"])])
    with pytest.raises(ValueError, match="compare blocks, and Module has 1"):
        lightning_run(tmp_path, [RenormalizabilityCallback(num_probe=6)], make=lambda: nn.Linear(64, 10))
    monkeypatch.setattr(module, "MAX_ROWS", 50)
    with pytest.raises(ValueError, match="6 samples x 10 outputs = 60 rows"):
        lightning_run(tmp_path, [RenormalizabilityCallback(num_probe=6)])
    with pytest.raises(ValueError, match="min_modes must be"):
        RenormalizabilityCallback(min_modes=0)
    with pytest.raises(ValueError, match="blocks must be a list"):
        RenormalizabilityCallback(blocks="net")


def test_several_instances_have_their_own_names():
    assert RenormalizabilityCallback().state_key == "RenormalizabilityCallback"
    assert RenormalizabilityCallback(name="a").state_key == "RenormalizabilityCallback[a]"
    assert ShellDynamicsCallback().state_key == "ShellDynamicsCallback"


def test_a_checkpoint_continues_the_run(tmp_path):
    callback = RenormalizabilityCallback(num_probe=6, every_n_steps=3, **QUICK)
    _, trainer = lightning_run(tmp_path / "a", [callback], max_epochs=1)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    again = RenormalizabilityCallback(num_probe=6, every_n_steps=3, **QUICK)
    cases.seed()
    lightning = cases.Module(net(), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    cases.fit(lightning, cases.regression(), tmp_path / "b", [again], ckpt_path=path, max_epochs=2)
    assert [c.step for c in again.conditions] == [0, 3, 4, 6, 8]
    assert again.conditions[1].to_dict() == callback.conditions[1].to_dict()
    assert again.verdict is not None


# ---- any loop ----


def loop(num_steps=40, activation=nn.Tanh, n=40, **options):
    model = seeded(lambda: nn.Sequential(
        nn.Linear(5, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 16), activation(),
        nn.Linear(16, 1)))  # fmt: skip
    x = randn(n, 5, seed=1)
    y = torch.sin(2 * x.sum(1, keepdim=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    settings = ConditionSettings(num_null=19, num_resamples=6)
    monitor = RenormalizabilityMonitor(model, "mse", (x, y), conditions=settings, **options)
    for step in range(num_steps):
        monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    monitor.finish(num_steps)
    return monitor


def test_monitor_in_a_loop():
    sink = MemorySink()
    monitor = loop(every_n_steps=10, writer=sink)
    assert [c.step for c in monitor.conditions] == [0, 10, 20, 30, 40]
    assert monitor.conditions[2].flow_time == pytest.approx(4.0)
    assert all(torch.equal(c.edges, monitor.conditions[0].edges) for c in monitor.conditions)
    assert [e.step for e in sink.emissions] == [0, 10, 20, 30, 40, 40]
    assert sink.emissions[0].record["step"] == 0 and Conditions.from_dict(sink.emissions[0].record).step == 0
    log_shift = next(v for v in monitor.verdict.verdicts if v.condition == "log-shift invariance")
    assert log_shift.lower <= log_shift.value <= log_shift.upper and 0.05 <= log_shift.p_value <= 1


def test_figure_of_the_verdicts():
    monitor = loop(every_n_steps=20)
    figure = conditions_figure(monitor.conditions, monitor.verdict)
    figure.canvas.draw()
    panels = [ax for ax in figure.axes]
    assert len(panels) == 5 and "regime" in panels[0].get_title(loc="left")
    cells = [c.get_text().get_text() for c in panels[0].tables[0].get_celld().values()]
    assert {v.condition for v in monitor.verdict.verdicts} <= set(cells)
    assert "log-shift invariance" in cells and len(panels[3].lines) >= 3
    with pytest.raises(ValueError, match="at least one"):
        conditions_figure([], monitor.verdict)


def test_a_prefix_tells_monitors_apart():
    sink = MemorySink()
    loop(num_steps=4, every_n_steps=4, writer=sink, prefix="grsd_b_")
    assert all(tag.startswith("grsd_b_") for e in sink.emissions for tag in {**e.scalars, **e.texts, **e.figures})


def test_default_cadence_is_log_spaced_and_within_its_share():
    """Measurements at start, end and between; their planned time is the share asked for."""
    monitor = loop(num_steps=400, total_steps=400, max_overhead=0.5, n=12)
    steps = [c.step for c in monitor.conditions]
    assert steps[0] == 0 and 1 not in steps and steps[-1] == 400  # the first steps are only timed
    assert "log-spaced" in monitor.schedule.describe()
    ends = [s for s in steps if s > 6]
    assert len(ends) <= 1 + 2 * 2  # two a decade, and the end


def test_shells_and_conditions_share_one_kernel(monkeypatch):
    """A measurement forms the kernel once, and two more for its velocity; it takes one eigendecomposition."""
    formed, solved = [], []

    def counting(where, name, calls):
        module = importlib.import_module(f"grsd_callbacks.{where}")
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: calls.append(where) or original(*args, **more))

    for where in ("renormalizability.blocks", "transfer", "kernel"):
        counting(where, "exact_gram", formed)
    for where in ("ways", "renormalizability.conditions"):
        counting(where, "eigendecomposition", solved)
    monitor = loop(num_steps=1, every_n_steps=5)
    assert len(monitor.conditions) == 2
    for calls in (formed, solved):
        calls.clear()
    monitor._take(2)
    assert sorted(formed) == ["renormalizability.blocks", "transfer", "transfer"] and solved == ["ways"]


def test_conditions_of_a_run_are_those_of_one_instant():
    """What is shared between shells and conditions changes nothing."""
    monitor = loop(num_steps=1, every_n_steps=5)
    model = monitor.model
    there = measure_conditions(model, monitor.probe, "mse", monitor.how, ShellGrid(monitor.conditions[0].edges))
    here = monitor.conditions[-1]
    for group, name in (("evolution", "kernel_speed"), ("incoherence", "cross_share"), ("propagation", "spread")):
        assert getattr(getattr(here, group), name) == pytest.approx(getattr(getattr(there, group), name), rel=1e-6)
    assert torch.allclose(here.flux, there.flux, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("busy_until", [0, 30, 300])
def test_the_default_cadence_holds_its_share(monkeypatch, busy_until):
    """A clock that only moves when told to: start and end are kept, what lies between gives way."""
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)))
    x, y = randn(6, 3, seed=1).float(), randn(6, 1, seed=2).float()
    monitor = RenormalizabilityMonitor(model.float(), "mse", (x, y), total_steps=20_000, per_decade=4, figures=False)
    take = monitor._take

    def slow(step):
        clock.now += 0.06
        return take(step)

    monitor._take = slow
    for step in range(20_000):
        monitor.step(step, lr=0.1)
        clock.now += 2e-3 * (10 if step < busy_until else 1)
    monitor.finish(20_000)
    steps = [c.step for c in monitor.conditions]
    assert steps[0] == 0 and steps[-1] == 20_000 and 1 not in steps and len(steps) > 6
    assert 0.01 < monitor.overhead <= 0.02
    assert (monitor.schedule.left_out > 0) == (busy_until > 0)


def test_kernels_of_float32_products_are_refused():
    with pytest.raises(ValueError, match="gram_dtype must be None or torch.float64: couplings need kernels"):
        loop(num_steps=1, every_n_steps=5, gram_dtype=torch.float32)


def test_a_failed_measurement_keeps_no_operator(monkeypatch):
    monitor = loop(num_steps=1, every_n_steps=5)
    monkeypatch.setattr(monitor, "_conditions_at", lambda snapshot: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        monitor._take(2)
    assert monitor._found is None
