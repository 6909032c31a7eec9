"""Optimisers and schedules; how a run is saved, resumed, and started from trained weights."""
