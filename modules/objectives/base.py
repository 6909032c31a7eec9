"""The base class of all objectives: where their weights begin, optimiser, reduction of losses, reseeding."""

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trunkline import TrunklineError
from trunkline.contract import DataFacts, Loss
from trunkline.modules.networks.base import ConfigT, Network
from trunkline.modules.networks.companions import Companions
from trunkline.modules.networks.lora import LoRAConfig, add_lora
from trunkline.modules.networks.resizing import SharedWords
from trunkline.modules.objectives.arguments import Beginning, as_config, as_plain
from trunkline.modules.objectives.checks import (
    check_architecture,
    check_sizes,
    facts_of,
    shared_words,
    with_sizes_of_data,
    with_trained_shape,
)
from trunkline.modules.objectives.evaluation import EvaluatedModule
from trunkline.modules.objectives.reduction import Accumulation, Terms, as_terms, mean_count, recomputed_sums, scalar_on
from trunkline.modules.training.checkpoints import follow_folder
from trunkline.modules.training.compiling import let_sizes_vary
from trunkline.modules.training.distributed import Gather, settle_buckets
from trunkline.modules.training.exact_resume import accumulates, correct_step_count, settle_progress
from trunkline.modules.training.finite_steps import FiniteSteps, gradient_norm, refuse_diverged, spread_fault
from trunkline.modules.training.flops import counted_flops, training_flops
from trunkline.modules.training.lora_runs import check_lora_run, check_same_lora, leave_out_frozen, refuse_beside_lora
from trunkline.modules.training.optim import OptimizerConfig, build_optimizer, lr_multiplier
from trunkline.modules.training.position import Position
from trunkline.modules.training.sharding import group_size, refuse_flattened, refuse_model_parallel, replicates
from trunkline.modules.training.start_parts import donors, part_for, sizes_from, start_from
from trunkline.modules.training.warm_start import TrainedWeights, class_path, freeze
from trunkline.ranges import check_ranges


