"""Where a checkpoint stands in its epoch, in samples: a run may go on with batches of another size."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from trunkline import TrunklineError
from trunkline.contract import CutsEpochs, EpochCut
from trunkline.modules.training.exact_resume import move_progress


@dataclass
class Position:
    """Where this process began to train."""

    epoch: int = 0
    batch: int = 0
    """Its first batch in that epoch."""
    steps_ahead: int = 0
    """How far the learning rate's schedule is ahead of the optimiser's steps. After a resume with other batches it
    stands where it would if all batches had been like these; the steps taken stay what they are."""

    def save(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Store how many samples of the epoch were seen, and what decides which samples these are."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, CutsEpochs) or data.cut is None:
            return
        epoch, batch = entered(checkpoint)
        moved, size = data.moved.get(epoch, 0), data.cut.batch_size
        checkpoint["position"] = {
            "epoch": epoch,
            "batch": batch,
            "batches": limited(data.cut.batches, trainer.limit_train_batches),
            "samples": None if size is None else batch * size + moved,  # batches by tokens cannot be cut otherwise
            "moved": moved,
            "accumulated": trainer.accumulate_grad_batches,
            "steps_ahead": self.steps_ahead,
            "cut": asdict(data.cut),
        }

    @classmethod
    def restore(cls, trainer: L.Trainer, checkpoint: dict[str, Any]) -> "Position":
        """Let training go on after the samples that were seen, whatever the size of batches is now.

        What Lightning counts in batches (the epoch's progress, its end, when a validation is due) is set to what it
        would be if all batches had been of this size. If the samples that are left do not divide into batches, the last
        ones are left out, as at the end of any epoch. An older checkpoint counts only batches, and is resumed by these.

        Args:
            trainer: the trainer that resumes, whose data is set up.
            checkpoint: its counters are changed in place.

        Raises:
            TrunklineError: in the middle of an epoch, if its samples have another order now, or batches limited by
                tokens have other borders: then some samples would come twice and others never.
        """
        saved, data = checkpoint.get("position"), trainer.datamodule  # type: ignore[attr-defined]
        epoch, batch = entered(checkpoint)
        if saved is None or not isinstance(data, CutsEpochs):
            return cls(epoch, batch)
        before, cut = EpochCut(**saved["cut"]), data.train_cut()
        data.move_batches(epoch, saved["moved"])
        if cut == before and saved["accumulated"] == trainer.accumulate_grad_batches:
            return cls(epoch, batch, saved["steps_ahead"])
        over, batches = batch == saved["batches"], limited(cut.batches, trainer.limit_train_batches)
        if batch > 0 and not over:
            check_same_order(before, cut)
        if cut != before:
            seen = saved["samples"] if batch else 0
            if cut.batch_size is None or seen is None or (cut.samples, cut.seed) != (before.samples, before.seed):
                batch = batches if over else 0
                data.move_batches(epoch, 0)
            else:
                end = cut.samples if batches == cut.batches else batches * cut.batch_size
                batch = batches - max(end - seen, 0) // cut.batch_size
                data.move_batches(epoch, seen - batch * cut.batch_size)
            move_progress(trainer, checkpoint["loops"]["fit_loop"], batch, batches)
            if seen:
                rank_zero_info(f"goes on after {seen:,} of the epoch's {cut.samples:,} samples, in other batches")
        return cls(epoch, batch, steps_ahead(trainer, checkpoint["global_step"], epoch, batch, batches))


def entered(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """The epoch in which a checkpoint stands, and the number of its batches that were trained on."""
    loop = checkpoint["loops"]["fit_loop"]
    return loop["epoch_progress"]["current"]["processed"], loop["epoch_loop.batch_progress"]["current"]["ready"]


def limited(batches: int, limit: int | float) -> int:
    """Number of batches in an epoch, with the trainer's `limit_train_batches`."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def steps_ahead(trainer: L.Trainer, taken: int, epoch: int, batch: int, batches: int) -> int:
    """See `Position`; 0 if steps, not epochs, decide when training ends, because then the schedule counts them."""
    if trainer.max_steps != -1:
        return 0
    a_step = trainer.accumulate_grad_batches
    in_epoch = math.ceil(batches / a_step) if batch == batches else batch // a_step
    return epoch * math.ceil(batches / a_step) + in_epoch - taken


def check_same_order(before: EpochCut, cut: EpochCut) -> None:
    """Check that the rest of an epoch can be found in another cut.

    Raises:
        TrunklineError: if not; says what to change back.
    """
    why = "in the middle of an epoch: with another order, some samples would come twice and others never"
    otherwise = "or start a new run from its weights with model.init_from"
    if cut.samples != before.samples:
        raise TrunklineError(
            f"the training data has {cut.samples:,} samples, but had {before.samples:,} when the checkpoint was saved, "
            f"{why}; resume with the same data, {otherwise}",
            "data.source",
        )
    if cut.seed != before.seed:
        raise TrunklineError(
            f"the seed is {cut.seed}, but was {before.seed} when the checkpoint was saved, {why}; resume with "
            f"seed_everything {before.seed}, {otherwise}",
            "seed_everything",
        )
    if cut.batch_tokens != before.batch_tokens or (cut.batch_tokens and cut.batches != before.batches):
        limits = [f"{c.batch_tokens} tokens or frames" if c.batch_tokens else "samples" for c in (cut, before)]
        raise TrunklineError(
            f"a batch is limited to {limits[0]} and an epoch has {cut.batches} of them, but when the checkpoint was "
            f"saved to {limits[1]} and {before.batches}, {why}; resume with the same limit and the same lengths, or "
            "from a checkpoint that was saved at the end of an epoch",
            "data.batch_*s",
        )
