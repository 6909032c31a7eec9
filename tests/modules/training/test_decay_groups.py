"""Parameter groups and freezing for training loops other than ours."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from parity import randomise
from timm.optim import param_groups_layer_decay

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import GPT, GPTConfig, ViT, ViTConfig
from trunkline.modules.networks.convert.families import FOREIGN_FAMILIES
from trunkline.modules.training.optim import decay_groups
from trunkline.modules.training.warm_start import freeze

SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}


def vit() -> ViT:
    return ViT(ViTConfig(8, 4, num_classes=3, prefix_positions=1, backbone=TransformerConfig(16, 3, 2, norm_eps=1e-6)))


def settings(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, tuple[float, float]]:
    """Name of a parameter -> its rate and its decay."""
    held = [(names[id(p)], (round(g["lr"], 9), g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(held) == len(dict(held))
    return dict(held)


def test_groups_as_timm_makes_them() -> None:
    """But for the final norm, which timm counts to the last block.

    The parameters carry their number as value through the conversion, so that no table of names is needed here.
    """
    peer, own = timm.create_model("vit_tiny_patch16_224", **SHAPE), vit()
    with torch.no_grad():
        for number, p in enumerate(peer.parameters()):
            p.fill_(number)
    # timm's own list: the class token and the positions.
    theirs = param_groups_layer_decay(peer, 0.1, no_weight_decay_list=peer.no_weight_decay(), layer_decay=0.5)
    number_of = {id(p): str(number) for number, p in enumerate(peer.parameters())}
    scaled = [{**group, "lr": 0.8 * group["lr_scale"]} for group in theirs]
    want = settings(scaled, number_of)
    family = next(f for f in FOREIGN_FAMILIES if f.origin == "timm" and f.network is ViT)
    converted = family.weights_from(peer.state_dict(), own.config)
    groups = decay_groups(own, lr=0.8, weight_decay=0.1, layer_decay=0.5)
    got = settings(groups, {id(p): name for name, p in own.named_parameters()})
    numbers = {name: {str(int(value)) for value in converted[name].unique()} for name in got}
    assert {number for found in numbers.values() for number in found} == want.keys()
    for name, found in numbers.items():
        rate, decay = got[name]
        assert {want[number] for number in found} == {(rate / 2 if "backbone.norm." in name else rate, decay)}, name
    assert len({rate for rate, _ in got.values()}) == 5  # the head, three blocks, the embeddings


def test_what_shall_not_decay() -> None:
    own = vit()
    names = {id(p): name for name, p in own.named_parameters()}
    plain = settings(decay_groups(own, 1.0, 0.3), names)
    spared = settings(decay_groups(own, 1.0, 0.3, no_decay=["head.weight", "*.mlp.fc1.*"]), names)
    changed = {name for name in plain if plain[name] != spared[name]}
    assert changed == {"head.weight", *(f"backbone.blocks.{i}.mlp.fc1.weight" for i in range(3))}
    assert {spared[name] for name in changed} == {(1.0, 0.0)}
    with pytest.raises(TrunklineError, match=r"no_decay names heads\.\*, but the network has no such parameter"):
        decay_groups(own, 1.0, no_decay=["heads.*"])


def test_one_step_of_a_plain_optimiser() -> None:
    """With the gradient 1 everywhere, plain SGD moves each weight by its own rate and decay."""
    own = randomise(vit())
    frozen = freeze(own, 1)
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    optimizer = torch.optim.SGD(decay_groups(own, 0.1, weight_decay=0.5, layer_decay=0.5))
    for p in own.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    rates = {"backbone.blocks.1.": 0.025, "backbone.blocks.2.": 0.05, "backbone.norm.": 0.1, "head.": 0.1}
    for name, p in own.named_parameters():
        rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), 0.0)
        decay = 0.5 if name.endswith(".weight") and "norm" not in name else 0.0
        torch.testing.assert_close(p.detach(), before[name] - rate * (1 + decay * before[name]), msg=name)
    assert own.patch_embed in frozen
    assert own.backbone.blocks[0] in frozen
    assert own.backbone.blocks[1] not in frozen
    with pytest.raises(TrunklineError, match="every parameter is frozen"):
        decay_groups(own.requires_grad_(False), 0.1)


def test_a_tied_weight_is_in_one_group() -> None:
    own = GPT(GPTConfig(11, 8, backbone=TransformerConfig(16, 2, 2, causal=True)))
    groups = settings(decay_groups(own, 1.0, 0.1, layer_decay=0.5), {id(p): n for n, p in own.named_parameters()})
    assert groups["token_embed.weight"] == (0.125, 0.0)
    assert groups.keys() == dict(own.named_parameters()).keys()


def test_neither_needs_lightning() -> None:
    code = """
import sys
for name in ("lightning", "torchmetrics", "tokenizers", "timm", "transformers"):
    sys.modules[name] = None
from trunkline.modules.training.optim import decay_groups
from trunkline.modules.training.warm_start import freeze
print(decay_groups.__name__, freeze.__name__)
"""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == "decay_groups freeze\n", done.stderr
