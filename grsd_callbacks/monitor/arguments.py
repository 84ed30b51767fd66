"""What the monitor's arguments mean, and which are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from grsd_callbacks.distributed import Group
from grsd_callbacks.functional import check_function
from grsd_callbacks.optimizer import NO_STEP_SIZE, StepSize, step_size
from grsd_callbacks.outlet import warn
from grsd_callbacks.probe import Probe, probe_from
from grsd_callbacks.schedule import FixedSchedule, LogSchedule
from grsd_callbacks.sharded import Twin


def make_schedule(
    every_n_steps: int | None,
    max_overhead: float | None,
    total_steps: int | None,
    per_decade: int = 10,
    pair: bool = False,
    sparse: bool = False,
) -> FixedSchedule | LogSchedule:
    """The schedule meant by a user's arguments; both are checked whichever is used."""
    log = LogSchedule(per_decade, max_overhead, total_steps, pair, sparse)
    return log if every_n_steps is None else FixedSchedule(every_n_steps)


def check_options(on_error: Any, switches: dict[str, Any], unpack: Any) -> None:
    """Raise unless on_error is a known word, switches are True or False, and unpack a function or None."""
    if not (isinstance(on_error, str) and on_error in ("warn", "raise")):
        raise ValueError(f"on_error must be 'warn' or 'raise', got {on_error!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    check_function("unpack", unpack)


def check_model_and_prefix(model: Any, prefix: Any) -> None:
    """Raise unless they are a module (or the twin of a sharded one) and a word."""
    if not isinstance(model, (nn.Module, Twin)):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a str, got {type(prefix).__name__}")


def check_num_probe(num_probe: int | None) -> None:
    """Raise unless num_probe is None or a positive integer."""
    if num_probe is not None and (isinstance(num_probe, bool) or not isinstance(num_probe, int) or num_probe < 1):
        raise ValueError(f"num_probe must be a positive integer (or None), got {num_probe!r}")


def shared_probe(group: Group, model: nn.Module, probe: Any, num_probe: int | None, unpack: Any) -> Probe:
    """Rank zero's probe, on every rank; with one warning if it has fewer samples than were asked for."""
    found = group.share(lambda: probe_from(probe, num_probe, *([unpack] if unpack else [])))
    if not group.leads:
        return found.to(next(model.parameters()).device)
    _warn_of_few_samples(num_probe, found)
    return found


def _warn_of_few_samples(num_probe: int | None, probe: Probe) -> None:
    if num_probe is not None and probe.num_samples < num_probe:
        warn(
            f"grsd: num_probe={num_probe}, but the data have only {probe.num_samples} samples; the probe has these. "
            "Give probe=(inputs, targets) for more."
        )


def on_every_rank(writer: Any) -> list[Any]:
    """The sinks that take values also where rank zero writes."""
    several = writer if isinstance(writer, (list, tuple)) else [writer]
    return [sink for sink in several if getattr(sink, "on_every_rank", False)]


def check_step(step: Any) -> None:
    """Raise unless step counts optimizer steps."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be a non-negative integer, got {step!r}")


def given_size(optimizer: Any, lr: float | None, flow_time: float | None = None) -> StepSize:
    """The size of the coming step, as the user gives it; a flow time that is given is not nominal."""
    if flow_time is not None and not _is_finite(flow_time):
        raise ValueError(f"flow_time must be a finite number, got {flow_time!r}")
    if optimizer is not None:
        return step_size(optimizer)
    if lr is not None:
        if not _is_finite(lr):
            raise ValueError(f"lr must be a finite number, got {lr!r}")
        return StepSize(float(lr), float(lr))
    return NO_STEP_SIZE if flow_time is None else replace(NO_STEP_SIZE, nominal=False)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
