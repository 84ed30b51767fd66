"""Figures during a run: when they are drawn, what that costs, and that nothing else changes."""

import math
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_figures import run_python
from test_monitor import Clock, descend, problem
from torch import nn

import grsd_callbacks.outlet
from grsd_callbacks import (
    MeasurementWarning,
    MemorySink,
    RenormalizabilityMonitor,
    ShellDynamicsCallback,
    ShellMonitor,
    tags,
)
from grsd_callbacks.monitor import FigureSchedule, stopwatch
from grsd_callbacks.monitor.figure_schedule import FIRST_ESTIMATE, spare_seconds
from grsd_callbacks.schedule import FixedSchedule, LogSchedule

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore:grsd. measuring every . steps costs")
SEVEN = {f"grsd_figures/{x}" for x in ("energy", "dissipation", "flux", "spectrum", "effective_lr", "loss", "verdict")}


# ---- the cadence alone ----


def drawn(schedule, steps, spare=math.inf, seconds=1.0):
    """Measured steps after which the schedule draws; `spare` at each measurement."""
    found = []
    for count, step in enumerate(steps, 1):
        if schedule.due(step, count, spare):
            schedule.drawn(step, seconds)
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (100, [0, 1, 99, 100, 150, 199, 350, 360, 400], [100, 350, 400]),
        (1, [0, 1, 2, 5], [1, 2, 5]),
        (10, [50], []),  # one measurement has no course
        (10, [50, 51, 60], [51, 60]),
    ],
)
def test_a_number_is_kept_at_the_first_measurement_after_it(every, steps, expected):
    assert drawn(FigureSchedule(every), steps, spare=-1.0) == expected  # whatever it costs


def test_auto_draws_when_the_run_has_doubled():
    assert drawn(FigureSchedule(), range(100)) == [3, 6, 12, 23, 44, 84]
    assert drawn(FigureSchedule(), [0, 1, 6, 20, 30, 50, 80, 400, 600, 1000]) == [20, 50, 400, 1000]
    assert drawn(FigureSchedule(None), range(100)) == []


def test_auto_waits_until_a_drawing_fits():
    schedule = FigureSchedule()
    assert not schedule.due(30, 10, spare=FIRST_ESTIMATE - 0.1) and schedule.due(30, 10, spare=FIRST_ESTIMATE)
    schedule.drawn(30, seconds=0.5)
    assert not schedule.due(60, 20, spare=0.4) and schedule.due(60, 20, spare=0.5)  # as long as the last one took
    assert not schedule.due(56, 20, spare=9.0)


def test_nothing_is_drawn_where_the_run_ends():
    assert drawn(FigureSchedule(5, total_steps=20), [0, 5, 10, 15, 20]) == [5, 10, 15]
    assert drawn(FigureSchedule(total_steps=7), range(8)) == [3]
    assert drawn(FigureSchedule(total_steps=8), range(9)) == [3, 6]


@pytest.mark.parametrize("every", ["auto", 100])
def test_state_round_trip(every):
    steps = list(range(0, 2000, 30))
    whole = drawn(FigureSchedule(every), steps)
    first, second = FigureSchedule(every), FigureSchedule(every)
    before = drawn(first, steps[:20])
    second.load_state_dict(first.state_dict())
    after = []
    for count, step in enumerate(steps[20:], 21):
        if second.due(step, count, 1.0):
            second.drawn(step, 1.0)
            after.append(step)
    assert before + after == whole and second.num_drawings == len(whole) and len(before) > 1


# ---- what measurements need is theirs ----


def decided(max_overhead=0.02, total_steps=10_000, per_step=0.1, cost=1.0):
    """A default schedule after its decision."""
    schedule, spent, elapsed = LogSchedule(10, max_overhead, total_steps), 0.0, 0.0
    assert schedule.reserved(0) == (math.inf if max_overhead else 0.0)
    for step in range(7):
        schedule.due(step)
        schedule.observe(step, spent, elapsed)
        now = cost if step < 2 else 0.0
        spent, elapsed = spent + now, elapsed + now + per_step
    return schedule


