"""`trunkline fit | validate | test`: a LightningCLI that combines recipes with configs of machines."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from trunkline.contract import DataFacts
from trunkline.datamodules.base import TrunklineDataModule
from trunkline.files import cannot_write, check_parts, load_checkpoint
from trunkline.modules.callbacks.drawing import tensorboard
from trunkline.modules.callbacks.graceful_stop import GracefulStop, LastCheckpoint, Stopped
from trunkline.modules.callbacks.progress import ProgressBar, shortest
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.training.background_saves import BackgroundCheckpointIO, FailedSaves
from trunkline.modules.training.checkpoints import RESUMED, SafeCheckpointIO
from trunkline.modules.training.exact_resume import end_data_workers, limit_waiting, take_signals
from trunkline.pipelines.configs import DEFAULTS, resolve_configs
from trunkline.pipelines.device_limits import DeviceLimits
from trunkline.pipelines.errors import config_files, flags, own_error
from trunkline.pipelines.loggers import forget_places, make_save_dir_optional, missing_package, place_loggers
from trunkline.pipelines.parser import (
    RecipeParser,
    import_recipe_classes,
    of_own_constructor,
    whole_numbers_first,
)
from trunkline.pipelines.preflight import (
    PreFlight,
    allow_any_srun,
    check_share,
    find_launch,
    fitted_to_launch,
    without_absent_slurm,
)
from trunkline.pipelines.processes import end_together
from trunkline.pipelines.quiet import FULL, quieten, silent_writers
from trunkline.pipelines.record import LastScores, RunRecord
from trunkline.pipelines.resumed import network_instead, replace_missing_tokenizers
from trunkline.pipelines.run_checks import FiniteWeights, KnownMetrics, check_run, check_seed, trainer_error
from trunkline.pipelines.run_lock import holds_nothing
from trunkline.pipelines.runs import claim_run, forgotten_run, record_beside, remove_run, unused_config
from trunkline.pipelines.sizes import with_stated, write_sizes
from trunkline.pipelines.unnamed_configs import checked_checkpoint, use_run_config
from trunkline.run_folders import read_lazily, step_in

AVERAGE = "averaging_state"
"""Key of a checkpoint whose weights are averaged."""
MANY_COLUMNS = 10_000


class TrainingParser(RecipeParser, LightningArgumentParser):
    """Our `RecipeParser` as the parser class that LightningCLI requires."""


class SavedConfig(SaveConfigCallback):
    """Saves the config when training starts: an attempt whose data or checkpoint does not fit leaves none."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir, self.config_filename)  # whatever folder a logger chooses
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"overwrite": self.overwrite, "multifile": self.multifile}
        # It has been parsed a moment ago: to check it once more would take four times as long as to write it.
        self.parser.save(self.config, str(path), skip_none=False, skip_validation=True, **options)


