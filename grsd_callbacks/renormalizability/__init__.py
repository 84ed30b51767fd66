"""Does this run renormalize? The conditions of arXiv:2512.18209, each with a number, an interval and a null.

| question | function |
|---|---|
| do gradients reach every layer? | `gradient_propagation` |
| do the blocks' kernels overlap? | `block_incoherence` |
| how fast do Jacobians move? | `jacobian_evolution` |
| are couplings the same at every scale? | `log_shift_invariance` |
| does time only rescale lambda? | `time_rescaling_covariance` |
| lazy or rich? | `lazy_or_rich` |
| all of one instant | `measure_conditions` |
| what holds? | `judge`, `verdict_table` |

The conditions' names are the paper's; their measurable forms and thresholds are this package's own.
"""

from .blocks import Block, BlockIncoherence, BlockOperator, block_incoherence, block_kernels, find_blocks
from .conditions import Conditions, ConditionSettings, conditions_at, measure_conditions
from .couplings import LogShiftInvariance, log_shift_invariance
from .evolution import JacobianEvolution, jacobian_evolution
from .judgement import RunVerdict, judge
from .propagation import GradientPropagation, gradient_propagation
from .regime import Regime, lazy_or_rich
from .rescaling import TimeRescaling, time_rescaling_covariance
from .verdicts import COLUMNS, DEFINITIONS, LIMITS, Verdict, table_rows, verdict_table

__all__ = [
    "COLUMNS",
    "DEFINITIONS",
    "LIMITS",
    "Block",
    "BlockIncoherence",
    "BlockOperator",
    "ConditionSettings",
    "Conditions",
    "GradientPropagation",
    "JacobianEvolution",
    "LogShiftInvariance",
    "Regime",
    "RunVerdict",
    "TimeRescaling",
    "Verdict",
    "block_incoherence",
    "block_kernels",
    "conditions_at",
    "find_blocks",
    "gradient_propagation",
    "jacobian_evolution",
    "judge",
    "lazy_or_rich",
    "log_shift_invariance",
    "measure_conditions",
    "time_rescaling_covariance",
    "table_rows",
    "verdict_table",
]
