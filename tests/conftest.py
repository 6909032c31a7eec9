"""Shared by all tests: few threads, one seed, an environment for each, and the settings of `make test-everywhere`."""

import gc
import os
import sys
from collections.abc import Iterator

import machine_settings
import pytest
import torch
import torch.distributed as dist

gc.disable()  # finds nothing while libraries and tests are imported, where it takes a quarter of the time
machine_settings.apply()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Lightning leaves ranks and seeds in the environment, from which a later test would conclude that it is a rank;
    and it changes the number of threads, on which rounding depends. An evaluation that is broken off leaves Dynamo with
    a stance in which nothing is compiled.
    """
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("default")


@pytest.fixture(scope="module", autouse=True)
def after_a_file() -> Iterator[None]:
    """The same for what the fixtures of a file do; and Lightning never ends the process group of a run in this process,
    where the next file may want to begin one.
    """
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    machine_settings.reorder(items)


def pytest_collection_finish() -> None:
    """Garbage is collected again, but not looked for among what has been imported, which stays to the end."""
    gc.freeze()
    gc.enable()