class TrainingCLI(LightningCLI):
    """LightningCLI with run folders, exact resume, crash-safe checkpoints and a test at the end."""

    def __init__(self, arguments: list[str], recipe: str | None, typed: Sequence[str] = ()) -> None:
        self.typed = typed
        self.command, self.recipe, self.run_dir = arguments[0], recipe, Path()
        self.checkpoint: Path | None = None
        self.is_new_run = False
        self.network_instead: Any = None
        self.claims = ExitStack()
        self.placed: list[Any] = []
        make_save_dir_optional()
        configs = [Path(file).read_text(encoding="utf-8") for file in config_files(arguments)]
        import_recipe_classes([*arguments, *configs])
        classes: list[type] = [L.Trainer, *Callback.__subclasses__()]
        for cls in classes:
            whole_numbers_first(cls)
        defaults = {"default_config_files": [str(DEFAULTS)]}
        with self.claims:  # the folder is held while LightningCLI's constructor runs the command
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The method of the trainer that the command calls, with its arguments that are not flags.

        LightningCLI would make a parser for each of its methods, which takes time.
        """
        own = {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {self.command: own | {"ckpt_path"} if self.command == "fit" else own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Trunkline's own flags."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="Name of the recipe; default: the name of its config."
        )
        parser.add_argument("--run_dir", type=str | None, default="runs", help="Folder of all runs; default: runs.")
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
        parser.link_arguments("data.facts", facts, compute_fn=self.facts_for, apply_on="instantiate")

    def facts_for(self, facts: DataFacts) -> DataFacts:
        """What the objective needs to know besides the data: see `with_stated` and `network_instead`."""
        return replace(with_stated(facts), network_instead=self.network_instead)

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
        allow_any_srun()
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.subcommand != "fit":
            if not config.ckpt_path:
                raise TrunklineError("--ckpt_path: nothing to evaluate; name a checkpoint")
            config.ckpt_path = checked_checkpoint(config.ckpt_path)
            self.replace_beginnings(config, Path(config.ckpt_path), read_lazily(Path(config.ckpt_path)))
            return
        config.name = config.name or self.recipe or "run"
        config.run_dir = config.run_dir or "runs"
        root, machine = Path(config.run_dir), (config.trainer.num_nodes, config.trainer.devices)
        self.run_dir, self.checkpoint, faults = claim_run(self.claims, root, config.name, config.resume, *machine)
        self.is_new_run = holds_nothing(self.run_dir)
        if self.checkpoint:
            content = read_lazily(self.checkpoint) or load_checkpoint(self.checkpoint)  # which says what is wrong
            check_parts(content, self.checkpoint, RESUMED if self.checkpoint.is_file() else {})
            self.replace_beginnings(config, self.checkpoint, content)
        self.placed = place_loggers(config.trainer.get("logger"), self.run_dir)
        for fault in faults:
            rank_zero_info(f"skipped: {fault}")
        if config.resume:
            rank_zero_info(f"resuming from {self.checkpoint}" if self.checkpoint else "nothing to resume: a new run")

    def replace_beginnings(self, config: Any, checkpoint: Path, content: Mapping[str, Any]) -> None:
        """Do without the files that the run once started from, which may be gone: the checkpoint has it all."""
        self.network_instead = network_instead(config.get("model"), content)
        for text in replace_missing_tokenizers(config.get("data"), checkpoint, content):
            rank_zero_info(text)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            other = None if own_error(error) else missing_package(error) or of_own_constructor(error)
            if other is None:
                raise
            raise other from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make a Trainer that writes into the run's folder."""
        trainer = self._get(self.config_init, "trainer")
        write_sizes(self.config[self.subcommand], self.model.hparams)
        kwargs["use_distributed_sampler"] = False  # our sampler distributes the samples itself
        kwargs |= fitted_to_launch(trainer, find_launch())
        plugins = trainer.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        plugins = without_absent_slurm(plugins, self.subcommand == "fit")
        safe = any(isinstance(plugin, SafeCheckpointIO) for plugin in plugins)  # one without a thread, or of one's own
        kwargs["plugins"] = plugins if safe else [*plugins, BackgroundCheckpointIO()]
        callbacks = trainer.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        switches = {"enable_checkpointing": (ModelCheckpoint, LastCheckpoint), "enable_progress_bar": (ProgressBar,)}
        off = [kind for switch, kinds in switches.items() if trainer.get(switch) is False for kind in kinds]
        limits = DeviceLimits(trainer.get("precision"), self._get(self.config, "compile"))
        if self.subcommand == "fit":
            name = unused_config(self.run_dir)
            record = RunRecord(record_beside(self.run_dir / name), self.typed, self.checkpoint)
            kwargs["callbacks"] = [
                *without(callbacks, *off),
                KnownMetrics(),
                FailedSaves(),
                limits,
                PreFlight(),
                record,
                LastScores(),
            ]
            for callback in kwargs["callbacks"]:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:  # otherwise a logger's choice
                    callback.dirpath = str(self.run_dir / "checkpoints")
            forget_places(self.placed)
            self.save_config_kwargs = {"overwrite": True, "config_filename": name, "save_to_log_dir": False}
            kwargs["default_root_dir"] = str(self.run_dir)
            if trainer.get("logger") is None:
                kwargs["logger"] = TensorBoardLogger(str(self.run_dir), name="", version="", default_hp_metric=False)
        else:
            kwargs["logger"], self.save_config_callback = False, None
            kwargs["callbacks"] = [*without(callbacks, ModelCheckpoint, WeightAveraging, *off), FiniteWeights(), limits]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise trainer_error(error, "trainer.") from error
        take_signals(trainer)  # also where a recipe leaves GracefulStop out
        limit_waiting(trainer)
        end_together(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Compile the network in place, which keeps the names of the weights."""
        if self._get(self.config, "compile"):
            self.model.network.compile()

    def fit(self, **kwargs: Any) -> None:
        """Train, test, and print the results and where they are."""
        try:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GracefulStop):  # data may be prepared for hours before training begins
                    callback.listen(self.trainer)
            check_share(self.trainer, self.datamodule)
            self.trainer.fit(**kwargs, ckpt_path=self.checkpoint, weights_only=True)
        except BaseException:
            end_data_workers(self.trainer)
            if self.is_new_run and self.trainer.global_step == 0:
                remove_run(self.run_dir, Path(self._get(self.config, "run_dir")))
            raise
        metrics: dict[str, Any] = {k: v for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        test_with = self._get(self.config, "test_with")
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        averaged = len(without(callbacks, WeightAveraging)) < len(callbacks)
        chosen = self.best_checkpoint() if test_with == "best" else ""
        if not chosen and self.checkpoint and step_in(self.checkpoint) == self.trainer.global_step:
            chosen = str(self.checkpoint)  # no step was left to train, so that the weights in memory are not averaged
        if test_with != "none" and self.datamodule.test_dataloader():
            # A weight average that stays on would replace the weights of a loaded checkpoint.
            callbacks[:] = without(callbacks, WeightAveraging)
            kwargs["ckpt_path"], kwargs["weights_only"] = chosen or None, True
            metrics |= self.trainer.test(**kwargs, verbose=False)[0]
        self.summarise(metrics, chosen or self.last_checkpoint(), averaged)

    def last_checkpoint(self) -> str:
        """A checkpoint of the last step; empty if none was saved."""
        saved = [c.best_model_path for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        for file in (self.run_dir / "checkpoints" / "last.ckpt", *map(Path, saved)):
            if file.exists() and step_in(file) == self.trainer.global_step:
                return str(file)
        return ""

    def best_checkpoint(self) -> str:
        """The checkpoint with the best validation metric; empty if no metric is monitored or nothing is saved yet."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor not in (None, "step"):
                best = callback.best_model_path
                return self.trainer.strategy.broadcast(best if best and Path(best).exists() else "")
        return ""

    def validate(self, **kwargs: Any) -> None:
        self.evaluate(self.trainer.validate, "val", kwargs)

    def test(self, **kwargs: Any) -> None:
        self.evaluate(self.trainer.test, "test", kwargs)

    def evaluate(self, run: Callable[..., list[Any]], split: str, kwargs: dict[str, Any]) -> None:
        """Print the results of `validate` or `test`.

        Raises:
            TrunklineError: if the data has no such split.
        """
        results = run(**kwargs | {"weights_only": True, "verbose": False})  # the table shows the metrics
        if not results:
            other = "test" if split == "val" else "validate"
            raise TrunklineError(
                f"the data of this run has no {split} split; give it one in --data, or measure the other: trunkline "
                f"{other}"
            )
        self.summarise(results[0], kwargs["ckpt_path"])

    def summarise(self, metrics: Any, checkpoint: str, averaged: bool = False) -> None:
        """Print a table of the results.

        Args:
            metrics: the results.
            checkpoint: the file with the weights that were tested; empty if they are in no file.
            averaged: whether weights that are in no file are averaged.
        """
        if not self.trainer.is_global_zero:
            return
        table = Table(show_header=False, title=self._get(self.config, "name"))
        for name, value in sorted(metrics.items()):
            table.add_row(name, f"{float(value):.4f}")
        content = read_lazily(Path(checkpoint)) if checkpoint else {}
        kind = "averaged" if (AVERAGE in content if checkpoint else averaged) else "as trained"
        step = content.get("global_step", self.trainer.global_step)
        table.add_row("weights", f"{kind}, of step {step}" + ("" if checkpoint else ", not saved"))
        if checkpoint:
            table.add_row("checkpoint", str(shortest(Path(checkpoint))))
        if self.subcommand == "fit" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            table.add_row("run", str(shortest(self.run_dir)))
        if tensorboard(self.trainer) is not None:
            table.add_row("look at it", f"tensorboard --logdir {self._get(self.config, 'run_dir')}")
        print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table as wide as its longest row, also where a terminal is narrower: a path that is cut is of no use."""
    console = Console()
    unlimited = console.options.update(width=MANY_COLUMNS, max_width=MANY_COLUMNS)
    needed = console.measure(table, options=unlimited).maximum
    Console(width=max(console.width, needed)).print(table, no_wrap=True, crop=False, soft_wrap=True)


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
    typed = arguments
    arguments, recipe = resolve_configs(arguments)
    if arguments[0] != "fit" and not {"--config", "-c", "--help", "-h"} & set(arguments):
        arguments = use_run_config(arguments)
    # Lightning starts the other processes of a run with this command line.
    sys.argv[1:] = arguments
    if str(Path.cwd()) not in sys.path:  # for classes of one's own, beside their config
        sys.path.append(str(Path.cwd()))
    try:
        with forgotten_run(), silent_writers():
            TrainingCLI(arguments, recipe, typed)
    except OSError as error:  # what Lightning or a logger could not write
        if error.errno not in FULL:
            raise
        root = next((value for name, value in flags(arguments) if name == "run_dir"), "runs")
        raise cannot_write(Path(root, "*"), error, "run_dir", then=", then resume the run") from error
    except Stopped as stop:
        command = re.sub(r" --resume[ =]('[^']*'|\S)+", "", shlex.join(["trunkline", *arguments]))
        if any(Path(stop.folder, "checkpoints").glob("*.ckpt")):
            rank_zero_info(f"resume with: {command} --resume {shlex.quote(stop.folder)}")
        raise
    except MisconfigurationException as error:  # Lightning's word for asking too much
        raise TrunklineError(str(error)) from error
