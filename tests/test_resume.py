"""A run resumed from a checkpoint continues: the same probe and shells, no step twice and none left out."""

from functools import partial

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grsd_callbacks import ShellDynamicsCallback

EPOCHS, STEPS_AN_EPOCH, EVERY = 4, 4, 2
MEASURED = [0, 2, 4, 6, 8, 10, 12, 14, 16]
pytestmark = [  # what Lightning says of any such run
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*ModelCheckpoint"),
]


class OneBatchMany(TensorDataset):
    """Every batch is the same, so that a restart in mid-epoch sees what the uninterrupted run saw."""

    def __init__(self):
        x, y = cases.digits(16)
        super().__init__(x.repeat(STEPS_AN_EPOCH, 1), y.repeat(STEPS_AN_EPOCH))


def data():
    return DataLoader(OneBatchMany(), batch_size=16, shuffle=False)


def module():
    cases.seed()
    optimizer = partial(torch.optim.SGD, lr=0.2, momentum=0.5)
    return cases.Module(cases.mlp(), nn.CrossEntropyLoss(), optimizer)


class Ends(pl.Callback):
    """The run ends after so many optimizer steps: Lightning 2.4 repeats the batch before a checkpoint in mid-epoch."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop |= trainer.global_step >= MEASURED[-1]


def callback(**options):
    return ShellDynamicsCallback(**{"num_probe": 8, "every_n_steps": EVERY, **options})


def run(folder, ours, ckpt_path=None, checkpoint=None, **options):
    if checkpoint is None:
        return cases.fit(module(), data(), folder, [ours, Ends()], ckpt_path, **{"max_epochs": EPOCHS, **options})
    callbacks = [ours, Ends(), ModelCheckpoint(folder, filename="at-{step}", save_top_k=-1, **checkpoint)]
    return cases.fit(module(), data(), folder, callbacks, ckpt_path, max_epochs=EPOCHS, enable_checkpointing=True)


def summary(snapshots):
    """What must not depend on where a run was interrupted."""
    return [(s.step, s.flow_time, s.loss, s.energy.tolist(), s.work.nan_to_num(-1).tolist()) for s in snapshots]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, and its checkpoints after every optimizer step and every epoch."""
    folder, ours = tmp_path_factory.mktemp("whole"), callback()
    run(folder, ours, checkpoint={"every_n_train_steps": 1})
    run(folder / "epochs", callback(), checkpoint={"every_n_epochs": 1})
    assert [s.step for s in ours.history] == MEASURED
    return ours, folder


def checkpoint_path(folder, name):
    (path,) = folder.glob(f"{name}.ckpt")
    return path


