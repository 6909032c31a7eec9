"""Shared by all tests: few threads, one seed, an environment for each, and the settings of `make test-everywhere`."""

import os
from collections.abc import Iterator

import machine_settings
import pytest
import torch
import torch.distributed as dist

machine_settings.apply()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Lightning leaves ranks and seeds in the environment, from which a later test would conclude that it is a rank."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Lightning never ends the process group of a run in this process; another file may want to begin one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    machine_settings.reorder(items)
