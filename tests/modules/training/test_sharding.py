"""Training with sharded weights is that of DDP; its checkpoints are resumed, converted, and never torn."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from recorded_run import Run
from sharded_runs import MODULES, SCALE, in_processes, train
from sharded_runs import optimizer as optimizer_config
from torch._dynamo.utils import counters

from trunkline import TrunklineError
from trunkline.files import load_checkpoint
from trunkline.modules import chunked_cross_entropy
from trunkline.modules.networks import GPT, ViT
from trunkline.modules.networks.base import Network
from trunkline.modules.training.sharding import (
    ShardedStrategy,
    recompute_activations,
    refuse_flattened,
    shard_module,
    trunks_in,
)
from trunkline.pipelines.cli import main

FAST = ("gpt", "vit")


def compare(rank: int, folder: Path, kinds: tuple[str, ...], accumulate: int = 1) -> None:
    """Train each kind with DDP and with shards."""
    found = {}
    for kind in kinds:
        for strategy in ("ddp", "sharded"):
            found[kind, strategy] = train(
                kind, strategy, folder, rank, save=kind == "vit", accumulate_grad_batches=accumulate
            )
    torch.save(found, folder / f"{rank}.pt")


def compare_and_resume(rank: int, folder: Path) -> None:
    """Also go on from the middle: sharded from sharded, sharded from DDP's file, DDP from the sharded folder."""
    compare(rank, folder, FAST)
    for name, strategy, source in (
        ("same", "sharded", "sharded"),
        ("from-file", "sharded", "ddp"),
        ("from-parts", "ddp", "sharded"),
    ):
        train("vit", strategy, folder / name, rank, resume=folder / f"vit-{source}/middle.ckpt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    in_processes(compare_and_resume, folder)
    return folder


def states(path: Path) -> dict[str, Any]:
    content = load_checkpoint(path)
    keys = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    return {key: content[key] for key in keys if key in content}


def assert_close(a: Any, b: Any, tolerance: float) -> None:
    """Nested states of the same structure, tensor by tensor."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def assert_same_training(folder: Path, kind: str, tolerance: float = 1e-5) -> None:
    sharded, whole = (states(folder / f"{kind}-{strategy}/last.ckpt") for strategy in ("sharded", "ddp"))
    assert (folder / f"{kind}-sharded/last.ckpt").is_dir()
    assert_close(sharded, whole, tolerance)
    for rank in range(2):
        found = torch.load(folder / f"{rank}.pt")
        assert found[kind, "sharded"]["steps"] == found[kind, "ddp"]["steps"] == 20
        logged, expected = found[kind, "sharded"]["logged"], found[kind, "ddp"]["logged"]
        assert logged == pytest.approx(expected, rel=10 * tolerance)
        assert {"train/loss", "train/grad_norm"} <= logged.keys()


@pytest.mark.parametrize("kind", FAST)
def test_20_steps_are_those_of_ddp(kind: str, runs: Path) -> None:
    """Weights, moments and logged norms; for the ViT also the averaged weights and the validation with them."""
    assert_same_training(runs, kind)
    content = load_checkpoint(runs / f"{kind}-sharded/last.ckpt")
    assert ("averaging_state" in content) == (kind == "vit")
    start = MODULES[kind]().state_dict()
    assert max((start[name] - x).abs().max() for name, x in content["state_dict"].items() if x.numel() > 1) > 1e-2


def test_activations_are_recomputed_without_a_trace(runs: Path) -> None:
    """Each block is computed twice in each step of the sharded ViT; its configuration is saved as it was."""
    for rank in range(2):
        found = torch.load(runs / f"{rank}.pt")
        assert (found["vit", "ddp"]["calls"], found["vit", "sharded"]["calls"]) == (20, 40)
    sharded, whole = (load_checkpoint(runs / f"vit-{strategy}/last.ckpt") for strategy in ("sharded", "ddp"))
    assert sharded["hyper_parameters"] == whole["hyper_parameters"]
    assert sharded["hyper_parameters"]["network"]["backbone"]["activation_checkpointing"] is False


@pytest.mark.parametrize("recompute", [True, False])
def test_all_trunks_recompute(recompute: bool) -> None:
    """Also the network's configuration is not changed, which is saved with its weights."""
    module = MODULES["seq2seq"]()
    configs = [module.network.config.encoder, module.network.config.decoder]
    recompute_activations(module, recompute)
    assert [trunk.config.activation_checkpointing for trunk in trunks_in(module)] == [recompute] * 2
    assert configs == [module.network.config.encoder, module.network.config.decoder]
    assert all(config.activation_checkpointing for config in configs)


def test_the_flag_of_the_machine_file(capsys: pytest.CaptureFixture[str]) -> None:
    flag = ["--trainer.strategy.activation_checkpointing", "true"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "vit/digits", "--config", "trainer/fsdp", *flag, "--print_config"])
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    assert strategy["class_path"].endswith("ShardedStrategy")
    assert strategy["init_args"]["activation_checkpointing"] is True
    assert strategy["init_args"]["timeout"] == "0:05:00"


