"""How networks learn, and how a run is saved, resumed and started from trained weights."""
