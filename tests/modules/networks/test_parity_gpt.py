"""Parity of the GPT with transformers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_near, randomise
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from trunkline import TrunklineError
from trunkline.modules.networks import GPT
from trunkline.modules.networks.convert import gpt_config_from_transformers, gpt_from_transformers


def gpt2_pair(**options: Any) -> tuple[Any, GPT, Tensor]:
    """A small GPT-2 of transformers with random weights, biases and norms, ours after conversion, and two texts."""
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
    peer: Any = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **options}))
    randomise(peer.eval(), 0.1)
    gpt = GPT(gpt_config_from_transformers(peer.config.to_dict())).eval()
    gpt.load_state_dict(gpt_from_transformers(peer.state_dict()))
    return peer, gpt, torch.randint(0, 50, (2, 16))


GPT2S: dict[str, dict[str, Any]] = {
    "usual": {},
    "wide": {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    "untied": {"tie_word_embeddings": False, "activation_function": "gelu"},
}


@pytest.mark.parametrize("name", GPT2S)
@torch.no_grad()
def test_gpt_against_transformers(name: str) -> None:
    peer, gpt, tokens = gpt2_pair(**GPT2S[name])
    want = peer(tokens).logits
    assert 0.2 < want.std() < 20
    assert_near(gpt(tokens), want)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :5] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = peer(tokens, attention_mask=mask.long(), position_ids=positions).logits
    assert_near(gpt(tokens, mask=mask)[mask], want[mask])


def test_gpt_gradients_against_transformers() -> None:
    peer, gpt, tokens = gpt2_pair(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    for model in (lambda x: peer(x).logits, gpt):
        F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    want = gpt_from_transformers({name: p.grad for name, p in peer.named_parameters()})
    for name, p in gpt.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[name])


@torch.no_grad()
def test_gpt_from_the_names_in_files() -> None:
    """Files of GPT-2 lack the prefix and the tied head; old ones hold causal masks."""
    peer, gpt, tokens = gpt2_pair()
    bare = GPT2Model(peer.config)
    bare.load_state_dict(peer.transformer.state_dict())
    mask = torch.ones(1, 1, 16, 16).tril()
    weights = {**bare.state_dict(), "h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}
    gpt.load_state_dict(gpt_from_transformers(weights))
    assert_near(gpt(tokens), peer(tokens).logits)


@pytest.mark.parametrize(
    "option",
    [{"activation_function": "tanh"}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}],
)
def test_gpt2_with_options_of_its_own(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(TrunklineError, match=f"a GPT-2 with {name}={value} cannot be converted"):
        gpt_config_from_transformers(GPT2Config(**option).to_dict())
