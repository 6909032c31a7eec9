"""Fields of `TransformerConfig` one by one: dropout, stochastic depth, widths, and sizes that do not fit."""

from typing import Any

import pytest
import torch
from test_backbone import config, trunk
from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.backbone import Transformer, TransformerConfig
from trunkline.modules.backbone.transformer import DropPath


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rate", [{"dropout": 0.5}, {"drop_path": 0.5}])
def test_regularisers_are_off_in_evaluation(rate: dict[str, float]) -> None:
    plain = trunk(config())
    model = Transformer(config(**rate))
    model.load_state_dict(plain.state_dict())
    x = torch.randn(8, 7, 32)
    assert not torch.equal(model.train()(x).x, model(x).x)
    assert torch.equal(model.eval()(x).x, plain(x).x)


@pytest.mark.parametrize("return_attention", [False, True])
def test_dropout_of_attention_weights_keeps_the_expectation(return_attention: bool) -> None:
    model = trunk(config(dropout=0.2)).blocks[0].attn
    x = torch.randn(1, 7, 32).expand(4000, -1, -1)
    want = model(x[:1])[0]
    out, weights = model.train()(x, return_attention=return_attention)
    assert (out.std(0) > 0.01).all()
    assert_near(out.mean(0), want[0], 0.1)
    assert weights is None or torch.equal(weights[0], weights[1])  # shown as they were before dropout


def test_dropout_of_branches() -> None:
    model = trunk(config(depth=1, dropout=0.5, final_norm=False)).train()
    block = model.blocks[0]
    for p in (*block.attn.proj.parameters(), block.mlp.fc2.weight):
        torch.nn.init.zeros_(p)
    torch.nn.init.ones_(block.mlp.fc2.bias)  # now the branches give 0 and 1
    added = model(torch.zeros(4, 7, 32)).x
    assert added.unique().tolist() == [0.0, 2.0]
    assert added.mean().item() == pytest.approx(1.0, abs=0.15)


def test_drop_path_takes_whole_samples_and_keeps_the_expectation() -> None:
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 2)).flatten(1)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert set(out[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert out.mean().item() == pytest.approx(1.0, abs=0.04)  # 4 standard deviations
    assert (drop.eval()(torch.ones(10, 3)) == 1).all()


def test_drop_path_draws_for_each_branch() -> None:
    model = trunk(config(depth=2, drop_path=0.5, final_norm=False)).train()
    x = torch.randn(1, 7, 32).expand(800, -1, -1)
    first = model.blocks[0](x, None, None, None, False, None, None, 0, False)[0]  # rate 0
    untouched = (model(x).x == first).flatten(1).all(1).float().mean().item()
    assert untouched == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(("depth", "rates"), [(5, [0.0, 0.1, 0.2, 0.3, 0.4]), (2, [0.0, 0.4]), (1, [0.0])])
def test_drop_path_grows_linearly(depth: int, rates: list[float]) -> None:
    model = Transformer(config(depth=depth, drop_path=0.4))
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("dim", "mlp", "given", "width"),  # 8/3 of 32, 64 and 96 is 85.33, 170.67 and 256
    [
        (32, "swiglu", None, 88),
        (64, "swiglu", None, 176),
        (96, "swiglu", 40, 40),
        (96, "swiglu", None, 256),
        (32, "relu", None, 128),
    ],
)
def test_hidden_width(dim: int, mlp: Any, given: int | None, width: int) -> None:
    cfg = config(dim=dim, mlp=mlp, mlp_dim=given)
    layers = Transformer(cfg).blocks[0].mlp
    assert cfg.hidden_dim == layers.fc2.in_features == width
    assert layers.fc1.out_features == width * (2 if mlp == "swiglu" else 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"num_heads=5 does not divide dim=32; set num_heads to 4"),
        ({"num_kv_heads": 3}, r"num_kv_heads=3 does not divide num_heads=4"),
        ({"num_kv_heads": 8}, r"num_kv_heads=8 does not divide num_heads=4"),
        ({"dim": 36, "rope_theta": 1e4}, r"rope_theta needs an even width per head, but it is 9"),
        ({"num_heads": 0}, "at least 1"),
        ({"num_kv_heads": 0}, "at least 1"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        config(**changes)


@pytest.mark.parametrize(("cross", "state"), [(True, "missing"), (False, "given")])
def test_context_against_the_configuration(cross: bool, state: str) -> None:
    x = torch.randn(2, 7, 32)
    with pytest.raises(TrunklineError, match=f"cross_attention={cross}, but context is {state}"):
        Transformer(config(cross_attention=cross))(x, context=None if cross else x)


@pytest.mark.parametrize("rate", [{"dropout": 1.0}, {"drop_path": 1.0}, {"dropout": -0.1}])
def test_rates_are_probabilities_below_one(rate: dict[str, float]) -> None:
    with pytest.raises(TrunklineError, match="must be from 0 up to below 1, not"):
        TransformerConfig(dim=16, depth=1, num_heads=2, **rate)  # type: ignore[arg-type]
