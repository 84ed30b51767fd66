"""Arguments in, clean logarithms out: every complaint about wrong use is raised here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np


@dataclass(frozen=True, eq=False)
class LogSeries:
    """Points sorted by x, in natural logarithms; `x_error`/`y_error` are relative errors or None."""

    x: np.ndarray
    y: np.ndarray
    x_error: np.ndarray | None
    y_error: np.ndarray | None
    num_masked: int

    @property
    def num_decades(self) -> float:
        """Decades of x."""
        return float((self.x[-1] - self.x[0]) / math.log(10.0)) if len(self.x) else 0.0

    @property
    def window(self) -> tuple[float, float]:
        """Smallest and largest x; NaN without points."""
        return (math.exp(self.x[0]), math.exp(self.x[-1])) if len(self.x) else (math.nan, math.nan)

    def select(self, keep) -> LogSeries:
        """The points where `keep` is true."""
        pick = lambda v: None if v is None else v[keep]  # noqa: E731
        return LogSeries(self.x[keep], self.y[keep], pick(self.x_error), pick(self.y_error), self.num_masked)


def vector(name: str, values, *, length: int | None = None) -> np.ndarray:
    """`values` as a one-dimensional float64 array, or an error that names the argument."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of real numbers, got {type(values).__name__}") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} must have {length} entries, one per point, got {len(array)}")
    return array


def real(name: str, value, *, above: float = -math.inf, below: float = math.inf, closed: bool = False) -> float:
    """A finite real number in (above, below), or [above, below) with `closed`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    inside = (number >= above if closed else number > above) and number < below
    if not (math.isfinite(number) and inside):
        raise ValueError(f"{name} must lie in {'[' if closed else '('}{above:g}, {below:g}), got {value}")
    return number


def count(name: str, value, *, at_least: int) -> int:
    """An integer not below `at_least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def choice(name: str, value, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if not (isinstance(value, str) and value in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def switch(name: str, value) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)


def interval_options(confidence, num_bootstrap) -> None:
    """A bootstrap must be large enough to own the quantile that is asked of it."""
    confidence = real("confidence", confidence, above=0.0, below=1.0)
    needed = math.ceil(confidence / (1.0 - confidence) - 1e-9)
    count("num_bootstrap", num_bootstrap, at_least=max(needed, 1))


def declared_window(window) -> tuple[float, float] | str | None:
    """None, the word "search", or a pair with 0 <= low < high."""
    if window is None or (isinstance(window, str) and window == "search"):
        return window
    try:
        low, high = (float(edge) for edge in window)
    except (TypeError, ValueError) as error:
        raise TypeError(f"window must be None, 'search' or a pair (low, high), got {window!r}") from error
    if not 0.0 <= low < high:
        raise ValueError(f"window must satisfy 0 <= low < high, got ({low:g}, {high:g})")
    return low, high


def shell_edges(edges) -> np.ndarray:
    """Finite, positive, strictly increasing shell edges in units of lambda."""
    edges = vector("edges", edges)
    if len(edges) < 2:
        raise ValueError(f"edges must have at least 2 entries, got {len(edges)}")
    if not (np.isfinite(edges).all() and edges[0] > 0 and (np.diff(edges) > 0).all()):
        raise ValueError("edges must be finite, positive and strictly increasing lambda values")
    return edges


def uniform_edges(edges) -> np.ndarray:
    """`shell_edges` of equal width in log lambda."""
    edges = shell_edges(edges)
    widths = np.diff(np.log(edges))
    if not np.allclose(widths, widths.mean(), rtol=1e-3):
        raise ValueError("edges must be uniform in log lambda: shell contents are power laws for equal widths only")
    return edges


def shell_values(name: str, values, edges: np.ndarray, *, batch: bool = False) -> np.ndarray:
    """Shell arrays [underflow, inner shells..., overflow]: len(edges) + 1 entries along the last axis."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of real numbers, got {type(values).__name__}") from error
    if array.ndim < 1 or (array.ndim > 1 and not batch):
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.shape[-1] != len(edges) + 1:
        raise ValueError(
            f"{name} must have len(edges) + 1 = {len(edges) + 1} shells "
            f"(underflow, inner shells, overflow), got {array.shape[-1]}"
        )
    return array


def log_series(x, y, x_error=None, y_error=None) -> LogSeries:
    """Logarithms of the usable points, sorted by x.

    Masked and counted: x = 0, y that is not finite and positive, errors that are NaN. Raised: what can only be a
    mistake (lengths, dimensions, negative or non-finite x, negative errors).
    """
    x = vector("x", x)
    y = vector("y", y, length=len(x))
    if not np.isfinite(x).all():
        raise ValueError(f"x must be finite, got {int((~np.isfinite(x)).sum())} entries that are not")
    if (x < 0).any():
        raise ValueError(f"x must not be negative, got a smallest entry of {x.min():g}")
    errors: dict[str, np.ndarray | None] = {}
    keep = (x > 0) & np.isfinite(y) & (y > 0)
    for name, given, scale in (("x_error", x_error, x), ("y_error", y_error, y)):
        if given is None:
            errors[name] = None
            continue
        error = vector(name, given, length=len(x))
        if (error < 0).any():
            raise ValueError(f"{name} must not be negative, got a smallest entry of {np.nanmin(error):g}")
        keep &= np.isfinite(error)
        errors[name] = error / np.where(scale > 0, scale, 1.0)
    order = np.flatnonzero(keep)[np.argsort(x[keep], kind="stable")]
    pick = {name: None if error is None else error[order] for name, error in errors.items()}
    return LogSeries(np.log(x[order]), np.log(y[order]), pick["x_error"], pick["y_error"], int((~keep).sum()))


def binned(x: np.ndarray, y: np.ndarray, num_per_decade: int) -> tuple[np.ndarray, np.ndarray]:
    """Geometric means of x and y in bins of equal width in log x: at most `num_per_decade` points in a decade.

    Exact for a power law (a mean of points on a line lies on the line). Points with a y that has no logarithm are
    kept as they are, for the fit to mask and to count.
    """
    usable = (x > 0) & np.isfinite(y) & (y > 0)
    log_x, log_y = np.log(x[usable]), np.log(y[usable])
    if not len(log_x):
        return x, y
    bins = np.floor((log_x - log_x.min()) / math.log(10.0) * num_per_decade + 1e-9).astype(int)
    _, inverse, sizes = np.unique(bins, return_inverse=True, return_counts=True)
    mean = lambda v: np.exp(np.bincount(inverse, v) / sizes)  # noqa: E731
    return np.concatenate([mean(log_x), x[~usable]]), np.concatenate([mean(log_y), y[~usable]])
