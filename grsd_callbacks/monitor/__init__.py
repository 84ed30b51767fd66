"""The framework-free core: measures a model while a training loop of any kind runs.

`shell_monitor` has the loop, the end and the checkpoints, `measurer` the set-up and one measurement, `arguments` what
users may give, `figure_schedule` when figures are drawn, and `stopwatch` what measuring costs.
"""

from grsd_callbacks.monitor.arguments import check_num_probe, check_options, make_schedule, on_every_rank
from grsd_callbacks.monitor.figure_schedule import FigureSchedule
from grsd_callbacks.monitor.measurer import COSTLY
from grsd_callbacks.monitor.shell_monitor import ShellMonitor

__all__ = [
    "COSTLY",
    "FigureSchedule",
    "ShellMonitor",
    "check_num_probe",
    "check_options",
    "make_schedule",
    "on_every_rank",
]
