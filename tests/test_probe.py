"""Probes: made once from pairs and loaders, and refused when they cannot be probes."""

from typing import NamedTuple

import pytest
import torch
from nets import randint, randn
from torch.utils.data import DataLoader, TensorDataset

from grsd_callbacks.probe import (
    Probe,
    concatenate,
    num_samples,
    plain_leaves,
    probe_from,
    restored,
    take,
    unpack_batch,
)

X, Y = randn(6, 3), randint(4, 6)


def test_a_pair_is_cloned():
    x, y = X.clone(), Y.clone()
    probe = probe_from((x, y))
    x.zero_(), y.zero_()
    assert torch.equal(probe.inputs, X) and torch.equal(probe.targets, Y) and probe.num_samples == 6


def test_num_keeps_the_first_samples():
    probe = probe_from((X, Y), 4)
    assert torch.equal(probe.inputs, X[:4]) and torch.equal(probe.targets, Y[:4])
    assert probe_from((X, Y), 100).num_samples == 6
    assert probe_from(Probe(X, Y), 2).num_samples == 2


@pytest.mark.parametrize("num, expected", [(None, 2), (2, 2), (3, 3), (5, 5), (50, 6)])
def test_loader(num, expected):
    probe = probe_from(DataLoader(TensorDataset(X, Y), batch_size=2), num)
    assert torch.equal(probe.inputs, X[:expected]) and torch.equal(probe.targets, Y[:expected])


def test_structured_inputs():
    inputs = {"ids": X, "more": (X[:, :1], 7), "scalar": torch.tensor(3.0)}
    part = Probe(inputs, Y).take(slice(1, 3))
    assert torch.equal(part.inputs["ids"], X[1:3]) and torch.equal(part.inputs["more"][0], X[1:3, :1])
    assert part.inputs["more"][1] == 7 and float(part.inputs["scalar"]) == 3.0
    whole = concatenate([part, Probe(inputs, Y).take(slice(3, 6))])
    assert torch.equal(whole.inputs["ids"], X[1:]) and torch.equal(whole.targets, Y[1:])
    assert torch.equal(take(X, torch.tensor([2, 0]), 6), X[[2, 0]])
    assert whole.to("cpu").num_samples == 5


def test_batches_are_understood():
    assert unpack_batch((1, 2)) == (1, 2)
    assert unpack_batch([1, 2]) == (1, 2)
    assert unpack_batch({"x": X, "label": Y}) == (X, Y)
    rest, labels = unpack_batch({"ids": X, "mask": X, "labels": Y})
    assert labels is Y and set(rest) == {"ids", "mask"}


@pytest.mark.parametrize(
    "batch, message",
    [
        ((1, 2, 3), "in a tuple of 3 items"),
        (X, "in a Tensor"),
        ({"a": 1, "b": 2}, "a mapping with keys \\['a', 'b'\\]"),
        ({"x": 1, "label": 1, "target": 2}, "cannot tell inputs from targets"),
    ],
)
def test_batches_that_are_not(batch, message):
    with pytest.raises(ValueError, match=message):
        unpack_batch(batch)


@pytest.mark.parametrize(
    "source, error, message",
    [
        ((X, Y, Y), ValueError, "expected a pair \\(inputs, targets\\), got 3 items"),
        ((X, Y[:4]), ValueError, "inputs have 6 samples, targets have shape \\(4,\\)"),
        ((X, torch.tensor(1.0)), ValueError, "one row per sample"),
        ((X[:0], Y[:0]), ValueError, "no samples"),
        (("words", Y), ValueError, "no tensor with a sample dimension"),
        ([], ValueError, "got 0 items"),
        (DataLoader([]), ValueError, "loader is empty"),
        ("auto?", TypeError, "got str"),
        (X, TypeError, "got Tensor"),
        (3, TypeError, "got int"),
    ],
)
def test_sources_that_are_no_probe(source, error, message):
    with pytest.raises(error, match=message):
        probe_from(source)


def test_num_samples_skips_scalars():
    assert num_samples((torch.tensor(2.0), X)) == 6


class Pair(NamedTuple):
    a: torch.Tensor
    b: object


def test_a_checkpoint_holds_plain_leaves_and_the_run_gives_the_structure(tmp_path):
    probe = Probe(Pair(torch.ones(3, 2), object()), torch.zeros(3))
    leaves = {"inputs": plain_leaves(probe.inputs), "targets": plain_leaves(probe.targets)}
    torch.save(leaves, tmp_path / "probe.pt")
    loaded = torch.load(tmp_path / "probe.pt", weights_only=True)
    again = restored(Probe(Pair(torch.zeros(5, 2), "here"), torch.ones(5)), loaded)
    assert isinstance(again.inputs, Pair) and torch.equal(again.inputs.a, torch.ones(3, 2)) and again.inputs.b == "here"
    with pytest.raises(ValueError, match="inputs have 2 parts, this run's 1"):
        restored(Probe(torch.zeros(5, 2), torch.ones(5)), loaded)


def test_edges_of_a_graph_are_not_left_without_their_nodes():
    x, edges = randn(6, 3), torch.tensor([[0, 1, 5], [1, 2, 0]])
    with pytest.raises(ValueError, match="3 of the 6 nodes of a graph cannot be taken without the others"):
        take((x, edges), slice(0, 3), 6)
    assert take((x, edges), slice(0, 6), 6)[0].shape == (6, 3)
    inside = torch.tensor([[0, 1], [1, 2]])
    assert [t.shape for t in take((x, inside), slice(0, 3), 6)] == [(3, 3), (2, 2)]
    beyond = torch.tensor([[0, 1], [1, 9]])  # no indices of these samples
    assert take((x, beyond), slice(0, 3), 6)[1] is beyond
