"""Processes that divide the blocks train as one process does; only the activations inside blocks are fewer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from holey_data import holey
from sharded_runs import MODULES, in_processes, optimizer, train, trunk
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.callbacks import SkippedRows, Throughput
from trunkline.modules.networks.lora import LoRAConfig, add_lora
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training import tensor_parallel
from trunkline.modules.training.background_saves import save_and_wait
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.sharding import ShardedStrategy, trunks_in
from trunkline.modules.training.tensor_parallel import DividedTrunks, TensorGroup, check_divisible

FAST, OTHERS = ("gpt", "vit"), ("t5", "clip", "drop_path")


def on_digits(folder: Path, devices: int, size: int) -> dict[str, float]:
    """Train on data of which some rows cannot be read, in batches that two processes cannot halve; and validate."""
    torch.manual_seed(0)
    module = ImageClassifier(tiny.vit(drop_path=0.5), optimizer=optimizer())
    fitted = tiny.trainer(
        folder,
        devices=devices,
        strategy="ddp" if size == 1 else ShardedStrategy(tensor_parallel_size=size),
        plugins=[SafeCheckpointIO()],
        max_epochs=1,
        limit_train_batches=8,
        log_every_n_steps=4,
        callbacks=[Throughput(), SkippedRows()],
    )
    fitted.fit(module, holey(batch_size=61, max_skipped=1000))
    save_and_wait(fitted, folder / f"digits-{'ddp' if size == 1 else 'sharded'}/last.ckpt")
    return {name: float(value) for name, value in fitted.callback_metrics.items()}


def divided(rank: int, folder: Path, kinds: tuple[str, ...], **options: Any) -> None:
    found = {kind: train(kind, "sharded", folder, rank, tensor_parallel=2, **options) for kind in kinds}
    torch.save({kind: run["logged"] for kind, run in found.items()}, folder / f"sharded-{rank}.pt")
    if "gpt" in kinds:  # no linear layer was called as a whole: there was no validation
        assert found["gpt"]["products"] == []


def undivided(rank: int, folder: Path, kinds: tuple[str, ...], processes: int = 1, **options: Any) -> None:
    found = {kind: train(kind, "ddp", folder, rank, devices=processes, **options) for kind in kinds}
    torch.save({kind: run["logged"] for kind, run in found.items()}, folder / f"ddp-{rank}.pt")


def divide_and_resume(rank: int, folder: Path) -> None:
    """Also train on real data, and go on from the middle with dropout."""
    divided(rank, folder, FAST, save=True)
    torch.save({"digits": on_digits(folder, 2, 2)}, folder / f"digits-sharded-{rank}.pt")
    train("dropout", "sharded", folder, rank, tensor_parallel=2, save=True)
    middle = folder / "dropout-sharded/middle.ckpt"
    train("dropout", "sharded", folder / "resumed", rank, tensor_parallel=2, resume=middle)


def alone(rank: int, folder: Path) -> None:
    """Also go on undivided from the middle of divided runs."""
    undivided(rank, folder, FAST)
    torch.save({"digits": on_digits(folder, 1, 1)}, folder / "digits-ddp-0.pt")
    for kind in ("gpt", "vit"):
        train(kind, "sharded", folder / "alone", devices=1, resume=folder / f"{kind}-sharded/middle.ckpt")


def states(path: Path) -> dict[str, Any]:
    content = load_checkpoint(path)
    keys = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    counts = {name: state for name, state in content["callbacks"].items() if name in ("Throughput", "SkippedRows")}
    assert "Throughput" in counts
    return {"counts": counts, **{key: content[key] for key in keys if key in content}}


def assert_same_training(folder: Path, kind: str, processes: int = 2, prefix: str = "") -> None:
    found, expected = (states(folder / f"{kind}-{strategy}/last.ckpt") for strategy in ("sharded", "ddp"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for rank in range(processes):
        logged = torch.load(folder / f"{prefix}ddp-{rank // 2}.pt")[kind]
        assert {"train/loss", "train/grad_norm"} <= logged.keys()
        assert torch.load(folder / f"{prefix}sharded-{rank}.pt")[kind] == pytest.approx(logged, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    in_processes(divide_and_resume, folder)
    in_processes(alone, folder, processes=1)
    return folder


@pytest.mark.parametrize("kind", FAST)
def test_20_steps_are_those_of_one_process(kind: str, runs: Path) -> None:
    assert_same_steps(runs, kind)


@pytest.mark.slow
def test_20_steps_of_other_networks(tmp_path: Path) -> None:
    """Two trunks, a shared one, and blocks that are left out at random."""
    in_processes(divided, tmp_path, OTHERS)
    in_processes(undivided, tmp_path, OTHERS, processes=1)
    for kind in OTHERS:
        assert_same_steps(tmp_path, kind)


def assert_same_steps(folder: Path, kind: str) -> None:
    """The same training, and one that changed the weights."""
    assert_same_training(folder, kind)
    start, end = MODULES[kind]().state_dict(), states(folder / f"{kind}-sharded/last.ckpt")["state_dict"]
    assert start.keys() == end.keys()
    assert max((start[name] - x).abs().max() for name, x in end.items() if x.numel() > 1) > 1e-2


def test_a_group_trains_on_each_sample_once(runs: Path) -> None:
    """Samples, rows that cannot be read, and metrics of a validation that is shared by all processes."""
    assert_same_training(runs, "digits", prefix="digits-")
    counts = states(runs / "digits-sharded/last.ckpt")["counts"]
    assert counts["Throughput"]["seen"] == 8 * 61
    logged = torch.load(runs / "digits-sharded-0.pt")["digits"]
    assert counts["SkippedRows"]["count"] == logged["train/skipped_images"] > 10
    assert {"val/loss", "val/acc"} <= logged.keys()


def test_resume_is_exact_with_dropout(runs: Path) -> None:
    found, expected = (states(folder / "dropout-sharded/last.ckpt") for folder in (runs / "resumed", runs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gpt", "vit"])
def test_resume_without_division(kind: str, runs: Path) -> None:
    found, expected = (states(runs / place / "last.ckpt") for place in (f"alone/{kind}-sharded", f"{kind}-ddp"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_groups(tmp_path: Path) -> None:
    """Four processes in groups of two are two processes; also from the middle of a run of these."""
    kinds = ("gpt", "t5", "clip")
    in_processes(two, tmp_path, kinds, processes=2)
    in_processes(four, tmp_path, kinds, processes=4)
    for kind in kinds:
        assert_same_training(tmp_path, kind, processes=4)
    found, expected = (states(tmp_path / place / "last.ckpt") for place in ("resumed/gpt-sharded", "gpt-ddp"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def two(rank: int, folder: Path, kinds: tuple[str, ...]) -> None:
    undivided(rank, folder, kinds, 2, save=True)


def four(rank: int, folder: Path, kinds: tuple[str, ...]) -> None:
    torch.set_num_threads(1)  # so many processes with several threads each would mostly wait for a core
    divided(rank, folder, kinds, devices=4)
    middle = folder / "gpt-ddp/middle.ckpt"
    train("gpt", "sharded", folder / "resumed", rank, devices=4, tensor_parallel=2, resume=middle)


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    kinds = ("gpt", "t5")
    in_processes(compiled, tmp_path, kinds)
    in_processes(undivided, tmp_path, kinds, processes=1)
    for kind in kinds:
        assert_same_training(tmp_path, kind)


def compiled(rank: int, folder: Path, kinds: tuple[str, ...]) -> None:
    divided(rank, folder, kinds, compiled=True)


# --- what a division keeps, and what cannot be divided


def kept(call: Callable[[], Any], module: nn.Module) -> int:
    """Numbers that a call keeps for its backward pass, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage()
        if place.data_ptr() not in weights and x.is_floating_point():
            found[place.data_ptr()] = place.nbytes() // x.element_size()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = call()
    assert result is not None
    return sum(found.values())


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_activations_inside_of_blocks_are_divided(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is the input of each part."""
    monkeypatch.setattr(tensor_parallel, "_sum", lambda x, team: x.clone())
    trunk = Transformer(TransformerConfig(dim=16, depth=1, num_heads=8, num_kv_heads=4, mlp=mlp))
    team = TensorGroup(4, 1)
    divided = DividedTrunks([trunk], team)
    x = torch.randn(2, 32, 16, requires_grad=True)
    for part in (trunk.blocks[0].attn, trunk.blocks[0].mlp):
        inside = kept(lambda: part(x), part) - x.numel()  # noqa: B023  # called at once
        with team.dividing():
            assert kept(lambda: part(x), part) - x.numel() == inside / 4  # noqa: B023
    divided.restore()
    with team.dividing():
        assert kept(lambda: trunk.blocks[0].mlp(x), trunk) - x.numel() == inside


def test_attention_weights_are_those_of_all_heads() -> None:
    trunk, team = Transformer(TransformerConfig(dim=16, depth=1, num_heads=2)), TensorGroup(2, 0)
    DividedTrunks([trunk], team)
    with team.dividing():
        found, weights = trunk.blocks[0].attn(torch.randn(1, 3, 16), return_attention=True)
    assert (found.shape, weights.shape) == ((1, 3, 16), (1, 2, 3, 3))


@pytest.mark.parametrize(
    ("options", "size", "processes", "message"),
    [
        ({}, 3, 4, r"=3 does not divide the number of processes \(4\); set it to 1 or 2$"),
        ({"num_heads": 1}, 2, 4, "=2 does not divide num_heads=1 of the network; set it to 1$"),
        ({"num_heads": 4, "num_kv_heads": 2}, 4, 4, "=4 does not divide num_kv_heads=2 of the network; set it to 1 or"),
        ({"num_heads": 4, "mlp_dim": 6}, 4, 4, "=4 does not divide mlp_dim=6 of the network; set it to 1 or 2$"),
    ],
)
def test_what_does_not_divide(options: dict[str, Any], size: int, processes: int, message: str) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        check_divisible([Transformer(trunk(**options))], size, processes)
    assert error.value.field == "trainer.strategy.tensor_parallel_size"


def test_other_layers_are_not_divided() -> None:
    module = MODULES["vit"]()
    check_divisible(trunks_in(module), 2, 2)
    add_lora(module.network, LoRAConfig(rank=2))
    with pytest.raises(TrunklineError, match="layers that cannot be divided among processes"):
        check_divisible(trunks_in(module), 2, 2)


@pytest.mark.parametrize(
    ("size", "message"), [(0, "tensor_parallel_size must be at least 1, not 0"), (2, r"number of processes \(1\)")]
)
def test_groups_are_full(size: int, message: str) -> None:
    with pytest.raises(TrunklineError, match=message) as error:
        _ = ShardedStrategy(tensor_parallel_size=size).distributed_sampler_kwargs
    assert error.value.field == "trainer.strategy.tensor_parallel_size"
