"""The core in a loop of one's own: steps, flow time, writers, failures and what they leave behind."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from grsd_callbacks import MeasurementWarning, MemorySink, ShellMonitor, read_json_lines, ways
from grsd_callbacks.monitor import stopwatch

pytestmark = pytest.mark.filterwarnings("ignore:grsd. measuring every . steps costs")


def problem(seed=0):
    """A small regression in float64: net, inputs, targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double(), x, x[:, :2].sin()


def descend(net, x, y, optimizer):
    optimizer.zero_grad()
    F.mse_loss(net(x), y).backward()
    optimizer.step()


def loop(num_steps=6, seed=0, lr=0.1, calls="before", **options):
    """A monitor after a run of full-batch descent, with one call of `step` an iteration."""
    net, x, y = problem(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    monitor = ShellMonitor(net, "mse", (x, y), **{"every_n_steps": 2, **options})
    for step in range(num_steps):
        if calls == "before":
            monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
        if calls == "after":
            monitor.step(step + 1, optimizer=optimizer)
    monitor.finish(num_steps)
    return monitor


# ---- steps and flow time ----


def test_step_measures_if_due_and_says_so():
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=3)
    found = [monitor.step(step, lr=0.1) for step in range(5)]
    assert [s and s.step for s in found] == [0, None, None, 3, None]
    assert found[0] is monitor.history[0] or found[0].step == monitor.history[0].step
    assert monitor.finish().step == 4 and monitor.finish() is None  # the end is measured once


def test_no_kernel_is_held_until_the_next_step(monkeypatch):
    """m^2 numbers beside the basis; the work of the step needs the basis alone."""
    kernels, decompose = [], ways.eigendecomposition
    monkeypatch.setattr(ways, "eigendecomposition", lambda M: kernels.append(weakref.ref(M)) or decompose(M))
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1, method="exact")
    assert monitor.step(0, lr=0.1) is not None and monitor.step(1, lr=0.1) is not None
    gc.collect()
    assert len(kernels) == 2 and all(kernel() is None for kernel in kernels)


def test_flow_time_from_an_optimizer():
    assert [s.flow_time for s in loop().history] == pytest.approx([0.0, 0.2, 0.4, 0.6])


@pytest.mark.parametrize("calls", ["before", "after"])
def test_end_of_a_loop_is_found_without_being_told(calls):
    """Whether a step followed the last call shows in the parameters' version counters."""
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=4)
    for step in range(6):
        if calls == "before":
            monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
        if calls == "after":
            monitor.step(step + 1, optimizer=optimizer)
    last = monitor.finish()
    assert (last.step, last.loss) == (6, F.mse_loss(net(x), y).item())
    assert last.flow_time == pytest.approx(0.6 if calls == "before" else 0.5)  # from the first call on
    assert monitor.finish() is None


def test_flow_time_from_given_rates():
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1)
    for step, lr in enumerate([0.1, 0.2, 0.4]):
        monitor.step(step, lr=lr)
    assert [s.flow_time for s in monitor.history] == pytest.approx([0.0, 0.1, 0.3])


def test_flow_time_may_be_given_and_steps_may_jump():
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=5)
    for step in (0, 7, 14):
        monitor.step(step, flow_time=step / 10)
    assert [(s.step, s.flow_time) for s in monitor.history] == [(0, 0.0), (7, 0.7), (14, 1.4)]


def test_without_a_rate_there_is_no_flux_and_a_reason():
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1)
    for step in range(2):
        monitor.step(step)
    last = monitor.history[-1]
    assert last.reasons["flux"].startswith("no flow time has passed") and last.health["nominal_flow_time"] == 1
    assert bool(last.flux.isnan().all()) and math.isnan(last.health["unstable"])


def test_calls_after_the_step_measure_the_weights_after_it():
    before, after = loop(every_n_steps=1), loop(every_n_steps=1, calls="after")
    assert [s.loss for s in after.history] == [s.loss for s in before.history[1:]]


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_steps_that_are_none_are_refused(step):
    net, x, y = problem()
    with pytest.raises(ValueError, match="step must be a non-negative integer"):
        ShellMonitor(net, "mse", (x, y)).step(step)


@pytest.mark.parametrize("lr", [math.nan, math.inf, "0.1"])
def test_rates_that_are_none_are_refused(lr):
    net, x, y = problem()
    with pytest.raises(ValueError, match="lr must be a finite number"):
        ShellMonitor(net, "mse", (x, y)).step(0, lr=lr)


