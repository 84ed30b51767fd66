"""The twin of a model: same names, values, ties, hooks and outputs, and nothing shared with the source's parameters."""

import torch
from torch import nn
from torch.nn.utils import parametrizations

from grsd_callbacks.sharded import Twin, is_sharded


class Odd(nn.Module):
    """Tied weights, a layer used twice, layers in a plain list, a bound method, a hook, weight norm and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.again = self.normed
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.layers = {"all": [self.norm, (self.normed, self.again)]}
        self.function = self.inner
        self.normed.register_forward_hook(lambda module, args, output: output.tanh())

    def inner(self, x):
        norm, (one, two) = self.layers["all"]
        return two(one(norm(self.embedding(x))))

    def forward(self, x):
        return self.function(x) @ self.head.weight


def test_the_twin_computes_the_same_from_parameters_of_its_own():
    torch.manual_seed(0)
    source, x = Odd().eval(), torch.randn(5, 3)
    source.norm.running_mean += 1.0
    source.normed.bias.requires_grad_(False)
    twin = Twin(source)
    module = twin.refresh()
    assert type(module) is Odd and torch.equal(module(x), source(x))
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in source.named_parameters()]
    for one, other in zip(source.named_parameters(), module.named_parameters()):
        assert one[1] is not other[1] and one[1].requires_grad == other[1].requires_grad
    assert module.head.weight is module.embedding.weight and module.again is module.normed
    assert module.layers["all"][0] is module.norm and module.function.__self__ is module


def test_the_twin_follows_only_when_asked():
    source, x = Odd().eval(), torch.randn(5, 3)
    twin = Twin(source)
    before = twin.refresh()(x)
    with torch.no_grad():
        source.embedding.weight.mul_(2.0)
        source.norm.running_var.mul_(3.0)
    source.train()
    assert torch.equal(twin.module(x), before)
    twin.make_room()
    assert twin.refresh().training and torch.equal(twin.module.eval()(x), source.eval()(x))


def test_what_is_sharded():
    assert not is_sharded(Odd())  # what is, needs ranks: tests/test_distributed.py
