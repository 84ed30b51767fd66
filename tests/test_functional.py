"""The model as a pure function of its parameters: what it selects, what it leaves alone, what it refuses."""

import pytest
import torch
from nets import Output, mlp, randn, seeded
from torch import nn

from grsd_callbacks.functional import ModelFunction, as_outputs, select_parameters


def test_equals_the_module_and_leaves_it_untouched():
    model, x = mlp(), randn(4, 5)
    before = {name: (t.clone(), t._version) for name, t in model.state_dict().items()}
    function = ModelFunction(model)
    f = function.run(lambda: function.outputs(x))
    assert torch.equal(f, model(x))
    assert f.requires_grad and function.num_parameters == sum(p.numel() for p in model.parameters())
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name][0]) and t._version == before[name][1]
    assert all(p.grad is None for p in model.parameters())


def test_gradients_reach_the_copies_only():
    model, x = mlp(), randn(4, 5)
    function = ModelFunction(model)
    function.run(lambda: function.outputs(x).sum().backward())
    assert all(p.grad is not None for p in function.parameters.values())
    assert all(p.grad is None for p in model.parameters())


def test_copies_do_not_follow_the_module():
    model, x = mlp(), randn(4, 5)
    function = ModelFunction(model)
    old = model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    assert torch.equal(function.run(lambda: function.outputs(x)), old)


def test_moved_is_the_function_at_other_parameters():
    model, x = mlp(), randn(4, 5)
    function = ModelFunction(model)
    velocity = {name: randn(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    moved = function.moved(velocity, 0.25)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(velocity[name], alpha=0.25)
    torch.testing.assert_close(moved.run(lambda: moved.outputs(x)), model(x), rtol=1e-14, atol=1e-14)
    half = function.moved(velocity, 0.0, dtype=torch.float32)
    assert half.dtype == torch.float32 and function.dtype == torch.float64


def test_half_precision_is_raised_and_double_is_kept():
    assert ModelFunction(nn.Linear(2, 1).bfloat16()).dtype == torch.float32
    assert ModelFunction(nn.Linear(2, 1)).dtype == torch.float32
    assert ModelFunction(nn.Linear(2, 1).double()).dtype == torch.float64
    assert ModelFunction(nn.Linear(2, 1), dtype=torch.float64).parameters["weight"].dtype == torch.float64


def test_modes():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5))).train()
    x = randn(2, 3)
    evaluated = ModelFunction(model)
    assert bool((evaluated.run(lambda: evaluated.outputs(x)) != 0).all())
    trained = ModelFunction(model, mode="train")
    assert bool((trained.run(lambda: trained.outputs(x)) == 0).any())
    assert model.training and model[1].training


@pytest.mark.parametrize(
    "params, names",
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("2.*", ["2.weight", "2.bias"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (lambda name, p: p.dim() == 2, ["0.weight", "2.weight"]),
    ],
)
def test_selection(params, names):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert list(select_parameters(model, params)) == names


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(select_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


REFUSED = {
    "no trainable parameters to measure \\(none has any": (lambda: nn.Linear(2, 1).requires_grad_(False), None),
    "no trainable parameters to measure \\(params= selects": (lambda: nn.Linear(2, 1), "nothing"),
    "is not initialised yet": (lambda: nn.LazyLinear(2), None),
    "is complex": (lambda: nn.Linear(2, 1, dtype=torch.complex64), None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_models(message):
    make, params = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        select_parameters(make(), params)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_refused_kinds():
    with pytest.raises(ValueError, match="torch.jit module"):
        select_parameters(torch.jit.script(nn.Linear(2, 1)))
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        select_parameters(lambda x: x)
    with pytest.raises(TypeError, match="name patterns"):
        select_parameters(nn.Linear(2, 1), [1, 2])


class Sharded(nn.Parameter):
    def full_tensor(self):
        return self


def test_sharded_parameters_are_refused():
    model = nn.Linear(2, 1, bias=False)
    model.weight = Sharded(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="sharded"):
        select_parameters(model)


def test_outputs_are_found():
    f = torch.zeros(2, 3)
    for raw in (f, {"logits": f, "x": 1}, Output(f, f), (f,), [f]):
        assert as_outputs(raw) is f
    assert as_outputs((0, f), lambda raw: raw[1]) is f


@pytest.mark.parametrize(
    "raw, message",
    [
        ((torch.zeros(2), torch.zeros(2)), "expected a tensor of shape \\(n, ...\\) from the model, got tuple"),
        ({"a": torch.zeros(2)}, "got dict; give outputs="),
        (torch.zeros(()), "returned a scalar"),
        (torch.zeros(2, dtype=torch.long), "not differentiable"),
    ],
)
def test_outputs_that_cannot_be_used(raw, message):
    with pytest.raises(ValueError, match=message):
        as_outputs(raw)
