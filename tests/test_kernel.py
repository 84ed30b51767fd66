"""The operator J J^T against dense Jacobians made by other machinery: jacrev, and plain autograd row by row."""

from dataclasses import replace

import pytest
import torch
from nets import MAIN, autograd_rows, jacobian, mlp, randint, randn, relative, seeded, zoo
from torch import nn

from grsd_callbacks.chunks import _Sum
from grsd_callbacks.kernel import FORWARD_PATHS, NTKOperator, synchronise
from grsd_callbacks.plan import Trial
from grsd_callbacks.spectrum import spectral_measure

ZOO = zoo()
NO_SECOND_DERIVATIVE = ("bag", "cdist")


def products_agree(op, J, tol=1e-10):
    m, P = J.shape
    assert op.shape == (m, m) and op.num_parameters == P
    V, W = randn(m, 3, seed=11), randn(P, 2, seed=12)
    assert relative(op.vjp(V), J.T @ V) < tol
    assert relative(op.vjp(V[:, 0]), J.T @ V[:, 0]) < tol
    assert relative(op.jvp(W), J @ W) < tol
    assert relative(op @ V, J @ (J.T @ V)) < tol
    assert relative(op @ V[:, 1], J @ (J.T @ V[:, 1])) < tol


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("name", MAIN)
def test_products_and_gram_equal_jacrev(name, chunk_size):
    make, inputs = MAIN[name]
    model, x = make(), inputs()
    J = jacobian(model, x)
    op = NTKOperator(model, x, chunk_size=chunk_size)
    products_agree(op, J)
    assert relative(op.gram(), J @ J.T) < 1e-10
    assert relative(op.gram(memory_limit=2**20), J @ J.T) < 1e-10
    assert op.num_outputs == J.shape[0] // 7 and op.num_samples == 7


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("path", FORWARD_PATHS)
@pytest.mark.parametrize("name", MAIN)
def test_every_forward_path_is_right(name, path, chunk_size):
    make, inputs = MAIN[name]
    model, x = make(), inputs()
    J = jacobian(model, x)
    op = NTKOperator(model, x, forward=path, chunk_size=chunk_size)
    assert op.forward_path == path
    products_agree(op, J, 1e-10 if path != "central" else 1e-8)


@pytest.mark.parametrize("name", ZOO)
def test_awkward_models(name):
    model, inputs, pick = ZOO[name]
    J = autograd_rows(model, inputs, pick)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    op = NTKOperator(model, inputs)
    products_agree(op, J, 1e-8 if op.forward_path == "central" else 1e-10)
    assert relative(op.gram(), J @ J.T) < 1e-10
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    if name in NO_SECOND_DERIVATIVE:
        assert op.forward_path == "central" and set(op.refused) == {"double_backward", "forward"}


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(NO_SECOND_DERIVATIVE)))
def test_double_backward_on_awkward_models_in_unequal_chunks(name):
    model, inputs, pick = ZOO[name]
    op = NTKOperator(model, inputs, forward="double_backward", chunk_size=2)
    products_agree(op, autograd_rows(model, inputs, pick))


@pytest.mark.parametrize("name", NO_SECOND_DERIVATIVE)
def test_a_forced_path_that_cannot_work_says_so(name):
    model, inputs, pick = ZOO[name]
    with pytest.raises((RuntimeError, NotImplementedError)):
        NTKOperator(model, inputs, forward="double_backward") @ pick(model(inputs)).flatten()


def test_single_precision_matches_to_its_rounding():
    model, x = mlp().float(), randn(7, 5).float()
    J = jacobian(mlp(), randn(7, 5))
    op = NTKOperator(model, x)
    assert op.dtype == torch.float32
    products_agree(op, J, 1e-5)
    products_agree(NTKOperator(model, x, dtype=torch.float64), jacobian(model.double(), x.double()))


def test_subsets_of_parameters():
    model, x = mlp(), randn(7, 5)
    J = jacobian(model, x, ["4.weight", "4.bias"])
    op = NTKOperator(model, x, params="4.*")
    assert op.parameter_names == ["4.weight", "4.bias"]
    products_agree(op, J)
    assert relative(op.gram(), J @ J.T) < 1e-10


def test_an_output_function_picks_the_rows():
    model, x = mlp(), randn(7, 5)
    J = jacobian(model, x).view(7, 3, -1)[:, 1]
    products_agree(NTKOperator(model, x, outputs=lambda f: f[:, 1]), J)