def test_on_error_and_wrong_pairs_are_refused_at_construction():
    net, x, y = problem()
    with pytest.raises(ValueError, match="on_error must be 'warn' or 'raise'"):
        ShellMonitor(net, "mse", (x, y), on_error="never")
    with pytest.raises(ValueError, match="targets must have the outputs' shape"):
        ShellMonitor(net, "mse", (x, y[:, 0]))
    with pytest.raises(TypeError, match="target must be a sink"):
        ShellMonitor(net, "mse", (x, y), writer=3)
    with pytest.raises(ValueError, match="unknown|method must be one of"):
        ShellMonitor(net, "mse", (x, y), method="dense")


# ---- what is measured ----


def test_budget_closure_tends_to_one_with_the_step():
    """-(dL/dt) over the mean dissipation: 1 + O(lr) for descent on the probe."""
    gaps = [abs(loop(num_steps=2, lr=lr, every_n_steps=1).history[1].closures["budget"] - 1) for lr in (0.2, 0.1, 0.05)]
    assert gaps[2] < 0.07 and gaps[0] / gaps[1] > 1.5 and gaps[1] / gaps[2] > 1.8


def test_a_linear_net_is_lazy():
    """Its kernel is constant: no transport, no drift, and frozen-kernel descent explains the whole change."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    _, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=3)
    for step in range(7):
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    for snapshot in monitor.history[1:]:
        assert snapshot.summary["frozen_kernel_share"] == pytest.approx(1.0, abs=1e-12)
        assert snapshot.summary["kernel_drift"] < 1e-7 and abs(snapshot.summary["cka_distance"]) < 1e-12
        assert float(snapshot.transport.abs().max()) < 1e-12
        assert torch.equal(snapshot.frozen_energy, snapshot.energy) or torch.allclose(
            snapshot.frozen_energy, snapshot.energy, atol=1e-14
        )


def test_pair_measures_before_and_after_a_step():
    assert [s.step for s in loop(7, every_n_steps=3, pair=True).history] == [0, 1, 3, 4, 6, 7]


def test_unstable_rates_are_flagged():
    net, x, y = problem()
    largest = loop(1).history[0].summary["lambda_max"]
    for lr, flag in ((1.9 / largest, 0.0), (2.1 / largest, 1.0)):
        monitor = ShellMonitor(net, "mse", (x, y))
        snapshot = monitor.step(0, lr=lr)
        assert snapshot.health["unstable"] == flag
        assert snapshot.health["lr_lambda_max"] == pytest.approx(lr * largest)


def test_replaced_parameters_break_the_flux():
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1)
    for step in range(4):
        if step == 2:
            net[2] = nn.Linear(5, 2).double()
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    reasons = [s.reasons.get("flux", "") for s in monitor.history]
    assert reasons == ["first measurement", "", "parameters were replaced, frozen or unfrozen between measurements", ""]


def test_new_segment_breaks_the_flux_once():
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1)
    for step in range(4):
        if step == 2:
            monitor.new_segment("another task")
        monitor.step(step, lr=0.1)
    assert [s.reasons.get("flux", "") for s in monitor.history] == ["first measurement", "", "another task", ""]


def test_a_random_loss_callable_moves_no_generator():
    def smoothed(outputs, targets):
        return F.huber_loss(outputs + 1e-3 * torch.rand(()), targets)

    net, x, y = problem()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    ShellMonitor(net, smoothed, (x, y), every_n_steps=1).step(0, lr=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_monitor_leaves_model_and_gradients_alone():
    net, x, y = problem()
    F.mse_loss(net(x), y).backward()
    before = [(p.detach().clone(), p.grad, p.grad.clone(), p._version) for p in net.parameters()]
    ShellMonitor(net, "mse", (x, y), every_n_steps=1).step(0, lr=0.1)
    for p, (value, grad, copied, version) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.grad is grad and torch.equal(grad, copied) and p._version == version


# ---- state ----


def test_state_round_trip_continues_the_run():
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    one = ShellMonitor(net, "mse", (x, y), every_n_steps=2)
    for step in range(5):
        one.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    loader = DataLoader(TensorDataset(x + 1, y), len(x))  # one that gives other samples now: the saved ones count
    other = ShellMonitor(net, "mse", loader, every_n_steps=2)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.probe.inputs, x)
    found = [m.step(6, optimizer=optimizer) for m in (one, other)]
    assert found[0].loss == found[1].loss and torch.equal(found[0].energy, found[1].energy)
    assert [s.step for s in other.history] == [0, 2, 4, 6]
    assert found[1].reasons == {"flux": "first measurement after a resume"} and found[0].reasons == {}


def test_state_before_the_first_measurement():
    net, x, y = problem()
    one, other = (ShellMonitor(net, "mse", (x, y)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert other.history == [] and other.step(0, lr=0.1).step == 0


# ---- writing ----


def test_everything_emitted_is_in_memory(tmp_path):
    sink = MemorySink()
    monitor = loop(4, writer=[sink, str(tmp_path / "run.jsonl")])
    steps = [e.step for e in sink.emissions if "grsd_loss/probe" in e.scalars]
    assert steps == [s.step for s in monitor.history] == [0, 2, 4]
    updates = [e.step for e in sink.emissions if "grsd_work/total" in e.scalars]
    assert updates == [0, 2]
    lines = read_json_lines(tmp_path / "run.jsonl")
    assert [line["step"] for line in lines] == [e.step for e in sink.emissions if not e.figures]
    assert all(len(line) > 1 for line in lines) and [e.step for e in sink.emissions if e.figures] == [4]


def test_prefix_renames_every_tag():
    sink = MemorySink()
    loop(3, writer=sink, prefix="grsd_deep_")
    names = {name for e in sink.emissions for name in (*e.scalars, *e.histograms, *e.texts)}
    assert len(names) > 30 and all(name.startswith("grsd_deep_") for name in names)


def test_summary_writer_stays_open(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    monitor = loop(3, writer=writer)
    monitor.close()
    writer.add_scalar("mine", 1.0, 0)
    writer.close()
    assert monitor.num_failed == 0


class Broken(MemorySink):
    def write(self, emission):
        raise OSError("disk full")


def test_a_sink_that_fails_is_one_warning_and_no_break():
    kept = MemorySink()
    with pytest.warns(MeasurementWarning) as caught:
        monitor = loop(6, writer=[Broken(), kept])
    messages = [str(w.message) for w in caught if "written" in str(w.message)]
    assert len(messages) == 1
    assert "grsd: values cannot be written (OSError: disk full); they are kept in history." in messages[0]
    assert monitor.num_failed == 4 and [s.step for s in monitor.history] == [0, 2, 4, 6]
    assert all(bool(s.flux.isfinite().all()) for s in monitor.history[1:])  # the run is not broken by it
    assert all(bool(s.work.isfinite().all()) for s in monitor.history[:-1])
    assert {e.step for e in kept.emissions} == {0, 2, 4, 6}
    assert max(e.scalars.get("grsd_health/failed", 0.0) for e in kept.emissions) == 4.0


def test_a_sink_that_fails_raises_where_that_is_asked_for():
    with pytest.raises(OSError, match="disk full"):
        loop(1, writer=Broken(), on_error="raise")


# ---- cost ----


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def timed_loop(clock, cost, per_step, num_steps=6, **options):
    """Descent in which each measurement takes `cost` and each step `per_step` on the synthetic clock."""
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), **{"every_n_steps": 1, "work": False, **options})
    take = monitor._take

    def slow(step):
        clock.now += cost
        return take(step)

    monitor._take = slow
    for step in range(num_steps):
        monitor.step(step, lr=0.1)
        clock.now += per_step
    return monitor


def test_overhead_is_measuring_over_training_without_it(clock):
    monitor = timed_loop(clock, cost=0.5, per_step=2.0)
    assert monitor.measuring_seconds == pytest.approx(3.0) and monitor.overhead == pytest.approx(3.0 / 12.0)
    emitted = [s.cost["overhead_percent"] for s in monitor.history]
    assert math.isnan(emitted[0])  # nothing has been trained yet
    assert emitted[1:] == pytest.approx([100 * 0.5 * (k + 1) / (2.0 * k) for k in range(1, 6)])  # this one included


def test_a_costly_fixed_schedule_is_warned_about_once(clock):
    with pytest.warns(MeasurementWarning) as caught:
        timed_loop(clock, cost=1.0, per_step=2.0, num_steps=8)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and "every 1 steps costs" in messages[0] and "raise every_n_steps" in messages[0]


def test_a_cheap_fixed_schedule_is_not_warned_about(clock, recwarn):
    timed_loop(clock, cost=0.1, per_step=2.0, num_steps=8)
    assert [w for w in recwarn if w.category is MeasurementWarning] == []


def test_default_schedule_keeps_its_share_in_a_real_loop(clock):
    monitor = timed_loop(clock, cost=0.05, per_step=0.1, num_steps=400, every_n_steps=None, total_steps=400)
    assert 5 <= len(monitor.history) <= 0.02 * 400 * 0.1 / 0.05 and monitor.overhead <= 0.02
    assert monitor.schedule.describe().startswith("log-spaced: ")


def test_summary_reads_as_a_table():
    text = loop(4).summary()
    assert text.startswith("shells of M = nu J J^T, 6 samples x 2 outputs, exact; step 0 -> 4")
    assert all(part in text for part in ("exponents, 95 % intervals", "sum E = L", "cost: 3 measurements"))


def test_a_learning_rate_schedule_is_read_step_by_step():
    """W_a / (lr D_a) is 1 under full-batch descent whatever the scheduler does; the probe closure too."""
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1, on_error="raise")
    for step in range(6):
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
        scheduler.step()
    monitor.finish()
    assert [s.summary["effective_lr"] for s in monitor.history[:-1]] == pytest.approx([1.0] * 6, rel=1e-6)
    assert [s.closures["probe"] for s in monitor.history[:-1]] == pytest.approx([1.0] * 6, rel=1e-6)
    assert monitor.flow_time == pytest.approx(sum(0.1 * 0.5**k for k in range(6)))


def test_flow_time_given_by_the_user_is_exact():
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1, on_error="raise")
    for step in range(4):
        monitor.step(step, flow_time=0.1 * step)
        descend(net, x, y, optimizer)
    monitor.finish(flow_time=0.4)
    assert [s.flow_time for s in monitor.history] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert all(s.health["nominal_flow_time"] == 0 for s in monitor.history)
    assert all(not s.reasons for s in monitor.history[1:])
    assert [s.closures["probe"] for s in monitor.history[:-1]] == pytest.approx([1.0] * 4, rel=1e-6)


def test_a_step_of_size_zero_gives_no_rate_and_no_failure():
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1, on_error="raise")
    for step in range(3):
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    assert monitor.num_failed == 0
    assert math.isnan(monitor.history[0].summary["effective_lr"])
    assert monitor.history[1].reasons["flux"] == "no flow time has passed (dt = 0)"


def test_unfreezing_is_a_break():
    net, x, y = problem()
    net[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1)
    for step in range(4):
        net[0].weight.requires_grad_(step >= 2)
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    assert "unfrozen" in monitor.history[2].reasons["flux"] and not monitor.history[3].reasons


def test_a_resumed_loop_keeps_its_flow_time():
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=5)
    for step in range(10):
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    resumed = ShellMonitor(net, "mse", (x, y), every_n_steps=5)
    resumed.load_state_dict(monitor.state_dict())
    for step in range(10, 20):
        resumed.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    assert [s.flow_time for s in resumed.history] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert resumed.history[-1].health["nominal_flow_time"] == 0


def test_steps_that_go_backwards_are_one_warning():
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1)
    monitor.step(3, lr=0.1)
    with pytest.warns(MeasurementWarning, match="step went backwards"):
        monitor.step(0, lr=0.1)


@pytest.mark.parametrize("method", ["lanczos", "krylov", "randomized"])
def test_incomplete_bases_keep_work_and_frozen_share_honest(method):
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1, method=method, num_matvecs=4, on_error="raise")
    for step in range(3):
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    for snapshot in monitor.history[:2]:
        assert snapshot.summary["effective_lr"] == pytest.approx(1.0, rel=1e-6)
        assert snapshot.closures["probe"] == pytest.approx(1.0, rel=1e-6)
        assert abs(snapshot.closures["dissipation"]) < 1e-8 and abs(snapshot.closures["energy"]) < 1e-10
        assert 0 < snapshot.health["frozen_coverage"] <= 1 + 1e-12
    if method == "randomized":
        assert monitor.history[0].energy_bounds.isnan().all()


def test_the_record_closes_its_own_budget():
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=2, on_error="raise")
    for step in range(5):
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    before, after = monitor.history[:2]
    change = (after.energy - before.energy) / after.summary["dt"]
    torch.testing.assert_close(change, after.transport - after.flux_dissipation, rtol=1e-9, atol=1e-14)