def test_the_default_schedule_reserves_what_later_steps_do_not_earn():
    schedule = decided()
    left = [p for p in schedule.points if p > 9_000]
    assert left  # and the two of the end, at 1.2 s each; 1,000 steps earn 2 s
    assert schedule.reserved(9_000) == pytest.approx(1.2 * (len(left) + 2) - 0.02 * 0.1 * 1_000)
    assert schedule.reserved(10_000) == pytest.approx(2.4) and schedule.reserved(10) == 0.0
    assert decided(total_steps=None).reserved(50) == 0.0 and decided(max_overhead=None).reserved(50) == 0.0


def test_what_is_reserved_is_resumed():
    schedule, resumed = decided(), LogSchedule(10, 0.02, 10_000)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.reserved(9_900) == schedule.reserved(9_900) > 0


def test_spare_is_what_is_neither_spent_nor_reserved():
    watch = SimpleNamespace(measuring_seconds=7.0, drawing_seconds=2.0, training_seconds=900.0)
    schedule = decided()
    expected = 0.02 * 900 - 7.0 - schedule.reserved(9_000)
    assert spare_seconds(9_000, schedule, watch, 0.02) == pytest.approx(expected) and schedule.reserved(9_000) > 0.5
    assert spare_seconds(9_000, LogSchedule(), watch, 0.02) == 0.0  # not decided: all may be needed
    assert spare_seconds(9_000, FixedSchedule(10), watch, 0.02) == pytest.approx(0.02 * 900 - 2.0)
    assert spare_seconds(9_000, LogSchedule(max_overhead=None), watch, None) == pytest.approx(7.0 - 2 * 2.0)


# ---- in a loop, on a synthetic clock ----


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def timed(clock, num_steps, per_step, cost=0.05, drawing=2.0, **options):
    """(monitor, steps of the drawings): measurements, steps and drawings take as long as is said."""
    net, x, y = problem()
    monitor = ShellMonitor(net, "mse", (x, y), work=False, writer=MemorySink(), total_steps=num_steps, **options)
    take, found = monitor._take, []

    def slow_take(step):
        clock.now += cost
        return take(step)

    def slow_figures(history, fits):
        clock.now += drawing
        found.append(history[-1].step)
        return True

    monitor._take, monitor.outlet.figures = slow_take, slow_figures
    for step in range(num_steps):
        monitor.step(step, lr=0.01)
        clock.now += per_step
    return monitor, found


def steps_of(monitor):
    return [s.step for s in monitor.history]


def test_drawing_counts_as_overhead_and_is_emitted(clock):
    monitor, found = timed(clock, 8, per_step=10.0, cost=0.5, every_n_steps=1, figures_every_n_steps=3)
    assert found == [3, 6]
    assert monitor.measuring_seconds == pytest.approx(8 * 0.5 + 2 * 2.0)
    assert monitor.overhead == pytest.approx(8.0 / 80.0)
    percent = [s.cost["overhead_percent"] for s in monitor.history]
    assert percent[3] == pytest.approx(100 * 2.0 / 30) and percent[4] == pytest.approx(100 * (2.5 + 2.0) / 40)


def test_the_last_drawing_is_outside_the_overhead(clock):
    monitor, found = timed(clock, 8, per_step=10.0, cost=0.5, every_n_steps=4, figures_every_n_steps=None)
    before = monitor.measuring_seconds
    monitor.finish(8)
    assert found == [8] and monitor.measuring_seconds == pytest.approx(before + 0.5)


def test_auto_stays_within_the_share_in_a_long_run(clock):
    monitor, found = timed(clock, 3_000, per_step=0.5)
    assert 3 <= len(found) <= 6 and monitor.overhead <= 0.02
    shares = [s.cost["overhead_percent"] for s in monitor.history if s.step > found[0]]
    assert max(shares) <= 2.0  # at any time since the first
    assert steps_of(monitor) == steps_of(timed(clock, 3_000, per_step=0.5, figures=False)[0])


