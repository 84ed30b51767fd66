"""The exact kernel against a dense Jacobian made by other machinery (`torch.func.jacrev`), and its own guards."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.checkpoint import checkpoint

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram import SUMS_FLOOR, exact_gram, gram_operations, sweep
from grsd_callbacks.gram.contraction import Accumulator
from grsd_callbacks.layers import ConvCall, LinearCall
from grsd_callbacks.probe import take

n = 4


class Wrapped(nn.Module):
    """A module whose forward is the given function of (module, input); submodules and parameters by keyword."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(d), Attention(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tied embedding and head; learned positions looked up without a sample dimension."""

    def __init__(self, vocabulary=7, d=4, depth=1, T=5, last=False, tied=True):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(T, d)
        self.blocks = nn.Sequential(*[Block(d) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight
        self.last = last

    def forward(self, tokens):
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        x = self.norm(self.blocks(x))
        return self.head(x[:, -1] if self.last else x)


def oracle(model, x):
    """J J^T in float64 from a Jacobian over the tensors that require a gradient."""
    model.eval()
    for module in model.modules():
        module.plain, module.sparse = True, False  # torch.func refuses checkpoints and sparse gradients
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    J = jacrev(lambda theta: functional_call(model, theta, (x,)).flatten(), chunk_size=1)(theta)
    rows = len(next(iter(J.values())))
    J = torch.cat([block.reshape(rows, -1) for block in J.values()], dim=1)
    return J @ J.T


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(*shape, high=11):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def mlp(**options):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(**options), nn.Linear(8, 7), nn.ReLU(**options), nn.Linear(7, 3))


def convnet(layer, activation=None, head=3):
    return nn.Sequential(layer, activation or nn.Tanh(), nn.Flatten(), nn.LazyLinear(head))


def batch_norm():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2))
    net[1].running_mean.normal_(generator=torch.Generator().manual_seed(2))
    net[1].running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    return net


def frozen():
    net = mlp()
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    return net


def hooked():
    net = mlp()
    net[0].register_forward_hook(lambda module, args, output: 2 * output + args[0].sum(1, keepdim=True))
    net[2].register_forward_hook(lambda module, args, output: output.mul_(3), prepend=True)
    net[4].register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    return net


def checkpointed():
    return Wrapped(
        lambda self, x: self.b(
            self.a(x) if getattr(self, "plain", False) else checkpoint(self.a, x, use_reentrant=False)
        ),
        a=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)),
        b=nn.Linear(8, 3),
    )


def parametrized():
    net = mlp()
    nn.utils.parametrizations.weight_norm(net[2])
    return net


