"""A contrastive loss and its gradients in one or several processes, for `test_contrastive_distributed.py`."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine_settings
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import CLIPConfig, GPTConfig, ViTConfig
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.objectives.reduction import mean_count
from trunkline.modules.training.distributed import Gather

CASES: list[dict[str, Any]] = [
    {"loss": loss, "same_captions": same, "chunk_size": chunk}
    for loss in ("infonce", "sigmoid")
    for same, chunk in (("negatives", None), ("ignored", None), ("ignored", 2))
]
PAIRS = 11


def model(**options: Any) -> ContrastiveImageText:
    torch.manual_seed(0)
    trunk = TransformerConfig(dim=16, depth=2, num_heads=2)
    image = ViTConfig(16, 8, pool="mean", backbone=trunk)
    # A factor of about 10: near 1 all pairs would have almost the same weight.
    config = CLIPConfig(image, gpt=GPTConfig(50, 6, backbone=trunk), dim=8, init_logit_scale=2.3, init_logit_bias=-3.0)
    if options["loss"] == "infonce":
        config.init_logit_bias = None
    return ContrastiveImageText(config, **options)


def pairs() -> dict[str, Tensor]:
    """A batch of pairs, in which some captions occur twice."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (PAIRS, 6), generator=draw)
    tokens[[3, 7, 9]] = tokens[[0, 1, 1]]
    return {
        "image": torch.randn(PAIRS, 3, 16, 16, generator=draw),
        "tokens": tokens,
        "mask": torch.arange(6) < torch.randint(3, 7, (PAIRS, 1), generator=draw),
        "caption_key": torch.tensor([0, 1, 2, 0, 4, 5, 6, 1, 8, 1, 10]),
    }


def large_step(count: int, chunk: int | None) -> Callable[[], None]:
    """A forward and backward pass, in which activations need most of the memory."""
    trunk = TransformerConfig(dim=128, depth=4, num_heads=4)
    config = CLIPConfig(ViTConfig(32, 4, pool="mean", backbone=trunk), gpt=GPTConfig(50, 6, backbone=trunk), dim=8)
    module = ContrastiveImageText(config)

    def step() -> None:
        batch = {
            "image": torch.randn(count, 3, 32, 32),
            "tokens": torch.randint(0, 50, (count, 6)),
            "mask": torch.ones(count, 6, dtype=torch.bool),
        }
        keys = torch.arange(count)
        module.contrast(module.embed(batch, chunk=chunk), keys, Gather(keys)).backward()

    return step


class Step(nn.Module):
    """The loss of this process from which a training step goes backward."""

    def __init__(self, module: ContrastiveImageText) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        (term,) = self.module.loss(batch)  # type: ignore[arg-type]
        return term.total / mean_count(group(), term.count)


def group() -> Any:
    """A stand-in for a trainer that only knows the number of processes."""
    return SimpleNamespace(world_size=dist.get_world_size() if dist.is_initialized() else 1)


def losses_and_gradients(counts: list[int] | None = None) -> list[dict[str, Tensor]]:
    """Loss and gradients of all cases, for all pairs, or for this process's share of them.

    Args:
        counts: number of pairs of each process; None for all pairs in one process.
    """
    results = []
    for case in CASES:
        step: nn.Module = Step(model(**case))
        batch = pairs()
        if counts is not None:
            start = sum(counts[: dist.get_rank()])
            batch = {name: value[start : start + counts[dist.get_rank()]] for name, value in batch.items()}
            step = DistributedDataParallel(step)
        loss = step(batch)
        loss.backward()
        if counts is not None:
            dist.all_reduce(loss := loss.detach() / len(counts))
        prefix = "module." * (1 + (counts is not None))
        gradients = {name.removeprefix(prefix): p.grad for name, p in step.named_parameters()}
        results.append({"loss": loss.detach(), **gradients})
    return results


def evaluation(counts: list[int]) -> dict[str, float]:
    """What a validation of two batches logs.

    In the first batch some processes may have no valid pair, in the second there is no valid pair at all.
    """
    module, batch, logged = model(loss="infonce"), pairs(), {}
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = sum(counts[:rank])
    share = {name: value[start : start + counts[rank]] for name, value in batch.items()}
    share["index"] = torch.arange(counts[rank])
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    module.eval()
    with torch.no_grad():
        share["valid"] = torch.arange(start, start + counts[rank]) < 6
        module.validation_step(share, 0)
        module.validation_step({**share, "valid": torch.zeros(counts[rank], dtype=torch.bool)}, 1)
        module.on_validation_epoch_end()
    module.metrics["val"]["loss"].sync_on_compute = dist.is_initialized()  # type: ignore[index]
    return {name: float(value.compute() if isinstance(value, Metric) else value) for name, value in logged.items()}


def worker(rank: int, counts: list[int], port: int, folder: Path) -> None:
    """Run one process; the first one writes the results."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    machine_settings.apply()
    dist.init_process_group("gloo", rank=rank, world_size=len(counts))
    results, logged = losses_and_gradients(counts), evaluation(counts)
    if rank == 0:
        torch.save({"steps": results, "evaluation": logged}, folder / "results.pt")
    dist.destroy_process_group()
