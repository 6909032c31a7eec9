"""Weights, gradients and optimiser states in shards over the processes: FSDP2 as a strategy of Lightning."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from trunkline import TrunklineError
from trunkline.files import find_fault, load_checkpoint
from trunkline.modules.backbone import Transformer
from trunkline.modules.training.background_saves import BackgroundCheckpointIO, snapshot
from trunkline.modules.training.distributed import sharing_in
from trunkline.modules.training.exact_resume import averaged_modules
from trunkline.modules.training.optim import OptimizerConfig
from trunkline.modules.training.sharded_checkpoints import Writers, own_span, save_parts, split, write_parts
from trunkline.modules.training.tensor_parallel import DividedTrunks, TensorGroup, check_divisible
from trunkline.parts import is_parts
from trunkline.ranges import check_ranges


class WholeModule(nn.Module):
    """The outermost sharded module: its call, to which Lightning redirects each step, gathers what is in no block."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


def trunks_in(module: nn.Module) -> list[Transformer]:
    """The trunks of all networks in a module; one that they share, once."""
    return [m for m in module.modules() if isinstance(m, Transformer)]


def recompute_activations(module: nn.Module, recompute: bool) -> None:
    """Let all trunks recompute their activations or not; the network's configuration stays as it was."""
    for trunk in trunks_in(module):
        trunk.config = replace(trunk.config, activation_checkpointing=recompute)


def shard_module(module: nn.Module, mesh: DeviceMesh) -> WholeModule:
    """Shard each block of each trunk by itself, and all other parameters together.

    A trunk that two networks share is sharded once. Weights that are tied to each other must be in the same block, or
    all outside of blocks.

    Args:
        module: changed in place: its parameters become DTensors, of which each process holds some rows.
        mesh: the processes.

    Returns:
        the module to call instead of `module`.

    Raises:
        TrunklineError: for a parameter without dimension, which has no rows.
    """
    for name, p in module.named_parameters():
        if p.ndim == 0:
            raise TrunklineError(
                f"the parameter {name} has no dimension, so that it cannot be sharded; give it the shape (1,), or "
                "train with trainer/ddp",
                "trainer.strategy",
            )
    trunks = trunks_in(module)
    for trunk in trunks:
        for block in trunk.blocks:
            fully_shard(block, mesh=mesh)
    whole = WholeModule(module)
    fully_shard(whole, mesh=mesh)
    for trunk in trunks:
        # Which block to gather next in the backward pass would otherwise follow from all calls since the last one, and
        # a process that has drawn something in a validation would gather others than the rest.
        for before, block in pairwise([whole, *trunk.blocks]):
            block.set_modules_to_backward_prefetch([before])
    return whole