def test_auto_draws_nothing_in_a_short_run_and_costs_no_measurement(clock):
    monitor, found = timed(clock, 400, per_step=0.1)
    assert found == [] and steps_of(monitor) == steps_of(timed(clock, 400, per_step=0.1, figures=False)[0])


def test_auto_leaves_alone_what_measurements_still_need(clock):
    """Thinned: measurements take all there is, so nothing is left at any time, though much has been earned."""
    monitor, found = timed(clock, 3_000, per_step=0.5, cost=1.2)
    assert len(monitor.schedule.points) < 30 and 0.02 * 1_500 - monitor.measuring_seconds > 2.0
    assert found == []


def test_a_number_costs_no_measurement_either(clock):
    plain, _ = timed(clock, 400, per_step=0.1, figures=False)
    monitor, found = timed(clock, 400, per_step=0.1, figures_every_n_steps=1)
    assert steps_of(monitor) == steps_of(plain) and found == steps_of(monitor)[1:]
    assert monitor.schedule.describe() == plain.schedule.describe()


def test_a_fixed_cadence_of_measurements_leaves_the_share_to_the_figures(clock):
    monitor, found = timed(clock, 1_000, per_step=1.0, cost=1.0, every_n_steps=10)
    assert len(found) >= 3 and found[0] >= 150  # 2 % of that is the first estimate
    assert monitor.overhead - 100 * 1.0 / 1_000 <= 0.02
    assert timed(clock, 140, per_step=1.0, cost=1.0, every_n_steps=10)[1] == []


def test_without_a_limit_drawing_takes_no_longer_than_measuring(clock):
    monitor, found = timed(clock, 2_000, per_step=0.01, cost=0.5, max_overhead=None)
    assert len(found) >= 2 and 2.0 * len(found) <= 0.5 * len(monitor.history)
    assert timed(clock, 2_000, per_step=0.01, cost=0.01, max_overhead=None)[1] == []


def test_a_slow_first_drawing_is_the_next_estimate(clock):
    assert len(timed(clock, 3_000, per_step=0.5, drawing=60.0)[1]) == 1


def test_a_costly_number_is_warned_about_once_and_not_blamed_on_the_measurements(clock):
    with pytest.warns(MeasurementWarning) as caught:
        timed(clock, 20, per_step=1.0, cost=0.01, every_n_steps=1, figures_every_n_steps=2)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and "drawing figures every 2 steps costs" in messages[0]
    assert "raise figures_every_n_steps" in messages[0]


def test_a_resumed_loop_keeps_the_cadence(clock):
    options = {"every_n_steps": 1, "figures_every_n_steps": 3}
    monitor, found = timed(clock, 8, per_step=50.0, **options)
    net, x, y = problem()
    resumed = ShellMonitor(net, "mse", (x, y), work=False, writer=MemorySink(), **options)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.watch.drawing_seconds == pytest.approx(4.0) and found == [3, 6]
    for step in range(8, 13):
        resumed.step(step, lr=0.01)
    assert [e.step for e in resumed.outlet.sinks.sinks[0].emissions if e.figures] == [9, 12]


# ---- what is drawn ----


def train(num_steps, writer, **options):
    net, x, y = problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), **{"every_n_steps": 1, "writer": writer, **options})
    for step in range(num_steps):
        monitor.step(step, optimizer=optimizer)
        descend(net, x, y, optimizer)
    monitor.finish()
    return monitor


