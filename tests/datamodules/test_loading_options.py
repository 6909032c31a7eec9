"""How a loader is set up by what samples cost and by the device that batches go to."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.datamodules import ImageData, MaskedTextData, SpanCorruptionData, TextData
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.datamodules.samplers import SampleKey


@pytest.mark.parametrize(
    ("kind", "options", "workers"),
    [  # of 2, 8 and 64 cores, which 2 training processes share
        (TextData, {}, (0, 0, 0)),
        (MaskedTextData, {}, (1, 1, 1)),
        (SpanCorruptionData, {}, (1, 1, 1)),
        (ImageData, {"source": "digits"}, (0, 0, 0)),
        (ImageData, {"source": "folder"}, (1, 3, 8)),
    ],
)
def test_workers_follow_the_cost_of_a_sample(
    kind: Any, options: dict[str, Any], workers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = kind(**options)
    strategy = DDPStrategy(cluster_environment=LightningEnvironment())
    data.trainer = SimpleNamespace(num_devices=2, strategy=strategy)
    found = []
    for cores in (2, 8, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, n=cores: set(range(n)), raising=False)
        found.append(data.worker_count())
    assert tuple(found) == workers
    assert kind(**options, num_workers=5).worker_count() == 5


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: SampleKey) -> int:
        return key.index


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_only_batches_for_a_gpu_are_pinned(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU beside, that the trainer does not use
    data = TrunklineDataModule(batch_size=4, num_workers=2)
    data.datasets["val"] = Numbers()
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)  # type: ignore[assignment]
    loader = data.loader("val")
    assert loader.pin_memory == (device == "cuda")
    assert loader.persistent_workers
    assert loader.prefetch_factor == 2
    data.num_workers = 0
    assert not data.loader("val").persistent_workers


class Sent(Tensor):
    """Notes how it is sent to a device, and stays where it is."""

    calls: list[Any]

    def to(self, *args: Any, **options: Any) -> "Sent":  # type: ignore[override]
        self.calls.append((*args, options))
        return self


@pytest.mark.parametrize(("device", "options"), [("cuda", {"non_blocking": True}), ("cpu", {})])
def test_the_copy_to_a_gpu_does_not_wait(device: str, options: dict[str, Any]) -> None:
    image = torch.zeros(2).as_subclass(Sent)
    image.calls = []
    TrunklineDataModule().transfer_batch_to_device({"image": image, "index": [1]}, torch.device(device), 0)
    assert image.calls == [(torch.device(device), options)]
