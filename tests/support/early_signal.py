"""A signal that a process of a run receives before its first step."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

PLAN = "signal.json"
HOOKS = ("__init__", "setup", "on_sanity_check_start", "on_train_start", "on_train_batch_start")


def plan_signal(folder: Path, hook: str, number: int, ranks: list[int]) -> None:
    """Let these processes of the next run send themselves a signal at one of the `HOOKS`."""
    assert hook in HOOKS
    (folder / PLAN).write_text(json.dumps({"hook": hook, "number": number, "ranks": ranks}))


class EarlySignal(Callback):
    """Sends this process the signal that `FOLDER/signal.json` asks for, the first time that it reaches the hook."""

    def __init__(self, folder: str) -> None:
        file = Path(folder, PLAN)
        plan: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"hook": ""}
        rank = int(os.environ.get("RANK", "0"))
        if plan["hook"] and rank in plan["ranks"]:
            if plan["hook"] == "__init__":
                os.kill(os.getpid(), plan["number"])
            setattr(self, plan["hook"], self.sender(plan["hook"], plan["number"]))

    def sender(self, hook: str, number: int) -> Callable[..., None]:
        def send(trainer: L.Trainer, *_: Any, **__: Any) -> None:
            delattr(self, hook)
            os.kill(os.getpid(), number)

        return send
