"""`trunkline fit | validate | test`: a LightningCLI that combines recipes with configs of machines."""

import logging
import re
import shlex
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from trunkline import TrunklineError
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.files import find_fault
from trunkline.modules.callbacks.graceful_stop import Stopped
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.training.checkpoints import SafeCheckpointIO
from trunkline.pipelines.configs import DEFAULTS, resolve_configs
from trunkline.pipelines.errors import config_files
from trunkline.pipelines.parser import RecipeParser, import_recipe_classes
from trunkline.pipelines.run_checks import KnownMetrics, check_run, check_seed, trainer_error
from trunkline.pipelines.runs import choose_run, forgotten_run, newest_config, removed_if_unused, unused_config
from trunkline.pipelines.sizes import facts_left_out, write_sizes


class TrainingParser(RecipeParser, LightningArgumentParser):
    """Our `RecipeParser` as the parser class that LightningCLI requires."""


class SavedConfig(SaveConfigCallback):
    """Saves the config when training starts: an attempt whose data or checkpoint does not fit leaves none."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class TrainingCLI(LightningCLI):
    """LightningCLI with run folders, exact resume, crash-safe checkpoints and a test at the end."""

    def __init__(self, arguments: list[str], recipe: str | None) -> None:
        self.recipe, self.run_dir = recipe, Path()
        self.checkpoint: Path | None = None
        configs = [Path(file).read_text(encoding="utf-8") for file in config_files(arguments)]
        import_recipe_classes([*arguments, *configs])
        defaults = {"default_config_files": [str(DEFAULTS)]}
        super().__init__(
            TrunklineModule,
            TrunklineDataModule,
            save_config_callback=SavedConfig,
            seed_everything_default=0,
            parser_class=TrainingParser,
            parser_kwargs={name: dict(defaults) for name in self.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the trainer, each with its arguments that are not flags."""
        own = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {"fit": own | {"ckpt_path"}, "validate": own, "test": own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Trunkline's own flags."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="Name of the recipe; default: the name of its config."
        )
        parser.add_argument("--run_dir", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="'auto' (newest valid checkpoint of this recipe, or a new run), a run's folder, or a checkpoint.",
        )
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="CPU threads of each process; default: PyTorch's choice. Tiny networks are fastest with 1.",
        )
        parser.add_argument("--compile", type=bool, default=False, help="torch.compile the network.")
        parser.add_argument(
            "--test_with",
            type=Literal["best", "last", "none"],
            default="best",
            help="Weights for the test after fit: the best checkpoint's, the last step's, or no test.",
        )
        for group in ("model", "data"):
            parser.link_arguments("seed_everything", f"{group}.init_args.seed", compute_fn=int)
        # A recipe states image size, classes, vocabulary and row length once, in its data.
        facts = "model.init_args.facts"
        parser.link_arguments("data.facts", facts, compute_fn=facts_left_out, apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyperparameters override the flags."""

    def _set_seed(self) -> None:
        """Refuse what is no seed before Lightning sets it."""
        check_seed(self._get(self.config, "seed_everything"))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Check what is declared elsewhere and choose the run's folder; for an evaluation, check the checkpoint."""
        config = self.config[self.subcommand]
        check_run(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.subcommand != "fit":
            fault = find_fault(Path(config.ckpt_path)) if config.ckpt_path else "nothing to evaluate; name a checkpoint"
            if fault is not None:
                raise TrunklineError(f"--ckpt_path: {fault}")
            return
        config.name = config.name or self.recipe or "run"
        self.run_dir, self.checkpoint, faults = choose_run(Path(config.run_dir), config.name, config.resume)
        for fault in faults:
            rank_zero_info(f"skipped: {fault}")
        if config.resume:
            rank_zero_info(f"resuming from {self.checkpoint}" if self.checkpoint else "nothing to resume: a new run")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make a Trainer that writes into the run's folder."""
        trainer = self._get(self.config_init, "trainer")
        write_sizes(self.config[self.subcommand], self.model.hparams)
        kwargs["use_distributed_sampler"] = False  # our sampler distributes the samples itself
        plugins = trainer.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), SafeCheckpointIO()]
        if self.subcommand == "fit":
            self.save_config_kwargs = {"overwrite": True, "config_filename": unused_config(self.run_dir)}
            kwargs["default_root_dir"] = str(self.run_dir)
            kwargs["callbacks"] = [*(trainer.get("callbacks") or []), KnownMetrics()]
            if trainer.get("logger") is None:
                kwargs["logger"] = TensorBoardLogger(str(self.run_dir), name="", version="", default_hp_metric=False)
        else:
            kwargs["logger"], self.save_config_callback = False, None
            kwargs["callbacks"] = without(trainer.get("callbacks") or [], ModelCheckpoint, WeightAveraging)
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise trainer_error(error, "trainer.") from error

    def after_instantiate_classes(self) -> None:
        """Compile the network in place, which keeps the names of the weights."""
        if self._get(self.config, "compile"):
            self.model.network.compile()

    def fit(self, **kwargs: Any) -> None:
        """Train, test, and print the results and where they are."""
        with removed_if_unused(self.run_dir, Path(self._get(self.config, "run_dir"))):
            self.trainer.fit(**kwargs, ckpt_path=self.checkpoint, weights_only=True)
        best = self.best_checkpoint()
        metrics: dict[str, Any] = {k: v for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        test_with = self._get(self.config, "test_with")
        if test_with != "none" and self.datamodule.test_dataloader():
            # A weight average that stays on would replace the weights of a loaded checkpoint.
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = without(callbacks, WeightAveraging)
            path = best if test_with == "best" and best else None
            kwargs["ckpt_path"], kwargs["weights_only"] = path, True
            metrics |= self.trainer.test(**kwargs, verbose=False)[0]
        last = self.run_dir / "checkpoints" / "last.ckpt"
        self.summarise(metrics, best if test_with == "best" and best else str(last))

    def best_checkpoint(self) -> str:
        """The checkpoint with the best validation metric; empty if no metric is monitored."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor not in (None, "step"):
                return callback.best_model_path
        return ""

    def validate(self, **kwargs: Any) -> None:
        self.summarise(self.trainer.validate(**kwargs, weights_only=True)[0], kwargs["ckpt_path"])

    def test(self, **kwargs: Any) -> None:
        self.summarise(self.trainer.test(**kwargs, weights_only=True)[0], kwargs["ckpt_path"])

    def summarise(self, metrics: Any, checkpoint: str | None) -> None:
        """Print a table of the results."""
        if not self.trainer.is_global_zero:
            return
        table = Table(show_header=False, title=self._get(self.config, "name"))
        for name, value in sorted(metrics.items()):
            table.add_row(name, f"{float(value):.4f}")
        if checkpoint:
            path = Path(checkpoint)
            table.add_row("checkpoint", str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
        if self.subcommand == "fit":
            table.add_row("look at it", f"tensorboard --logdir {self._get(self.config, 'run_dir')}")
        Console(soft_wrap=True).print(table)


def without(callbacks: list[Callback], *kinds: type[Callback]) -> list[Callback]:
    """The callbacks without those of these classes."""
    return [callback for callback in callbacks if not isinstance(callback, kinds)]


def run_training(arguments: list[str]) -> None:
    """Run one of the training commands.

    Args:
        arguments: the command and its options.

    Raises:
        TrunklineError: for bad input.
    """
    quieten()
    arguments, recipe = resolve_configs(arguments)
    if arguments[0] != "fit" and not {"--config", "-c", "--help", "-h"} & set(arguments):
        arguments = use_run_config(arguments)
    # Lightning starts the other processes of a run with this command line.
    sys.argv[1:] = arguments
    if str(Path.cwd()) not in sys.path:  # for classes of one's own, beside their config
        sys.path.append(str(Path.cwd()))
    try:
        with forgotten_run():
            TrainingCLI(arguments, recipe)
    except Stopped as stop:
        command = re.sub(r" --resume[ =]('[^']*'|\S)+", "", shlex.join(["trunkline", *arguments]))
        rank_zero_info(f"resume with: {command} --resume {shlex.quote(stop.folder)}")
        raise
    except MisconfigurationException as error:  # Lightning's word for asking too much
        raise TrunklineError(str(error)) from error


def use_run_config(arguments: list[str]) -> list[str]:
    """Add the config that the checkpoint's run saved, for an evaluation without `--config`."""
    values = [a.partition("=")[2] or b for a, b in pairwise([*arguments, ""]) if a.partition("=")[0] == "--ckpt_path"]
    if not values:
        raise TrunklineError(f"trunkline {arguments[0]} needs --ckpt_path, the checkpoint to evaluate")
    fault = find_fault(Path(values[-1]))
    if fault is not None:
        raise TrunklineError(f"--ckpt_path: {fault}")
    folder = Path(values[-1]).parent.parent
    config = newest_config(folder)
    if config is None:
        raise TrunklineError(f"there is no {folder / 'config.yaml'}, which a run saves; name one with --config")
    if config.name != "config.yaml":
        rank_zero_info(f"evaluating with {config}, of the last resume")
    return [arguments[0], "--config", str(config), *arguments[1:]]


def quieten() -> None:
    """Hide advertisements, and warnings about things that are intended."""
    rank_zero_logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero_logger.addFilter(lambda record: not record.getMessage().startswith("💡"))
    for pattern in (
        ".*args parameter is intended to run from within Python.*",  # the list with short names replaced
        ".*does not have many workers.*",  # data in memory needs none
        ".*dataloader is not resumable.*",  # it is, by its own position
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run writes into its old folder
        ".*smaller than the logging interval.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # the weight average is no longer needed
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen parts
        ".*srun.* command is available on your system.*",
        ".*LeafSpec.*is deprecated.*",
    ):
        warnings.filterwarnings("ignore", pattern)
