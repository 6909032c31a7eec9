"""How fast a device multiplies at most, by its maker's data sheet."""

import re

import torch
from lightning.fabric.utilities.throughput import get_available_flops

HALF_PRECISION = {
    # H200 and H100 data sheets: 1,979 (SXM) and 1,671 (NVL) with sparsity, which is twice as much. Lightning knows only
    # names that no driver gives to an H200, with sparsity; of an H100 NVL it has the speed of a pair.
    # https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
    # https://resources.nvidia.com/en-us-tensor-core
    r"h200 nvl|h100 nvl": 835.5e12,
    r"g?h200": 989.4e12,  # a GH200 holds the same chip
    # L40S, L40, RTX A6000 and A40 data sheets. Lightning takes the first two for an L4, and has the speed of the others
    # without tensor cores.
    r"l40s": 362.05e12,
    r"l40": 181.05e12,
    r"rtx a6000": 154.8e12,
    r"a40": 149.7e12,
}
"""Operations a second in float16 and bfloat16, without sparsity, of GPUs of which Lightning's table has others."""


def peak_speed(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second of a device in a type, without sparsity; None if they are not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        found = [speed for pattern, speed in HALF_PRECISION.items() if re.search(rf"\b({pattern})\b", name)]
        if found:
            return found[0] if dtype in (torch.float16, torch.bfloat16) else None
    return get_available_flops(device, dtype)
