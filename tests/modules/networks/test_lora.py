"""LoRA against a float64 loop: what it computes, what learns, and what merging gives."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_near
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    BERT,
    CLIP,
    GPT,
    BERTConfig,
    CLIPConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    ViT,
    ViTConfig,
)
from trunkline.modules.networks.lora import LoRAConfig, LoRALinear, add_lora, is_adapted, merge_lora
from trunkline.modules.training.optim import OptimizerConfig, parameter_groups


def trunk(**options: Any) -> TransformerConfig:
    return TransformerConfig(**{"dim": 16, "depth": 2, "num_heads": 4, "mlp_dim": 24, **options})


def gpt(**options: Any) -> GPT:
    torch.manual_seed(0)
    grouped = trunk(num_kv_heads=2, mlp="swiglu", norm="rmsnorm", rope_theta=100.0, causal=True, **options)
    return GPT(GPTConfig(30, 12, positions="none", backbone=grouped))


def vit() -> ViT:
    torch.manual_seed(0)
    made = ViT(ViTConfig(8, 4, 1, 5, backbone=trunk()))
    nn.init.normal_(made.head.weight)
    return made


def trained(network: Any) -> Any:
    """With adapters whose B is no longer zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    return network


TOKENS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def loop(x: Tensor, layer: LoRALinear) -> Tensor:
    """W x + b + (alpha / r) B A x in float64, with one matrix for each of the stacked layers."""
    weight, row = layer.weight.detach().double(), 0
    parts = []
    for number, rows in enumerate(layer.rows):
        adapter: Any = layer.adapters[str(number)]
        a, b = adapter.lora_A.weight.detach().double(), adapter.lora_B.weight.detach().double()
        parts.append(weight[row : row + rows] + 6.0 / len(a) * (b @ a))
        row += rows
    bias = None if layer.bias is None else layer.bias.detach().double()
    return F.linear(x.double(), torch.cat(parts), bias)


def test_outputs_and_gradients_are_those_of_a_loop() -> None:
    """In every kind of layer: grouped queries, a gated MLP, biases."""
    layers = [
        layer
        for network in (gpt(), vit())
        for layer in trained(add_lora(network, LoRAConfig(3, alpha=6.0))).modules()
        if isinstance(layer, LoRALinear)
    ]
    assert {layer.rows for layer in layers} == {(16, 8, 8), (24, 24), (16, 16, 16), (24,), (16,)}
    for layer in layers:
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(layer(x).double(), loop(x, layer), rtol=1e-5, atol=1e-5)
        weights = torch.randn(layer.out_features)
        (layer(x) * weights).sum().backward()
        assert layer.weight.grad is None
        row = 0
        for number, rows in enumerate(layer.rows):
            adapter: Any = layer.adapters[str(number)]
            a, b = adapter.lora_A.weight.detach().double(), adapter.lora_B.weight.detach().double()
            upstream = weights[row : row + rows].double().expand(5, rows)
            want_b, want_a = 2.0 * upstream.T @ (x.double() @ a.T), 2.0 * (upstream @ b).T @ x.double()
            torch.testing.assert_close(adapter.lora_A.weight.grad.double(), want_a, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(adapter.lora_B.weight.grad.double(), want_b, rtol=1e-4, atol=1e-4)
            row += rows


@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
def test_first_outputs_are_those_of_the_trained_network(targets: Any) -> None:
    """Bit for bit; and which parameters there are."""
    for make, given in ((gpt, TOKENS), (vit, IMAGE)):
        plain, network = make().eval(), add_lora(make(), LoRAConfig(2, targets=targets)).eval()
        assert torch.equal(network(given), plain(given))
        assert not torch.equal(trained(network)(given), plain(given))
        adapted = {name.rpartition(".")[2] for name, m in network.named_modules() if isinstance(m, LoRALinear)}
        assert (
            adapted
            == {"all": {"qkv", "proj", "fc1", "fc2"}, "attention": {"qkv", "proj"}, "mlp": {"fc1", "fc2"}}[targets]
        )


def test_what_learns() -> None:
    network = add_lora(vit(), LoRAConfig(2))
    block = 3 * 2 * (16 + 16) + 2 * (16 + 16) + 2 * (16 + 24) + 2 * (24 + 16)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 2 * block + 16 * 5 + 5
    learning = {n for n, p in network.named_parameters() if p.requires_grad and ".adapters." not in n}
    assert learning == {"head.weight", "head.bias"}
    bert = add_lora(BERT(BERTConfig(30, 12, backbone=trunk(norm_first=False, final_norm=False))), LoRAConfig(2))
    learning = {n for n, p in bert.named_parameters() if p.requires_grad and ".adapters." not in n}
    assert learning == {
        *("head.bias", "masked_head.dense.weight", "masked_head.dense.bias"),
        *("masked_head.norm.weight", "masked_head.norm.bias"),
    }  # not the table that the output layer shares with the embeddings


def test_decay_and_rates() -> None:
    """The matrices of adapters decay; layer-wise decay gives them the rate of their block."""
    network = add_lora(vit(), LoRAConfig(2))
    names = {p: name for name, p in network.named_parameters()}
    config = OptimizerConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5, schedule="constant")
    found = {}
    for group in parameter_groups(network, config):
        for p in group["params"]:
            part = names[p].partition(".attn")[0].partition(".mlp")[0]
            found.setdefault(part, set()).add((group["lr"], group["weight_decay"]))
    assert found == {
        "backbone.blocks.0": {(0.25, 0.1)},
        "backbone.blocks.1": {(0.5, 0.1)},
        "head.weight": {(1.0, 0.1)},
        "head.bias": {(1.0, 0.0)},
    }
    muon = parameter_groups(network, OptimizerConfig("muon", schedule="constant"))
    assert {g["splits"] for g in muon if g["muon"]} == {1}