def test_figures_show_the_run_as_it_was_and_its_own_exponents(monkeypatch):
    calls, original = [], grsd_callbacks.outlet.run_figures

    def noted(history, fits):
        calls.append((len(history), dict(fits)))
        return original(history, fits)

    monkeypatch.setattr(grsd_callbacks.outlet, "run_figures", noted)
    sink = MemorySink()
    monitor = train(6, sink, figures_every_n_steps=2)
    assert [count for count, _ in calls] == [3, 5, 7] and [fits for _, fits in calls[:2]] == [{}, {}]
    assert calls[2][1].keys() == monitor.final_exponents().keys()
    emissions = [e for e in sink.emissions if e.figures]
    assert [e.step for e in emissions] == [2, 4, 6] and all(e.figures.keys() >= SEVEN for e in emissions)
    title = emissions[0].figures["grsd_figures/verdict"]().axes[0].get_title(loc="left")
    assert title == "Verdict after 3 measurements"  # as many as there were then, though drawn now


def fitted(folder, ours, module=None, **options):
    cases.seed()
    module = module or cases.Module(cases.mlp(), nn.CrossEntropyLoss())
    return cases.fit(module, cases.classes(), folder, [ours], logger=TensorBoardLogger(folder, version=0), **options)


def images(folder):
    read = EventAccumulator(str(folder / "lightning_logs" / "version_0"), {"images": 0}).Reload()
    return {tag: [event.step for event in read.Images(tag)] for tag in read.Tags()["images"]}


def callback(**options):
    return ShellDynamicsCallback(**{"num_probe": 8, "every_n_steps": 1, "figures_every_n_steps": 3, **options})


def test_event_files_hold_figures_of_several_steps(tmp_path, unrendered):
    fitted(tmp_path, callback())
    found = images(tmp_path)
    assert {tag: found[tag] for tag in SEVEN} == dict.fromkeys(SEVEN, [3, 6, 8])
    assert set(found) - SEVEN <= {"grsd_figures/collapse"}


def test_without_a_cadence_there_is_the_last_drawing_alone(tmp_path):
    fitted(tmp_path, callback(figures_every_n_steps=None))
    assert {tag: images(tmp_path)[tag] for tag in SEVEN} == dict.fromkeys(SEVEN, [8])


class Dies(cases.Module):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 7:
            raise RuntimeError("cable pulled")
        return super().training_step(batch, batch_idx)


def test_a_killed_run_has_left_its_figures(tmp_path, unrendered):
    with pytest.raises(RuntimeError, match="cable pulled"):
        fitted(tmp_path, callback(), Dies(cases.mlp(), nn.CrossEntropyLoss()))
    assert images(tmp_path) == dict.fromkeys(SEVEN, [3, 6])


