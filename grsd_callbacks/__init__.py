"""See how a neural network learns, scale by scale, while it trains.

The estimators import neither Lightning, nor TensorBoard, nor matplotlib; the callbacks are loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from grsd_callbacks.density import SpectralDensity, spectral_density
from grsd_callbacks.emission import Emission, Histogram
from grsd_callbacks.exponents import (
    Closure,
    Collapse,
    Compression,
    Estimate,
    PowerLawFit,
    ResourceLaws,
    VelocityExponents,
    closure,
    combine,
    compression_exponents,
    elasticity,
    energy_tail,
    finite_size_bias,
    fit_counts,
    fit_energy,
    fit_loss,
    fit_power_law,
    fit_scaling_law,
    fit_spectrum,
    fit_tail,
    frontier,
    local_slope,
    progress_contour,
    resolved_modes,
    resource_laws,
    self_similar_collapse,
    shell_labels,
    unbiased_scale,
    velocity_exponents,
)
from grsd_callbacks.flux import KernelState, ShellFlux, four_corner_flux
from grsd_callbacks.guard import undisturbed
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss, resolve_loss
from grsd_callbacks.measure import Instant, measure
from grsd_callbacks.monitor import ShellMonitor
from grsd_callbacks.optimizer import StepSize, step_size
from grsd_callbacks.outlet import MeasurementWarning
from grsd_callbacks.probe import Probe
from grsd_callbacks.quantisation import Quantisation, quantisation_exponents
from grsd_callbacks.renormalizability import (
    BlockIncoherence,
    Conditions,
    ConditionSettings,
    GradientPropagation,
    JacobianEvolution,
    LogShiftInvariance,
    Regime,
    RunVerdict,
    TimeRescaling,
    Verdict,
    block_incoherence,
    block_kernels,
    find_blocks,
    gradient_propagation,
    jacobian_evolution,
    judge,
    lazy_or_rich,
    log_shift_invariance,
    measure_conditions,
    time_rescaling_covariance,
    verdict_table,
)
from grsd_callbacks.renormalizability_monitor import RenormalizabilityMonitor, regime_signs
from grsd_callbacks.settings import Settings
from grsd_callbacks.shells import ShellBudget, ShellGrid, shell_budget
from grsd_callbacks.sinks import JSONLinesSink, LoggerSink, MemorySink, Sink, TensorBoardSink, read_json_lines
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.spectrum import Eigendecomposition, SpectralMeasure, eigendecomposition, spectral_measure
from grsd_callbacks.tags import TAGS, Tag

if TYPE_CHECKING:
    from grsd_callbacks.callbacks import ShellDynamicsCallback
    from grsd_callbacks.renormalizability_callback import RenormalizabilityCallback

__version__ = "0.1.0"

__all__ = [
    "TAGS",
    "BlockIncoherence",
    "Closure",
    "Collapse",
    "Compression",
    "ConditionSettings",
    "Conditions",
    "Eigendecomposition",
    "Emission",
    "Estimate",
    "GradientPropagation",
    "Histogram",
    "Instant",
    "JSONLinesSink",
    "JacobianEvolution",
    "KernelState",
    "LogShiftInvariance",
    "LoggerSink",
    "Loss",
    "MeasurementWarning",
    "MemorySink",
    "NTKOperator",
    "PowerLawFit",
    "Probe",
    "Quantisation",
    "Regime",
    "RenormalizabilityCallback",
    "RenormalizabilityMonitor",
    "ResourceLaws",
    "RunVerdict",
    "Settings",
    "ShellBudget",
    "ShellDynamicsCallback",
    "ShellFlux",
    "ShellGrid",
    "ShellMonitor",
    "Sink",
    "Snapshot",
    "SpectralDensity",
    "SpectralMeasure",
    "StepSize",
    "Tag",
    "TensorBoardSink",
    "TimeRescaling",
    "VelocityExponents",
    "Verdict",
    "block_incoherence",
    "block_kernels",
    "closure",
    "combine",
    "compression_exponents",
    "eigendecomposition",
    "elasticity",
    "energy_tail",
    "find_blocks",
    "finite_size_bias",
    "fit_counts",
    "fit_energy",
    "fit_loss",
    "fit_power_law",
    "fit_scaling_law",
    "fit_spectrum",
    "fit_tail",
    "four_corner_flux",
    "frontier",
    "gradient_propagation",
    "jacobian_evolution",
    "judge",
    "lazy_or_rich",
    "local_slope",
    "log_shift_invariance",
    "measure",
    "measure_conditions",
    "progress_contour",
    "quantisation_exponents",
    "read_json_lines",
    "regime_signs",
    "resolve_loss",
    "resolved_modes",
    "resource_laws",
    "self_similar_collapse",
    "shell_budget",
    "shell_labels",
    "spectral_density",
    "spectral_measure",
    "step_size",
    "time_rescaling_covariance",
    "unbiased_scale",
    "undisturbed",
    "velocity_exponents",
    "verdict_table",
]


def __getattr__(name: str) -> Any:
    """Load the Lightning callbacks only when they are asked for."""
    if name == "ShellDynamicsCallback":
        from grsd_callbacks import callbacks

        return getattr(callbacks, name)
    if name == "RenormalizabilityCallback":
        from grsd_callbacks import renormalizability_callback

        return getattr(renormalizability_callback, name)
    raise AttributeError(f"module 'grsd_callbacks' has no attribute {name!r}")
