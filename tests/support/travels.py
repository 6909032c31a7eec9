"""A model of another library becomes ours and goes back, through files, as its own library writes and reads them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trunkline.modules.networks.base import Network
from trunkline.modules.networks.convert.families import save_foreign


def arrive(peer: Any, network_class: type[Network], folder: Path) -> Any:
    """Write a model of transformers, and read it as ours, in evaluation mode."""
    peer.save_pretrained(folder / "theirs")
    return network_class.from_pretrained(folder / "theirs").eval()


def go_back(network: Network, peer: Any, folder: Path, **ids: int) -> Any:
    """Write ours for transformers, which reads it; every weight of the two files must have the same bits."""
    save_foreign(network, folder / "back", "transformers", ids)
    assert_same_bits(folder / "theirs/model.safetensors", folder / "back/model.safetensors")
    again, info = type(peer).from_pretrained(folder / "back", output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    return again.eval()


def assert_same_bits(first: Path, second: Path) -> None:
    before, after = load_file(first), load_file(second)
    assert before.keys() ^ after.keys() == set()
    assert [name for name, value in before.items() if not same(value, after[name])] == []


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by the names of the parameters."""
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
