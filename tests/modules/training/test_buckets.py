"""The buckets in which DDP adds up gradients are the same from the first step on."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trunkline.modules.training.distributed import settle_buckets

KIBIBYTE = 1 / 1024
"""In mebibytes, of which DDP's options are."""


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process: the buckets do not depend on their number."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


class Wandering(nn.Module):
    """Uses its layers in another order than it defines them, and has what a throw-away step could change."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.spare = nn.Linear(16, 16) if spare else None
        self.layers[3].requires_grad_(False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in (2, 0, 3, 1):
            x = self.layers[layer](x)
        return self.dropout(self.norm(x))


def wrapped(module: nn.Module, **options: Any) -> tuple[DistributedDataParallel, list[list[tuple[int, ...]]]]:
    """The module in DDP with small buckets, and a list to which each of them is added as it is reduced."""
    torch.manual_seed(0)
    model, seen = DistributedDataParallel(module, bucket_cap_mb=KIBIBYTE, **options), []  # type: ignore[arg-type]

    def note(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        seen.append(tuple(map(id, bucket.parameters())))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, note)
    return model, seen


def steps(
    model: DistributedDataParallel, seen: list[Any], count: int = 3, quiet: int = 0
) -> list[list[tuple[int, ...]]]:
    """The buckets of each step; of an accumulation, the first `quiet` passes are not reduced."""
    found = []
    for _ in range(count):
        seen.clear()
        for part in range(quiet + 1):
            with model.no_sync() if part < quiet else nullcontext():
                model(torch.randn(5, 16)).sum().backward()
        found.append(list(seen))
        model.zero_grad()
    return found


@pytest.mark.parametrize("quiet", [0, 2])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}])
def test_buckets_of_the_first_step_are_those_of_all(options: dict[str, Any], quiet: int) -> None:
    model, seen = wrapped(Wandering(spare="find_unused_parameters" in options), **options)
    assert settle_buckets(model)
    first, *others = steps(model, seen, quiet=quiet)
    assert len(first) > 2  # buckets
    assert others == [first, first]


def test_without_it_they_change_after_the_first_step() -> None:
    model, seen = wrapped(Wandering())
    first, *others = steps(model, seen)
    assert others[0] == others[1] != first


def test_parameters_defined_last_are_reduced_first() -> None:
    model, seen = wrapped(Wandering())
    settle_buckets(model)
    (buckets,) = steps(model, seen, 1)
    learning = [id(p) for p in model.module.parameters() if p.requires_grad]
    assert [p for bucket in buckets for p in bucket] == learning[::-1]


def test_a_compiled_network() -> None:
    def plain(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return graph.forward

    module = Wandering()
    module.layers.compile(backend=plain)
    model, seen = wrapped(module)
    assert settle_buckets(model)
    first, *others = steps(model, seen)
    assert others == [first, first]


def test_nothing_else_is_touched() -> None:
    model, _ = wrapped(Wandering())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    settle_buckets(model)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.module)
    assert model.module.calls == 0
    assert model(torch.randn(5, 16)).shape == (5, 16)


def test_a_forward_of_the_modules_own_comes_back() -> None:
    module = nn.Linear(16, 16)
    own = module.forward = lambda x: x @ module.weight + module.bias  # type: ignore[assignment]
    model, _ = wrapped(module)
    settle_buckets(model)
    assert module.forward is own


def test_a_static_graph_learns_from_a_real_step() -> None:
    model, seen = wrapped(Wandering(), static_graph=True)
    assert not settle_buckets(model)
    assert seen == []
    steps(model, seen)


@pytest.mark.parametrize("static", [False, True])
def test_training_settles_them_and_says_where_it_cannot(
    static: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny.classifier()
    made.trainer = trainer = tiny.trainer(tmp_path)
    trainer.strategy.model, seen = wrapped(made, static_graph=static)
    made.on_fit_start()
    assert (len(seen) > 0) == (not static)
    assert ("resumed runs may differ by rounding" in caplog.text) == static
