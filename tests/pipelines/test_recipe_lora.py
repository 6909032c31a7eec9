"""Every packaged recipe with `--model.lora.rank`: it trains adapters and output layers, and nothing else."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from parity import randomise
from recipe_paths import batch_of
from test_training import RECIPES, Dry, declared_facts
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import datamodules
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks.lora import LoRALinear, linear_layers
from trunkline.pipelines.configs import find_config, resolve_configs

STARTS = ("init_from", "init_image_from", "init_text_from")
FREEZES = {"clip/lit": ["--model.freeze_image_blocks", "0"]}
"""Recipes that freeze blocks, which does not go with LoRA, and what lets them learn."""
LENGTH = 32
"""Tokens of a text."""


def small(config: Any) -> Any:
    """The same network with small trunks."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, TransformerConfig):
            few = {"dim": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12, "drop_path": 0.0, "dropout": 0.0}
            few |= {"num_kv_heads": None, "head_dim": None, "activation_checkpointing": False}
            changed[field.name] = dataclasses.replace(value, **few)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = small(value)
    return dataclasses.replace(config, **changed)


def some_values(name: str, like: Tensor, sounds: bool) -> Tensor:
    """Small numbers of the shape of a batch's tensor; all tokens are real."""
    shape = like.shape if sounds or name == "image" else (*like.shape[:1], *(min(n, LENGTH) for n in like.shape[1:]))
    if like.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if like.is_floating_point():
        return torch.randn(shape)
    if name == "caption_key":
        return torch.arange(len(like))
    return torch.randint(0, 10 if "tokens" in name else 2, shape)  # two classes there are everywhere


@pytest.mark.parametrize("recipe", RECIPES)
def test_lora_in_every_recipe(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_RUN", "test")
    kind = getattr(datamodules, yaml.safe_load(find_config(recipe).read_text())["data"]["class_path"])
    monkeypatch.setattr(kind, "facts", property(lambda data: declared_facts(data, recipe)))
    flags = ["--config", "trainer/cpu", "--model.lora.rank", "2", *FREEZES.get(recipe, [])]
    resolved, name = resolve_configs(["fit", "--config", recipe, *flags])
    monkeypatch.setattr("sys.argv", ["trunkline", *resolved])
    with torch.device("meta"):
        cli = Dry(resolved, name)
    large = cli.model
    layers = linear_layers(large.network)
    assert layers
    assert all(isinstance(layer.module, LoRALinear) for layer in layers)

    torch.manual_seed(0)
    config = small(large.network.config)
    randomise(type(large.network)(config), 0.1).save_pretrained(tmp_path / "start")
    arguments = {**large.hparams, "network": config, "init_from": str(tmp_path / "start")}
    arguments["optimizer"] = {**arguments["optimizer"], "lr": 0.01, "warmup": 0, "schedule": "constant"}
    arguments |= dict.fromkeys(arguments.keys() & set(STARTS[1:]))
    module = type(large)(**arguments, facts=cli.datamodule.facts)
    network = module.network
    embeddings = {p for part in network.modules() if isinstance(part, torch.nn.Embedding) for p in part.parameters()}
    heads = {p for part in network.output_modules() for p in part.parameters()} - embeddings
    adapters = {n for n, _ in network.named_parameters() if ".adapters." in n}
    learning = {n for n, p in network.named_parameters() if p in heads} | adapters
    assert {n for n, p in network.named_parameters() if p.requires_grad} == learning

    like = batch_of(cli.datamodule, cli.datamodule.facts)
    batch = {n: some_values(n, value, "features" in like) for n, value in like.items()}
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    tiny.trainer(tmp_path, max_steps=1).fit(module, DataLoader([batch], batch_size=None))
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= learning
    assert {n for n in adapters if ".lora_B." in n} <= changed  # an A only after its B, which starts at zero
    assert all(torch.isfinite(p).all() for p in network.parameters())
