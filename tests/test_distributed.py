"""Two gloo processes against one: the same numbers, undisturbed training, and failures that all ranks share."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch
from torch import nn

from benchmarks import communication
from grsd_callbacks import ShellMonitor
from grsd_callbacks.distributed import Group
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram import exact_gram
from grsd_callbacks.gram.division import partial_gram, share_out

SCRIPT = Path(rank_cases.__file__)
#: of totals and shell contents, relative to the sum of each array; what is a difference of them gets more
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
MORE = 100
CONTENTS = ("loss", "grad_norm_sq", "energy", "dissipation", "counts", "eigenvalues", "weights", "work")
BOUNDS = ("energy_bounds", "dissipation_bounds", "count_bounds")
DIFFERENCES = ("transport", "flux", "flux_dissipation", "frozen_energy", "transfer", "drift_flux", "summary")
SAME = ("step", "flow_time", "nu", "num_samples", "num_outputs", "method", "edges", "resolved", "reasons")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "store"), str(folder)],
            cwd=SCRIPT.parent.parent,
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def numbers(value):
    """All numbers of plain data in order, also those written as text."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [] if value is None else [float(value)]


def gap(one, other):
    """Largest difference over the sum of absolute values; NaN must be in the same places."""
    one, other = numbers(one), numbers(other)
    assert len(one) == len(other) and [math.isnan(x) for x in one] == [math.isnan(x) for x in other]
    pairs = [(x, y) for x, y in zip(one, other) if math.isfinite(x) and math.isfinite(y)]
    size = sum(abs(x) for x, _ in pairs)
    return max((abs(x - y) for x, y in pairs), default=0.0) / (size or 1.0)


