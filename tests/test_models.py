"""Layers of every kind against rows of J by plain autograd: products by the ladder and the exact kernel."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import autograd_rows, jacobian, randint, randn, relative, seeded
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from grsd_callbacks import NTKOperator, ShellMonitor

N = 4


class Net(nn.Module):
    """Submodules by name, and a forward that uses them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.rule = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.rule(self, *args)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class OnlyOnce(OldStyle):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def recurrent(layer):
    return lambda: Net(lambda s, x: s.b(s.a(x)[0][:, -1]), a=layer(), b=nn.Linear(4, 2))


def packed(s, x, lengths):
    out, _ = s.a(pack_padded_sequence(x, lengths, batch_first=True))
    return s.b(pad_packed_sequence(out, batch_first=True)[0][:, 0])


def attention(need_weights, causal=False):
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None

    def forward(s, x):
        mine = None if mask is None else mask.to(x.dtype)
        return s.a(x, x, x, need_weights=need_weights, attn_mask=mine)[0].sum(1)

    return lambda: Net(forward, a=nn.MultiheadAttention(4, 2, batch_first=True))


def sdpa(s, x):
    q, k, v = s.a(x).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(1)


def encoder(**options):
    return lambda: Net(
        lambda s, x: s.b(s.a(x)[:, 0]),
        a=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **options), 1, enable_nested_tensor=not options
        ),
        b=nn.Linear(4, 2),
    )


def with_padding(s, x, lengths):
    return s.b(s.a(x, src_key_padding_mask=torch.arange(5)[None] >= lengths[:, None])[:, 0])


def padded_encoder():
    net = encoder()()
    net.rule = with_padding
    return net


def normalised(make):
    """weight_norm, spectral_norm and such need a forward in train mode to settle their buffers."""

    def build():
        net = nn.Sequential(make(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2)).double()
        net(randn(N, 4))
        return net

    return build


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def adapted():
    """A frozen layer with a trainable low-rank part beside it."""
    net = Net(
        lambda s, x: s.head((s.body(x) + s.lora_b(s.lora_a(x))).tanh()),
        body=nn.Linear(4, 6),
        lora_a=nn.Linear(4, 2, bias=False),
        lora_b=nn.Linear(2, 6, bias=False),
        head=nn.Linear(6, 2),
    )
    net.body.requires_grad_(False)
    return net


def function_net(function):
    return lambda: Net(lambda s, x: s.b(function.apply(s.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 2))


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def lstm(**options):
    return lambda: nn.LSTM(4, 4, batch_first=True, **options)


VECTORS, SEQUENCES, TOKENS = randn(N, 4, seed=1), randn(N, 5, 4, seed=2), randint(6, N, 5, seed=3)
PADDED = (SEQUENCES, torch.tensor([5, 4, 3, 2]))
IMAGES = randn(N, 2, 6, 6, seed=4)


def table(**options):
    return lambda: Net(lambda s, t: s.b(s.a(t).tanh().mean(1)), a=nn.Embedding(6, 4, **options), b=nn.Linear(4, 2))


def bag(mode):
    return lambda: Net(lambda s, t: s.b(s.a(t).tanh()), a=nn.EmbeddingBag(6, 4, mode=mode), b=nn.Linear(4, 2))


def convnet(features, *layers):
    return lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 2))


