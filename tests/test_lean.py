"""Lean derivatives against PyTorch's own: the same outputs, J^T v and J w, and what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from nets import jacobian, randn, relative, seeded
from torch import nn
from torch.func import functional_call

from grsd_callbacks.lean import lean_derivatives


class Shifted(nn.Module):
    """The layer on inputs that depend on parameters themselves."""

    def __init__(self, layer, *shape):
        super().__init__()
        self.layer = layer
        self.shift = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.layer(x * (1 + 0.1 * self.shift) + self.shift).tanh()


def settled(norm, *shape):
    """A batch norm with running statistics of its own."""
    norm.train()(3 * torch.randn(9, *shape) + 1)
    return norm.eval()


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear_sequence": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear_without_bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 6, 5)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "conv2d_named_padding": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 5)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), (4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, groups=2), (4, 5, 4)),
    "batch_norm": (lambda: settled(nn.BatchNorm2d(4), 4, 5, 5), (4, 5, 5)),
    "batch_norm_flat": (lambda: settled(nn.BatchNorm1d(4), 4), (4,)),
    "batch_norm_plain": (lambda: settled(nn.BatchNorm1d(4, affine=False), 4), (4,)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 5, 5)),
    "group_norm_plain": (lambda: nn.GroupNorm(2, 4, affine=False), (4, 5)),
    "layer_norm": (lambda: nn.LayerNorm(4), (5, 4)),
    "layer_norm_two": (lambda: nn.LayerNorm((5, 4)), (3, 5, 4)),
    "layer_norm_without_bias": (lambda: nn.LayerNorm(4, bias=False), (4,)),
    "layer_norm_plain": (lambda: nn.LayerNorm(4, elementwise_affine=False), (4,)),
}
LEFT_ALONE = ("conv2d_named_padding",)


def case(name):
    make, shape = LAYERS[name]
    net = seeded(lambda: Shifted(make(), *shape))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype))
    return net, randn(3, *shape)


def products(f, leaves, v, W):
    """J^T v, and J W column by column and batched."""
    pulled = torch.autograd.grad(f, leaves, v.view_as(f), retain_graph=True)
    z = torch.zeros_like(f, requires_grad=True)
    graph = torch.autograd.grad(f, leaves, z, create_graph=True)
    columns = [[w.view_as(p) for w, p in zip(c.split([p.numel() for p in leaves]), leaves)] for c in W.unbind(1)]
    pushed = [torch.autograd.grad(graph, z, c, retain_graph=True)[0].flatten() for c in columns]
    stacked = [torch.stack(parts) for parts in zip(*columns)]
    (batched,) = torch.autograd.grad(graph, z, stacked, is_grads_batched=True)
    return torch.cat([g.flatten() for g in pulled]), torch.stack(pushed, 1), batched.flatten(1).T


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_a_dense_jacobian(name):
    net, x = case(name)
    J = jacobian(net, x)
    with lean_derivatives():
        f = net(x)
    torch.testing.assert_close(f, net(x), rtol=0, atol=0)
    v, W = randn(J.shape[0], seed=5), randn(J.shape[1], 3, seed=6)
    pulled, pushed, batched = products(f, list(net.parameters()), v, W)
    assert relative(pulled, J.T @ v) < 1e-12
    assert relative(pushed, J @ W) < 1e-12
    assert relative(batched, J @ W) < 1e-12


@pytest.mark.parametrize("name", sorted(set(LAYERS) - set(LEFT_ALONE)))
def test_a_rule_takes_the_call(name):
    net, x = case(name)
    with lean_derivatives():
        y = net.layer(x + net.shift)
    assert "_Operation" in type(y.grad_fn).__name__


@pytest.mark.parametrize("free", ["weight", "bias", "shift"])
@pytest.mark.parametrize("name", ["linear_sequence", "conv2d", "batch_norm", "group_norm", "layer_norm"])
def test_parameters_that_are_frozen(name, free):
    net, x = case(name)
    for key, p in net.named_parameters():
        p.requires_grad_(key.endswith(free))
    (leaf,) = [p for p in net.parameters() if p.requires_grad]
    J = jacobian(net, x, [key for key, p in net.named_parameters() if p.requires_grad])
    with lean_derivatives():
        f = net(x)
    pulled, pushed, _ = products(f, [leaf], randn(J.shape[0], seed=5), randn(J.shape[1], 2, seed=6))
    assert relative(pulled, J.T @ randn(J.shape[0], seed=5)) < 1e-12
    assert relative(pushed, J @ randn(J.shape[1], 2, seed=6)) < 1e-12


def test_double_backward_of_a_convolution_does_no_needless_work():
    """Two convolutions a layer and J w; PyTorch's own formula takes four."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)), torch.randn(2, 3, 8, 8)

    def convolutions(f):
        leaves = list(net.parameters())
        z = torch.zeros_like(f, requires_grad=True)
        graph = torch.autograd.grad(f, leaves, z, create_graph=True)
        with torch.profiler.profile() as profile:
            torch.autograd.grad(graph, z, [torch.ones_like(p) for p in leaves])
        return sum(e.count for e in profile.key_averages() if e.key == "aten::_convolution")

    with lean_derivatives():
        lean = net(x)
    assert convolutions(lean) == 3  # the first layer's input has no tangent
    assert convolutions(net(x)) > 3


def test_what_is_left_alone():
    x, w = randn(3, 4, 5, 5), randn(6, 4, 3, 3).requires_grad_()
    norm = nn.BatchNorm2d(4).double().train()
    with lean_derivatives():
        assert "_Operation" not in type(F.conv2d(x[0], w).grad_fn).__name__  # no batch dimension
        assert "_Operation" not in type(norm(x).grad_fn).__name__  # train mode
        shift = randn(4).requires_grad_()
        for y in (
            F.layer_norm(x[..., :4], (4,), None, shift),
            F.group_norm(x, 2, None, shift),
            F.batch_norm(x, randn(4), randn(4).abs(), None, shift),
        ):
            assert "_Operation" not in type(y.grad_fn).__name__  # a bias alone
        assert F.conv2d(x, w.detach()).grad_fn is None
        with torch.no_grad():
            assert F.conv2d(x, w).grad_fn is None
        values = functional_call(norm.eval(), {k: p.detach() for k, p in norm.named_parameters()}, (x,))
        assert values.grad_fn is None
