"""Trackers: writers of a run's rows of metrics for other viewers, such as TensorBoard and MLflow."""

from psmpi.track.record import Run, Tracker
from psmpi.track.tracker import TRACKERS, Trackers, check_trackers

__all__ = ["TRACKERS", "Run", "Tracker", "Trackers", "check_trackers"]