def assert_same_run(one, other, tolerance):
    """Two runs' snapshots as plain data."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert {name: a[name] for name in SAME} == {name: b[name] for name in SAME}
        contents = {name: gap(a[name], b[name]) for name in (*CONTENTS, *BOUNDS)}
        assert max(contents.values()) < tolerance, (a["step"], contents)
        differences = {name: gap(a[name], b[name]) for name in DIFFERENCES}
        assert max(differences.values()) < MORE * tolerance, (a["step"], differences)


@pytest.mark.parametrize("dtype", rank_cases.DTYPES)
@pytest.mark.parametrize("method", rank_cases.METHODS)
def test_two_ranks_measure_what_one_does(ranks, method, dtype):
    alone = rank_cases.measured(method, dtype)
    slack = 10 if method == "randomized" else 1  # Ritz vectors that have not converged turn with the rounding
    assert_same_run(alone, ranks[0][f"{method} {dtype}"], slack * TOLERANCE[dtype])
    assert repr(ranks[0][f"{method} {dtype}"]) == repr(ranks[1][f"{method} {dtype}"])  # both keep the same history


def test_buffers_are_rank_zeros(ranks):
    """Without copying them the parts do not fit together: the running statistics differ between ranks."""
    alone = rank_cases.measured("krylov", "float64")
    assert gap(alone[0]["energy"], ranks[0]["without the copies"][0]["energy"]) > 1e-3


def test_fewer_samples_than_ranks(ranks):
    alone = rank_cases.measured("krylov", "float64", num_samples=1)
    assert_same_run(alone, ranks[0]["one sample"], 1e-12)


def test_the_work_is_divided(ranks):
    (n0, products0, part0, plan0, report), (n1, products1, part1, plan1, _) = (found["shares"] for found in ranks)
    assert (n0, n1) == (11, 10) and products0 == products1 > 10
    assert plan0 == plan1 and part0.norm() > 0 and part1.norm() > 0
    model, (x, _) = rank_cases.net(), rank_cases.data()
    whole = exact_gram(ModelFunction(model), x).matrix
    assert (part0 + part1 - whole).norm() < 1e-12 * whole.norm() < (part0 - whole).norm()
    assert "ranks       2: samples of the probe for products, terms of the exact kernel" in report


def test_all_ranks_drop_what_they_remember_of_a_model_that_has_changed(ranks):
    """One kernel by rank zero alone, with the old rules refuted; then the work is divided again."""
    assert ranks[0]["relearned"] == [0, 1, 1]


def test_samples_that_see_each_other_are_measured_by_rank_zero(ranks):
    snapshots, report = ranks[0]["interacting"]
    assert_same_run(rank_cases.interacting(0, 1)[0], snapshots, 1e-12)
    assert "rank 0 of 2 measures, the others wait (samples are not independent of each other)" in report
    assert repr(ranks[1]["interacting"]) == repr(ranks[0]["interacting"])


def test_a_monitor_may_measure_by_itself(ranks):
    assert len(ranks[0]["by itself"]) == 1 and ranks[1]["by itself"] == []


@pytest.mark.parametrize("method", rank_cases.METHODS)
def test_training_is_bit_identical_on_both_ranks(ranks, method):
    for found in ranks:
        assert found[f"trained {method}"] == found["plain"]
    assert ranks[0]["plain"] != ranks[1]["plain"]  # the generators differ, so the fingerprint sees them


@pytest.mark.parametrize("name", rank_cases.FAULTS)
def test_a_failing_rank_fails_the_measurement_of_all(ranks, name):
    rank, *_, error, _ = rank_cases.FAULTS[name]
    for found in ranks:
        assert found[name]["fingerprint"] == found["plain"]
        assert found[name]["failed"] == 1
        assert found[name]["steps"] == ranks[0][name]["steps"] and len(found[name]["steps"]) == 3
    (warning,) = ranks[0][name]["warnings"]
    assert f"failed on rank {rank} ({type(error).__name__}: {error})" in warning and "goes on unchanged" in warning
    assert ranks[1][name]["warnings"] == []


def test_errors_of_one_rank_are_raised_on_all(ranks):
    assert ranks[0]["raising"] == ranks[1]["raising"]
    found = ranks[0]["raising"]
    assert found["rank 1 has nothing to train"].startswith("ValueError: model has no trainable parameters")
    assert found["rank 0 has no probe"].startswith("ValueError: probe: expected a pair")
    assert "pickle" in found["the probe cannot be sent"]
    assert found["another shape on rank 0"].startswith(
        "ValueError: the model on rank 1 has other parameters or buffers than on rank 0; measure the same model"
    )
    assert found["on_error"] == ("'made up'", 1)


def test_rank_zero_draws_during_the_run_and_its_failure_is_raised_on_all(ranks):
    (drawn, error), (elsewhere, same) = (found["figures"] for found in ranks)
    assert len(drawn) >= 2 and drawn == sorted(set(drawn)) and elsewhere == []
    assert error == same == "ZeroDivisionError of rank 0"


@pytest.mark.parametrize(
    ("how", "work", "reason"),
    [
        ("written", [True, False, True, True, False], ""),  # the work of step 1; of the last measurement there is none
        ("replaced", [True] * 4 + [False], "parameters were replaced, frozen or unfrozen between measurements"),
    ],
)
def test_what_one_rank_notices_is_decided_together(ranks, how, work, reason):
    """Else one would go on to the next measurement, while the other waits for it to complete the last one."""
    for found in ranks:
        assert found[how][:2] == ([0, 1, 2, 3, 4], work)
        assert found[how][2] == ["first measurement", "", reason, "", ""]


def test_the_schedule_is_rank_zeros_decision(ranks):
    """Rank 1 is slower, and would have allowed 600 %."""
    assert ranks[0]["timed"] == ranks[1]["timed"]
    steps, points, decision = ranks[0]["timed"]
    assert "at most 100 %" in decision and steps[:2] == [0, 1] and set(steps[2:]) == {*points, 40}


@pytest.mark.parametrize("by_default", [True, False])
@pytest.mark.parametrize("method", rank_cases.METHODS)
def test_the_calculation_of_traffic_is_what_is_sent(ranks, method, by_default):
    """With and without the default schedule and the figures that it draws."""
    sent, num, rows, parameters = ranks[0][f"traffic {method}{', default' if by_default else ''}"]
    products, density = {"exact": (0, 0), "lanczos": (6, 0), "krylov": (6, 4), "randomized": (6, 0)}[method]
    options = {"density": density, "itemsize": 8, "schedule": by_default, "figures": by_default}
    one = communication.traffic(method, parameters, rows, products, **options)
    assert sent == pytest.approx(one.payload, rel=0.01)
    assert num == one.collectives


def test_the_table_of_traffic(tmp_path, capsys):
    found = communication.main(["--out", str(tmp_path / "table.json"), "--memory", "1e10"])
    assert json.loads((tmp_path / "table.json").read_text())["results"] == found
    lines = capsys.readouterr().out.splitlines()
    assert {entry["method"] for entry in found} == set(rank_cases.METHODS)
    assert len(lines) == 2 + len(found) and "calculated: 25 GB/s a rank" in lines[0]
    for entry in found:
        seconds = [entry["seconds"][str(r)] for r in communication.RANKS]
        assert seconds[0] == 0.0 and seconds == sorted(seconds) and entry["fits"] == (entry["parameters"] <= 10**8)


@pytest.mark.parametrize("method", rank_cases.METHODS)
def test_a_sharded_model_is_measured_like_a_whole_one(ranks, method):
    """FSDP2; the parameters are gathered from both ranks."""
    snapshots, report = ranks[0][f"sharded {method}"]
    assert_same_run(rank_cases.measured(method, "float64"), snapshots, 1e-12)
    assert "parameters gathered into an unsharded twin" in report
    assert repr(ranks[1][f"sharded {method}"]) == repr(ranks[0][f"sharded {method}"])


def test_sharded_training_is_bit_identical_on_both_ranks(ranks):
    for rank, found in enumerate(ranks):
        plain, measured, failing = (found[f"sharded {name}"] for name in ("plain", "measured", "failing"))
        assert repr(plain[0]) == repr(measured[0]) == repr(failing[0])
        assert measured[1:] == (0, []) and failing[1] == 1 and len(failing[2]) == (rank == 0)
    assert "failed on rank 1 (OutOfMemoryError: out of memory (made up))" in ranks[0]["sharded failing"][2][0]


def test_shards_that_cannot_be_gathered_are_refused(ranks):
    for found in ranks:
        parallel, alone = found["refused shards"]
        assert "is tensor parallel, so it computes on a part of its parameters and cannot be measured" in parallel
        assert "so they all have to measure it; leave distributed=True" in alone


def test_collectives(ranks):
    zero, one = (found["collectives"] for found in ranks)
    for found in (zero, one):
        assert found["sum"] == [3.0] * 3 and found["all"] == [True, False]
        assert found["overwritten"] == [0.0, 1.0, 2.5, sum(range(2**21))]
        assert found["integers"] == [7, 0]
        assert found["share"]["rank"] == 0 and found["gather"] == [("rank", 0), ("rank", 1)]
        assert found["errors"][1:] == ["RankError: on rank 0: Odd: odd argument", "ValueError: mine"]
        assert found["errors"][0][:2] == ("division by zero", 0)
    assert zero["share_of"] == [slice(0, 0), slice(0, 1), slice(0, 3)]
    assert one["share_of"] == [slice(0, 0), slice(1, 1), slice(3, 5)]


def test_alone_every_collective_is_the_identity():
    group, x = Group.current(), torch.ones(2)
    assert (group.rank, group.size, group.leads) == (0, 1, True)
    assert group.sum(x) is x and group.all(True) and not group.all(False) and group.integers([3]) == [3]
    assert group.gather("a") == ["a"] and group.share(lambda: x) is x and group.share_of(5) == slice(0, 5)
    with pytest.raises(KeyError):
        group.together(lambda: {}["a"])


def test_terms_are_shared_out_by_what_they_cost():
    class Term:
        def __init__(self, operations):
            self.operations = operations

    terms = [Term(x) for x in (1.0, 8.0, 3.0, 4.0, 1.0)]
    loads = [sum(t.operations for t in part) for part in share_out(terms, 3)]
    assert sorted(loads) == [4.0, 5.0, 8.0]
    assert [len(part) for part in share_out(terms[:1], 3)] == [1, 0, 0]


@pytest.mark.parametrize("size", [1, 3, 40])
def test_parts_of_the_kernel_add_up(size):
    model, (x, _) = rank_cases.net(), rank_cases.data()
    function = ModelFunction(model)
    parts = [partial_gram(function, x, rank, size) for rank in range(size)]
    whole = exact_gram(ModelFunction(model), x)
    total = parts[0].total(sum(part.matrix for part in parts))
    assert (total.matrix - whole.matrix).norm() < 1e-13 * whole.matrix.norm()
    assert total.paths == whole.paths and total.num_unused == whole.num_unused and total.check_gap < 1e-12
    assert len({part.plan for part in parts}) == 1


def test_kernels_that_cannot_be_taken_apart_have_no_plan():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()
    part = partial_gram(ModelFunction(model, mode="train"), rank_cases.data()[0], 0, 2)
    assert part.plan is None and not part.matrix.any()


def test_one_rank_measures_alone():
    monitor = ShellMonitor(rank_cases.net(), "mse", rank_cases.data())
    assert not monitor.team.divided and "ranks" not in monitor.report
