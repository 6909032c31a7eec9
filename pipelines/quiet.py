"""What a run does not print: advertisements, what is said twice, and one error from two threads."""

import errno
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Numbers of the errors of a disk that takes no more."""


@contextmanager
def silent_writers() -> Iterator[None]:
    """Let no thread print that the disk is full: TensorBoard's writer raises the same error for the main thread."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if getattr(arguments.exc_value, "errno", None) not in FULL:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


UNSAID = (
    "💡",
    "GPU available: ",
    "TPU available: ",
    "Seed set to ",
    "Loading `train_dataloader` to estimate",
    "Restoring states from",
    "Restored all states from",
    "Loaded model weights from",
    "`Trainer.fit` stopped: `max_",
    "`Trainer(limit_",
    "Running in `fast_dev_run` mode",
    "Found current_model_state in the checkpoint",
    "Initializing distributed: ",  # of each process
)
"""Beginnings of Lightning's messages that nobody acts on, or that Trunkline says itself."""
RANK = re.compile(r"^\[rank: \d+\] ")
"""What Lightning puts before a message of another process than the first."""
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
)


def quieten() -> None:
    """Hide advertisements, what is said twice, and warnings about things that are intended."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(is_said)
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"  # without a line of our source
    for pattern in (
        ".*args parameter is intended to run from within Python.*",  # the list with short names replaced
        ".*does not have many workers.*",  # data in memory needs none
        ".*dataloader is not resumable.*",  # it is, by its own position
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run writes into its old folder
        ".*smaller than the logging interval.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # the weight average is no longer needed
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen parts
        ".*Embedding dir exists.*",  # the map of a resumed run's last step is written once more
        ".*srun.* command is available on your system.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):  # between libraries
        warnings.simplefilter("ignore", category)


def is_said(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning is printed."""
    return not RANK.sub("", record.getMessage()).startswith(UNSAID)
