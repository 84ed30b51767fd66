"""The user's own `training_step` as observed function and loss, so that no user code has to change.

    f = the tensors through which all dependence of the returned loss on the parameters passes, (n, C) sample-major
    L = the returned loss as a function of f

f is found by recording one run: what loss functions are given (the input of a cross-entropy, say), or else what
submodules return. Random numbers drawn in the step are the same at every evaluation: one fixed draw is measured.
"""

from grsd_callbacks.training_step.finding import Observed, observe_step, warning_of_gap
from grsd_callbacks.training_step.observed import StepLoss, StepOutputs
from grsd_callbacks.training_step.runner import (
    StepRunner,
    as_floating,
    batch_type,
    check_step,
    step_name,
    step_pair,
    step_source,
)

__all__ = [
    "Observed",
    "StepLoss",
    "StepOutputs",
    "StepRunner",
    "as_floating",
    "batch_type",
    "check_step",
    "observe_step",
    "step_name",
    "step_pair",
    "step_source",
    "warning_of_gap",
]
