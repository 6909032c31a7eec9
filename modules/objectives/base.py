"""What every objective shares: optimiser, reseeding, freezing, and the guard against divergence."""

import copy
import dataclasses
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import SumMetric

from trunkline import TrunklineError
from trunkline.modules.networks.base import Network, config_from_dict
from trunkline.modules.training.checkpoints import follow_folder, load_checkpoint
from trunkline.modules.training.optim import OptimizerConfig, build_optimizer, lr_multiplier
from trunkline.modules.training.warm_start import freeze, load_matching, network_from_checkpoint

DIVERGED = (
    "Lower --model.optimizer.lr, lengthen --model.optimizer.warmup, set --trainer.gradient_clip_val 1, or with "
    "16-mixed precision use bf16-mixed; then --resume auto"
)


class TrunklineModule(L.LightningModule):
    """Base of the LightningModules, one for each objective.

    A subclass calls `keep_hyperparameters` with its arguments, sets `network` and then calls
    `prepare_network`. Configurations may be given as dataclasses or, as checkpoints hold them, as
    plain dicts.

    Args:
        optimizer: how the network learns.
        seed: of dropout and of everything else that is drawn during a step.
    """

    network: Network
    unit = "samples"
    """What a sample is, in the plural, for names of metrics."""
    counted: ClassVar[dict[str, str]] = {}
    """Flags of rows in a batch, and the metrics that count them over an epoch."""

    def __init__(self, optimizer: OptimizerConfig | dict[str, Any] | None, seed: int) -> None:
        super().__init__()
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.seed = seed
        self.frozen: list[torch.nn.Module] = []
        self.loss_sum: Tensor | float = 0.0
        self.counts = torch.nn.ModuleDict(
            {f"{stage}_{name}": SumMetric() for stage in ("train", "val", "test") for name in self.counted}
        )

    def keep_hyperparameters(self, **arguments: Any) -> None:
        """Store the constructor's arguments as plain data, which any checkpoint reader can load safely."""
        self.save_hyperparameters({name: as_plain(value) for name, value in arguments.items()})

    def prepare_network(self, init_from: str | None, freeze_blocks: int) -> None:
        """Start from trained weights, and freeze what shall not learn.

        Args:
            init_from: a training checkpoint, a folder that `save_pretrained` wrote, or a hub name. Output
                modules (heads) of another shape are left as they were made.
            freeze_blocks: the embeddings and this many first blocks keep their weights and run in
                evaluation mode; the trunk's depth or more freezes all but the output modules (linear
                probing).
        """
        if init_from is not None:
            if Path(init_from).is_file():
                source = network_from_checkpoint(type(self.network), init_from)
            else:
                source = type(self.network).from_pretrained(init_from)
            load_matching(self.network, source, init_from)
        if freeze_blocks > 0:
            self.frozen = freeze(self.network, freeze_blocks)
        self.train()

    def train(self, mode: bool = True) -> "TrunklineModule":
        """As usual, but frozen parts stay in evaluation mode: their dropout would only be noise."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The configured optimiser, with its schedule stepped once an optimiser step."""
        optimizer = build_optimizer(self.network, self.optimizer_config)
        try:
            total = self.trainer.estimated_stepping_batches
        except TrunklineError:
            raise
        except ValueError as error:  # options of the trainer that do not fit the data
            raise TrunklineError(f"--trainer: {error}") from error
        lr_multiplier(0, total, self.optimizer_config)  # an impossible schedule is reported before the first step
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_multiplier(step, total, self.optimizer_config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Reseed from (seed, epoch, batch, rank): what a step draws does not depend on how the run got there."""
        words = np.random.SeedSequence((self.seed, self.current_epoch, batch_idx, self.global_rank)).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))
        # Lightning's own count of steps for loggers is one off after some resumes.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite, before it reaches a weight that is saved.

        On an accelerator, looking at each loss would make the host wait for the device: there the sum is
        kept, which no later loss can make finite again, and looked at when logging and saving.
        """
        self.loss_sum = self.loss_sum + loss.detach()
        if self.device.type == "cpu" or self.is_logging_step():
            self.check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Never let diverged weights replace good ones, and say what the checkpoint is of."""
        self.check_finite()
        for name, p in self.network.named_parameters():
            if not torch.isfinite(p).all():
                raise TrunklineError(f"the weight {name} is not finite; nothing was saved. {DIVERGED}")
        checkpoint["objective"] = type(self).__name__
        settle_progress(self.trainer, checkpoint["loops"]["fit_loop"])

    def on_validation_start(self) -> None:
        """Drop the half-done validation that `settle_progress` may have put into the counters."""
        self.trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()

    def check_finite(self) -> None:
        """Raise if any loss of this run was not finite.

        Raises:
            TrunklineError: naming the step and what to change.
        """
        if not math.isfinite(self.loss_sum):
            raise TrunklineError(
                f"the loss is not finite by step {self.trainer.global_step} (epoch {self.current_epoch}); the last "
                f"checkpoint is from before that. {DIVERGED}"
            )

    def is_logging_step(self) -> bool:
        """Whether the trainer writes this step's metrics."""
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % interval == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the learning rate (the largest of the groups') and the gradient's norm before clipping."""
        if self.is_logging_step():
            self.log("train/lr", max(group["lr"] for group in optimizer.param_groups))
            grads = [p.grad for p in self.network.parameters() if p.grad is not None]
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(grads))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another architecture with one message instead of a list of keys.

        Raises:
            TrunklineError: naming the first difference.
        """
        for callback in self.trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state:
                follow_folder(state, str(callback.dirpath))
        saved, own = checkpoint["state_dict"], self.state_dict()
        shape = {key: tuple(value.shape) for key, value in own.items()}
        different = [k for k in {**own, **saved} if k not in saved or shape.get(k) != tuple(saved[k].shape)]
        if different:
            key = different[0]
            shapes = [tuple(d[key].shape) if key in d else "missing" for d in (saved, own)]
            raise TrunklineError(
                f"the checkpoint is of another architecture: {len(different)} weight(s) differ, first {key}: "
                f"{shapes[0]} in the checkpoint, {shapes[1]} here; use the config.yaml of the run that wrote it"
            )

    def mean_over_processes(self, total: Tensor, count: Tensor) -> Tensor:
        """A loss whose gradients, averaged over processes, are those of the mean over all their targets.

        Args:
            total: sum of this process's losses.
            count: how many they are.
        """
        count = count.float()
        if self.trainer.world_size > 1:
            count = self.trainer.strategy.reduce(count, reduce_op="mean")
        return total / count.clamp(min=1e-8)

    def count(self, batch: dict[str, Tensor], stage: str) -> None:
        """Log how many rows of this epoch have the flags in `counted`, over all processes.

        Args:
            batch: may lack a flag.
            stage: train, val or test.
        """
        for name, title in self.counted.items():
            metric: Any = self.counts[f"{stage}_{name}"]
            metric.update(batch.get(name, 0))
            self.log(f"{stage}/{title}", metric, on_step=False, on_epoch=True)

    def batch_size(self, batch: dict[str, Tensor]) -> int:
        """Samples in this process's batch."""
        return len(next(iter(batch.values())))

    def flops_per_batch(self, batch: dict[str, Tensor]) -> int:
        """Floating-point operations of a training step on this batch."""
        raise NotImplementedError(f"{type(self).__name__} does not count its operations")

    def network_flops(self, *inputs: Tensor, **options: Tensor) -> int:
        """Floating-point operations of one training step (forward and twice that backward) on such inputs."""
        with torch.device("meta"):
            network = type(self.network)(copy.deepcopy(self.network.config))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(
                    *(torch.empty_like(x, device="meta") for x in inputs),
                    **{name: torch.empty_like(x, device="meta") for name, x in options.items()},
                )
        return 3 * counter.get_total_flops()


def settle_progress(trainer: L.Trainer, saved: dict[str, Any]) -> None:
    """Correct saved counters where Lightning 2.6 would resume from them at another point than it saved.

    It would lose the gradients of an accumulation that is under way, leave out a validation that was due
    but not done, and after the last batch of an epoch count wrongly from there on.

    Args:
        trainer: while it saves.
        saved: state of its fit loop, changed in place.
    """
    loop = trainer.fit_loop.epoch_loop
    epochs, batches = saved["epoch_progress"], saved["epoch_loop.batch_progress"]
    ready = batches["current"]["ready"]
    if epochs["current"]["processed"] == epochs["current"]["ready"]:  # all but over: the next epoch follows
        for count in (epochs["current"], epochs["total"]):
            count["completed"] = count["processed"]
        batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
    elif loop._should_accumulate():  # the optimiser step begins again, as if saved at the end of the one before
        for count in (batches["current"], batches["total"]):
            first = count["ready"] - ready % trainer.accumulate_grad_batches
            count.update(ready=first, started=first, processed=first, completed=first - 1)
    elif batches["current"]["processed"] == ready > batches["current"]["completed"]:  # a batch is all but over
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if due or loop._num_ready_batches_reached():
            for count in (batches["current"], batches["total"]):
                count["completed"] += 1
        if due:  # as if saved after the validation has begun
            validation = saved["epoch_loop.val_loop.batch_progress"]
            validation["current"].update(ready=1, started=1, processed=0, completed=0)
            validation["total"]["ready"] += 1
            validation["total"]["started"] += 1


def check_text_sizes(trainer: L.Trainer, config: Any, group: str = "--model.network") -> None:
    """Compare a network on text with the data.

    Args:
        trainer: has the data.
        config: of the network.
        group: of the flags that set it.

    Raises:
        TrunklineError: if the data has longer rows or more tokens than the network takes.
    """
    data: Any = getattr(trainer, "datamodule", None)
    for name in ("vocab_size", "max_length"):
        given, taken = getattr(data, name, 0), getattr(config, name)
        if given > taken:
            raise TrunklineError(
                f"the data has {name}={given}, but the network takes {taken}; set {group}.{name} {given}"
            )


def check_tokenizer(module: TrunklineModule, argument: str = "init_from") -> None:
    """Compare the data's tokenizer with that of the checkpoint whose weights a run starts from.

    Args:
        module: with its trainer.
        argument: of the module that names the checkpoint.

    Raises:
        TrunklineError: if they differ, for then the ids mean other words.
    """
    source = module.hparams.get(argument)
    tokenizer = getattr(getattr(module.trainer, "datamodule", None), "tokenizer", None)
    if tokenizer is None or source is None or not Path(source).is_file():
        return
    states = [s["tokenizer"] for s in load_checkpoint(source).values() if isinstance(s, dict) and s.get("tokenizer")]
    if states and states[0] != tokenizer.to_str():
        raise TrunklineError(
            f"{argument} {source} was trained with another tokenizer than the data's, so that its ids mean other "
            f"words; set --data.tokenizer {source}"
        )


def check_loss_options(label_smoothing: float, z_loss: float = 0.0) -> None:
    """Refuse what no loss can be made with.

    Raises:
        TrunklineError: naming the flag.
    """
    if not 0 <= label_smoothing < 1:
        raise TrunklineError(f"--model.label_smoothing must be from 0 up to below 1, not {label_smoothing}")
    if z_loss < 0:
        raise TrunklineError(f"--model.z_loss must be 0 or more, not {z_loss}")


def as_config(config_class: type[Any], value: Any) -> Any:
    """A configuration from a dataclass, a plain mapping, or None for the defaults."""
    if isinstance(value, config_class):
        return copy.deepcopy(value)
    return config_from_dict(config_class, value if isinstance(value, Mapping) else {})


def as_plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists: what JSON would make of them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: as_plain(v) for key, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, list | tuple) else value
