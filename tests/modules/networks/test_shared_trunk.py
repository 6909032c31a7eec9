"""Networks around an existing trunk: one set of weights that several networks read, each in its own way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_networks import assert_near, bert, gpt, randomise, vit
from torch import Tensor, nn

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.networks import (
    BERT,
    CLIP,
    GPT,
    CLIPConfig,
    Network,
    TextHead,
    TextHeadConfig,
    ViT,
)

SHAPE = {"dim": 32, "depth": 2, "num_heads": 4, "norm_first": True, "final_norm": True}
MODERN = {**SHAPE, "mlp": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2, "qk_norm": True, "rope_theta": 1e4}
BUILDERS: dict[str, tuple[type[Network], Any]] = {
    "gpt": (GPT, gpt(SHAPE)),
    "bert": (BERT, bert(SHAPE)),
    "vit": (ViT, vit(SHAPE)),
    "text head on gpt": (TextHead, TextHeadConfig(gpt=gpt(SHAPE), pool="last")),
    "text head on bert": (TextHead, TextHeadConfig(bert=bert(SHAPE))),
}


def trunk_of(network: Any) -> Transformer:
    return network.body.backbone if isinstance(network, TextHead) else network.backbone


def inputs(network: Any) -> Tensor:
    return torch.randn(2, 3, 16, 16) if isinstance(network, ViT) else torch.randint(0, 19, (2, 9))


@pytest.mark.parametrize("shape", [SHAPE, MODERN])
@pytest.mark.parametrize("causal", [False, True])
def test_one_trunk_under_a_gpt_and_a_bert_at_once(shape: dict[str, Any], causal: bool) -> None:
    """The same outputs and gradients as two networks that have equal weights."""
    trunk = Transformer(TransformerConfig(**shape, causal=causal))
    networks: list[Any] = [GPT(gpt(shape), trunk), BERT(bert(shape), trunk), ViT(vit(shape), trunk)]
    randomise(nn.ModuleList(networks))
    assert len({id(trunk_of(network)) for network in networks}) == 1
    total: list[dict[str, Tensor]] = []
    for network in networks:
        alone = type(network)(network.config)
        alone.load_state_dict(network.state_dict())
        assert list(alone.state_dict()) == list(network.state_dict())
        x = inputs(network)
        assert torch.equal(network(x), alone(x))
        network(x).square().sum().backward()
        alone(x).square().sum().backward()
        total.append({name: p.grad for name, p in alone.backbone.named_parameters() if p.grad is not None})
    for name, p in trunk.named_parameters():  # of all three
        assert p.grad is not None
        assert_near(p.grad, sum(gradients[name] for gradients in total), 1e-4)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_given_trunk_keeps_its_weights(name: str, causal: bool) -> None:
    network_class, config = BUILDERS[name]
    trunk = randomise(Transformer(TransformerConfig(**SHAPE, causal=causal, dropout=0.2)))
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    network: Any = network_class(config, trunk)  # type: ignore[call-arg]
    assert trunk_of(network) is trunk
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())
    assert trunk.config == TransformerConfig(**SHAPE, causal=causal, dropout=0.2)
    assert network.config == config


def test_a_gpt_scales_the_branches_of_its_own_trunk_alone() -> None:
    torch.manual_seed(0)
    given = GPT(gpt(SHAPE), Transformer(TransformerConfig(**SHAPE)))
    torch.manual_seed(0)
    own = GPT(gpt(SHAPE))
    for name in ("attn.proj", "mlp.fc2"):
        pair = [n.backbone.blocks[1].get_submodule(name).get_parameter("weight").std() for n in (given, own)]
        assert (pair[0] / pair[1]).item() == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("dim", 36, "36"),
        ("depth", 3, "3"),
        ("num_heads", 2, "2"),
        ("num_kv_heads", 1, "1"),
        ("mlp_dim", 100, "100"),
        ("mlp", "relu", "relu"),
        ("norm", "rmsnorm", "rmsnorm"),
        ("norm_eps", 1e-3, r"0\.001"),
        ("norm_first", False, "False"),
        ("final_norm", False, "False"),
        ("qk_norm", True, "True"),
        ("bias", False, "False"),
        ("cross_attention", True, "True"),
        ("rope_theta", 7.0, r"7\.0"),
    ],
)
def test_a_trunk_of_another_shape_is_refused(name: str, field: str, value: Any, shown: str) -> None:
    network_class, config = BUILDERS[name]
    trunk = Transformer(TransformerConfig(**{**SHAPE, field: value}))
    with pytest.raises(TrunklineError, match=rf"given trunk has {field}={shown}, but .* backbone\.{field}="):
        network_class(config, trunk)  # type: ignore[call-arg]


def test_defaults_that_are_written_out_are_the_same_shape() -> None:
    trunk = Transformer(TransformerConfig(**SHAPE, num_kv_heads=4, mlp_dim=128))
    assert GPT(gpt(SHAPE), trunk).backbone is trunk


# --- CLIP


def clip(text: str, **options: Any) -> CLIPConfig:
    body: dict[str, Any] = {"gpt": gpt(SHAPE)} if text == "gpt" else {"bert": bert(SHAPE)}
    return CLIPConfig(**{"image": vit(SHAPE), **body, "dim": 12, "share_trunk": True, **options})


@pytest.mark.parametrize("text", ["gpt", "bert"])
def test_both_towers_of_a_clip_on_a_given_trunk(text: str) -> None:
    trunk = randomise(Transformer(TransformerConfig(**SHAPE)))
    network = CLIP(clip(text), trunk)
    assert network.image.backbone is network.text.body.backbone is trunk
    apart = CLIP(clip(text, share_trunk=False))
    apart.load_state_dict(network.state_dict())
    image, tokens = torch.randn(2, 3, 16, 16), torch.randint(0, 19, (2, 9))
    for got, want in zip(network(image, tokens), apart(image, tokens), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(TrunklineError, match="share no trunk, so none can be given; set share_trunk=True"):
        CLIP(clip(text, share_trunk=False), trunk)
    with pytest.raises(TrunklineError, match="given trunk has depth=1"):
        CLIP(clip(text), Transformer(TransformerConfig(**{**SHAPE, "depth": 1})))


def test_a_shared_trunk_starts_where_it_always_did() -> None:
    """The text tower's own trunk is drawn and dropped: a seed gives the weights that it gave before."""
    torch.manual_seed(0)
    network = CLIP(clip("bert"))
    torch.manual_seed(0)
    image, text = ViT(vit(SHAPE, num_classes=12)), TextHead(replace(clip("bert").text))
    for head in (image.head, text.head):
        nn.init.normal_(head.weight, std=32**-0.5)
    want = {**{f"image.{k}": v for k, v in image.state_dict().items()}}
    want |= {f"text.{k}": v for k, v in text.state_dict().items() if "backbone" not in k}
    got = network.state_dict()
    assert len(want) > 20
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_a_causal_vit_is_refused() -> None:
    with pytest.raises(TrunklineError, match="the trunk of a ViT cannot be causal"):
        vit({"causal": True})