MODELS = {
    "mlp": (mlp, randn(n, 6)),
    "mlp inplace": (lambda: mlp(inplace=True), randn(n, 6)),
    "scalar output": (lambda: nn.Sequential(mlp(), nn.Linear(3, 1), nn.Flatten(0)), randn(n, 6)),
    "one sample": (mlp, randn(1, 6)),
    "no bias": (lambda: nn.Linear(6, 3, bias=False), randn(n, 6)),
    "frozen": (frozen, randn(n, 6)),
    "unused": (lambda: Wrapped(lambda s, x: s.a(x), a=mlp(), b=nn.Linear(2, 2)), randn(n, 6)),
    "dead": (lambda: Wrapped(lambda s, x: s.a(x) + 0 * s.b(x), a=mlp(), b=nn.Linear(6, 1)), randn(n, 6)),
    "hooks": (hooked, randn(n, 6)),
    "parametrized": (parametrized, randn(n, 6)),
    "checkpoint": (checkpointed, randn(n, 6)),
    "twice": (
        lambda: Wrapped(lambda s, x: s.b(s.a(torch.tanh(s.a(x)))), a=nn.Linear(6, 6), b=nn.Linear(6, 2)),
        randn(n, 6),
    ),
    "used by hand too": (
        lambda: Wrapped(lambda s, x: s.a(x) + x @ s.a.weight.T, a=nn.Linear(6, 6)),
        randn(n, 6),
    ),
    "scale": (
        lambda: Wrapped(lambda s, x: s.a(x) * s.scale + s.shift, a=nn.Linear(6, 3), scale=nn.Parameter(randn(3)),
                        shift=nn.Parameter(randn(3))),
        randn(n, 6),
    ),
    "sequence": (
        lambda: Wrapped(lambda s, x: s.b(torch.tanh(s.a(x)).mean(1)), a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        randn(n, 7, 6),
    ),
    "sequence of n": (
        lambda: Wrapped(lambda s, x: s.b(torch.tanh(s.a(x)).cumsum(1)[:, -1]), a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        randn(n, n, 6),
    ),
    "batch second": (
        lambda: Wrapped(
            lambda s, x: s.b(s.c(torch.tanh(s.a(x.transpose(0, 1)))).cumsum(0).transpose(0, 1)),
            a=nn.Linear(6, 5), b=nn.Linear(5, 2), c=nn.LayerNorm(5),
        ),
        randn(n, 7, 6),
    ),
    "batch second, n long": (
        lambda: Wrapped(
            lambda s, x: s.b(torch.tanh(s.a(x.transpose(0, 1))).cumsum(0)[-1]), a=nn.Linear(6, 5), b=nn.Linear(5, 2)
        ),
        randn(n, n, 6),
    ),
    "flattened": (
        lambda: Wrapped(
            lambda s, x: s.b(torch.tanh(s.a(x.flatten(0, 1))).view(len(x), -1, 5).cumsum(1)),
            a=nn.Linear(6, 5), b=nn.Linear(5, 2),
        ),
        randn(n, 7, 6),
    ),
    "flattened by time": (
        lambda: Wrapped(
            lambda s, x: s.b(torch.tanh(s.a(x.transpose(0, 1).flatten(0, 1))).view(7, len(x), 5).cumsum(0)[-1]),
            a=nn.Linear(6, 5), b=nn.Linear(5, 2),
        ),
        randn(n, 7, 6),
    ),
    "shared table": (
        lambda: Wrapped(lambda s, x: s.b(x * s.a(torch.ones(n, 3).to(x))), a=nn.Linear(3, 6), b=nn.Linear(6, 2)),
        randn(n, n, 6),
    ),
    "frames": (
        lambda: Wrapped(
            lambda s, x: s.b(s.norm(s.a(x.flatten(0, 1))).flatten(1)).view(len(x), -1, 2).cumsum(1)[:, -1],
            a=nn.Conv1d(2, 3, 3), norm=nn.GroupNorm(1, 3), b=nn.Linear(12, 2),
        ),
        randn(n, 3, 2, 6),
    ),
    "conv1d": (lambda: convnet(nn.Conv1d(3, 4, 3, stride=2, padding=1)), randn(n, 3, 9)),
    "conv2d": (lambda: convnet(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)), randn(n, 3, 5, 6)),
    "conv2d wide": (lambda: convnet(nn.Conv2d(12, 6, 3)), randn(n, 12, 4, 4)),
    "conv2d one by one": (lambda: convnet(nn.Conv2d(3, 4, 1, stride=2)), randn(n, 3, 5, 5)),
    "conv2d dilated": (lambda: convnet(nn.Conv2d(2, 4, (3, 2), stride=(1, 2), dilation=(2, 1))), randn(n, 2, 7, 6)),
    "conv2d groups": (lambda: convnet(nn.Conv2d(4, 6, 3, groups=2, padding=(1, 0))), randn(n, 4, 5, 5)),
    "conv2d depthwise": (lambda: convnet(nn.Conv2d(3, 6, 3, groups=3, bias=False)), randn(n, 3, 5, 5)),
    "conv2d same": (lambda: convnet(nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2))), randn(n, 2, 6, 7)),
    "conv2d valid": (lambda: convnet(nn.Conv2d(2, 3, 3, padding="valid")), randn(n, 2, 5, 5)),
    "conv2d reflect": (lambda: convnet(nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect")), randn(n, 2, 5, 5)),
    "conv2d circular": (
        lambda: convnet(nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular")),
        randn(n, 2, 4, 5),
    ),
    "conv3d": (lambda: convnet(nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 1, 2), padding=1)), randn(n, 2, 3, 4, 3)),
    "transposed 1d": (lambda: convnet(nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1)), randn(n, 3, 5)),
    "transposed 2d": (
        lambda: convnet(nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=1, dilation=(1, 2), groups=2)),
        randn(n, 4, 3, 4),
    ),
    "transposed 3d": (lambda: convnet(nn.ConvTranspose3d(2, 3, 2, stride=2)), randn(n, 2, 2, 2, 3)),
    "batch norm": (batch_norm, randn(n, 2, 5, 5)),
    "batch norm 1d": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), randn(n, 6)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), convnet(nn.GroupNorm(2, 4))), randn(n, 2, 5, 5)),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), convnet(nn.InstanceNorm1d(4, affine=True))),
        randn(n, 2, 7),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)), randn(n, 3, 6)),
    "layer norm 2d": (lambda: nn.Sequential(nn.LayerNorm((3, 6)), nn.Flatten(), nn.Linear(18, 2)), randn(n, 3, 6)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 2)), randn(n, 3, 6)),
    "embedding": (
        lambda: Wrapped(lambda s, t: s.b(torch.tanh(s.a(t)).cumsum(1)[:, -1]),
                        a=nn.Embedding(11, 4, padding_idx=2), b=nn.Linear(4, 3)),
        tokens(n, 6),
    ),
    "embedding sparse": (
        lambda: nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)),
        tokens(n, 2, high=50),
    ),
    "gpt": (GPT, tokens(n, 5, high=7)),
    "gpt last token": (lambda: GPT(last=True, tied=False), tokens(n, 5, high=7)),
    "transformer encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(18, 2)),
        randn(n, 3, 6),
    ),
    "multihead attention": (
        lambda: Wrapped(lambda s, x: s.a(x, x, x)[0].sum(1), a=nn.MultiheadAttention(6, 2, batch_first=True)),
        randn(n, 3, 6),
    ),
    "lstm": (
        lambda: Wrapped(lambda s, x: s.b(s.a(x)[0][:, -1]), a=nn.LSTM(6, 4, batch_first=True), b=nn.Linear(4, 2)),
        randn(n, 3, 6),
    ),
}  # fmt: skip