def test_flatten_is_the_inverse_of_unflatten():
    op = NTKOperator(mlp(), randn(7, 5))
    w = randn(op.num_parameters)
    assert torch.equal(op.flatten(op.unflatten(w)), w)
    assert float(op.flatten([None] * 6).abs().sum()) == 0.0


def test_products_are_counted_and_graphs_released():
    op = NTKOperator(mlp(), randn(7, 5), forward="double_backward")
    op @ randn(21, 4)
    assert op.num_products == 4.0
    first = op @ torch.ones(21)
    op.release()
    assert torch.equal(op @ torch.ones(21), first)
    auto = NTKOperator(mlp(), randn(7, 5))
    assert auto.forward_path in FORWARD_PATHS and auto.num_products == 0.0
    assert auto.adjoint_gap < 1e-12


def test_the_first_right_path_without_timing():
    op = NTKOperator(mlp(), randn(7, 5))
    assert op.choose_forward(timed=False) == "double_backward" == op.forward_path
    synchronise(op.device)


class WrongForward(torch.autograd.Function):
    """A backward that is not linear in its input: J w by double backward is not its transpose."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.abs().mean()


class Crooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return WrongForward.apply(self.a(x))


def test_a_wrong_backward_is_refused_by_the_adjoint_check():
    op = NTKOperator(seeded(Crooked), randn(4, 3))
    with pytest.raises(RuntimeError, match="no way to compute J w for this model .*not the transpose"):
        op @ torch.ones(8)


class NoOutputs(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.how = nn.Linear(3, 2), how

    def forward(self, x):
        return self.how(self.a(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NTKOperator(mlp(), randn(7, 5), forward="fast"), "forward must be 'auto' or one of"),
        (lambda: NTKOperator(mlp(), randn(7, 5), chunk_size=0), "chunk_size must be a positive integer or None, got 0"),
        (lambda: NTKOperator(mlp(), randn(7, 5), chunk_size=1.5), "chunk_size"),
        (lambda: NTKOperator(mlp(), randn(0, 5)), "inputs hold no samples"),
        (lambda: NTKOperator(mlp(), "words"), "no tensor with a sample dimension"),
        (lambda: NTKOperator(mlp(), randn(7, 5)).vjp(randn(7)), "V must be a tensor of shape \\(21,\\)"),
        (lambda: NTKOperator(mlp(), randn(7, 5)).jvp(randn(3, 2)), "W must be a tensor of shape \\(147,\\)"),
        (lambda: NTKOperator(mlp(), randn(7, 5)).vjp([1.0]), "got list"),
        (lambda: NTKOperator(NoOutputs(lambda f: f.sum(0)), randn(4, 3).float()).shape, "one row per sample"),
        (lambda: NTKOperator(NoOutputs(lambda f: f.detach()), randn(4, 3).float()).shape, "do not depend on"),
        (lambda: NTKOperator(NoOutputs(lambda f: f.argmax(1)), randn(4, 3).float()).shape, "not differentiable"),
    ],
)
def test_wrong_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_sample_one_output():
    model = seeded(lambda: nn.Linear(3, 1))
    x = randn(1, 3)
    op = NTKOperator(model, x)
    assert float(op @ torch.ones(1)) == pytest.approx(float(x.square().sum()) + 1, rel=1e-13)
    assert op.gram().item() == pytest.approx(float(x.square().sum()) + 1, rel=1e-13)


class Gain(nn.Module):
    """A parameter without dimensions, as a temperature is."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(5, 3), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return (self.gain * self.layer(x)).tanh()


def test_a_parameter_without_dimensions():
    model, x = seeded(Gain), randn(7, 5, seed=1)
    products_agree(NTKOperator(model, x), jacobian(model, x))


class Force(nn.Module):
    """An energy and a small part of its derivative by the input, as physics-informed nets return it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u + 1e-4 * slope[:, :1]


def test_a_model_that_differentiates_itself_has_no_lean_graphs():
    """In float32 the missing second derivatives would be within the trial's tolerance."""
    model, x = seeded(Force, dtype=torch.float32), randn(7, 5, seed=1)
    op = NTKOperator(model, x.float())
    J = autograd_rows(model, x.float())
    assert relative(op.vjp(torch.eye(7)), J.T) < 1e-6
    assert op.plan.lean is False and "differentiates its own layers" in op.refused["lean"]


