"""Attention as a GPU would do it, on a machine without one."""

from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from trunkline.modules.attention_kernels import AttentionPath, attention_path
from trunkline.modules.backbone import transformer

Decision = tuple[str, AttentionPath]


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, run: bool = True, traced: bool = False, **said: Any) -> list[Decision]:
    """Let trunks decide as in a compiled network in bfloat16 on a GPU.

    Args:
        monkeypatch: takes it back.
        run: also take the path. PyTorch refuses gradients of flex attention on a CPU, where only its slow form can
            compute them; for a comparison that form will do.
        traced: also list the calls of a compiled trunk. For a single batch: a longer list is a reason to compile again.
        **said: other arguments for `attention_path`.

    Returns:
        The kind of mask and the path of each call of a trunk, as they are made.
    """
    seen: list[Decision] = []
    on_gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "compiled": True, **said}

    def decide(kind: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> AttentionPath:
        path = attention_path(kind, **{**options, **on_gpu})
        if traced or not torch.compiler.is_compiling():
            seen.append((kind, path))
        return path if run else attention_path(kind, device, dtype, **options)

    monkeypatch.setattr(transformer, "attention_path", decide)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    return seen
