"""Training with LoRA: which options go with it, and checkpoints that hold only what learns."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from trunkline import TrunklineError
from trunkline.base_weights import BASE, BASE_NAME, STATES
from trunkline.files import digest, fsync, in_use, remove_unused
from trunkline.modules.networks.base import config_from_dict
from trunkline.modules.networks.lora import LoRAConfig
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.modules.training.sharding import ShardedStrategy
from trunkline.modules.training.warm_start import differences, listed, starts_from_weights


def refuse_beside_lora(config: LoRAConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse to freeze blocks beside LoRA, which freezes all of them.

    Raises:
        TrunklineError: naming the argument.
    """
    frozen = [name for name, value in arguments.items() if value] if config.rank else []
    if frozen:
        raise TrunklineError(
            f"LoRA freezes all blocks, and its adapters are in all of them; leave out {frozen[0]}, or lora",
            f"model.{frozen[0]}",
        )


def check_lora_run(trainer: L.Trainer, arguments: Mapping[str, Any]) -> None:
    """Check that there is something to adapt, and that the strategy keeps whole weights.

    Args:
        trainer: about to train with LoRA.
        arguments: hyperparameters of the objective.

    Raises:
        TrunklineError: if the network starts from nothing, or the strategy cuts weights into pieces.
    """
    if not starts_from_weights(arguments) and trainer.ckpt_path is None:
        raise TrunklineError(
            "LoRA adapts trained weights, but this network starts from none; set init_from, or leave out lora",
            "model.lora.rank",
        )
    if isinstance(trainer.strategy, ShardedStrategy | FSDPStrategy | DeepSpeedStrategy):
        raise TrunklineError(
            f"LoRA does not train under {type(trainer.strategy).__name__}; train with trainer/ddp: what LoRA adds to "
            "the memory of the weights is small",
            "trainer.strategy",
        )


def check_same_lora(config: LoRAConfig, trained: Mapping[str, Any]) -> None:
    """Compare LoRA with that of the run that a checkpoint is of.

    Args:
        config: as the recipe says.
        trained: hyperparameters in the checkpoint.

    Raises:
        TrunklineError: if only one of them has adapters, or their rank, alpha or layers differ.
    """
    there = config_from_dict(LoRAConfig, trained.get("lora") or {})
    found = differences(there, config, "model.lora", {"dropout"}) if there.rank or config.rank else []
    if found:
        fields = listed([f"{d.place.removeprefix('model.')}={'null' if d.there is None else d.there}" for d in found])
        raise TrunklineError(
            f"the checkpoint was trained with {fields}; set {listed([d.mend for d in found])}", found[0].place
        )


def leave_out_frozen(writer: CheckpointIO, module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Take the weights that do not learn out of a checkpoint, and have them written beside it.

    Args:
        writer: of the checkpoint. Only a `SafeCheckpointIO` can do that; for others the checkpoint stays whole.
        module: the objective.
        checkpoint: its content, changed in place.
    """
    if not isinstance(writer, SafeCheckpointIO):
        return
    if not isinstance(writer.frozen, FrozenWeights) or writer.frozen.module is not module:
        writer.frozen = FrozenWeights(module)
    for part in STATES:
        if part in checkpoint:
            checkpoint[part] = {n: value for n, value in checkpoint[part].items() if n not in writer.frozen.names}
    checkpoint[BASE] = {}  # the writer fills it


class FrozenWeights:
    """The weights of an objective that do not learn, and the file in which they are stored once a folder.

    Args:
        module: the objective.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        state = module.state_dict(keep_vars=True)
        kept = [n for n, value in state.items() if isinstance(value, nn.Parameter) and not value.requires_grad]
        firsts: dict[int, str] = {}
        self.same = {n: first for n in kept if (first := firsts.setdefault(id(state[n]), n)) != n}
        self.weights = {n: state[n].detach() for n in kept if n not in self.same}
        self.names = set(kept)
        self.written: dict[Path, dict[str, Any]] = {}
        """Folder -> what a checkpoint in it says about the file."""

    def beside(self, checkpoint: Path) -> dict[str, Any]:
        """Write the file beside a checkpoint, unless it is there; return what the checkpoint says about it.

        Raises:
            OSError: if it cannot be written.
            RuntimeError: the same, from the library.
        """
        folder = checkpoint.parent.absolute()
        known = self.written.get(folder)
        if known is not None and (folder / known["file"]).is_file():
            return known
        folder.mkdir(parents=True, exist_ok=True)
        remove_unused(folder.glob(".base.*.tmp"))  # what killed saves left
        temporary = folder / f".base.{secrets.token_hex(4)}.tmp"
        try:
            with in_use(temporary):
                mode = temporary.stat().st_mode  # the library makes a file that only its owner may read
                try:
                    save_file({name: weight.contiguous() for name, weight in self.weights.items()}, temporary)
                except SafetensorError as error:
                    raise RuntimeError(str(error)) from error
                temporary.chmod(mode)
                fsync(temporary)
                value = digest(temporary)
                known = {"file": BASE_NAME.format(value[:16]), "sha256": value, "same": self.same}
                os.replace(temporary, folder / known["file"])
            fsync(folder)
        finally:
            temporary.unlink(missing_ok=True)
        self.written[folder] = known
        return known
