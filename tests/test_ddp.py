"""The Lightning callback under DistributedDataParallel, two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import ddp_script
import lightning_cases as cases
import pytest
import torch
from test_distributed import assert_same_run

from grsd_callbacks import Conditions, RenormalizabilityMonitor, ShellMonitor

SCRIPT = Path(ddp_script.__file__)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found, by case."""
    folder = tmp_path_factory.mktemp("ddp")
    root = str(SCRIPT.parent.parent)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ["exact", "krylov", "default", "failing", "late", "pair"])
def test_training_is_bit_identical_on_both_ranks(ranks, name):
    for found in ranks:
        assert cases.differences(found["plain"], found[name]["image"]) == []
    assert cases.differences(ranks[0]["plain"], ranks[1]["plain"])  # the image sees that ranks train on other samples


@pytest.mark.parametrize("name", ["exact", "krylov", "default", "pair"])
def test_both_ranks_have_the_same_history(ranks, name):
    assert ranks[0][name]["steps"][:1] == [0] and ranks[0][name]["steps"][-1] == 2
    assert repr(ranks[0][name]["history"]) == repr(ranks[1][name]["history"])
    assert [found[name]["warnings"] for found in ranks] == [[], []]


def test_the_probe_is_taken_from_every_ranks_first_batch(ranks):
    """Fifteen samples: eight of rank zero's batch, then seven of rank one's."""
    first, second = (found["first batch"][0] for found in ranks)
    expected = torch.cat([first[:8], second[:7]])
    assert not torch.equal(first, second)
    for found in ranks:
        assert torch.equal(found["exact"]["probe"], expected)


def test_more_samples_than_the_batches_hold_come_from_the_data_set(ranks):
    images = cases.digits()[0]
    expected = images[[i * cases.NUM_TRAIN // 42 for i in range(42)]]
    for found in ranks:
        assert torch.equal(found["more than a batch"], expected)


@pytest.mark.parametrize("name, options", [("exact", {}), ("krylov", {"num_matvecs": 6, "num_density_matvecs": 4})])
def test_the_first_measurement_is_that_of_one_process(ranks, name, options):
    first, second = (found["first batch"] for found in ranks)
    probe = tuple(torch.cat([a[:8], b[:7]]) for a, b in zip(first, second))
    cases.seed()
    monitor = ShellMonitor(cases.bn_dropout(), "cross_entropy", probe, method=name, **options, work=False)
    alone = monitor.step(0, lr=0.1).to_dict()
    there = ranks[0][name]["history"][0]
    assert there["work"] != alone["work"]  # of the step after, which only the run has taken
    summary = {key: value for key, value in there["summary"].items() if key in alone["summary"]}
    assert_same_run([alone], [{**there, "work": alone["work"], "summary": summary}], 1e-6)


def test_a_failing_rank_fails_the_measurement_of_all(ranks):
    for found in ranks:
        assert found["failing"]["steps"] == [2] and found["failing"]["failed"] == 1
    (warning,) = ranks[0]["failing"]["warnings"]
    assert "measurement at step 0 failed on rank 1 (OutOfMemoryError: out of memory (made up))" in warning
    assert ranks[1]["failing"]["warnings"] == []


def test_all_ranks_begin_later_where_one_cannot(ranks):
    (warning,) = ranks[0]["late"]["warnings"]
    assert "the model cannot be measured on the probe (RuntimeError: no operator)" in warning
    assert ranks[1]["late"]["warnings"] == []
    assert [(found["late"]["steps"], found["late"]["failed"]) for found in ranks] == [([1, 2], 1)] * 2


def test_wrong_use_is_refused_on_all_ranks(ranks):
    for found in ranks:
        assert found["wrong use"].startswith("ValueError: probe targets must have the outputs' shape (32, 10)")


def test_a_sharded_model_is_measured_like_a_whole_one(ranks):
    """ModelParallelStrategy with fully_shard: same weights, probe and first measurement as under DDP."""
    for found in ranks:
        (plain, measured), history, report = found["sharded"]
        assert repr(plain) == repr(measured) and "parameters gathered into an unsharded twin" in report
        assert [s["step"] for s in history] == [0, 2]
        there = found["exact"]["history"][0]
        steps = {name: there[name] for name in ("work", "summary")}
        assert_same_run([there], [{**history[0], **steps}], 1e-6)


def test_a_checkpoint_resumes_on_all_ranks(ranks):
    for found in ranks:
        assert found["resumed"] == ([0, 2], [0, 2, 4])


# ---- conditions: measured by rank zero, shared with all ----


@pytest.mark.parametrize("name", ["conditions", "conditions by default", "conditions failing"])
def test_conditions_leave_training_as_it_was(ranks, name):
    for found in ranks:
        assert cases.differences(found["plain"], found[name]["image"]) == []


def test_both_ranks_know_the_conditions_and_rank_zero_judges(ranks):
    first, second = (found["conditions"] for found in ranks)
    assert [c["step"] for c in first["conditions"]] == [c["step"] for c in second["conditions"]] == [0, 1, 2]
    assert repr(first["conditions"][:-1]) == repr(second["conditions"][:-1])  # the last one is thorough where it judges
    assert first["conditions"][-1]["errors"] and not second["conditions"][-1]["errors"]
    assert len(first["verdicts"]) == 6 and second["verdicts"] is None
    assert (first["failed"], second["failed"], first["warnings"], second["warnings"]) == (0, 0, [], [])
    assert [c["step"] for c in ranks[1]["conditions by default"]["conditions"]] == [0, 2]


def test_conditions_are_those_of_one_process(ranks):
    first, second = (found["first batch"] for found in ranks)
    probe = tuple(torch.cat([a[:8], b[:7]]) for a, b in zip(first, second))
    cases.seed()
    monitor = RenormalizabilityMonitor(cases.bn_dropout(), "cross_entropy", probe)
    monitor.step(0, lr=0.1)
    there, alone = Conditions.from_dict(ranks[1]["conditions"]["conditions"][0]), monitor.conditions[0]
    for group, name in (("propagation", "spread"), ("incoherence", "cross_share"), ("evolution", "kernel_speed")):
        assert getattr(getattr(there, group), name) == pytest.approx(getattr(getattr(alone, group), name), rel=1e-5)
    assert there.loss == pytest.approx(alone.loss, rel=1e-6)


def test_conditions_that_fail_on_rank_zero_fail_on_all(ranks):
    first, second = (found["conditions failing"] for found in ranks)
    assert [c["step"] for c in first["conditions"]] == [c["step"] for c in second["conditions"]] == [0, 2]
    assert first["failed"] == second["failed"] == 1 and second["warnings"] == []
    (warning,) = first["warnings"]
    assert "measurement at step 1 failed on rank 0 (RuntimeError: no conditions)" in warning
    assert len(first["verdicts"]) == 6


def test_conditions_of_a_sharded_model_are_those_of_a_whole_one(ranks):
    for found in ranks:
        plain, _ = found["sharded"][0]
        sharded = found["conditions sharded"]
        assert repr(plain) == repr(sharded["image"]) and sharded["failed"] == 0
        there, here = (Conditions.from_dict(c["conditions"][0]) for c in (found["conditions"], sharded))
        assert here.evolution.kernel_speed == pytest.approx(there.evolution.kernel_speed, rel=1e-5)
