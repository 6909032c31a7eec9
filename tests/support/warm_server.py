"""Imported by the process of which `recorded_run` forks runs: whatever a run imports late, which each would pay for."""

import gc
from importlib import import_module

from trunkline.pipelines.objectives import KINDS, import_class

for name in (
    "matplotlib.backends.backend_agg",
    "pyarrow.parquet",
    "sklearn.datasets",
    "tensorboard.backend.event_processing.event_accumulator",
    "timm.data",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
    "trunkline.pipelines.training",
):
    import_module(name)
for kind in KINDS.values():
    import_class(kind.objective)
gc.freeze()  # a fork that looks for garbage leaves these objects alone, and shares their memory
