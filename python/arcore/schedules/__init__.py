"""How noise grows with time, what networks predict of it, and how samplers step back to clean data.

Times are tensors with one entry per row, block, frame or token, so parts of a sequence may be at different times.
"""

from arcore.schedules.asynchronous import (
    Windows,
    adaptive_levels,
    fopp_marginals,
    fopp_times,
    grouped_levels,
    pyramid_levels,
    sliding_windows,
    table_times,
    trapezoid_levels,
)
from arcore.schedules.noise import FlowSchedule, NoiseSchedule, Spacing, VPSchedule, add_noise, broadcast_time
from arcore.schedules.prediction import PREDICTIONS, Prediction, target, to_eps, to_x0
from arcore.schedules.solvers import DDIM, DDPM, DPMSolver2M, History, Solver

__all__ = [
    "DDIM",
    "DDPM",
    "PREDICTIONS",
    "DPMSolver2M",
    "FlowSchedule",
    "History",
    "NoiseSchedule",
    "Prediction",
    "Solver",
    "Spacing",
    "VPSchedule",
    "Windows",
    "adaptive_levels",
    "add_noise",
    "broadcast_time",
    "fopp_marginals",
    "fopp_times",
    "grouped_levels",
    "pyramid_levels",
    "sliding_windows",
    "table_times",
    "target",
    "to_eps",
    "to_x0",
    "trapezoid_levels",
]