#: what some parameters must have taken, so that a rule that never holds is noticed
PATHS = {
    "mlp": {"0.weight": "linear", "0.bias": "linear"},
    "mlp inplace": {"2.weight": "linear"},
    "frozen": {"0.weight": "linear", "2.bias": "bias"},
    "unused": {"b.weight": "unused"},
    "hooks": {"0.weight": "linear", "2.weight": "linear"},
    "parametrized": {"2.bias": "bias", "2.parametrizations.weight.original0": "rows"},
    "twice": {"a.weight": "shared:rows", "b.weight": "linear"},
    "used by hand too": {"a.weight": "rows", "a.bias": "bias"},
    "sequence": {"a.weight": "linear:rows"},
    "batch second": {"a.weight": "linear:rows", "c.weight": "norm"},
    "flattened": {"a.weight": "linear:rows"},
    "flattened by time": {"a.weight": "linear:rows"},
    "shared table": {"b.weight": "linear:rows"},
    "frames": {"a.weight": "conv:rows", "norm.weight": "norm"},
    "conv2d wide": {"0.weight": "conv:positions"},
    "conv3d": {"0.weight": "conv:rows"},
    "transposed 2d": {"0.weight": "conv_transpose:rows"},
    "batch norm": {"1.weight": "norm", "1.bias": "bias"},
    "instance norm": {"1.0.weight": "norm"},
    "rms norm": {"1.weight": "norm"},
    "embedding sparse": {"0.weight": "embedding:positions"},
    "gpt": {"token.weight": "shared:rows", "norm.weight": "norm"},
    "gpt last token": {"head.weight": "linear"},
    "checkpoint": {"a.0.weight": "linear"},
}


def built(name):
    make, x = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules
        model = make()
        with torch.no_grad():
            model.float().eval()(x.float() if x.is_floating_point() else x)
    return model.double().eval(), x


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_jacobian(name):
    model, x = built(name)
    found = exact_gram(ModelFunction(model), x)
    assert relative(found.matrix, oracle(model, x)) < 1e-10
    assert torch.equal(found.matrix, found.matrix.T)
    assert found.check_gap < 1e-9
    assert PATHS.get(name, {}).items() <= found.paths.items()


