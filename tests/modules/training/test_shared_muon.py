"""Muon in shares over processes: the result of one process, the same bytes in all, and equal work."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from sharded_runs import in_processes
from tiny import batches, fit, vit
from torch import Tensor, nn

from trunkline.modules.networks import ViT
from trunkline.modules.objectives import base
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.training import muon
from trunkline.modules.training.muon import Muon, equal_shares, orthogonalize, orthogonalize_each
from trunkline.modules.training.optim import OptimizerConfig, build_optimizer
from trunkline.modules.training.sharding import ShardedStrategy, replicates

STEPS, MIDDLE = 6, 3
CONFIG = OptimizerConfig("muon", lr=0.02, weight_decay=0.1)


def make_network() -> ViT:
    torch.manual_seed(0)
    return ViT(vit())


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
        optimizer.step()


def share(rank: int, folder: Path) -> None:
    """Train in shares, and again from the middle; count the matrices that this process computes."""
    dist.init_process_group("gloo")
    computed: list[Tensor] = []
    muon.orthogonalize = lambda stack: computed.extend(stack) or orthogonalize(stack)  # type: ignore[assignment]
    network = make_network()
    optimizer = build_optimizer(network, CONFIG, replicated=True)
    train(network, optimizer, range(MIDDLE))
    middle = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    train(network, optimizer, range(MIDDLE, STEPS))
    count = len(computed)
    resumed = make_network()
    resumed.load_state_dict(middle[0])
    again = build_optimizer(resumed, CONFIG, replicated=True)
    again.load_state_dict(middle[1])
    train(resumed, again, range(MIDDLE, STEPS))
    found = {"weights": network.state_dict(), "resumed": resumed.state_dict(), "state": optimizer.state_dict()["state"]}
    torch.save({**found, "count": count / STEPS}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_are_the_whole(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_processes(share, tmp_path, processes=processes)
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: False)
    network = make_network()
    start = copy.deepcopy(network.state_dict())
    optimizer = build_optimizer(network, CONFIG)
    train(network, optimizer, range(STEPS))
    runs: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    want = network.state_dict()
    torch.testing.assert_close(runs[0]["weights"], want, rtol=0, atol=1e-6)
    assert all((want[name] - start[name]).abs().max() > 1e-2 for name in want if name.endswith("weight"))
    torch.testing.assert_close(runs[0]["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    for run in runs:
        torch.testing.assert_close(run["weights"], runs[0]["weights"], rtol=0, atol=0)
        torch.testing.assert_close(run["resumed"], run["weights"], rtol=0, atol=0)
    matrices = sum(len(group["params"]) * group["splits"] for group in optimizer.param_groups if group["muon"])
    assert sum(run["count"] for run in runs) == matrices  # none is computed twice
    assert max(run["count"] for run in runs) < matrices


def few(rank: int, folder: Path) -> None:
    """A single matrix, then none: a process may have nothing to compute."""
    dist.init_process_group("gloo")
    p, idle = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([p, idle], shared=True, lr=0.1, momentum=0.9, weight_decay=0.0)
    p.grad = torch.arange(24.0).view(4, 6)
    optimizer.step()
    torch.save(p.detach().clone(), folder / f"few-{rank}.pt")
    p.grad = None
    optimizer.step()
    dist.destroy_process_group()


def test_more_processes_than_matrices(tmp_path: Path) -> None:
    in_processes(few, tmp_path)
    one, two = (torch.load(tmp_path / f"few-{rank}.pt") for rank in range(2))
    assert torch.equal(one, two)
    assert (one != 1).any()


def test_one_call_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    monkeypatch.setattr(muon, "orthogonalize", lambda stack: calls.append(stack.shape) or orthogonalize(stack))
    matrices = [torch.randn(shape) for shape in ((4, 6), (6, 4), (4, 6), (5, 5), (4, 6))]
    found = orthogonalize_each(matrices)
    assert sorted(calls) == [(1, 5, 5), (1, 6, 4), (3, 4, 6)]
    for matrix, result in zip(matrices, found, strict=True):
        torch.testing.assert_close(result, orthogonalize(matrix[None])[0], rtol=0.05, atol=0.05)


def loads(costs: list[int], processes: int) -> list[int]:
    owners = equal_shares(costs, processes)
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == p) for p in range(processes)]


def test_equal_shares() -> None:
    assert loads([3, 3, 2, 2, 2], 2) == [7, 5]  # Graham's own example of a worst case: 6 and 6 is possible
    assert loads([5], 3) == [5, 0, 0]
    assert equal_shares([], 2) == []
    blocks = [cost for _ in range(12) for cost in (1, 1, 1, 1, 4, 4)]  # GPT-2: q, k, v, proj, fc1, fc2 of 768
    for processes in (2, 3, 4, 6, 8):
        assert max(loads(blocks, processes)) * processes <= 1.06 * sum(blocks)


def test_when_the_work_is_shared() -> None:
    strategy = DDPStrategy(cluster_environment=LightningEnvironment())
    assert not replicates(strategy)  # a single process
    sharded = ShardedStrategy()
    for each in (strategy, sharded):
        each.cluster_environment = LightningEnvironment()
        each.cluster_environment.set_world_size(2)
    assert replicates(strategy)
    assert not replicates(sharded)
    assert not replicates(SingleDeviceStrategy())
    for config, replicated, shared in (
        (CONFIG, True, True),
        (CONFIG, False, False),
        (OptimizerConfig("muon", muon_shared=False), True, False),
    ):
        optimizer = build_optimizer(make_network(), config, replicated)
        assert isinstance(optimizer, Muon)
        assert optimizer.shared == shared
        assert "shared" not in optimizer.state_dict()["param_groups"][0]  # a checkpoint does not decide


def test_an_objective_asks_its_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        muon, "orthogonalize_shared", lambda matrices: calls.append(len(matrices)) or orthogonalize_each(matrices)
    )
    for answer in (False, True):
        monkeypatch.setattr(base, "replicates", lambda strategy, answer=answer: answer)
        fit(ImageClassifier(vit(), optimizer=OptimizerConfig("muon", schedule="constant")), tmp_path, batches(1))
        assert bool(calls) == answer
