"""The choice between the exact kernel and products: by size, by memory, by cost, and the reason given."""

import math

import pytest
import torch
from nets import mlp, randn
from torch import nn

from grsd_callbacks import method
from grsd_callbacks.gram import GramEstimate
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.method import MAX_EXACT, MAX_LANCZOS, choose_by_cost, method_by_size
from grsd_callbacks.monitor import ShellMonitor


def operator(n=7, **more):
    return NTKOperator(mlp(), randn(n, 5), **more)


def test_by_cost_either_way(monkeypatch):
    cheap, dear = (GramEstimate(operations, 10**6, {"w": "linear"}) for operations in (1.0, 1e15))
    monkeypatch.setattr(method, "gram_operations", lambda *args, **more: cheap)
    found = choose_by_cost(operator(), 96)
    assert found.method == "exact" and found.exact_seconds < 3 * found.krylov_seconds
    assert "exact" in found.reason and "96 products" in found.reason and "1 MB" in found.reason
    monkeypatch.setattr(method, "gram_operations", lambda *args, **more: dear)
    found = choose_by_cost(operator(), 96)
    assert found.method == "krylov" and found.exact_seconds > 3 * found.krylov_seconds


def test_rows_are_charged_for_their_backward_passes(monkeypatch):
    rows = GramEstimate(1.0, 10**6, {"w": "rows"})
    monkeypatch.setattr(method, "gram_operations", lambda *args, **more: rows)
    op = operator()
    assert choose_by_cost(op, 1).exact_seconds >= op.shape[0] * 1e-6
    assert op.plan.chunk_size == 7


def test_never_beyond_the_memory_bound(monkeypatch):
    bound = 10**8
    for peak, expected in ((bound // 2, "exact"), (2 * bound - 20_000, "lanczos"), (3 * bound, "krylov")):
        estimate = GramEstimate(1.0, peak, {"w": "linear"})
        monkeypatch.setattr(method, "gram_operations", lambda *args, estimate=estimate, **more: estimate)
        found = choose_by_cost(operator(), 10**6, memory_limit=bound)
        assert found.method == expected
        if expected == "lanczos":
            assert "200 MB, above the bound of 200 MB exact" in found.reason
    assert found.reason == "an exact kernel takes 300 MB, above the bound of 200 MB" and math.isnan(found.exact_seconds)
    op = operator(memory_limit=1000)
    assert choose_by_cost(op, 10**6, memory_limit=1000).reason.startswith("an exact kernel and its eigenvalues take")


@pytest.mark.parametrize("backward, expected", [(0.1, "lanczos"), (1e-9, "krylov")])
def test_above_the_size_for_eigenvectors(backward, expected, monkeypatch):
    """Without them where that pays, else by products."""
    monkeypatch.setattr(method, "_backward_seconds", lambda op: backward)
    op = NTKOperator(nn.Linear(2, 40).double(), randn(40, 2))
    assert MAX_EXACT["cpu"] < op.shape[0] == 1600 < MAX_LANCZOS["cpu"]
    found = choose_by_cost(op, 96)
    assert found.method == expected and "without eigenvectors" in found.reason
    assert (found.lanczos_seconds <= 1.5 * found.krylov_seconds) == (expected == "lanczos")
    assert method_by_size(op) == "krylov"  # without a trial


def test_eigenvectors_are_left_out_where_they_are_what_costs_too_much(monkeypatch):
    monkeypatch.setattr(method, "EIGEN_OPERATIONS", 1e12)
    found = choose_by_cost(operator(), 96)
    assert found.method == "lanczos" and 2 * found.lanczos_seconds <= 3 * found.krylov_seconds < found.exact_seconds


def test_above_the_device_s_size(monkeypatch):
    monkeypatch.setattr(method, "MAX_LANCZOS", {"cpu": 20})
    found = choose_by_cost(operator(), 10)
    assert found.method == "krylov" and "m = 21 is above 20" in found.reason
    assert MAX_EXACT["cuda"] > MAX_EXACT["cpu"]


def test_a_monitor_without_eigenvectors():
    net, x = mlp().float(), torch.randn(7, 5)
    monitor = ShellMonitor(net, "mse", (x, torch.zeros(7, 3)), method="lanczos", num_matvecs=8, on_error="raise")
    (line,) = [line for line in monitor.report.splitlines() if line.startswith("  method")]
    assert "lanczos: exact kernel, its eigenvalues, and 8 products with it (energies) (as asked for)" in line
    assert any(line.startswith("  kernel      linear") for line in monitor.report.splitlines())
    assert monitor.step(0, lr=0.1).method == "lanczos"


@pytest.mark.parametrize("memory_limit, chosen", [(None, "exact"), (2000, "krylov")])
def test_the_report_says_why(memory_limit, chosen):
    net, x = mlp().float(), torch.randn(7, 5)
    monitor = ShellMonitor(net, "mse", (x, torch.zeros(7, 3)), memory_limit=memory_limit, num_matvecs=30)
    (line,) = [line for line in monitor.report.splitlines() if line.startswith("  method")]
    assert f"method      {chosen}" in line and (
        "products" in line if memory_limit is None else "above the bound" in line
    )
    snapshot = monitor.step(0, lr=0.1)
    assert snapshot.method == chosen
    assert snapshot.dissipation.sum() == pytest.approx(snapshot.grad_norm_sq, rel=1e-4)
