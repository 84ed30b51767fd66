"""Systems with known exponents, trained for real: a torch model, an optimizer, and `ShellMonitor` watching."""

import numpy as np
import torch

from grsd_callbacks import ShellMonitor
from grsd_callbacks.trajectory import exponent_closures


def train(system, lr, num_steps, *, per_decade=12, **options):
    """Full-batch gradient descent on `nn.MSELoss()` from the system's start; the monitor after it."""
    model, x, y = system.model(), system.inputs, system.targets
    monitor = ShellMonitor(
        model, "mse", (x, y), work=False, figures=False, max_overhead=None, per_decade=per_decade, on_error="raise",
        total_steps=num_steps, **{"method": "exact", **options},
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    criterion = torch.nn.MSELoss()
    for step in range(num_steps):
        monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad(set_to_none=True)
        criterion(model(x), y).backward()
        optimizer.step()
    monitor.finish(num_steps)
    return monitor


def series(monitor):
    """Flow times and losses of the measurements, without the first one at t = 0."""
    later = monitor.history[1:]
    return np.array([s.flow_time for s in later]), np.array([s.loss for s in later])


def closures(monitor):
    """Closures over the whole run."""
    return exponent_closures(monitor.final_exponents())


def shown(label, fit, expected):
    """Print a figure beside what theory says of it."""
    window = f"window {fit.window[0]:.3g} to {fit.window[1]:.3g}" if hasattr(fit, "window") else ""
    value = getattr(fit, "exponent", getattr(fit, "value", None))
    print(f"{label}: {value:.3f} [{fit.lower:.3f}, {fit.upper:.3f}], theory {expected:.3f} {window}")
    return fit