@pytest.mark.parametrize(
    "name",
    ["at-step=5", "at-step=6", "at-step=7", "at-step=8", "at-step=9", "epochs/at-step=8"],
    ids=["mid-epoch", "mid-epoch, due", "before the last batch", "last batch", "first batch", "end of epoch"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole, name):
    uninterrupted, folder = whole
    resumed = callback()
    run(tmp_path, resumed, checkpoint_path(folder, name))
    assert [s.step for s in resumed.history] == MEASURED
    assert summary(resumed.history) == summary(uninterrupted.history)
    assert all(torch.equal(s.edges, uninterrupted.history[0].edges) for s in resumed.history)
    assert torch.equal(resumed.monitor.probe.inputs, uninterrupted.monitor.probe.inputs)
    assert torch.equal(resumed.monitor.probe.targets, uninterrupted.monitor.probe.targets)
    assert resumed.monitor.num_failed == 0


@pytest.mark.parametrize("saved_at", [5, 8])
def test_flux_right_after_a_resume_is_nan_and_says_why(tmp_path, whole, saved_at):
    uninterrupted, folder = whole
    resumed = callback()
    run(tmp_path, resumed, checkpoint_path(folder, f"at-step={saved_at}"))
    last = max(s for s in MEASURED if s < saved_at)
    after = [s for s in resumed.history if s.step > last]
    assert bool(after[0].flux.isnan().all()) and bool(after[0].transport.isnan().all())
    assert after[0].reasons == {"flux": "first measurement after a resume"}
    for snapshot, expected in zip(after[1:], uninterrupted.history[-len(after) + 1 :], strict=True):
        assert torch.equal(snapshot.flux, expected.flux) and bool(snapshot.flux.isfinite().all())
        assert "flux" not in snapshot.reasons
        assert snapshot.summary["kernel_drift"] == expected.summary["kernel_drift"]  # the same frozen basis


def test_exponents_go_on_with_the_whole_series(tmp_path, whole):
    uninterrupted, folder = whole
    resumed = callback()
    run(tmp_path, resumed, checkpoint_path(folder, "at-step=8"))
    series = [c.monitor.run.trajectory.state_dict() for c in (uninterrupted, resumed)]
    times = [state.pop("velocity_time") for state in series]
    velocities = [state.pop("velocity") for state in series]
    assert repr(series[0]) == repr(series[1])
    missing = [k for k, t in enumerate(times[0]) if t not in times[1]]
    assert len(missing) == 1  # what happened between the last measurement and the first after the resume is not known
    assert repr([v for k, v in enumerate(velocities[0]) if k not in missing]) == repr(velocities[1])
    assert resumed.history[-1].exponents["chi"].num_points == len(MEASURED) - 1  # all but t = 0


def test_checkpoint_loads_with_weights_only_and_holds_the_measurement_of_its_step(whole):
    state = torch.load(checkpoint_path(whole[1], "at-step=7"), weights_only=True)
    ours = state["callbacks"]["ShellDynamicsCallback"]
    assert len(ours["run"]["history"]) == 4 and ours["last_step"] == 7 - 1


def test_pair_schedule_is_kept(tmp_path):
    ours, resumed = callback(every_n_steps=5, pair=True), callback(every_n_steps=5, pair=True)
    run(tmp_path, ours, checkpoint={"every_n_train_steps": 6})
    run(tmp_path / "on", resumed, checkpoint_path(tmp_path, "at-step=6"))
    assert [s.step for s in resumed.history] == [s.step for s in ours.history] == [0, 1, 5, 6, 10, 11, 15, 16]


def test_default_schedule_keeps_its_decision(tmp_path):
    ours, resumed = callback(every_n_steps=None, max_overhead=50.0), callback(every_n_steps=None, max_overhead=50.0)
    run(tmp_path, ours, checkpoint={"every_n_train_steps": 8})
    run(tmp_path / "on", resumed, checkpoint_path(tmp_path, "at-step=8"))
    states = [c.monitor.schedule.state_dict() for c in (resumed, ours)]
    assert all(states[0][name] == states[1][name] for name in ("decided", "points", "decision", "left_out"))
    assert [s.step for s in resumed.history] == [s.step for s in ours.history]


def test_a_finished_run_goes_on_without_measuring_its_end_twice(tmp_path):
    ours, resumed = callback(), callback()
    trainer = run(tmp_path, ours, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    run(tmp_path, resumed, tmp_path / "end.ckpt")
    assert [s.step for s in resumed.history] == MEASURED


def test_another_interval_may_be_asked_for(tmp_path):
    ours, resumed = callback(every_n_steps=4), callback(every_n_steps=3)
    run(tmp_path, ours, checkpoint={"every_n_train_steps": 6})
    run(tmp_path / "on", resumed, checkpoint_path(tmp_path, "at-step=6"))
    assert [s.step for s in resumed.history] == [0, 4, 6, 9, 12, 15, 16]


def test_from_fixed_to_default_schedule_repeats_no_step(tmp_path):
    ours, resumed = callback(), callback(every_n_steps=None)
    run(tmp_path, ours, checkpoint={"every_n_train_steps": 7})
    run(tmp_path / "on", resumed, checkpoint_path(tmp_path, "at-step=7"))
    steps = [s.step for s in resumed.history]
    assert steps == sorted(set(steps)) and steps[:4] == [0, 2, 4, 6] and steps[-1] == 16


def test_checkpoint_without_our_state_starts_a_history(tmp_path):
    """The callback was added later: its first measurement is the run's first as far as it knows."""
    cases.fit(
        module(), data(), tmp_path, [ModelCheckpoint(tmp_path, filename="old")], max_epochs=2, enable_checkpointing=True
    )
    ours = callback()
    run(tmp_path, ours, tmp_path / "old.ckpt")
    assert [s.step for s in ours.history] == [8, 10, 12, 14, 16]
    assert ours.history[0].reasons == {"flux": "first measurement"} and ours.history[0].flow_time == 0.0
