"""Check that the loss of one batch, trained again and again, falls."""

from typing import Any

import lightning as L

from trunkline.pipelines.checks.trial import Trial
from trunkline.pipelines.checks.trial_process import NO_LOSS, TrialObserver, trained_loss

MOST_STEPS = 300
"""Most steps on the batch."""
ROWS_LEARNT = 16
"""Most rows of the batch."""
SHARE = 0.75
"""The loss must fall by this share of its first value, or below `NOTHING_LEFT`. The frequency of labels alone cannot do
that, nor a CLIP whose first temperature makes it worse than chance, nor a recogniser that has only learnt to be
silent."""
NOTHING_LEFT = 0.05
"""A loss that begins below this has been learnt already."""


class LossObserver(TrialObserver):
    """Keeps the first and the last loss, and ends the trial when the loss is low enough."""

    def after_step(self, trainer: L.Trainer, module: L.LightningModule, rows: list[Any]) -> None:
        loss = trained_loss(module)
        first = self.result.setdefault("first", loss)
        self.result |= {"last": loss, "steps": trainer.global_step, "rows": len(rows)}
        if learnt(first, loss):
            trainer.should_stop = True


def learnt(first: float | None, last: float | None) -> bool:
    """Whether the loss has fallen far enough; None stands for a loss that is not known."""
    if first is None or last is None:
        return False
    return last <= first - SHARE * abs(first) or last < NOTHING_LEFT


def overfit_trial() -> Trial:
    """The trial: the recipe's optimiser and precision, without dropout, on the same few rows in each step."""
    title = f"up to {MOST_STEPS} steps on one batch"
    return Trial(title, LossObserver(), steps=MOST_STEPS, rows=ROWS_LEARNT, one_batch=True, parts=1)


def overfit_figures(result: dict[str, Any]) -> str:
    """What the trial measured."""
    if result["last"] is None:
        return f"loss not compared in {result['steps']} steps"
    first, last = result["first"], result["last"]
    share = (first - last) / abs(first) if first else 0.0
    bar = f"to below {NOTHING_LEFT}" if share < SHARE and last < NOTHING_LEFT else f"(at least {SHARE:.0%} expected)"
    return f"by {share:.0%} {bar}, {first:.4g} to {last:.4g} in {result['steps']} steps"


def explain_standstill(result: dict[str, Any]) -> str:
    """What is wrong if the batch was not learnt, and what to do."""
    if result["last"] is None:
        return NO_LOSS
    return (
        f"the loss of one batch of {result['rows']} rows went from {result['first']:.4g} to {result['last']:.4g} in "
        f"{result['steps']} steps, and should fall by {SHARE:.0%}: the network cannot learn it; see whether the inputs "
        "reach the output and whether the targets belong to them, and try another optimizer.lr"
    )
