"""Trunkline: every modality through one transformer trunk."""

__version__ = "0.1.0"


class TrunklineError(ValueError):
    """Bad input. The message names the file, row or field at fault and says how to fix it.

    Args:
        message: one sentence. It uses the Python names of fields, because only `pipelines/` knows the flags.
        field: path of the field at fault in a config, such as `data.batch_size`, `model.network.max_length` or
            `trainer.max_epochs`. The commands add the flag, or the line of the config, that set it.
    """

    def __init__(self, message: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
