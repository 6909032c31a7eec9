"""What a datamodule asks its trainer, without a run."""

from types import SimpleNamespace
from typing import Any

import torch


def pretended_trainer(rank: int, processes: int) -> Any:
    """The trainer of one of several processes on the CPU of a machine."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    shares = {"rank": rank, "num_replicas": processes}
    return SimpleNamespace(
        global_rank=rank,
        world_size=processes,
        num_devices=processes,
        strategy=strategy,
        distributed_sampler_kwargs=shares,
    )
