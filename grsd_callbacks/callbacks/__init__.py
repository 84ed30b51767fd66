"""The Lightning callback that delegates to `ShellMonitor`. With `cli`, the only importer of Lightning.

`dynamics` has the callback: its arguments, and its hooks one after the other, which ask `arguments` for checks,
`hooks` for what surrounds each of them, `first_batch` for the monitor, `discovery` for function and loss,
`sampling` for the probe, `output` for where values go, and `lightning_facts` for all that is asked of the Trainer.
"""

from grsd_callbacks.callbacks.discovery import auto_loss
from grsd_callbacks.callbacks.dynamics import ShellDynamicsCallback
from grsd_callbacks.callbacks.lightning_facts import GATHERED, SHARDED, refuse_sharded, step_axis
from grsd_callbacks.callbacks.output import JSON_STEM, json_lines_sink, refuse_collisions, unused_path

__all__ = [
    "GATHERED",
    "JSON_STEM",
    "SHARDED",
    "ShellDynamicsCallback",
    "auto_loss",
    "json_lines_sink",
    "refuse_collisions",
    "refuse_sharded",
    "step_axis",
    "unused_path",
]
