"""The range finder: exact at full rank, error bounds that hold, warm starts that help, refusals."""

import pytest
import torch
from nets import mlp, randn

from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.randomized import randomized_eigenpairs

X = randn(6, 5, seed=1)


@pytest.fixture
def op():
    return NTKOperator(mlp(), X)


def test_full_rank_is_exact(op):
    exact = torch.linalg.eigvalsh(3.0 * op.gram())
    pairs = randomized_eigenpairs(op, op.shape[0], nu=3.0)
    torch.testing.assert_close(pairs.values, exact, rtol=1e-9, atol=1e-10 * float(exact[-1]))
    assert bool(pairs.converged(1e-6)[-3:].all())


@pytest.mark.parametrize("seed", range(5))
def test_an_eigenvalue_lies_within_the_error_of_every_ritz_value(op, seed):
    exact = torch.linalg.eigvalsh(op.gram())
    pairs = randomized_eigenpairs(op, 4, generator=torch.Generator().manual_seed(seed))
    nearest = (exact[None] - pairs.values[:, None]).abs().min(1).values
    assert bool((nearest <= pairs.errors * (1 + 1e-9) + 1e-12).all())
    assert bool((pairs.values <= exact[-4:] * (1 + 1e-12)).all())  # from below
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(4).double(), rtol=0, atol=1e-12)


def test_cost_and_warm_start(op):
    cold = randomized_eigenpairs(op, 4)
    assert cold.num_products == 8  # two products of the block
    warm = randomized_eigenpairs(op, 4, start=cold.vectors)
    assert float(warm.errors[-1]) < float(cold.errors[-1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, r"rank must be an integer in \[1, "),
        ({"rank": 10_000}, r"rank must be an integer in \[1, "),
        ({"rank": 2, "num_iterations": 0}, "num_iterations must be at least 1"),
        ({"rank": 2, "start": torch.zeros(3, 2)}, "start must have shape"),
    ],
)
def test_refusals(op, options, match):
    with pytest.raises(ValueError, match=match):
        randomized_eigenpairs(op, **options)
