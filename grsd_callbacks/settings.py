"""How to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.functional import ParameterFilter, check_function, check_patterns
from grsd_callbacks.gram import checked_sums

METHODS = ("auto", "exact", "lanczos", "krylov", "randomized")
#: dtypes of a measurement
WORKING_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        method: "auto", "exact", "lanczos" (the exact kernel without its eigenvectors), "krylov" (products only), or
            "randomized" (top of the spectrum only).
        num_matvecs: kernel products for the residual's spectral measure (krylov; lanczos: with the dense kernel) or
            the range finder (randomized, half as many vectors).
        num_density_matvecs: kernel products for eigenvalue counts (krylov), 0 for none.
        shells_per_decade: shells a decade of eigenvalues.
        params, outputs, dtype, gram_dtype: see `NTKOperator`.
        memory_limit: bytes of temporaries of the exact kernel, and of the graphs of products; None for the defaults.
        seed: of the private generator behind random probe vectors, the same at every measurement.
    """

    method: str = "auto"
    num_matvecs: int = 64
    num_density_matvecs: int = 32
    shells_per_decade: int = 3
    params: ParameterFilter = None
    outputs: Callable[[Any], Tensor] | None = None
    dtype: torch.dtype | None = None
    memory_limit: int | None = None
    gram_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.method, str) and self.method in METHODS):
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        for name, least in (("num_matvecs", 2), ("num_density_matvecs", 0), ("shells_per_decade", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not (self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype in WORKING_DTYPES)):
            raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {self.dtype!r}")
        if self.memory_limit is not None and not (isinstance(self.memory_limit, int) and self.memory_limit > 0):
            raise ValueError(f"memory_limit must be a positive number of bytes, got {self.memory_limit!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {type(self.seed).__name__}")
        checked_sums("gram_dtype", self.gram_dtype)
        check_function("outputs", self.outputs)
        check_patterns(self.params)
