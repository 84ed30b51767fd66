"""What rounding the weights does to the learned function, mode by mode of its kernel.

Legend: b bits, Delta = max|w| / (2^(b-1) - 1) the step of a tensor, s = sqrt(nu) (f_rounded - f), u_i eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from grsd_callbacks.exponents import PowerLawFit, fit_power_law
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.losses import Loss, calibrate, resolve_loss
from grsd_callbacks.measure import measure_with_operator
from grsd_callbacks.probe import Probe, probe_from
from grsd_callbacks.settings import Settings

#: shells with fewer modes are left out of the fit over lambda
MIN_MODES = 3


@dataclass(frozen=True, eq=False)
class Quantisation:
    """Rounded weights seen in function space.

    Attributes:
        bits: shape (k,).
        loss: on the probe with rounded weights, shape (k,).
        energy: `1/2 |s|^2`, what rounding moves the outputs by, shape (k,), unit of the loss (squared loss).
        edges: of the shells of M at the present parameters, shape (B + 1,).
        shell_energy: energy per shell, shape (k, B + 2); rows sum to `energy`.
        step: fit of energy on the step `2^(1 - b)`: 2 where rounding is a small perturbation.
        spread: fit of energy a mode on lambda, mean over the bits of the fit: 1 where rounding is isotropic in the
            weights, since `E <u_i, s>^2 = lambda_i Delta^2 / 12`. So the stiff modes bear the error, and the pruned
            ones, which hold what is hardest to learn, hardly notice.
    """

    bits: np.ndarray
    loss: np.ndarray
    energy: np.ndarray
    edges: np.ndarray
    shell_energy: np.ndarray
    step: PowerLawFit
    spread: PowerLawFit


def quantisation_exponents(
    model: nn.Module, loss: Any, probe: Any, *, bits: Iterable[int] = range(6, 15), settings: Settings | None = None
) -> Quantisation:
    """Round every weight tensor to b bits (symmetric, uniform, one step a tensor) and see which modes it moves.

    Args:
        model: the network; left bit-identical.
        loss: see `resolve_loss`.
        probe: `(inputs, targets)` or a DataLoader.
        bits: numbers of bits, each at least 2; five of them and more than four apart for the fit over the step.
        settings: how to measure; the method must be exact (default).

    Returns:
        A `Quantisation`; fits that the numbers do not support are refused with a reason.

    Raises:
        ValueError: bits below 2 or none, a method that is not exact.
        TypeError: arguments of the wrong kind.

    Cost: one exact measurement and a forward a number of bits.

    Accuracy: energies exact to rounding; the laws hold for small steps (`step` says whether they are).

    Source: quantisation as spectral perturbation, arXiv:2511.07892 (in words); our operational form.

    Example:
        >>> import torch
        >>> net = nn.Linear(64, 1, bias=False).double()
        >>> _ = nn.init.uniform_(net.weight, -1, 1, generator=torch.Generator().manual_seed(0))
        >>> found = quantisation_exponents(net, "mse", (torch.eye(64).double(), torch.zeros(64, 1).double()))
        >>> bool(abs(found.step.exponent - 2) < 0.1)
        True
    """
    numbers = _checked(bits)
    settings = settings or Settings(method="exact")
    if settings.method != "exact":
        raise ValueError(f"settings.method must be 'exact' to resolve every mode, got {settings.method!r}")
    kept, resolved = probe_from(probe), resolve_loss(loss)
    instant, op = measure_with_operator(model, kept, resolved, settings)
    resolved = op.run(lambda: calibrate(resolved, op.outputs, kept.targets))
    losses, rows = [], []
    for b in numbers:
        outputs, value = op.run(partial(_at, op.function, kept, resolved, b))
        s = math.sqrt(instant.nu) * (outputs - op.outputs).reshape(-1)
        rows.append(instant.state.energies(s, instant.budget.grid)[0].numpy())
        losses.append(value)
    table = np.stack(rows)
    energy = table.sum(1)
    step = fit_power_law(2.0 ** (1 - np.array(numbers, float)), energy)
    grid = instant.budget.grid
    spread = _spread(table / energy[:, None], grid.centers, instant.budget.counts, instant.budget.resolved)
    return Quantisation(np.array(numbers), np.array(losses), energy, grid.edges.numpy(), table, step, spread)


def _at(function: ModelFunction, probe: Probe, loss: Loss, bits: int) -> tuple[Tensor, float]:
    """Outputs and loss at rounded weights."""
    rounded = {name: _rounded(p.detach(), bits) for name, p in function.parameters.items()}
    outputs = function.outputs(probe.inputs, rounded).detach()
    return outputs, float(loss.evaluate(outputs, probe.targets).loss)


def _checked(bits: Iterable[int]) -> list[int]:
    numbers = sorted(set(bits))
    if not numbers or any(isinstance(b, bool) or not isinstance(b, int) or b < 2 for b in numbers):
        raise ValueError(f"bits must be whole numbers of at least 2, got {numbers!r}")
    return numbers


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """The nearest multiples of the tensor's own step."""
    step = weight.abs().max() / (2 ** (bits - 1) - 1) if weight.is_floating_point() and weight.numel() else 0.0
    return (weight / step).round() * step if float(step) > 0 else weight


def _spread(shares: np.ndarray, centers: Tensor, counts: Tensor, resolved: Tensor) -> PowerLawFit:
    """Energy a mode against lambda, mean over bits, on the resolved inner shells with enough modes."""
    modes = counts.numpy().copy()
    usable = (modes >= MIN_MODES) & resolved.numpy()
    usable[[0, -1]] = False
    mean = np.where(usable, shares.mean(0) / np.maximum(modes, 1.0), np.nan)
    return fit_power_law(centers.numpy(), mean, y_error=np.abs(mean) * np.sqrt(2.0 / np.maximum(modes, 1.0)))
