"""What the GPT promises beyond the contract of all networks."""

from typing import Any

import pytest
import torch
from test_networks import assert_near, gpt, randomise
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import GPT, GPTConfig
from trunkline.modules.networks.gpt import positions_in_document
from trunkline.modules.training.optim import OptimizerConfig, parameter_groups

MODERN = {"mlp": "swiglu", "norm": "rmsnorm", "num_kv_heads": 2, "qk_norm": True, "bias": False, "rope_theta": 1e4}
KINDS: dict[str, dict[str, Any]] = {"learned": {}, "rotary": {"trunk": MODERN, "positions": "none"}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str = "learned", **changes: Any) -> GPT:
    return randomise(GPT(gpt(**KINDS[kind], **changes))).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 19, shape)


def test_a_gpt_is_causal_whatever_its_trunk_says() -> None:
    assert not TransformerConfig().causal
    assert gpt().backbone.causal


@each_kind
def test_the_future_changes_nothing(kind: str) -> None:
    net, x = network(kind), tokens(2, 9)
    other = x.clone()
    other[:, 5:] = (x[:, 5:] + 1) % 19
    assert_near(net(other)[:, :5], net(x)[:, :5], 1e-6)
    assert (net(other)[:, 5:] - net(x)[:, 5:]).abs().max() > 0.01


@each_kind
def test_cache_in_pieces_equals_the_whole(kind: str) -> None:
    net, x = network(kind), tokens(2, 9)
    cache = net.make_cache(2)
    pieces = [net(x[:, :4], cache=cache), net(x[:, 4:5], cache=cache), net(x[:, 5:], cache=cache)]
    assert_near(torch.cat(pieces, dim=1), net(x))


@each_kind
def test_left_padding_counts_for_nothing(kind: str) -> None:
    net, x = network(kind), tokens(1, 6)
    padded = torch.cat([tokens(1, 3), x], dim=1)
    mask = torch.arange(9)[None] >= 3
    assert_near(net(padded, mask=mask)[:, 3:], net(x))
    cache = net.make_cache(1)
    first = net(padded[:, :7], mask=mask[:, :7], cache=cache)[:, 3:]
    assert_near(torch.cat([first, net(padded[:, 7:], mask=mask, cache=cache)], dim=1), net(x))


@each_kind
def test_packed_documents_are_as_if_alone(kind: str) -> None:
    net, x = network(kind), tokens(2, 9)
    document = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3, 3, 3]])
    out = net(x, document)
    for row, start, end in ((0, 0, 3), (0, 3, 7), (1, 0, 1), (1, 1, 2), (1, 2, 9)):
        assert_near(out[row, start:end], net(x[row : row + 1, start:end])[0])
    assert out.isfinite().all()


def test_positions_in_document() -> None:
    document = torch.tensor([[1, 1, 2, 2, 2, 0], [4, 4, 4, 4, 4, 4]])
    assert positions_in_document(document).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


@each_kind
def test_keep_and_states(kind: str) -> None:
    net, x = network(kind), tokens(2, 9)
    assert_near(net(x, keep=slice(-1, None)), net(x)[:, -1:])
    assert_near(net.head(net(x, return_logits=False)), net(x))
    assert net(x, return_logits=False).shape == (2, 9, 32)


def test_tied_and_free_output_layer() -> None:
    tied, free = network(), network(tie_embeddings=False)
    assert tied.head.weight is tied.token_embed.weight
    assert free.head.weight is not free.token_embed.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 19 * 32
    assert (tied.output_modules(), free.output_modules()) == ([], [free.head])
    decayed = [g for g in parameter_groups(tied, OptimizerConfig(weight_decay=0.1)) if g["weight_decay"] > 0]
    assert all(p is not tied.head.weight for g in decayed for p in g["params"])  # an embedding after all


@pytest.mark.parametrize(("tied", "deviation"), [(True, 0.02), (False, 0.5)])
def test_a_free_embedding_starts_large(tied: bool, deviation: float) -> None:
    net = GPT(gpt(vocab_size=2000, tie_embeddings=tied))
    assert net.token_embed.weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert net.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_gpt2_has_124_million_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808


def test_the_start_is_a_uniform_guess_and_residual_branches_are_small() -> None:
    torch.manual_seed(0)
    net = GPT(GPTConfig(1000, 16, backbone=TransformerConfig(dim=128, depth=8, num_heads=4)))
    logits = net(torch.randint(0, 1000, (4, 16)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 1000, (64,)))
    assert loss.item() == pytest.approx(torch.tensor(1000.0).log().item(), abs=0.05)
    block = net.backbone.blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize("cached", [0, 4])
def test_more_tokens_than_positions(cached: int) -> None:
    net = network()
    cache = net.make_cache(1)
    if cached:
        net(tokens(1, cached), cache=cache)
    with pytest.raises(TrunklineError, match=r"10 tokens are more than the 9 the network can see"):
        net(tokens(1, 10 - cached), cache=cache)
