"""The peak of GPUs by the names that drivers give them, without sparsity."""

import pytest
import torch

from trunkline.modules.training.peak_speed import peak_speed

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA A40", 149.7),
        ("NVIDIA H100 80GB HBM3", 989.4),  # from here on Lightning's
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
    ],
)
def test_half_precision(name: str, tera: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_speed(GPU, torch.bfloat16) == peak_speed(GPU, torch.float16) == pytest.approx(tera * 1e12)


def test_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_speed(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 NVL")
    assert peak_speed(GPU, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Chip of tomorrow")
    with pytest.warns(UserWarning, match="Chip of tomorrow"):
        assert peak_speed(GPU, torch.bfloat16) is None