@pytest.mark.parametrize("options", [{"fast_dev_run": 4}, {}])
def test_fast_dev_run_draws_nothing(tmp_path, monkeypatch, options):
    made = []
    monkeypatch.setattr(grsd_callbacks.figures, "new_figure", lambda: made.append(1) or 1 / 0)
    ours = callback(figures_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted(tmp_path, ours, **options)
    assert bool(made) != bool(options) and (ours.monitor.num_failed == 0) == bool(options)


def test_a_resumed_fit_keeps_the_cadence(tmp_path, unrendered):
    first = fitted(tmp_path / "a", callback(), max_epochs=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    fitted(tmp_path / "b", callback(), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    assert images(tmp_path / "a")["grsd_figures/energy"] == [3, 4]
    assert images(tmp_path / "b")["grsd_figures/energy"] == [6, 9, 12]


def test_conditions_are_drawn_at_the_end_only():
    cases.seed()
    net, (x, y) = cases.mlp(dtype=torch.float64), cases.digits(6, torch.float64)
    sink = MemorySink()
    monitor = RenormalizabilityMonitor(
        nn.Sequential(net[0], net[1], nn.Linear(16, 16).double(), nn.Tanh(), net[2]),
        "mse", (x, cases.one_hot(y, torch.float64)), every_n_steps=1, writer=sink, figures_every_n_steps=1,
    )  # fmt: skip
    for step in range(3):
        monitor.step(step, lr=0.1)
    assert not any(e.figures for e in sink.emissions)
    monitor.finish(3)
    assert [(e.step, list(e.figures)) for e in sink.emissions if e.figures] == [(3, [tags.CONDITIONS_FIGURE])]


# ---- what goes wrong ----


def test_what_cannot_be_drawn_is_one_warning_and_tried_again(monkeypatch):
    original, left = grsd_callbacks.outlet.run_figures, [IndexError("no figure"), IndexError("still none")]

    def fails_twice(*args):
        if left:
            raise left.pop(0)
        return original(*args)

    monkeypatch.setattr(grsd_callbacks.outlet, "run_figures", fails_twice)
    sink = MemorySink()
    with pytest.warns(MeasurementWarning) as caught:
        monitor = train(8, sink, figures_every_n_steps=2)
    (message,) = [str(w.message) for w in caught if "figures" in str(w.message)]
    assert message.startswith("grsd: figures cannot be drawn or written (IndexError: no figure)")
    assert "tried again when figures are next due" in message
    assert [e.step for e in sink.emissions if e.figures] == [6, 8] and monitor.num_failed == 2
    assert [s.step for s in monitor.history] == list(range(9))
    assert all(bool(s.flux.isfinite().all()) for s in monitor.history[1:])  # the run is not broken by it


def test_values_that_cannot_be_written_are_told_of_after_figures_that_could_not(monkeypatch):
    """One is not the other: the disk may fill up long after matplotlib has failed."""

    class Full(MemorySink):
        def write(self, emission):
            if emission.scalars and emission.step >= 4:
                raise OSError("disk full")

    monkeypatch.setattr(grsd_callbacks.outlet, "run_figures", lambda *args: {}["energy"])
    with pytest.warns(MeasurementWarning) as caught:
        train(6, Full(), figures_every_n_steps=2)
    messages = [str(w.message).split(" (")[0] for w in caught if "cannot be" in str(w.message)]
    assert messages == ["grsd: figures cannot be drawn or written", "grsd: values cannot be written"]


def test_it_raises_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(grsd_callbacks.outlet, "run_figures", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(4, MemorySink(), figures_every_n_steps=2, on_error="raise")


def test_training_goes_on_unchanged_where_drawing_fails(tmp_path, monkeypatch, unrendered):
    monkeypatch.setattr(grsd_callbacks.figures.maps, "energy", lambda *args: 1 / 0)
    runs = {}
    for name, ours in (("plain", pl.Callback()), ("measured", callback(figures_every_n_steps=1))):
        cases.seed()
        module = cases.Module(cases.bn_dropout(), nn.CrossEntropyLoss())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs[name] = cases.image(fitted(tmp_path / name, ours, module), module)
    assert cases.differences(runs["plain"], runs["measured"]) == [] and ours.monitor.num_failed == 8


CODE = """
import test_monitor as t
from grsd_callbacks import ShellMonitor
from torch.utils.tensorboard import SummaryWriter
import tempfile, torch
def train(**options):
    net, x, y = t.problem()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=1, figures_every_n_steps=2, **options)
    for step in range(3):
        monitor.step(step, optimizer=optimizer)
        t.descend(net, x, y, optimizer)
    return monitor
"""


def test_without_matplotlib_there_is_the_one_warning():
    code = """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = train(writer=SummaryWriter(folder))
        monitor.finish()
    ours = [w for w in caught if "matplotlib" in str(w.message)]
    print(len(ours), ours[0].category.__name__, monitor.num_failed, len(monitor.history))
    """
    block = 'sys.modules["matplotlib"] = None\n'
    assert run_python(block + CODE + "if True:" + code) == ["1", "FigureWarning", "0", "4"]


def test_matplotlib_is_left_alone():
    code = """
    import matplotlib
    matplotlib.use("svg")
    before = dict(matplotlib.rcParams)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        monitor = train(writer=SummaryWriter(folder))
        print(monitor.figure_schedule.num_drawings, monitor.num_failed)
    print("matplotlib.pyplot" in sys.modules, dict(matplotlib.rcParams) == before, matplotlib.get_backend())
    """
    assert run_python(CODE + "if True:" + code) == ["1", "0", "False", "True", "svg"]
