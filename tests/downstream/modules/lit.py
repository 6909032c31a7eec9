"""The same task in Lightning, in a LightningModule of this project."""

from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import trunkline
from modules.loop import Sorter
from trunkline.modules.training.optim import decay_groups


class LitSorter(lightning.LightningModule):
    """A `Sorter` that Lightning trains.

    Args:
        source: from where `trunkline.load` takes the network.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sorter = Sorter(trunkline.load(source)).train()  # networks come in evaluation mode

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        """Cross-entropy of a batch."""
        pictures, labels = batch
        loss = F.cross_entropy(self.sorter(pictures), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The network slower than the head, and its lower blocks slower than the upper ones."""
        groups = decay_groups(self.sorter.body, lr=1e-2, layer_decay=0.75)
        return torch.optim.AdamW([*groups, {"params": list(self.sorter.head.parameters()), "lr": 1e-2}])


def train(source: str, pictures: Tensor, labels: Tensor, folder: Path, epochs: int) -> tuple[LitSorter, Path]:
    """Train, and write a checkpoint of Lightning's."""
    lit = LitSorter(source)
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=epochs,
    )
    loader = DataLoader(TensorDataset(pictures, labels), batch_size=16, shuffle=True)
    trainer.fit(lit, loader)
    trainer.save_checkpoint(folder / "sorter.ckpt")
    return lit.eval(), folder / "sorter.ckpt"
