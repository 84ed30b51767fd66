"""Chunks under a memory bound, running out of memory, batched columns, and the trial of paths."""

import pytest
import torch
from nets import autograd_rows, cnn, jacobian, mlp, randn, relative, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.paths import Products
from grsd_callbacks.plan import BATCHED_PARAMETERS, ProductPlan, overhead_dominates
from grsd_callbacks.transfer import kernel_velocity


def spied(monkeypatch):
    """Counts the graphs that are built, by number of samples."""
    built = []
    original = Products.outputs.fget

    def outputs(self):
        if self._outputs is None:
            built.append(len(self.inputs))
        return original(self)

    monkeypatch.setattr(Products, "outputs", property(outputs))
    return built


def whole(n=23):
    model, x = mlp(), randn(n, 5)
    J = jacobian(model, x)
    return model, x, J, randn(J.shape[0], 3, seed=4)


def test_all_graphs_are_kept_where_they_fit(monkeypatch):
    model, x, J, V = whole()
    op = NTKOperator(model, x)
    assert relative(op @ V, J @ (J.T @ V)) < 1e-12 and op.chunk_size == 23
    built = spied(monkeypatch)
    assert relative(op @ V, J @ (J.T @ V)) < 1e-12
    assert built == []


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_chunks_follow_from_the_bound_and_change_nothing(monkeypatch, share):
    model, x, J, V = whole(47)
    probe = NTKOperator(model, x)
    probe.chunk_size  # noqa: B018
    total = probe.plan.sample_bytes * 47
    op = NTKOperator(model, x, memory_limit=int(share * total))
    assert relative(op @ V, J @ (J.T @ V)) < 1e-12
    assert op.chunk_size < 47 and (op.chunk_size == 1 or 47 % op.chunk_size)  # unequal chunks
    held = sum(len(p.inputs) for p in op._kept.values())
    assert (held + op.chunk_size) * op.plan.sample_bytes <= op.memory_limit or op.chunk_size == 1
    assert share < 0.1 or held > 0
    built = spied(monkeypatch)
    op @ V[:, 0]
    assert sum(built) == 2 * (47 - held)  # only the others are built again, once for J^T v and once for J w
    assert relative(op.outputs, NTKOperator(model, x).outputs) < 1e-14


def test_sample_bytes_are_measured():
    model = nn.Sequential(nn.Linear(100, 400, bias=False), nn.Tanh(), nn.Linear(400, 1, bias=False)).double()
    op = NTKOperator(model, randn(64, 100), forward="double_backward")
    op @ torch.ones(64)
    least = 8 * 2 * 400  # tanh's result and its gradient
    assert least <= op.plan.sample_bytes <= 2 * least


class Limited(nn.Module):
    """Runs out of memory above so many samples."""

    def __init__(self, most):
        super().__init__()
        self.net, self.most = mlp(), most

    def forward(self, x):
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.net(x)


def test_out_of_memory_halves_the_chunk_and_goes_on():
    x, V = randn(23, 5), randn(69, 2)
    model = seeded(lambda: Limited(4))
    op = NTKOperator(model, x)
    expected = NTKOperator(model.net, x)
    assert relative(op @ V, expected @ V) < 1e-12
    assert op.chunk_size == 3 and op.num_products == 2.0
    model.most = 1
    op.release()
    assert relative(op.vjp(V), expected.vjp(V)) < 1e-12 and op.chunk_size == 1
    model.most = 0
    op.release()
    with pytest.raises(RuntimeError, match="can't allocate"):
        op.vjp(V)


class Interacting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x - x.mean(0))


def test_samples_that_interact_are_never_split():
    model, x = seeded(Interacting), randn(8, 5)
    J = jacobian(model, x)
    op = NTKOperator(model, x, memory_limit=100)
    with pytest.warns(RuntimeWarning, match="cannot be built in chunks: samples interact"):
        assert relative(op @ torch.ones(24), J @ (J.T @ torch.ones(24).double())) < 1e-12
    assert op.chunk_size == 8


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(checkpoint(lambda t: torch.tanh(self.a(t)), x, use_reentrant=False))


def test_lean_graphs_are_refused_where_they_differ():
    model, x = seeded(Recomputed), randn(7, 5)
    J = autograd_rows(model, x)
    op = NTKOperator(model, x)
    V = randn(21, 2)
    assert relative(op @ V, J @ (J.T @ V)) < 1e-12
    assert op.plan.lean is False and op.refused["lean"]


# ---- several columns ----