LAYERS = {
    "lstm": (recurrent(lstm()), SEQUENCES),
    "lstm, two layers, both ways": (
        lambda: Net(lambda s, x: s.a(x)[0][:, 0], a=nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True)),
        SEQUENCES,
    ),
    "lstm, projected": (
        lambda: Net(lambda s, x: s.a(x)[0][:, -1], a=nn.LSTM(4, 4, batch_first=True, proj_size=2)),
        SEQUENCES,
    ),
    "lstm, packed": (lambda: Net(packed, a=nn.LSTM(4, 4, batch_first=True), b=nn.Linear(4, 2)), PADDED),
    "gru": (recurrent(lambda: nn.GRU(4, 4, batch_first=True)), SEQUENCES),
    "rnn": (recurrent(lambda: nn.RNN(4, 4, batch_first=True)), SEQUENCES),
    "cells": (
        lambda: Net(lambda s, x: s.b(x[:, 1], s.a(x[:, 0])[0]), a=nn.LSTMCell(4, 4), b=nn.GRUCell(4, 4)),
        SEQUENCES,
    ),
    "attention": (attention(False), SEQUENCES),
    "attention with weights": (attention(True), SEQUENCES),
    "attention, causal": (attention(False, causal=True), SEQUENCES),
    "scaled dot product": (lambda: Net(sdpa, a=nn.Linear(4, 12)), SEQUENCES),
    "encoder": (encoder(), SEQUENCES),
    "encoder, norm first, gelu": (encoder(norm_first=True, activation="gelu"), SEQUENCES),
    "encoder, padding": (padded_encoder, PADDED),
    "decoder": (
        lambda: Net(lambda s, x: s.a(x, x.flip(1))[:, 0], a=nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)),
        SEQUENCES,
    ),
    "batch norm": (convnet(48, nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU()), IMAGES),
    "instance norm": (convnet(48, nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.SiLU()), IMAGES),
    "transposed, grouped, reflected": (
        convnet(196, nn.ConvTranspose2d(2, 4, 2), nn.Conv2d(4, 4, 3, groups=2, padding="same", padding_mode="reflect")),
        IMAGES,
    ),
    "pooling": (convnet(3, nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)), IMAGES),
    "prelu, bilinear": (
        lambda: Net(lambda s, x: s.b(s.a(x), x), a=nn.PReLU(), b=nn.Bilinear(4, 4, 2)),
        VECTORS,
    ),
    "weight norm": (normalised(nn.utils.parametrizations.weight_norm), VECTORS),
    "spectral norm": (normalised(nn.utils.parametrizations.spectral_norm), VECTORS),
    "weight norm, hook": (normalised(old_weight_norm), VECTORS),
    "spectral norm, hook": (normalised(nn.utils.spectral_norm), VECTORS),
    "orthogonal": (normalised(nn.utils.parametrizations.orthogonal), VECTORS),
    "embedding, padding": (table(padding_idx=0), TOKENS),
    "embedding, max_norm": (table(max_norm=0.5), TOKENS),
    "embedding, sparse": (table(sparse=True), TOKENS),
    "bag, mean": (bag("mean"), TOKENS),
    "bag, sum": (bag("sum"), TOKENS),
    "bag, max": (bag("max"), TOKENS),
    "checkpoint": (
        lambda: Net(
            lambda s, x: s.b(checkpoint(lambda v: s.a(v).tanh(), x, use_reentrant=False)),
            a=nn.Linear(4, 5),
            b=nn.Linear(5, 2),
        ),
        VECTORS,
    ),
    "old function": (function_net(OldStyle), VECTORS),
    "once differentiable": (function_net(OnlyOnce), VECTORS),
    "function with setup": (function_net(WithSetup), VECTORS),
    "hard sigmoid": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 2)), VECTORS),
    "tied": (tied, VECTORS),
    "low rank": (adapted, VECTORS),
}


#: no second derivative in torch: central differences
CENTRAL = ("bag, mean", "bag, sum", "bag, max", "once differentiable")


def built(name, dtype=torch.float64):
    make, inputs = LAYERS[name]
    cast = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    return seeded(make, dtype=dtype), cast


def rows_of(name):
    """J of a twin, in float64: some forwards write to the module."""
    return autograd_rows(*built(name))


def same_state(before, after):
    return all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize("name", LAYERS)
