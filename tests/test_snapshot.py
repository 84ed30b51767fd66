"""A snapshot survives JSON to the last bit, NaN and infinities included."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from grsd_callbacks import PowerLawFit, ShellMonitor, Snapshot


@pytest.fixture(scope="module")
def snapshots():
    """Real ones: exact and krylov, the first of a run and a later one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for method in ("exact", "krylov"):
        monitor = ShellMonitor(net, "mse", (x, x[:, :2]), every_n_steps=1, method=method, num_matvecs=5)
        for step in range(3):
            monitor.step(step, optimizer=optimizer)
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), x[:, :2]).backward()
            optimizer.step()
        monitor.finish(3)
        found += [monitor.history[0], monitor.history[2]]
    return found


def same(a, b):
    """Equal in type and in every bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(
                a.nan_to_num(0.5) if a.is_floating_point() else a, b.nan_to_num(0.5) if b.is_floating_point() else b
            )
        )
    if isinstance(a, PowerLawFit):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def differing(one, other):
    return [f.name for f in fields(Snapshot) if not same(getattr(one, f.name), getattr(other, f.name))]


@pytest.mark.parametrize("index", range(4), ids=["exact first", "exact later", "krylov first", "krylov later"])
def test_round_trip_is_exact(snapshots, index):
    snapshot = snapshots[index]
    text = snapshot.to_json()
    assert "\n" not in text
    assert differing(snapshot, Snapshot.from_json(text)) == []
    assert Snapshot.from_json(text).to_json() == text


def test_json_is_strict_and_names_what_is_not_finite(snapshots):
    nan, inf = math.nan, math.inf
    snapshot = replace(
        snapshots[0],
        loss=inf,
        energy=torch.tensor([nan, inf, -inf, 0.1, -0.0], dtype=torch.float64),
        summary={"x": nan, "y": -inf, "z": 1e-320},
    )

    def refuse(name):
        raise AssertionError(f"{name} is not strict JSON")

    json.loads(snapshot.to_json(), parse_constant=refuse)
    restored = Snapshot.from_json(snapshot.to_json())
    assert differing(snapshot, restored) == []
    assert math.copysign(1, restored.energy[-1]) == -1


def test_the_comparison_notices_the_last_bit(snapshots):
    snapshot = snapshots[0]
    changed = replace(snapshot, loss=math.nextafter(snapshot.loss, math.inf), energy=snapshot.energy.float())
    assert differing(snapshot, changed) == ["loss", "energy"]


def test_a_record_from_the_sinks_is_a_snapshot(snapshots):
    """read_json_lines gives floats for "nan"; from_dict takes both."""
    data = snapshots[0].to_dict()
    data["work"] = [math.nan if value == "nan" else value for value in data["work"]]
    assert differing(snapshots[0], Snapshot.from_dict(data)) == []


@pytest.mark.parametrize("format", [0, 2, "1", None])
def test_other_formats_are_refused(snapshots, format):
    with pytest.raises(ValueError, match="not a snapshot of format 1: format is"):
        Snapshot.from_dict({**snapshots[0].to_dict(), "format": format})


def test_missing_fields_are_named(snapshots):
    data = snapshots[0].to_dict()
    del data["energy"], data["flux"]
    with pytest.raises(ValueError, match="lacks .*energy.*flux"):
        Snapshot.from_dict(data)


def test_grid_is_that_of_the_edges(snapshots):
    assert torch.equal(snapshots[0].grid.edges, snapshots[0].edges)
    assert snapshots[0].grid.num_shells == snapshots[0].energy.numel() == snapshots[0].flux.numel() + 1