@pytest.mark.parametrize("make, shape", [(mlp, (7, 5)), (cnn, (4, 1, 6, 6))])
def test_batched_columns_are_those_of_single_ones(make, shape):
    model, x = make(), randn(*shape)
    op = NTKOperator(model, x)
    V = randn(op.shape[0], 70)
    batched = op @ V
    assert op.plan.columns == {"vjp": 32, "jvp": 32} and op.num_products == 70.0
    singly = torch.stack([op @ column for column in V.unbind(1)], 1)
    assert relative(batched, singly) < 1e-13
    W = op.vjp(V)
    assert relative(op.jvp(W), singly) < 1e-13
    chunked = NTKOperator(model, x, chunk_size=2)
    assert relative(chunked @ V, singly) < 1e-13 and chunked.plan.columns == {"vjp": 32, "jvp": 32}


def test_large_nets_are_not_batched():
    cpu = torch.device("cpu")
    assert overhead_dominates(cpu, BATCHED_PARAMETERS, 1e5) and not overhead_dominates(cpu, BATCHED_PARAMETERS, 1e8)
    assert not overhead_dominates(cpu, 10 * BATCHED_PARAMETERS, 1e5)
    assert overhead_dominates(torch.device("cuda"), 10 * BATCHED_PARAMETERS, 1e6)
    op = NTKOperator(nn.Linear(300, 200).double(), randn(2, 300))
    V = randn(400, 3)
    op @ V
    assert op.plan.columns == {"vjp": 1}


def test_a_block_product_never_holds_all_columns(monkeypatch):
    op = NTKOperator(nn.Linear(300, 200).double(), randn(2, 300))
    widths = []
    original = NTKOperator.vjp
    monkeypatch.setattr(NTKOperator, "vjp", lambda self, V: widths.append(V.shape[1:]) or original(self, V))
    op @ randn(400, 5)
    assert widths == [(1,)] * 5
    assert (op @ randn(400, 0)).shape == (400, 0)


# ---- the plan ----


def test_a_plan_is_adopted(monkeypatch):
    model, x, J, V = whole()
    first = NTKOperator(model, x)
    first @ V
    assert first.plan.path == "double_backward" and first.plan.lean and first.plan.chunk_size == 23
    second = NTKOperator(model, x)
    second.adopt(first.plan)
    built = spied(monkeypatch)
    assert relative(second @ V, J @ (J.T @ V)) < 1e-12
    assert built == [23]  # one graph, no trial


def test_the_trial_takes_few_samples(monkeypatch):
    model, x = mlp(), randn(64, 5)
    built = spied(monkeypatch)
    op = NTKOperator(model, x)
    op @ torch.ones(192)
    assert built.count(64) == 1 and set(built) == {4, 64} and built.count(4) == 2
    assert isinstance(op.plan, ProductPlan)


@pytest.mark.parametrize("value", [0, 2.5, True])
def test_wrong_memory_limit(value):
    with pytest.raises(ValueError, match="memory_limit must be a positive integer or None"):
        NTKOperator(mlp(), randn(7, 5), memory_limit=value)


# ---- cost, by counted operations ----


def operations(n, width):
    """Multiplications of one kernel product of a net with square layers."""
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    op = NTKOperator(net, torch.randn(n, width, generator=torch.Generator().manual_seed(0)))
    op @ torch.ones(n)
    with FlopCounterMode(display=False) as counter:
        op @ torch.ones(n)
    return counter.get_total_flops(), op.num_parameters


def test_a_product_costs_two_passes_and_grows_linearly_in_samples_and_parameters():
    small, P = operations(8, 32)
    # J^T v and J w: a layer's weight and its input, each once; the first layer has no gradient for its input
    assert small == 2 * 2 * 8 * (32 * 32 + 2 * 32 * 32 + 2 * 32)
    assert operations(32, 32)[0] == 4 * small
    wide, more = operations(8, 128)
    assert wide / small == pytest.approx(more / P, rel=0.05)


def test_memory_of_products_does_not_grow_with_the_number_of_vectors():
    """Nothing of size k P is held, in block products and in the matrix-free transfer."""
    net = nn.Sequential(nn.Linear(60, 600), nn.Tanh(), nn.Linear(600, 4)).double()
    op = NTKOperator(net, randn(5, 60))
    P = op.num_parameters
    V, velocity = randn(20, 18), randn(P)

    def most(task):
        task()
        with torch.profiler.profile(profile_memory=True) as profile:
            task()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = highest = 0
        for event in events:
            held += event.nbytes()
            highest = max(highest, held)
        return highest / (8 * P)

    assert most(lambda: op @ V) < 8
    assert most(lambda: kernel_velocity(op, velocity, V)) < 10
    assert most(lambda: op.vjp(V)) > 18  # what was asked for