def test_products_and_the_exact_kernel(name):
    model, x = built(name)
    state = copy.deepcopy(model.state_dict())
    op = NTKOperator(model, x)
    J = rows_of(name)
    V = randn(op.shape[0], 2, seed=8)
    tolerance = 1e-7 if name in CENTRAL else 1e-10
    assert relative(op.vjp(V), J.T @ V) < 1e-10
    assert relative(op @ V, J @ (J.T @ V)) < tolerance
    assert relative(op.gram(), J @ J.T) < 1e-10
    assert (op.forward_path == "central") == (name in CENTRAL)
    assert op.adjoint_gap < 1e-6 and same_state(state, model.state_dict())


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"lstm, projected"}))
def test_single_precision(name):
    """The fused kernels of float32 (LSTM, attention) give the same, to rounding."""
    model, x = built(name, torch.float32)
    J = rows_of(name)
    op = NTKOperator(model, x)
    v = randn(op.shape[0], seed=8)
    assert op.dtype == torch.float32
    assert relative(op @ v.float(), J @ (J.T @ v)) < 2e-3
    assert relative(op.gram(), J @ J.T) < 1e-4
    w = op.vjp(v.float())
    assert float(v.float() @ (op @ v.float())) == pytest.approx(float(w.square().sum()), rel=1e-3)


@pytest.mark.parametrize(
    "params, num_tensors",
    [(None, 4), ("head.*", 2), (["lora_*"], 2), (lambda name, p: p.dim() == 2 and "lora" in name, 2), ("*.weight", 3)],
)
def test_a_part_of_the_parameters(params, num_tensors):
    """The kernel of the part: the last layer, the low-rank part; what is frozen is never in it."""
    model, x = built("low rank")
    op = NTKOperator(model, x, params=params)
    assert len(op.parameter_names) == num_tensors and "body.weight" not in op.parameter_names
    J = jacobian(model, x, op.parameter_names)
    assert relative(op.gram(), J @ J.T) < 1e-10
    assert relative(op @ randn(8, seed=2), J @ (J.T @ randn(8, seed=2))) < 1e-10


class Dictionary(nn.Linear):
    def forward(self, x):
        return {"a": super().forward(x).tanh(), "b": x}


@pytest.mark.parametrize(
    "outputs, pick",
    [
        (lambda raw: raw["a"], lambda raw: raw["a"]),
        (lambda raw: torch.cat([raw["a"], raw["a"] ** 2], 1), lambda raw: torch.cat([raw["a"], raw["a"] ** 2], 1)),
    ],
)
def test_outputs_in_a_dictionary(outputs, pick):
    model = seeded(lambda: Dictionary(4, 2))
    J = autograd_rows(model, VECTORS, pick)
    assert relative(NTKOperator(model, VECTORS, outputs=outputs).gram(), J @ J.T) < 1e-10


# ---- compiled ----


class Counting:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def compiled_submodule(backend):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    net[0] = torch.compile(net[0], backend=backend)
    return net


def compiled_in_place(backend):
    net = Net(lambda s, x: s.b(s.a(x).tanh()), a=nn.Linear(4, 5), b=nn.Linear(5, 2)).double()
    net.compile(backend=backend)
    return net


def compiled_whole(backend):
    return torch.compile(compiled_net(), backend=backend)


def compiled_net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.mark.filterwarnings("ignore:.*(torch.jit|deprecated|complex)")
@pytest.mark.parametrize("make", [compiled_submodule, compiled_in_place, compiled_whole])
def test_compiled_modules_are_measured_without_another_compilation(make):
    backend = Counting()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(backend)
    expected = model(VECTORS).detach()
    graphs = backend.graphs
    assert graphs > 0
    rows = []
    for value in model(VECTORS).flatten():
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows)
    monitor = ShellMonitor(model, "mse", (VECTORS, randn(N, 2)), every_n_steps=1, on_error="raise")
    assert monitor.step(0, lr=0.1) is not None
    op = NTKOperator(model, VECTORS)
    assert relative(op.gram(), J @ J.T) < 1e-10 and relative(op @ J[:, 0], J @ (J.T @ J[:, 0])) < 1e-10
    assert torch.equal(model(VECTORS), expected) and backend.graphs == graphs
