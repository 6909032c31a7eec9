"""The space that a run will need, and what is free, before the first step."""

import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from test_preflight import Small
from tiny import classifier

from trunkline.modules.callbacks import LastCheckpoint
from trunkline.modules.networks.lora import LoRAConfig
from trunkline.pipelines import preflight


def tensor_bytes(state: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(state)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim())


def test_the_size_of_a_checkpoint() -> None:
    """That of weights, buffers and AdamW's state after a step, and of a copy if weights are averaged."""
    module = Small()
    optimizer = torch.optim.AdamW(module.parameters())
    module.frozen(module.learns(torch.ones(1, 50))).sum().backward()
    optimizer.step()
    weights, state = tensor_bytes(module.state_dict()), tensor_bytes(optimizer.state_dict())
    trainer: Any = types.SimpleNamespace(callbacks=[])
    assert preflight.checkpoint_sizes(trainer, module) == (weights + state, 0)
    trainer.callbacks = [EMAWeightAveraging()]
    assert preflight.checkpoint_sizes(trainer, module) == (2 * weights + state, 0)


def test_lora_writes_frozen_weights_once() -> None:
    module = classifier()
    whole = preflight.checkpoint_sizes(types.SimpleNamespace(callbacks=[]), module)  # type: ignore[arg-type]
    lora = classifier(lora=LoRAConfig(rank=2))
    trainer: Any = types.SimpleNamespace(callbacks=[EMAWeightAveraging()])
    found = preflight.checkpoint_sizes(trainer, lora)
    learnt = sum(p.nbytes for p in lora.parameters() if p.requires_grad)
    assert found.checkpoint == 4 * learnt + 2 * sum(buffer.nbytes for buffer in lora.buffers())
    assert found.frozen == sum(p.nbytes for p in lora.parameters() if not p.requires_grad)
    assert found.checkpoint + found.frozen < whole.checkpoint


def test_the_number_of_checkpoints(tmp_path: Path) -> None:
    trainer: Any = types.SimpleNamespace(callbacks=[], fast_dev_run=False)
    trainer.callbacks = [LastCheckpoint(), ModelCheckpoint(monitor="step", save_top_k=2), ModelCheckpoint()]
    assert preflight.files_to_come(trainer, tmp_path) == 1 + 2 + 1 + 1  # and the one that is being written
    (tmp_path / "checkpoints").mkdir()
    for number in range(3):
        (tmp_path / f"checkpoints/{number}.ckpt").touch()
    assert preflight.files_to_come(trainer, tmp_path) == 2
    trainer.fast_dev_run = True
    assert preflight.files_to_come(trainer, tmp_path) == 0
    trainer.fast_dev_run = False
    trainer.callbacks = []
    assert preflight.files_to_come(trainer, tmp_path) == 0


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "files_to_come", lambda *_: 4)
    trainer: Any = None
    for free, sizes, said in (
        (8_000_000, (2_000_000, 0), None),
        (7_999_999, (2_000_000, 0), "4 checkpoints of about 2.0 MB, but 8.0 MB are"),
        (8_100_000, (2_000_000, 100_000), None),
        (8_099_999, (2_000_000, 100_000), "2.0 MB and the frozen weights of 0.1 MB, but 8.1 MB are"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: types.SimpleNamespace(free=free))
        monkeypatch.setattr(preflight, "checkpoint_sizes", lambda *_, sizes=sizes: preflight.WrittenSizes(*sizes))
        found = preflight.lacking_space(trainer, trainer, tmp_path / "not" / "yet")
        assert (found is None) == (said is None)
        assert said is None or said in str(found)
    assert str(found).endswith(
        f"are free at {tmp_path}/not/yet; free some space, choose another run_dir, or let ModelCheckpoint keep fewer "
        "(save_top_k)"
    )
    monkeypatch.setattr(preflight, "files_to_come", lambda *_: 0)  # it writes none
    assert preflight.lacking_space(trainer, trainer, tmp_path) is None
