"""Parity with the AST of transformers: results, gradients, weights and configuration in both directions."""

import json
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import assert_near, randomise
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.networks import AST, ASTConfig
from trunkline.modules.networks.convert.families import from_foreign
from trunkline.modules.networks.convert.transformers_ast import (
    ast_config_from_transformers,
    ast_config_to_transformers,
    ast_from_transformers,
    ast_to_transformers,
)

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PEERS: dict[str, dict[str, Any]] = {
    "usual": {**SIZES, "num_mel_bins": 32, "max_length": 60, "num_labels": 5},
    "others": {
        **SIZES,
        **{"num_mel_bins": 21, "max_length": 33, "patch_size": 8, "time_stride": 5, "frequency_stride": 3},
        **{"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "qkv_bias": False},
    },
}
HEAD = ("classifier.dense.weight",)
every_peer = pytest.mark.parametrize("name", PEERS)


class Pair(NamedTuple):
    theirs: Any
    ours: AST


@cache
@torch.random.fork_rng()
def pair(name: str) -> Pair:
    """A small model of transformers with random weights, and ours, in float64."""
    torch.manual_seed(1)
    theirs = randomise(transformers.ASTForAudioClassification(transformers.ASTConfig(**PEERS[name])))
    ours = from_foreign(theirs.config.to_dict(), theirs.state_dict())
    return Pair(theirs.double().eval(), ours.double().eval())


def clips(name: str) -> Tensor:
    return torch.randn(3, PEERS[name]["max_length"], PEERS[name]["num_mel_bins"], dtype=torch.float64)


@every_peer
@torch.no_grad()
def test_logits_and_features(name: str) -> None:
    theirs, ours = pair(name)
    features = clips(name)
    want = theirs(features).logits
    assert want.std() > 0.1
    assert_near(ours(features), want)
    body = theirs.audio_spectrogram_transformer(features)
    inside = ours.forward_features(features)
    assert_near(torch.cat((inside.prefix, inside.patches), dim=1), body.last_hidden_state)
    assert_near(ours.forward_head(inside, pre_logits=True), body.pooler_output)


@every_peer
def test_gradients(name: str) -> None:
    theirs, ours = pair(name)
    features, classes = clips(name), torch.tensor([0, 1, 1])
    for model, out in ((theirs, theirs(features).logits), (ours, ours(features))):
        model.zero_grad()
        F.cross_entropy(out, classes).backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    want = ast_from_transformers(gradients)
    got = {key: p.grad for key, p in ours.named_parameters()}
    assert got.keys() == want.keys()
    for key, gradient in got.items():
        assert gradient is not None
        assert_near(gradient, want[key])


@torch.no_grad()
def test_tokens_without_positions_become_theirs() -> None:
    """As a network of ours has them; theirs have positions of zero."""
    ours = randomise(AST(replace(pair("usual").ours.config, prefix_positions=0))).double().eval()
    content = ast_config_to_transformers(ours.config)
    config = transformers.ASTConfig(**{key: value for key, value in content.items() if key != "model_type"})
    theirs = transformers.ASTForAudioClassification.from_pretrained(
        None, config=config, state_dict=ast_to_transformers(ours.state_dict(), ours.config), dtype=torch.float64
    )
    features = clips("usual")
    assert_near(theirs.eval()(features).logits, ours(features))
    assert theirs.audio_spectrogram_transformer.embeddings.position_embeddings[:, :2].count_nonzero() == 0


@every_peer
def test_configuration_there_and_back(name: str) -> None:
    theirs, ours = pair(name)
    content = ast_config_to_transformers(ours.config)
    found = json.loads(theirs.config.to_json_string(use_diff=False)) | {"architectures": content["architectures"]}
    assert {key: found[key] for key in content} == content
    assert ast_config_from_transformers(content, HEAD) == ours.config


def test_names_of_classes() -> None:
    config = replace(pair("others").ours.config, stride=(4, 4))
    content = ast_config_to_transformers(config, ["Speech", "Rain"])
    assert content["id2label"] == {"0": "Speech", "1": "Rain"}
    assert content["label2id"] == {"Speech": 0, "Rain": 1}
    assert ast_config_from_transformers(content, HEAD) == replace(config, stride=4)


def test_the_usual_sizes() -> None:
    labels = {"id2label": {str(n): str(n) for n in range(527)}}
    config = ast_config_from_transformers({"model_type": "audio-spectrogram-transformer", **labels}, HEAD)
    assert config == ASTConfig(prefix_positions=2, backbone=config.backbone)
    assert (config.backbone.dim, config.backbone.depth, config.grid) == (768, 12, (12, 101))


# --- what cannot be converted


def test_an_activation_that_the_network_lacks() -> None:
    with pytest.raises(
        TrunklineError, match="with hidden_act=quick_gelu cannot be converted: our AST has no such option"
    ):
        ast_config_from_transformers({**pair("usual").theirs.config.to_dict(), "hidden_act": "quick_gelu"}, HEAD)


@pytest.mark.parametrize(
    ("field", "value"),
    [("pool", "mean"), ("head_norm", False), ("backbone.mlp", "swiglu"), ("backbone.qk_norm", True)],
)
def test_networks_that_theirs_lacks(field: str, value: Any) -> None:
    config = pair("usual").ours.config
    side, _, name = field.rpartition(".")
    change = {side: replace(config.backbone, **{name: value})} if side else {field: value}
    change |= {"prefix_positions": 0} if field == "pool" else {}
    with pytest.raises(TrunklineError, match=rf"our AST with {field}=\S+ cannot become an AST of transformers"):
        ast_config_to_transformers(replace(config, **change))


def test_weights_without_a_place() -> None:
    theirs, ours = pair("usual")
    with pytest.raises(TrunklineError, match=r"of an AST of transformers have no place in our AST: 'extra\.weight'"):
        ast_from_transformers({**theirs.state_dict(), "extra.weight": torch.zeros(1)})
    with pytest.raises(TrunklineError, match=r"of our AST have no place in an AST of .*: 'extra\.weight'"):
        ast_to_transformers({**ours.state_dict(), "extra.weight": torch.zeros(1)}, ours.config)