class TrunklineModule(EvaluatedModule):
    """Base class of the LightningModules, one for each objective.

    A subclass has its own arguments, above all `network`, and passes the others on to this class (`**shared`). Its
    constructor calls `configured` and `keep_hyperparameters`, makes `network`, and calls `start`. It implements
    `loss`, and for evaluation `make_metrics` and `evaluate`. This class does the rest: training steps, logging, and the
    reduction over processes and accumulated steps.

    Args:
        optimizer: the optimiser and its schedule.
        init_from: trained weights to start from: a training checkpoint, a run, a folder that `save_pretrained` wrote, a
            folder or file of transformers, timm or open_clip, or a hub name. Output modules (heads) whose shape differs
            keep their initial weights, positions and patches are resized; of other networks, a part is taken over
            (`trunkline.modules.training.start_parts.FITS`). A line says what was taken over, resized and left new.
        init_vocabulary: `same`: the data must have the tokenizer of `init_from`, to which tokens may have been added.
            `matched`: the tokens that both tokenizers have are taken over, the others begin as the mean of all tokens.
        freeze_blocks: the embeddings and this many first blocks keep their weights and run in evaluation mode. With the
            trunk's depth or more, only the output modules learn (linear probing).
        lora: with a rank, only adapters of that rank and the output modules learn, and checkpoints hold only these; the
            trained weights to start from lie beside them, once.
        seed: seed of dropout and of everything else that is random during a step.
        facts: what the datamodule knows; sizes that the recipe leaves out of `network` are taken from here.
    """

    network: Network
    network_class: ClassVar[type[Network]] = Network
    unit = "samples"
    """What the samples are called in names of metrics; see `unit_size`."""
    gather = staticmethod(Gather)
    """How a loss that compares the rows of all processes gathers them."""
    ragged = False
    """Whether training batches differ in their sizes; `setup` asks the data."""
    joint = False
    """Whether the loss needs all batches of an accumulation at once (see `joint_loss`): because it is not a sum over
    rows, or because it consists of several sums, each with its own count."""

    def __init__(
        self,
        optimizer: OptimizerConfig | None = None,
        init_from: str | None = None,
        init_vocabulary: Literal["same", "matched"] = "same",
        freeze_blocks: int = 0,
        lora: LoRAConfig | None = None,
        seed: int = 0,
        facts: DataFacts | None = None,
    ) -> None:
        super().__init__()
        check_ranges("model", {"freeze_blocks": freeze_blocks, "seed": seed}, freeze_blocks="[0, inf)", seed="[0, inf)")
        self.optimizer_config: OptimizerConfig = as_config(OptimizerConfig, optimizer)
        self.lora: LoRAConfig = as_config(LoRAConfig, lora)
        refuse_beside_lora(self.lora, {"freeze_blocks": freeze_blocks})
        self.init_from, self.freeze_blocks, self.seed = init_from, freeze_blocks, seed
        self.init_vocabulary = init_vocabulary
        self.unchecked: list[tuple[Companions, str, str]] = []
        """Whose tokenizers are yet to be compared with the data's: what goes with the weights, argument and name."""
        self.beginning = Beginning(facts or DataFacts())
        self.begins = self.beginning.facts.network_instead is None
        """Whether the weights to start from are needed: not if a checkpoint replaces all weights."""
        self.beginning.weights = self.read_weights(init_from)
        self.frozen: list[torch.nn.Module] = []
        self.finite_steps = FiniteSteps(self.optimizer_config.skip_nonfinite)
        self.position = Position()
        self.accumulation = Accumulation()
        self.trained_loss: Tensor | float | None = None
        """The loss of the last step, the sum of all its terms; its average over processes is the global mean."""
        self.held: list[Any] = []
        """Batches of the current accumulation, for a joint loss."""

    # --- from arguments to a network

    def accepted(self) -> tuple[type[Network], ...]:
        """Networks whose weights this objective can start from."""
        return donors(self.network_class)

    def read_weights(
        self, name: str | None, argument: str = "init_from", accepted: tuple[type[Network], ...] = ()
    ) -> TrainedWeights | None:
        """The weights that an argument names, or None without a name or need; see `TrainedWeights.read`."""
        needed = name is not None and self.begins
        return TrainedWeights.read(name, argument, accepted or self.accepted()) if name and needed else None

    def words_of(self, weights: TrainedWeights, network_class: type[Network]) -> Mapping[str, SharedWords]:
        """What the vocabularies of weights for such a network and of the data have in common, as far as known.

        Raises:
            TrunklineError: if the tokenizers differ and `init_vocabulary` does not allow it.
        """
        if part_for(network_class, weights).is_trunk:  # which sees no words
            return {}
        given = (weights.companions, weights.argument, weights.name)
        if self.beginning.facts.tokenizer is None:
            self.unchecked.append(given)
        return shared_words(*given, self.beginning.facts, self.init_vocabulary)

    def configured(
        self,
        config_class: type[ConfigT],
        network: ConfigT | None,
        source: Any = None,
        words: Mapping[str, SharedWords] | None = None,
    ) -> ConfigT:
        """The network's configuration; what the recipe leaves out comes from the weights to start from and the data.

        Args:
            config_class: class of the configuration.
            network: as the recipe states it.
            source: configuration of the weights to start from; None takes that of `init_from`, if there is one.
            words: what their vocabulary and the data's have in common; None compares with `init_from`.
        """
        weights = self.beginning.weights
        if weights is not None:
            source = sizes_from(self.network_class, weights) if source is None else source
            self.beginning.words = self.words_of(weights, self.network_class)
        facts = self.beginning.facts
        if facts.network_instead is not None:
            source = as_config(config_class, facts.network_instead)
        config = with_trained_shape(as_config(config_class, network), source, facts.stated)
        return with_sizes_of_data(config, facts, source, words=self.beginning.words if words is None else words)

    def keep_hyperparameters(self, **arguments: Any) -> None:
        """Store the constructor's arguments as plain data, which any checkpoint reader can load safely."""
        shared = {
            "optimizer": self.optimizer_config,
            "init_from": self.init_from,
            "init_vocabulary": self.init_vocabulary,
            "freeze_blocks": self.freeze_blocks,
            "lora": self.lora,
            "seed": self.seed,
        }
        self.save_hyperparameters({name: as_plain(value) for name, value in {**arguments, **shared}.items()})

    def start(self, copy_more: Callable[[], None] | None = None) -> None:
        """Copy the trained weights into `network`, freeze the first blocks or add adapters, and make the metrics.

        Args:
            copy_more: copies the trained weights of further arguments.
        """
        if self.beginning.weights is not None:
            self.copy_weights(self.beginning.weights)
        if copy_more is not None:
            copy_more()
        if self.lora.rank:
            add_lora(self.network, self.lora)
        if self.freeze_blocks > 0:
            self.frozen += freeze(self.network, self.freeze_blocks)
        self.beginning = Beginning()  # weight averaging copies the module, and would copy facts and weights with it
        self.make_all_metrics()
        self.train()

    def copy_weights(self, weights: TrainedWeights) -> None:
        """Copy the weights of an `accepted` network into this objective's network."""
        start_from(self.network, weights, self.beginning.words)

    def setup(self, stage: str) -> None:
        """Compare the network with the data before the first step.

        Raises:
            TrunklineError: for sizes or a tokenizer that do not fit, or a strategy that cannot be used.
        """
        facts = facts_of(self.trainer)
        if stage == "fit":
            for given in self.unchecked:
                shared_words(*given, facts)
            if self.lora.rank:
                check_lora_run(self.trainer, self.hparams)
        check_sizes(self.network.config, facts)
        self.ragged = facts.ragged
        refuse_model_parallel(self.trainer.strategy)

    def train(self, mode: bool = True) -> "TrunklineModule":
        """Set the mode as usual, but keep frozen parts in evaluation mode: their dropout would only be noise."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    # --- the loss

    def joint_loss(self, batches: list[Any]) -> Terms:
        """The loss of all batches of an accumulation together, for an objective that is `joint`.

        By default it adds up the losses of the batches. Each batch is recomputed in the backward pass, so that memory
        holds the activations of only one batch.
        """
        return recomputed_sums(self.loss, batches)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a step, scaled so that its gradients, averaged over processes, are those of the global mean."""
        self.count(batch, "train")
        if self.ragged:
            let_sizes_vary(batch)
        return spread_fault(self.scaled_loss(batch, batch_idx))

    def scaled_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, or at its last batch that of an accumulation, divided by its count; logs the means."""
        steps = self.trainer.accumulate_grad_batches
        first = batch_idx % steps == 0
        if self.joint and steps > 1:
            self.held = [batch] if first else [*self.held, batch]  # an interrupted epoch may have left batches
            if accumulates(self.trainer):
                return 0.0 * next(p for p in self.network.parameters() if p.requires_grad).sum()
            batches, self.held = self.held, []
            return self.sum_of_means(self.joint_loss(batches)) * steps  # the trainer divides by the number of steps
        terms = as_terms(self.loss(batch))
        if steps == 1:
            return self.sum_of_means(terms)
        if len(terms) > 1:
            raise TrunklineError(f"set `joint = True` in {type(self).__name__}: {len(terms)} terms cannot accumulate")
        (term,) = terms
        loss = self.accumulation.add(self.trainer, term, first)
        self.log_terms([(term, self.accumulation.mean(self.trainer))])
        return loss

    def sum_of_means(self, terms: Terms) -> Tensor:
        """Divide each term by its count, log the means, and add them up."""
        means = [(term, term.total / mean_count(self.trainer, term.count)) for term in terms]
        self.log_terms(means)
        first, *others = (mean for _, mean in means)
        return sum(others, start=first)

    def log_terms(self, means: list[tuple[Loss, Any]]) -> None:
        """Log the means of a training step, and the further values that the objective wants logged.

        None with `prog_bar`: Lightning would read it, and so wait for the device, in every step. `ProgressBar` reads
        the loss in logging steps.
        """
        self.trained_loss = sum(mean.detach() if isinstance(mean, Tensor) else mean for _, mean in means)
        for term, mean in means:
            self.log(f"train/{term.name}", mean)
            for name, value in term.logs.items():
                self.log(f"train/{name}", scalar_on(self.device, value))

    # --- training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The configured optimiser, with a schedule that advances at every optimiser step."""
        refuse_flattened(self.trainer.strategy, self.optimizer_config)
        optimizer = build_optimizer(self.network, self.optimizer_config, replicates(self.trainer.strategy))
        try:
            total = self.trainer.estimated_stepping_batches
        except TrunklineError:
            raise
        except ValueError as error:  # options of the trainer that do not fit the data
            raise TrunklineError(f"the options of the trainer do not fit the data: {error}") from error
        lr_multiplier(0, total, self.optimizer_config)  # an impossible schedule is reported before the first step
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_multiplier(max(step + self.position.steps_ahead, 0), total, self.optimizer_config),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Make the first step of this run add up gradients as all later ones do, also after a resume."""
        torch.compiler.set_stance("default")  # an evaluation that failed in this process has left another
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and not settle_buckets(model):
            rank_zero_info("static_graph: with 3 or more processes, resumed runs may differ by rounding")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Reseed from (seed, epoch, batch, rank), so that a resumed run draws the same random numbers.

        So do processes that share the computation of the same samples.
        """
        rank = self.global_rank // group_size(self.trainer)
        words = np.random.SeedSequence((self.seed, self.current_epoch, batch_idx, rank)).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))
        correct_step_count(self.trainer)
        self.finite_steps.begin(batch, batch_idx, self.trainer.optimizers)

    def on_before_backward(self, loss: Tensor) -> None:
        self.finite_steps.add(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Correct accumulated gradients, stop or leave out a step that is not finite, and log learning rate and norm.

        The rate is the largest one; the norm is that of the gradients before clipping. Where steps may be left out,
        those of the run so far are logged too, as `train/skipped_steps`.
        """
        steps = self.trainer.accumulate_grad_batches
        if steps > 1 and not self.joint:
            self.accumulation.correct(self.network, self.trainer, steps)
        norm = gradient_norm(self.network)
        self.finite_steps.check(self, optimizer, norm)
        if self.is_logging_step():
            self.log("train/lr", max(group["lr"] for group in optimizer.param_groups))
            self.log("train/grad_norm", norm)
            if self.finite_steps.left_out is not None:
                self.log("train/skipped_steps", self.finite_steps.left_out)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *clipping: Any, **named: Any) -> None:
        """Clip as usual; after that the optimiser alone decides, on its device, whether a step is left out."""
        super().configure_gradient_clipping(optimizer, *clipping, **named)
        self.finite_steps.leave_overflows_to(optimizer, itself=True)

    def is_logging_step(self) -> bool:
        """Whether the trainer logs this step's metrics."""
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % interval == 0

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save diverged weights, and store which classes the checkpoint belongs to.

        Raises:
            TrunklineError: if the loss or a weight is not finite.
        """
        self.finite_steps.settle(self.trainer)
        refuse_diverged(self.network)
        self.finite_steps.save(checkpoint)
        checkpoint["objective"] = type(self).__name__
        data = getattr(self.trainer, "datamodule", None)
        kinds = {"objective": type(self), "network": type(self.network), "data": type(data)}
        checkpoint["classes"] = {role: class_path(kind) for role, kind in kinds.items() if kind is not type(None)}
        settle_progress(self.trainer, checkpoint["loops"]["fit_loop"], (self.position.epoch, self.position.batch))
        self.position.save(self.trainer, checkpoint)
        if self.lora.rank:
            leave_out_frozen(self.trainer.strategy.checkpoint_io, self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another architecture, and find the sample at which training goes on.

        Raises:
            TrunklineError: with the first weight that differs, instead of a list of all keys; or if the rest of the
                epoch cannot be found.
        """
        for callback in self.trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state:
                follow_folder(state, str(callback.dirpath))
        check_same_lora(self.lora, checkpoint.get("hyper_parameters", {}))
        check_architecture(checkpoint["state_dict"], self.state_dict())
        self.finite_steps.restore(checkpoint)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.position = Position.restore(self.trainer, checkpoint)

    # --- what a batch has

    def batch_size(self, batch: dict[str, Tensor]) -> int | Tensor:
        """Number of samples in this process's batch: an int if all processes have as many, else a scalar tensor."""
        return len(next(iter(batch.values())))

    @property
    def unit_size(self) -> float:
        """Number of units in what `batch_size` counts: not 1 where frames are counted, and shown as seconds."""
        return 1

    def flops_per_batch(self, batch: Any) -> int:
        """Floating-point operations of a training step on this batch; 0 if they cannot be counted.

        By default they are counted during one more call of `loss`, without gradients.
        """
        return counted_flops(self.network, lambda: self.loss(batch))

    def network_flops(self, *inputs: Any, **options: Any) -> int:
        """Floating-point operations of a training step of the network on inputs of these shapes."""
        return training_flops(self.network, *inputs, **options)