class ShardedStrategy(DDPStrategy):
    """Data-parallel training in which each process holds a share of the weights, gradients and optimiser states.

    A block's weights are gathered when it is computed, and released after it. In evaluations each process holds all
    weights, so that whatever runs the network there, in all processes or in one, does so as usual. Checkpoints are
    folders (`trunkline.parts`), and can be resumed by any strategy on any number of processes; so can those of others
    by this one.

    Lightning's own `ModelParallelStrategy` is not the base, because its checkpoints are unpickled without restriction,
    its writer leaves torn ones, it refuses 16-mixed, and callbacks that average weights cannot be used with it. What
    DDP does differently is replaced here.

    Args:
        process_group_backend: such as gloo; None chooses by the device.
        timeout: after which a process that waits for others gives up.
        activation_checkpointing: whether all trunks recompute the activations of their blocks in the backward pass, for
            less memory and the same numbers; None leaves that to the network's own configuration, which is not changed.
        tensor_parallel_size: so many neighbouring processes train on the same samples, each with its share of the heads
            and hidden units of every block (tensor parallelism). It saves activations and lets a step have fewer
            samples than processes; a block's weights are still gathered whole when it is computed. Evaluations are not
            divided. It must divide the number of processes, and heads, key/value heads and hidden units of all trunks.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=5),
        activation_checkpointing: bool | None = None,
        tensor_parallel_size: int = 1,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.tensor_parallel_size = tensor_parallel_size
        self.divided: DividedTrunks | None = None
        """The trunks of a training, with `tensor_parallel_size` above 1."""
        self.sharing: dist.ProcessGroup | None = None
        """The processes that together have each sample of a step once; None for all."""
        self.activation_checkpointing = activation_checkpointing
        self.wholes: list[WholeModule] = []
        """The sharded module, and those of callbacks that average its weights."""
        self.mesh: DeviceMesh | None = None
        self.writers: Writers | None = None

    def setup(self, trainer: L.Trainer) -> None:
        """For a test after `fit`, keep the shards: DDP would broadcast whole weights."""
        if trainer.state.fn == TrainerFn.FITTING or not self.wholes:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.wholes[0]
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Shard instead of replicating; also the copies of callbacks that average the weights."""
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        if not self.wholes or self.wholes[0].module is not module:
            if self.distributed_sampler_kwargs["num_replicas"] < self.world_size:
                check_divisible(trunks_in(module), self.tensor_parallel_size, self.world_size)
            for tensor in [*module.parameters(), *module.buffers()]:  # as DDP does
                dist.broadcast(tensor.detach(), 0)
            self.mesh = init_device_mesh(self.root_device.type, (self.world_size,))
            if self.activation_checkpointing is not None:
                recompute_activations(module, self.activation_checkpointing)
            self.wholes = [shard_module(module, self.mesh)]
        mesh = self.mesh
        assert mesh is not None
        copies = [copy.to(self.root_device) for copy in averaged_modules(trainer)]
        self.wholes = [self.wholes[0], *(shard_module(copy, mesh) for copy in copies)]
        self.model = self.wholes[0]
        self._divide_trunks(module)

    # --- tensor parallelism

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The number of shares of the training data, and this process's: one for each group of processes.

        Raises:
            TrunklineError: if `tensor_parallel_size` is below 1, or does not divide the number of processes.
        """
        size, processes = self.tensor_parallel_size, self.world_size
        check_ranges("trainer.strategy", self, tensor_parallel_size="[1, inf)")  # in a constructor it would be lost
        check_divisible([], size, processes)
        return {"num_replicas": processes // size, "rank": self.global_rank // size}

    def _divide_trunks(self, module: nn.Module) -> None:
        size = self.tensor_parallel_size
        if size == 1:
            return
        self._restore_trunks()
        shape = (self.world_size // size, size)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("samples", "tensor"))
        team = TensorGroup(size, mesh.get_local_rank("tensor"), mesh.get_group("tensor"))
        self.sharing, self.divided = mesh.get_group("samples"), DividedTrunks(trunks_in(module), team)

    def _restore_trunks(self) -> None:
        if self.divided is not None:
            self.divided.restore()
        self.sharing = self.divided = None

    @contextmanager
    def _dividing(self) -> Iterator[None]:
        """What a step computes is divided, and its samples are shared by groups of processes."""
        with ExitStack() as stack:
            if self.divided is not None:
                stack.enter_context(self.divided.team.dividing())
                stack.enter_context(sharing_in(self.sharing))
            yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._dividing():
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As usual; where activations are recomputed, blocks are computed here too."""
        with self._dividing():
            return super().backward(*args, **kwargs)

    # --- whole weights, outside of training steps

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Let each process hold all weights inside the block; what is written to them there is lost."""
        self.gather_weights()
        try:
            yield
        finally:
            self.release_weights()

    def gather_weights(self) -> None:
        """Gather all weights; from then on the network runs without communication until `release_weights`."""
        for module in self._sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def release_weights(self) -> None:
        """Keep only this process's rows again."""
        for module in self._sharded():
            module.reshard()
            module.set_reshard_after_forward(not isinstance(module, WholeModule), recurse=False)

    def _sharded(self) -> list[FSDPModule]:
        return [m for whole in self.wholes for m in whole.modules() if isinstance(m, FSDPModule)]

    def on_validation_start(self) -> None:
        self.gather_weights()

    def on_validation_end(self) -> None:
        self.release_weights()

    def on_test_start(self) -> None:
        self.gather_weights()

    def on_test_end(self) -> None:
        self.release_weights()

    def on_train_end(self) -> None:
        """For what callbacks draw at the end of `fit`; those that save have done so."""
        self.gather_weights()

    def teardown(self) -> None:
        """Leave the sharded tensors where they are, unlike DDP: a test may follow."""
        self._restore_trunks()
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()  # waits for the last save

    # --- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The sharded state, also where a validation that is under way has gathered it."""
        for module in self._sharded():
            module.reshard()
        return super().lightning_module_state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a folder, each process its own rows; with `BackgroundCheckpointIO`, while training goes on.

        Raises:
            TrunklineError: in all processes, if one cannot write, or could not write the save before; an older
                checkpoint of the name stays as it was.
        """
        path = Path(self.broadcast(os.fspath(filepath)))
        if self.writers is None:
            self.writers = Writers(self._timeout)
        writer = self.checkpoint_io
        if not isinstance(writer, BackgroundCheckpointIO):
            save_parts(checkpoint, path, self.writers)
            return
        writer.wait()
        shared, held = split(checkpoint, self.global_rank, self.world_size)
        writer.start(write_parts, snapshot(shared), held, path, self.writers)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of this or another strategy; of a folder, only this process's rows.

        Raises:
            TrunklineError: if it is damaged, or holds more than plain data.
        """
        self.release_weights()
        if isinstance(self.checkpoint_io, BackgroundCheckpointIO):
            self.checkpoint_io.wait()
        path = Path(self.broadcast(os.fspath(checkpoint_path)))
        if not self.wholes:
            return super().load_checkpoint(path, weights_only=weights_only)
        if is_parts(path):
            fault = self.broadcast(find_fault(path) if self.is_global_zero else None)  # one reads all of it
            if fault is not None:
                raise TrunklineError(f"{fault}; use an older checkpoint")
            return load_checkpoint(path, make=lambda pieces: self._own_rows(pieces.shape, pieces.rows))
        content = super().load_checkpoint(path, weights_only=weights_only)
        own = self.lightning_module.state_dict()  # type: ignore[union-attr]
        for key in {"state_dict", "current_model_state"} & content.keys():
            content[key] = {name: self._sharded_as(own.get(name), value) for name, value in content[key].items()}
        for optimizer, state in zip(self.optimizers, content.get("optimizer_states", []), strict=False):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for number, held in state["state"].items():
                # Not the step counts, which are the same in all processes.
                held.update({name: self._sharded_as(params[number], x) for name, x in held.items() if name != "step"})
        return content

    def _sharded_as(self, pattern: Any, value: Any) -> Any:
        """A whole tensor in shards, if the pattern is one and has as many entries."""
        if not (isinstance(pattern, DTensor) and isinstance(value, Tensor)) or pattern.numel() != value.numel():
            return value
        rows = value.reshape(pattern.shape)
        return self._own_rows(pattern.shape, lambda first, last: rows[first:last])

    def _own_rows(self, shape: torch.Size, rows: Any) -> DTensor:
        """The DTensor of that shape of which this process holds the rows that `rows(first, last)` reads."""
        assert self.mesh is not None
        local = rows(*own_span(shape[0], self.global_rank, self.world_size)).to(self.root_device, copy=True)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


