"""The device that a command runs on."""

import torch

from trunkline import TrunklineError


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is the accelerator if there is one, else the CPU.

    Raises:
        TrunklineError: if the device does not exist or cannot be used.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise TrunklineError(f"--device {name} cannot be used here: {reason}; try --device cpu") from error