def test_resume_is_exact(runs: Path) -> None:
    found, expected = (load_checkpoint(f / "vit-sharded/last.ckpt") for f in (runs / "same", runs))
    assert found["global_step"] == expected["global_step"] == 20
    assert_close(states(runs / "same/vit-sharded/last.ckpt"), states(runs / "vit-sharded/last.ckpt"), 0.0)


@pytest.mark.parametrize(("name", "strategy"), [("from-file", "sharded"), ("from-parts", "ddp")])
def test_resume_with_another_strategy(name: str, strategy: str, runs: Path) -> None:
    assert_close(states(runs / name / f"vit-{strategy}/last.ckpt"), states(runs / "vit-ddp/last.ckpt"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scaled", "clip", "seq2seq", "frozen"])
def test_other_objectives(kind: str, tmp_path: Path) -> None:
    """Several trunks, a shared one, recomputed activations, frozen blocks, and factors of whole matrices."""
    in_processes(compare, tmp_path, (kind,))
    assert_same_training(tmp_path, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "clip"])
def test_accumulated_steps(kind: str, tmp_path: Path) -> None:
    """Of batches with different numbers of targets; for CLIP all of them in one loss."""
    in_processes(compare, tmp_path, (kind,), 3)
    assert_same_training(tmp_path, kind)


@pytest.mark.slow
def test_bfloat16_weights(tmp_path: Path) -> None:
    in_processes(compare, tmp_path, ("bf16-true",))
    sharded, whole = (states(tmp_path / f"bf16-true-{strategy}/last.ckpt") for strategy in ("sharded", "ddp"))
    assert {x.dtype for name, x in sharded["state_dict"].items() if "network" in name} == {torch.bfloat16}
    torch.testing.assert_close(sharded["state_dict"], whole["state_dict"], rtol=0.05, atol=0.05)


def compare_with_compiled_loss(rank: int, folder: Path) -> None:
    """Train a GPT with the step of the loss that GPUs compile; here it is traced, which needs no compiler."""
    plain = chunked_cross_entropy.loss_and_gradients

    def compiled(*given: Any) -> list[torch.Tensor]:
        *rest, _, needed = given
        return plain(*rest, True, needed)

    traced = torch.compile(chunked_cross_entropy._softmax, backend="aot_eager")
    chunked_cross_entropy._compiler = cache(lambda: traced)
    chunked_cross_entropy.loss_and_gradients = compiled
    compare(rank, folder, ("gpt",))
    assert not chunked_cross_entropy._not_compiled
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_compiled_loss(runs: Path, tmp_path: Path) -> None:
    in_processes(compare_with_compiled_loss, tmp_path)
    assert_same_training(tmp_path, "gpt")
    for strategy in ("ddp", "sharded"):
        found, expected = (states(f / f"gpt-{strategy}/last.ckpt") for f in (tmp_path, runs))
        assert_close(found, expected, 1e-5)


@pytest.mark.slow
def test_mixed_bfloat16(tmp_path: Path) -> None:
    """Products in bfloat16, of weights in float32."""
    in_processes(compare, tmp_path, ("bf16-mixed",))
    assert_same_training(tmp_path, "bf16-mixed", 3e-3)
    weights = states(tmp_path / "bf16-mixed-sharded/last.ckpt")["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["bf16-mixed", "sharded"]["products"] == ["torch.bfloat16"]


def half_precision(rank: int, folder: Path) -> None:
    """Train in 16-mixed: with DDP, with shards, from the middle, and with an overflow that one process alone sees."""
    kind, middle = "16-mixed", folder / "16-mixed-sharded/middle.ckpt"
    found = {(kind, strategy): train(kind, strategy, folder, rank, save=True) for strategy in ("ddp", "sharded")}
    found[kind, "resumed"] = train(kind, "sharded", folder / "resumed", rank, resume=middle)
    found[kind, "overflow"] = train(kind, "sharded", folder / "overflow", rank, resume=middle, overflow=True)
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    """All processes find the same scale, keep it in the checkpoint, and leave out the same step."""
    in_processes(half_precision, tmp_path)
    assert_same_training(tmp_path, "16-mixed", 1e-3)
    for rank in range(2):
        found = {name: run["scale"] for (_, name), run in torch.load(tmp_path / f"{rank}.pt").items()}
        assert found == {"ddp": SCALE, "sharded": SCALE, "resumed": SCALE, "overflow": SCALE / 2}
    last = "16-mixed-sharded/last.ckpt"
    whole, resumed, overflow = (states(tmp_path / place / last) for place in ("", "resumed", "overflow"))
    assert_close(resumed, whole, 0.0)
    for held in overflow["optimizer_states"][0]["state"].values():
        assert held["step"] == 19


@pytest.mark.slow
def test_a_recipe_with_all_its_callbacks(tmp_path: Path) -> None:
    """The machine file trainer/fsdp on two CPU processes: pictures, averaged weights, best weights, test, resume."""
    small = "--data.num_workers 0 --trainer.check_val_every_n_epoch 1 --test_with best --trainer.limit_train_batches 6"
    machine = "--trainer.accelerator cpu --trainer.devices 2 --trainer.precision 32-true"
    command = f"fit --config vit/digits --config trainer/fsdp {machine} {small}".split()
    for epochs, resume in (("1", []), ("2", ["--resume", "auto"])):
        run = Run([*command, "--trainer.max_epochs", epochs, *resume], tmp_path, 2)
        assert run.wait() == [0, 0], run.output()
        assert "test/acc" in run.output()
    (folder,) = (tmp_path / "runs/vit/digits").iterdir()
    for name, steps in (("best", (6, 12)), ("last", (12,))):
        content = load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")
        assert content["global_step"] in steps
        assert "averaging_state" in content
    main(["convert", "--checkpoint", str(tmp_path / "runs/vit/digits")])
    assert ViT.from_pretrained(folder / "checkpoints/best").config.num_classes == 10


@pytest.mark.parametrize(("kind", "network"), [("gpt", GPT), ("vit", ViT)])
def test_convert(kind: str, network: type[Network], runs: Path, tmp_path: Path) -> None:
    """One safetensors file of all shards: the network of DDP's checkpoint, averaged if that was kept."""
    checkpoint = runs / f"{kind}-sharded/last.ckpt"
    main(["convert", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    found = network.from_pretrained(tmp_path / "out").state_dict()
    assert_close(found, network.from_checkpoint(runs / f"{kind}-ddp/last.ckpt").state_dict(), 1e-5)
    assert_close(found, network.from_checkpoint(checkpoint).state_dict(), 0.0)


def test_optimisers_of_whole_matrices_are_refused_where_weights_are_flattened() -> None:
    for strategy, name in ((FSDPStrategy, "FSDPStrategy"), (DeepSpeedStrategy, "DeepSpeedStrategy")):
        made = object.__new__(strategy)
        for config, optimizer in ((optimizer_config("muon"), "muon"), (optimizer_config(rms_scaled=True), "rms_sc")):
            with pytest.raises(
                TrunklineError, match=f"{optimizer}.* needs whole matrices, but {name} flattens"
            ) as error:
                refuse_flattened(made, config)
            assert error.value.field == "trainer.strategy"
        refuse_flattened(made, optimizer_config())
    refuse_flattened(DDPStrategy(), optimizer_config("muon"))


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_lightnings_own_sharding_is_refused(stage: str, tmp_path: Path) -> None:
    module = MODULES["vit"]()
    module.trainer = tiny.trainer(tmp_path, strategy=ModelParallelStrategy(), devices=2)
    message = "^ModelParallelStrategy cannot be used: .*; train with trainer/fsdp, whose ShardedStrategy shards any"
    with pytest.raises(TrunklineError, match=message) as error:
        module.setup(stage)
    assert error.value.field == "trainer.strategy"
    module.trainer = tiny.trainer(tmp_path, strategy=ShardedStrategy(), devices=2)
    module.setup(stage)


def test_a_parameter_without_dimension_is_refused() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

    mesh: Any = None
    with pytest.raises(TrunklineError, match=r"parameter scale has no dimension.*give it the shape \(1,\)"):
        shard_module(Scaled(), mesh)