@pytest.mark.parametrize("name", MODELS)
def test_does_not_depend_on_memory_copies_or_blocks(name, monkeypatch):
    model, x = built(name)
    function = ModelFunction(model)
    expected = exact_gram(function, x).matrix
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    assert relative(exact_gram(function, x).matrix, expected) < 1e-13
    for limit, blocks in ((600 * len(expected), "parameter"), (6000 * len(expected), "module")):
        found = exact_gram(function, x, memory_limit=limit, blocks=blocks)
        assert relative(found.matrix, expected) < 1e-12
        assert relative(sum(found.blocks.values()), expected) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    model, x = built(name)
    expected = oracle(model, x)
    found = exact_gram(ModelFunction(model, dtype=torch.float32), x).matrix
    assert found.dtype == torch.float64
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_sums_in_float32(name):
    """Faster and coarser: right to float32's rounding of the largest eigenvalue, whatever the form and memory."""
    model, x = built(name)
    function = ModelFunction(model, dtype=torch.float32)
    expected = exact_gram(function, x).matrix
    limits = (600 * len(expected), 6000 * len(expected), 10**8)
    for limit, blocks in zip(limits, ("parameter", "module", None)):
        found = exact_gram(function, x, memory_limit=limit, blocks=blocks, sums=torch.float32)
        error = torch.linalg.matrix_norm(found.matrix - expected, 2) / torch.linalg.matrix_norm(expected, 2)
        assert found.matrix.dtype == torch.float64 and torch.equal(found.matrix, found.matrix.T)
        assert error < SUMS_FLOOR[torch.float32]
        if blocks:
            assert relative(sum(found.blocks.values()), expected) < 1e-6


def test_sums_in_float32_are_made_in_float32():
    """The option is not ignored: where eigenvalues fall to zero, what is left is of float32's size, not float64's."""
    model, x = mlp_for_sums()
    function = ModelFunction(model, dtype=torch.float32)
    dtypes = (torch.float64, torch.float32)
    double, single = (torch.linalg.eigvalsh(exact_gram(function, x, sums=dtype).matrix) for dtype in dtypes)
    assert double[0].abs() < 1e-12 * double[-1] and 1e-10 * single[-1] < single[0].abs() < 3e-7 * single[-1]


def test_sums_in_float32_of_a_float64_model_pass_the_check():
    """Products in float32 are not taken for an incomplete kernel, which would be computed again from rows."""
    model, x = mlp_for_sums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = exact_gram(ModelFunction(model), x, sums=torch.float32)
    assert ModelFunction(model).dtype == torch.float64 and found.check_gap < 1e-6
    assert set(found.paths.values()) == {"linear"}


def mlp_for_sums():
    """Inputs along one line: depth without width, so that J has few singular values above rounding."""
    torch.manual_seed(1)
    x = torch.linspace(0.0, 1.0, 40, dtype=torch.float64)[:, None]
    return nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)).double(), x


def test_wrong_sums():
    model, x = built("mlp")
    with pytest.raises(ValueError, match="sums must be torch.float32, torch.float64 or None, got torch.float16"):
        exact_gram(ModelFunction(model), x, sums=torch.float16)


def test_closed_form():
    # f = W x + b: d f_c / d W_cj = x_j, so J J^T = (x . y + 1) delta_cd
    x = randn(n, 6)
    found = exact_gram(ModelFunction(nn.Linear(6, 3).double()), x, blocks="parameter")
    identity = torch.eye(3, dtype=torch.float64)
    assert relative(found.blocks["weight"], torch.kron(x @ x.T, identity)) < 1e-14
    assert relative(found.blocks["bias"], torch.kron(torch.ones(n, n).double(), identity)) < 1e-14
    assert relative(found.matrix, torch.kron(x @ x.T + 1, identity)) < 1e-14