def networks() -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    encoder = EncoderDecoderConfig(30, None, 12, 12, encoder=trunk(), decoder=trunk())
    clip = CLIPConfig(
        dim=8,
        image=ViTConfig(8, 4, 1, backbone=trunk()),
        gpt=GPTConfig(30, 12, backbone=trunk(causal=True)),
        share_trunk=True,
    )
    return {
        "gpt": (gpt(), (TOKENS,)),
        "vit": (vit(), (IMAGE,)),
        "encoder-decoder": (EncoderDecoder(encoder), (TOKENS, TOKENS)),
        "one trunk of two towers": (CLIP(clip), (IMAGE, TOKENS)),
    }


@pytest.mark.parametrize("name", networks())
def test_merged(name: str) -> None:
    network, inputs = networks()[name]
    names, kinds = list(network.state_dict()), [type(m) for m in network.modules()]

    def run(made: Any) -> Tensor:
        out = made(*inputs)
        return torch.cat([each.flatten() for each in (out if isinstance(out, tuple) else (out,))])

    plain = run(network.eval())
    add_lora(network, LoRAConfig(3, alpha=6.0))
    trained(network)
    changed = run(network)
    assert (changed - plain).abs().max() > 1e-2
    assert merge_lora(network) is network
    assert_near(run(network), changed)
    assert list(network.state_dict()) == names
    assert [type(m) for m in network.modules()] == kinds
    assert all(p.requires_grad for p in network.parameters())
    assert merge_lora(network) is network  # which changes nothing now
    assert_near(run(network), changed)


def test_selected_tokens_and_cache() -> None:
    network = trained(add_lora(gpt(), LoRAConfig(3))).eval()
    states = network(TOKENS, return_logits=False)
    assert_near(network(TOKENS, keep=slice(-1, None), return_logits=False), states[:, -1:])
    places = torch.tensor([[1, 4], [8, 0]])
    assert_near(network(TOKENS, keep=places, return_logits=False), states[torch.arange(2)[:, None], places])


def test_activation_checkpointing_and_dropout() -> None:
    """The same gradients, with the same dropout of the adapters."""
    found = []
    for checkpointing in (False, True):
        network = trained(add_lora(gpt(activation_checkpointing=checkpointing), LoRAConfig(3, dropout=0.5))).train()
        torch.manual_seed(2)
        network(TOKENS).square().mean().backward()
        found.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == {n for n, p in network.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(network(TOKENS), network(TOKENS))  # dropout is on
    network.eval()
    assert torch.equal(network(TOKENS), network(TOKENS))


def test_bfloat16() -> None:
    network = trained(add_lora(gpt(), LoRAConfig(3)))
    want = network(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(TOKENS)
    assert (mixed.float() - want).abs().max() < 0.05 * want.abs().max()
    half = copy.deepcopy(network).bfloat16()
    out = half(TOKENS)
    assert out.dtype == torch.bfloat16
    assert (merge_lora(half)(TOKENS).float() - out.float()).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rank": -1}, "model.lora.rank"),
        ({"rank": 2, "alpha": 0.0}, "model.lora.alpha"),
        ({"rank": 2, "dropout": 1.0}, "model.lora.dropout"),
        ({"rank": 2, "targets": "heads"}, "model.lora.targets"),
        ({"dropout": 0.1}, "model.lora.rank"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], field: str) -> None:
    with pytest.raises(TrunklineError) as found:
        LoRAConfig(**options)
    assert found.value.field == field


def test_misuse() -> None:
    network = vit()
    with pytest.raises(TrunklineError, match="needs a rank"):
        add_lora(network, LoRAConfig())
    assert not is_adapted(network)
    add_lora(network, LoRAConfig(2))
    with pytest.raises(TrunklineError, match="merge them first"):
        add_lora(network, LoRAConfig(2))
