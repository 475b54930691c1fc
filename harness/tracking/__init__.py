"""Run tracking: metrics.jsonl always, and beside it Weights & Biases or trackio, a dashboard on this machine."""

from harness.tracking.dashboard import Dashboard, Table
from harness.tracking.tracker import SilentTracker, Tracker, check_tracking, log_study, open_tracker

__all__ = ["Dashboard", "SilentTracker", "Table", "Tracker", "check_tracking", "log_study", "open_tracker"]