@pytest.mark.parametrize("kind", ["mlp", "conv2d", "gpt", "twice"])
def test_kernels_of_blocks_given_by_a_mapping(kind):
    model, x = built(kind)
    owner = {name: "even" if i % 2 == 0 else "odd" for i, (name, _) in enumerate(model.named_parameters())}
    single = exact_gram(ModelFunction(model), x, blocks="parameter").blocks
    found = exact_gram(ModelFunction(model), x, blocks=owner)
    assert set(found.blocks) == {owner[name] for name in single}
    for block, kernel in found.blocks.items():
        assert relative(kernel, sum(k for name, k in single.items() if owner[name] == block)) < 1e-12
    assert relative(found.matrix, sum(found.blocks.values())) < 1e-14
    assert all(found.matrix.data_ptr() != kernel.data_ptr() for kernel in found.blocks.values())


def test_blocks_that_leave_a_parameter_out():
    model, x = built("mlp")
    with pytest.raises(ValueError, match=r"blocks must name the block of every measured parameter, it lacks \['0.bias"):
        exact_gram(ModelFunction(model), x, blocks={"0.weight": "first"})


def test_unused_and_dead_parameters_are_told_apart():
    model, x = built("unused")
    assert exact_gram(ModelFunction(model), x).num_unused == 2
    model, x = built("dead")
    assert exact_gram(ModelFunction(model), x).num_unused == 0


def test_nothing_stays_on_the_model():
    model, x = built("hooks")
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    values = {name: t.clone() for name, t in model.state_dict().items()}
    exact_gram(ModelFunction(model), x)
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == before
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_are_removed_when_the_forward_fails():
    model = Wrapped(lambda self, x: self.a(x) + self.missing, a=nn.Linear(6, 3))
    with pytest.raises(AttributeError, match="missing"):
        exact_gram(ModelFunction(model), randn(n, 6).float())
    assert not model.a._forward_hooks


def test_draws_nothing_from_the_global_generator():
    model, x = built("mlp")
    state = torch.get_rng_state()
    exact_gram(ModelFunction(model), x)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the guards ----


@pytest.mark.parametrize("name", ["mlp", "sequence", "sequence of n"])
def test_a_wrong_rule_is_noticed_and_left_to_rows(name, monkeypatch):
    model, x = built(name)
    right = LinearCall._left
    monkeypatch.setattr(LinearCall, "_left", lambda self, x: 1.01 * right(self, x))
    found = exact_gram(ModelFunction(model), x)
    assert {path for p, path in found.paths.items() if p.endswith("weight")} == {"rows"}
    assert relative(found.matrix, oracle(model, x)) < 1e-10


def test_patches_of_the_wrong_pixels_are_noticed(monkeypatch):
    model, x = built("conv2d")
    right = ConvCall._left
    monkeypatch.setattr(ConvCall, "_left", lambda self, x: right(self, x.roll(1, -1)))
    found = exact_gram(ModelFunction(model), x)
    assert found.paths["0.weight"] == "rows"
    assert relative(found.matrix, oracle(model, x)) < 1e-10


@pytest.mark.parametrize("method", ["outer", "rows"])
def test_a_wrong_product_is_noticed_and_recomputed(method, monkeypatch):
    model, x = built("batch norm")
    right = getattr(Accumulator, method)
    calls = []

    def wrong(self, *args):
        calls.append(method)
        return right(self, *(1.001 * a if isinstance(a, torch.Tensor) and len(calls) == 1 else a for a in args))

    monkeypatch.setattr(Accumulator, method, wrong)
    with pytest.warns(RuntimeWarning, match="not complete for this model .v.T K v misses"):
        found = exact_gram(ModelFunction(model), x)
    assert set(found.paths.values()) == {"rows"}
    assert found.check_gap < 1e-9
    assert relative(found.matrix, oracle(model, x)) < 1e-10


def test_an_input_changed_after_the_layer_saw_it_is_not_used():
    model = Wrapped(lambda self, x: self.b(torch.tanh(self.a(x))) + x.zero_().sum(1, keepdim=True), a=nn.Linear(6, 5),
                    b=nn.Linear(5, 2)).double()  # fmt: skip
    model.a.weight.requires_grad_(False)
    model.a.bias.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    model = nn.Sequential(nn.Linear(6, 6).double(), model)
    twin = Wrapped(lambda self, x: self.b(torch.tanh(self.a(x))), a=model[1].a, b=model[1].b)
    expected = oracle(nn.Sequential(model[0], twin), randn(n, 6))
    found = exact_gram(ModelFunction(model), randn(n, 6))
    assert relative(found.matrix, expected) < 1e-10


