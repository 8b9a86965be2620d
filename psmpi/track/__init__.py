"""Writers of a run's rows for other people's viewers, by name."""

from psmpi.track.record import Run, Tracker
from psmpi.track.tracker import TRACKERS, Trackers, check_trackers

__all__ = ["TRACKERS", "Run", "Tracker", "Trackers", "check_trackers"]
