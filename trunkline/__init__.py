"""Trunkline: every modality through one transformer trunk."""

__version__ = "0.1.0"


class TrunklineError(ValueError):
    """Bad input. The message names the file, row or flag at fault and says the mend."""