def test_batch_norm_in_train_mode_takes_the_whole_graph_without_a_warning():
    model, x = built("batch norm")
    model[1].track_running_stats = False
    function = ModelFunction(model, mode="train")
    found = exact_gram(function, x)
    assert set(found.paths.values()) == {"rows:interacting"}
    model[1].running_mean = model[1].running_var = None  # then it normalises by the batch in eval mode too
    assert relative(found.matrix, oracle(model, x)) < 1e-10


@pytest.mark.parametrize("statistics", [True, False])
def test_samples_that_interact_are_noticed(statistics):
    mixing = (lambda s, x: s.b(x - x.mean(0))) if statistics else (lambda s, x: s.b(x.softmax(0)))
    model = nn.Sequential(nn.Linear(6, 5), Wrapped(mixing, b=nn.Linear(5, 2))).double()
    with pytest.warns(RuntimeWarning, match="rows:interacting") as caught:
        found = exact_gram(ModelFunction(model), randn(n, 6))
    assert len(caught) == 1
    assert relative(found.matrix, oracle(model, randn(n, 6))) < 1e-10


def test_gradients_scaled_by_frequency_take_the_whole_graph():
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3)).double()
    x = torch.tensor([[0, 1], [2, 3], [4, 1], [1, 3]])
    with pytest.warns(RuntimeWarning, match="not complete"):
        found = exact_gram(ModelFunction(model), x)
    assert relative(found.matrix, oracle(model, x)) < 1e-10


def test_a_network_that_takes_another_way_on_part_of_the_batch(monkeypatch):
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    model = Wrapped(
        lambda s, x: s.b(torch.tanh(s.a(x))) if len(x) == n else s.b(torch.tanh(F.linear(x, s.a.weight, s.a.bias))),
        a=nn.Linear(6, 5), b=nn.Linear(5, 2),
    ).double()  # fmt: skip
    with pytest.warns(RuntimeWarning, match="calls other layers on part of the batch"):
        found = exact_gram(ModelFunction(model), randn(n, 6), memory_limit=500)
    assert relative(found.matrix, oracle(model, randn(n, 6))) < 1e-10


@pytest.mark.parametrize("inside", [True, False])
def test_nested_tensors_have_no_plain_shape(inside):
    """A layer on a nested tensor, or nested tensors made of its outputs."""

    def body(s, x):
        rows = [row[:3] if inside else s.a(row[:3]) for row in x]
        h = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return s.b(torch.nested.to_padded_tensor(torch.sin(s.a(h) if inside else h), 0.0).mean(1))

    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)}
    model, plain = Wrapped(body, **parts).double(), Wrapped(lambda s, x: s.b(torch.sin(s.a(x[:, :3])).mean(1)), **parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # samples cannot always be taken apart
        found = exact_gram(ModelFunction(model), randn(n, 4, 4))
    assert relative(found.matrix, oracle(plain, randn(n, 4, 4))) < 1e-10


def test_running_out_of_memory_halves_the_limit(monkeypatch):
    model, x = built("conv2d")
    limits = []
    right = sweep.Sweeper.run

    def scarce(self, *args):
        limits.append(self.memory_limit)
        if len(limits) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, *args)

    monkeypatch.setattr(sweep.Sweeper, "run", scarce)
    found = exact_gram(ModelFunction(model), x)
    assert limits[0] == 2 * limits[1] == 4 * limits[2]
    assert relative(found.matrix, oracle(model, x)) < 1e-10


