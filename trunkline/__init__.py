"""Trunkline: every modality through one transformer trunk."""

__version__ = "0.1.0"


class TrunklineError(ValueError):
    """Bad input. The message names the file, row or field at fault and says the mend.

    Args:
        message: one sentence. It names fields as they are called in Python, for flags are known to `pipelines/` alone.
        field: the field at fault by its place in a config, such as `data.batch_size`, `model.network.max_length` or
            `trainer.max_epochs`. The commands add the flag, or the line of the config, that gave it.
    """

    def __init__(self, message: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
