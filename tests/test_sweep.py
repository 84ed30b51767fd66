"""Backward passes column by column or several at once, and rules that are checked once per graph."""

import gc

import pytest
import torch
from test_gram import MODELS, Wrapped, built, n, oracle, randn, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram import checks as gram_checks
from grsd_callbacks.gram import exact_gram, sweep, verified
from grsd_callbacks.layers import LinearCall


@pytest.fixture
def checks(monkeypatch):
    """How often the samples were taken apart by a second backward pass."""
    seen = []
    right = gram_checks._separate
    monkeypatch.setattr(gram_checks, "_separate", lambda *args: (seen.append(1), right(*args))[1])
    return seen


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_columns_at_once_or_one_by_one(name, at_once, monkeypatch):
    model, x = built(name)
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    monkeypatch.setattr(sweep.Sweeper, "_at_once", lambda self, calls: at_once and not self.refused)
    whole = exact_gram(ModelFunction(model), x).matrix
    assert relative(whole, oracle(model, x)) < 1e-10
    assert relative(exact_gram(ModelFunction(model), x, memory_limit=2000 * len(whole)).matrix, whole) < 1e-12


def test_images_go_column_by_column_on_a_cpu_and_sequences_at_once(monkeypatch):
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    widths = []
    right = sweep._pull
    monkeypatch.setattr(sweep, "_pull", lambda *args, **more: (widths.append(len(args[4])), right(*args, **more))[1])
    for name, several in (("conv2d", False), ("gpt", True)):
        model, x = built(name)
        widths.clear()
        exact_gram(ModelFunction(model), x)
        assert (max(widths) > 1) == several