def test_token_outputs_are_sample_major():
    model = seeded(lambda: nn.Embedding(5, 4))
    tokens = randint(5, 3, 2, seed=9)
    J = autograd_rows(model, tokens)
    products_agree(NTKOperator(model, tokens), J)


def test_the_device(device):
    model, x = mlp().to(device), randn(7, 5).to(device)
    J = jacobian(mlp(), randn(7, 5)).to(device)
    op = NTKOperator(model, x)
    V = randn(21, 2).to(device)
    assert relative(op @ V, J @ (J.T @ V)) < 1e-10 and op.device.type == device.type


def test_central_differences_of_a_float32_model_are_taken_in_float64():
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
    x, v = torch.randn(7, 5), torch.randn(21)
    products = [NTKOperator(net, x, forward=path) @ v for path in ("double_backward", "central")]
    torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-5)


class Straight(nn.Module):
    """Forward mode differentiates through the block without gradients, backward mode does not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        with torch.no_grad():
            gate = self.w**2
        return self.w * x + gate * x


def test_a_forced_path_that_is_wrong_is_not_silent():
    op = NTKOperator(Straight(), torch.ones(2, 1), forward="forward")
    with pytest.warns(RuntimeWarning, match="not the transpose of J.T v .*use forward='auto'"):
        op @ torch.ones(2)
    assert op.adjoint_gap > 0.1


@pytest.mark.parametrize("gram_dtype", [None, torch.float32])
def test_a_dense_kernel_and_its_measure_on_the_device(device, gram_dtype):
    """Sums in either dtype, eigenvalues and Lanczos where the model is."""
    model, x, r = mlp().to(device), randn(7, 5).to(device), randn(21).to(device)
    J = jacobian(mlp(), randn(7, 5)).to(device)
    op = NTKOperator(model, x, gram_dtype=gram_dtype)
    K = op.gram()
    tolerance = 1e-12 if gram_dtype is None else 1e-6
    assert K.device.type == device.type and K.dtype == torch.float64 and relative(K, J @ J.T) < tolerance
    measured = spectral_measure(K, r, 21)
    assert measured.ritz_vectors.device.type == device.type
    assert measured.dissipation == pytest.approx(float(r @ (J @ (J.T @ r))), rel=10 * tolerance)


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("path", ["forward", "central"])
def test_kept_graphs_may_take_another_path_than_rebuilt_ones(path, share):
    make, inputs = MAIN["mlp"]
    model, x = make(), inputs()
    whole = NTKOperator(model, x)
    whole.choose_forward()
    limit = int(share * len(x) * whole.plan.sample_bytes)
    op = NTKOperator(model, x, memory_limit=max(limit, 4 * int(whole.plan.sample_bytes)))
    op.choose_forward()
    op.adopt(replace(op.plan, path=path, kept_path="double_backward"))
    products_agree(op, jacobian(model, x), 1e-10 if path == "forward" else 1e-8)
    assert 0 < len(op._kept) < len(op._chunks())
    taken = {op._path_of(index) for index in op._chunks()}
    assert taken == {path, "double_backward"}


def test_the_trial_finds_a_path_for_kept_graphs(monkeypatch):
    make, inputs = MAIN["mlp"]
    model, x = make(), inputs()
    costs = {("double_backward", True): 3.0, ("forward", True): 2.0, ("double_backward", False): 1.0}
    right = Trial._attempt
    monkeypatch.setattr(
        Trial, "_attempt", lambda s, path, w, rebuilt, good: (costs[path, rebuilt], right(s, path, w, rebuilt, good)[1])
    )
    op = NTKOperator(model, x, memory_limit=1)
    op.choose_forward()
    assert (op.plan.path, op.plan.kept_path) == ("forward", "double_backward")
    costs["double_backward", False] = 2.5
    op = NTKOperator(model, x, memory_limit=1)
    op.choose_forward()
    assert (op.plan.path, op.plan.kept_path) == ("forward", "")


def test_sums_over_chunks_leave_what_was_given_alone():
    """Autograd may return one tensor for two parameters."""
    shared = torch.ones(3)
    total = _Sum(2)
    for _ in range(3):
        total.add([shared, shared])
    total.add([None, shared])
    assert torch.equal(shared, torch.ones(3))
    assert total.parts[0].tolist() == [3.0] * 3 and total.parts[1].tolist() == [4.0] * 3