NO_MODEL_PARALLEL = (
    "ModelParallelStrategy cannot be used: the networks do not shard themselves, and its checkpoints are not read "
    "safely; train with trainer/fsdp, whose ShardedStrategy shards any network"
)


def refuse_model_parallel(strategy: Strategy) -> None:
    """Refuse the strategy of Lightning that leaves the sharding to the module (see `ShardedStrategy`).

    Raises:
        TrunklineError: naming it.
    """
    if isinstance(strategy, ModelParallelStrategy):
        raise TrunklineError(NO_MODEL_PARALLEL, "trainer.strategy")


def refuse_flattened(strategy: Strategy, config: OptimizerConfig) -> None:
    """Refuse an optimiser of whole matrices under a strategy that cuts the weights into flat pieces.

    Raises:
        TrunklineError: naming both.
    """
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy) and (config.name == "muon" or config.rms_scaled):
        optimizer = "rms_scaled" if config.rms_scaled else config.name
        raise TrunklineError(
            f"{optimizer} needs whole matrices, but {type(strategy).__name__} flattens the weights; train with "
            "trainer/fsdp, which does not, or with plain adamw",
            "trainer.strategy",
        )


def replicates(strategy: Strategy) -> bool:
    """Whether several processes each hold the same whole weights and gradients, as under DDP."""
    return isinstance(strategy, DDPStrategy) and not isinstance(strategy, ShardedStrategy) and strategy.world_size > 1


def group_size(trainer: L.Trainer) -> int:
    """Number of processes that train on the same samples: 1 without tensor parallelism."""
    strategy = trainer.strategy
    return strategy.tensor_parallel_size if isinstance(strategy, ShardedStrategy) else 1


@contextmanager
def whole_weights(trainer: L.Trainer) -> Iterator[None]:
    """Let each process hold all weights inside the block, whatever the strategy; all processes must enter it."""
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy):
        with strategy.whole_weights():
            yield
    else:
        yield