# --- the two steps of a GPT


@pytest.mark.parametrize("shape", [SHAPE, MODERN])
def test_embed_and_run_are_the_forward(shape: dict[str, Any]) -> None:
    network = randomise(GPT(gpt(shape, positions="learned" if shape is SHAPE else "none"))).eval()
    tokens = torch.randint(0, 19, (2, 9))
    document = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3, 3, 3]])
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    for options in ({}, {"document": document}, {"mask": mask}):
        x = network.embed(tokens, **options)
        assert x.shape == (2, 9, 32)
        assert torch.equal(network.head(network.run(x, **options).x), network(tokens, **options))
        out = network.run(x, **options, keep=slice(-1, None), return_attention=True)
        assert torch.equal(
            network.head(out.x),
            network.head(network.forward_features(tokens, **options, keep=slice(-1, None), return_attention=True).x),
        )
        assert out.attention is not None
    cache = network.make_cache(2)
    first = network.run(network.embed(tokens[:, :5]), cache=cache).x
    rest = network.run(network.embed(tokens[:, 5:], start=5), cache=cache).x
    assert_near(network.head(torch.cat([first, rest], dim=1)), network(tokens))


def test_embeddings_of_another_kind_among_the_words() -> None:
    """Two vectors stand between words: what comes before does not see them, what comes after does."""
    network = randomise(GPT(gpt(SHAPE))).eval()
    tokens, own = torch.randint(0, 19, (2, 7)), torch.randn(2, 2, 32, requires_grad=True)

    def states(own: Tensor) -> Tensor:
        before, after = network.embed(tokens[:, :3]), network.embed(tokens[:, 3:], start=5)
        return network.run(torch.cat([before, own, after], dim=1)).x

    out = states(own)
    assert out.shape == (2, 9, 32)
    assert_near(out[:, :3], network.forward_features(tokens[:, :3]).x)
    assert (states(-own)[:, 3:] - out[:, 3:]).abs().amax(dim=-1).min() > 1e-3
    out[:, 5:].sum().backward()
    assert own.grad is not None
    assert own.grad.abs().amax(dim=-1).min() > 0
    # A word's own embedding, given as if it were of another kind, changes nothing.
    word = network.embed(tokens[:, :2], start=3)
    assert_near(states(word), network.forward_features(torch.cat([tokens[:, :3], tokens[:, :2], tokens[:, 3:]], 1)).x)
    with pytest.raises(TrunklineError, match="10 tokens are more than the 9 the network can see"):
        network.run(torch.randn(1, 10, 32))


def test_documents_and_a_mask_together() -> None:
    """A token sees what both allow; an additive mask is added within documents."""
    network = randomise(GPT(gpt(SHAPE))).eval()
    x, document = torch.randn(1, 9, 32), torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    mask = torch.tensor([[True, False, True, True, True, True, False, True, True]])
    same = (document[:, :, None] == document[:, None])[:, None]
    want = network.backbone(x, mask=same & mask[:, None, None], causal=True).x
    assert_near(network.run(x, document=document, mask=mask).x[mask], want[mask])
    bias = torch.randn(4, 9, 9)
    want = network.backbone(x, mask=bias.masked_fill(~same, -torch.inf), causal=True).x
    assert_near(network.run(x, document=document, mask=bias).x, want)