class Doubled(torch.autograd.Function):
    """2 x, with a backward that refuses transforms: it looks at a value."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g if float(g.sum()) < 1e9 else g


def test_a_backward_that_refuses_several_columns_is_asked_for_one(monkeypatch):
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    model = Wrapped(lambda s, x: s.b(Doubled.apply(s.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 3)).double()
    plain = Wrapped(lambda s, x: s.b(2 * s.a(x)), a=model.a, b=model.b)
    assert relative(exact_gram(ModelFunction(model), randn(n, 6)).matrix, oracle(plain, randn(n, 6))) < 1e-10


@pytest.mark.parametrize("memory_limit", [70_000, 93_000])
def test_a_refusal_frees_memory_only_after_the_graph_was_released(memory_limit, monkeypatch):
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    parts = {"a": nn.Linear(3, 10), "b": nn.Linear(10, 8), "c": nn.Linear(8, 12)}
    model = Wrapped(lambda s, x: s.c(s.b(Doubled.apply(s.a(x))).mean(1)), **parts).double()
    plain = Wrapped(lambda s, x: s.c(s.b(2 * s.a(x)).mean(1)), **parts)
    x = randn(6, 14, 3)
    assert relative(exact_gram(ModelFunction(model), x, memory_limit=memory_limit).matrix, oracle(plain, x)) < 1e-10


def test_running_out_of_memory_is_no_refusal(monkeypatch):
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    model, x = built("mlp")
    limits = []
    right = sweep.Sweeper._pulled

    def scarce(self, *args):
        limits.append(self.memory_limit)
        if len(limits) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, *args)

    monkeypatch.setattr(sweep.Sweeper, "_pulled", scarce)
    assert relative(exact_gram(ModelFunction(model), x).matrix, oracle(model, x)) < 1e-10
    assert limits[1] == limits[0] // 2


@pytest.mark.parametrize("name", ["mlp", "conv2d", "gpt", "batch norm", "sequence of n"])
def test_rules_are_checked_once_per_graph(name, checks):
    model, x = built(name)
    first = exact_gram(ModelFunction(model), x)
    once = len(checks)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    again = exact_gram(ModelFunction(model), x)
    assert once > 0 and len(checks) == once
    assert again.paths == first.paths and relative(again.matrix, oracle(model, x)) < 1e-10
    exact_gram(ModelFunction(model), x[:3])  # other shapes: another graph
    assert len(checks) > once


def test_a_layer_that_changes_its_rule_is_checked_again(checks, monkeypatch):
    """The same graph by name, a wrong rule: v^T K v notices, and what was remembered is dropped without a warning."""
    model, x = built("mlp")
    exact_gram(ModelFunction(model), x)
    once, right = len(checks), LinearCall._left
    monkeypatch.setattr(LinearCall, "_left", lambda self, x: 1.01 * right(self, x))
    found = exact_gram(ModelFunction(model), x)
    assert len(checks) == 2 * once
    assert {path for p, path in found.paths.items() if p.endswith("weight")} == {"rows"}
    assert relative(found.matrix, oracle(model, x)) < 1e-10


def test_another_graph_through_the_same_layers_is_checked_again(checks):
    model = Wrapped(lambda s, x: s.b(torch.tanh(s.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 2)).double()
    exact_gram(ModelFunction(model), randn(n, 6))
    once = len(checks)
    model.body = lambda s, x: s.b(torch.tanh(s.a(x)).softmax(0))  # samples interact now
    with pytest.warns(RuntimeWarning, match="rows:interacting"):
        found = exact_gram(ModelFunction(model), randn(n, 6))
    assert len(checks) > once and relative(found.matrix, oracle(model, randn(n, 6))) < 1e-10
    assert model not in verified._MEMORIES  # rules that did not make a kernel


def test_a_branch_that_starts_at_zero_tells_nothing_of_its_layout():
    """Time first, as many steps as samples: without a gradient either could be the samples."""
    parts = {"a": nn.Linear(3, 5), "up": nn.Linear(5, 6), "head": nn.Linear(5, 2)}

    def body(s, x):
        h = s.a(x.transpose(0, 1))
        return s.head((h + torch.tanh(s.up(h)) @ s.down.T).cumsum(0)).transpose(0, 1)

    model = Wrapped(body, down=nn.Parameter(torch.zeros(5, 6)), **parts).double()
    exact_gram(ModelFunction(model), randn(n, n, 3))
    with torch.no_grad():
        model.down.copy_(1e-5 * randn(5, 6))
    found = exact_gram(ModelFunction(model, params="up.*"), randn(n, n, 3))
    small = exact_gram(ModelFunction(model), randn(n, n, 3), blocks="module").blocks["up"]
    assert relative(small, found.matrix) < 1e-10


def test_what_is_remembered_is_bounded_and_goes_with_the_model():
    model, x = built("mlp")
    before = len(verified._MEMORIES)
    for size in range(1, verified._MOST + 5):
        exact_gram(ModelFunction(model), randn(size, 6))
    assert len(verified._MEMORIES[model]) == verified._MOST
    del model
    gc.collect()
    assert len(verified._MEMORIES) <= before


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6), lambda: nn.Conv1d(2, 2, 3, padding=1)])
def test_the_host_waits_as_often_for_a_deep_net_as_for_a_shallow_one(layer):
    counts = []
    for depth in (2, 8):
        layers = [part for _ in range(depth) for part in (layer(), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Flatten()).double()
        x = randn(n, 2, 6)
        exact_gram(ModelFunction(model), x)
        with Waits() as waits:
            exact_gram(ModelFunction(model), x)
        counts.append(waits.count)
    assert counts[0] == counts[1] <= 3


def test_rules_are_checked_anew_after_some_kernels(checks, monkeypatch):
    monkeypatch.setattr(verified, "RECALLS", 2)
    model, x = built("mlp")
    seen = []
    for _ in range(7):
        exact_gram(ModelFunction(model), x)
        seen.append(len(checks))
    once = seen[0]
    assert seen == [once, once, once, 2 * once, 2 * once, 2 * once, 3 * once]
