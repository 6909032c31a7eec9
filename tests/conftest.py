"""Shared by all tests: few threads (the models are tiny), one seed, and the settings of `make test-everywhere`."""

import machine_settings
import pytest
import torch

machine_settings.apply()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    machine_settings.reorder(items)