def test_memory_that_never_suffices_and_other_errors_come_out(monkeypatch):
    model, x = built("mlp")

    def fail(message):
        def run(self, *args):
            raise RuntimeError(message)

        monkeypatch.setattr(sweep.Sweeper, "run", run)

    fail("DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="can't allocate"):
        exact_gram(ModelFunction(model), x)
    fail("something else")
    with pytest.raises(RuntimeError, match="something else"):
        exact_gram(ModelFunction(model), x)


def test_arguments_and_outputs_are_checked():
    model, x = built("mlp")
    with pytest.raises(ValueError, match="blocks must be None, 'parameter', 'module' or a mapping .*, got 'layer'"):
        exact_gram(ModelFunction(model), x, blocks="layer")
    with pytest.raises(ValueError, match="one row per sample"):
        exact_gram(ModelFunction(model, outputs=lambda y: y.flatten()), x)
    with pytest.raises(ValueError, match="do not depend on the selected parameters"):
        exact_gram(ModelFunction(model, outputs=lambda y: y.detach()), x)


@pytest.mark.parametrize(
    "name", ["scale", "multihead attention", "transformer encoder", "parametrized", "embedding sparse"]
)
def test_parameters_without_a_rule_take_one_backward_pass_per_output(name, monkeypatch):
    model, x = built(name)
    if name == "embedding sparse":
        monkeypatch.setattr(type(model[0]), "forward", lambda self, t: F.embedding(t, self.weight))
    taken = []
    right = sweep.rows_of
    monkeypatch.setattr(sweep, "rows_of", lambda *a: (taken.append(a[3]), right(*a))[1])
    monkeypatch.setattr(sweep.Sweeper, "_record", None)  # no forward on single samples
    monkeypatch.setattr(sweep, "OVERHEAD_BOUND", {"cpu": 0})
    found = exact_gram(ModelFunction(model), x)
    assert taken and set(sum(taken, [])) == {name for name, path in found.paths.items() if path == "rows"}
    assert relative(found.matrix, oracle(model, x)) < 1e-10


def test_a_model_that_vmap_refuses_takes_single_samples(monkeypatch):
    model = Wrapped(
        lambda s, x: s.a(x) * s.scale if float(x.sum()) > -1e9 else x, a=nn.Linear(6, 3),
        scale=nn.Parameter(randn(3)),
    ).double()  # fmt: skip
    samples = []
    right = sweep.Sweeper._record
    monkeypatch.setattr(sweep.Sweeper, "_record", lambda self, i, k: (samples.append(k), right(self, i, k))[1])
    found = exact_gram(ModelFunction(model), randn(n, 6))
    assert found.paths["scale"] == "rows" and samples.count(1) == n
    assert relative(found.matrix, oracle(model, randn(n, 6))) < 1e-10


# ---- cost ----


def test_the_estimate_names_the_paths_and_orders_the_costs():
    costs = []
    for name in ("mlp", "conv2d", "gpt"):
        model, x = built(name)
        estimate = gram_operations(ModelFunction(model), x)
        assert estimate.paths == exact_gram(ModelFunction(model), x).paths
        assert estimate.peak_bytes > 8 * len(exact_gram(ModelFunction(model), x).matrix) ** 2
        costs.append(estimate.operations)
    assert costs[0] < costs[1] and costs[0] < costs[2]
    small, large = (gram_operations(ModelFunction(model), take(x, slice(0, k), n)).operations for k in (2, 4))
    assert 2 < large / small < 5


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("limit", [1, 10_000])
@pytest.mark.parametrize("sums, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_three_forms_agree(width, limit, sums, tolerance):
    left, right = randn(n, 5, 4), randn(n, width, 5, 3)
    rows = torch.einsum("ntp,nctq->ncqp", left, right).flatten(2)
    bias = right.sum(2)
    expected = rows.flatten(0, 1) @ rows.flatten(0, 1).T
    with_bias = expected + bias.flatten(0, 1) @ bias.flatten(0, 1).T

    def by(method, *arguments):
        total = Accumulator(n, width, (torch.float64, sums), torch.device("cpu"), limit)
        getattr(total, method)(*arguments)
        return total.finish()

    assert relative(by("rows", rows), expected) < tolerance
    assert relative(by("positions", lambda s: left[s], right, False), expected) < tolerance
    assert relative(by("positions", lambda s: left[s], right, True), with_bias) < tolerance
    outer = torch.kron(left[:, 0] @ left[:, 0].T + 1, torch.ones(width, width)) * (
        right[:, :, 0].flatten(0, 1) @ right[:, :, 0].flatten(0, 1).T
    )
    assert relative(by("outer", left[:, 0], right[:, :, 0], True), outer) < tolerance
