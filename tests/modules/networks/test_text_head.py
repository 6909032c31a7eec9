"""TextHead: what it reads, that padding changes nothing, freezing and decay, and starting from trained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import trainer
from torch import Tensor
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERT, GPT, BERTConfig, GPTConfig
from trunkline.modules.networks.text_head import TextHead, TextHeadConfig
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.text_classifier import TextClassifier
from trunkline.modules.training.optim import OptimizerConfig, parameter_groups

V, T = 50, 8
QUICK = OptimizerConfig(schedule="constant", warmup=0, lr=0.01)


def trunk(**options: Any) -> TransformerConfig:
    return TransformerConfig(**{"dim": 16, "depth": 2, "num_heads": 2, **options})


def bert(**options: Any) -> BERTConfig:
    return BERTConfig(**{"vocab_size": V, "max_length": T, "backbone": trunk(), **options})


def gpt(**options: Any) -> GPTConfig:
    return GPTConfig(**{"vocab_size": V, "max_length": T, "backbone": trunk(), **options})


def config(body: str, pool: Any, **options: Any) -> TextHeadConfig:
    own: Any = {"bert": bert()} if body == "bert" else {"gpt": gpt()}
    return TextHeadConfig(**{**own, "pool": pool, "num_outputs": 3, **options})


def rows(lengths: tuple[int, ...] = (8, 5, 1, 3)) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, V, (len(lengths), T))
    return tokens, torch.arange(T) < torch.tensor(lengths)[:, None]


CASES = [("bert", p) for p in ("cls", "mean", "last", "none")] + [("gpt", p) for p in ("mean", "last", "none")]


@pytest.mark.parametrize(("body", "pool"), CASES)
def test_outputs_are_those_of_the_language_models_states(body: str, pool: Any) -> None:
    network = TextHead(config(body, pool)).eval()
    source: Any = (BERT(bert()) if body == "bert" else GPT(gpt())).eval()
    source.load_state_dict({**source.state_dict(), **network.body.state_dict()})
    tokens, mask = rows()
    segment = torch.zeros_like(tokens)
    segment[:, 4:] = 1
    output = network(tokens, segment, mask=mask)
    for row, own in enumerate(mask):  # row by row, without padding: (1, n, D) states
        n = int(own.sum())
        given = (tokens[row : row + 1, :n], *((segment[row : row + 1, :n],) if body == "bert" else ()))
        states = source.forward_features(*given).x[0]
        read = {"cls": states[0], "mean": states.mean(dim=0), "last": states[-1], "none": states}[pool]
        want = read @ network.head.weight.T + network.head.bias
        torch.testing.assert_close(output[row, :n] if pool == "none" else output[row], want, rtol=1e-4, atol=1e-5)
    assert output.shape == ((4, T, 3) if pool == "none" else (4, 3))


@pytest.mark.parametrize(("body", "pool"), CASES)
def test_every_parameter_learns(body: str, pool: Any) -> None:
    options = {"bert": bert(next_sentence=True)} if body == "bert" else {"gpt": gpt(tie_embeddings=False)}
    network = TextHead(config(body, pool, **options))
    tokens, mask = rows()
    network(tokens, tokens % 2, mask=mask).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert network(tokens).shape[-1] == 3  # without a mask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one body, not none; set either bert or gpt"),
        ({"bert": bert(), "gpt": gpt()}, "needs one body, not two"),
        ({"gpt": gpt()}, "pool=cls reads a GPT's first token, which sees no other token; set pool to last or mean"),
        ({"bert": bert(), "num_outputs": -1}, "num_outputs=-1 is below 0"),
        ({"bert": bert(), "dropout": 1.0}, r"dropout=1\.0 is not a probability; set it to at least 0 and below 1"),
        ({"bert": {"vocab": 3}}, "BERTConfig has no field 'vocab'; did you mean 'vocab_size'"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrunklineError, match=message):
        TextHeadConfig(**options)


def test_saved_and_read_again(tmp_path: Path) -> None:
    network = TextHead(config("gpt", "last")).eval()
    network.save_pretrained(tmp_path)
    again = TextHead.from_pretrained(tmp_path).eval()
    tokens, mask = rows()
    assert again.config == network.config
    assert torch.equal(again(tokens, mask=mask), network(tokens, mask=mask))


@pytest.mark.parametrize("body", ["bert", "gpt"])
def test_layer_decay(body: str) -> None:
    network = TextHead(config(body, "last"))
    groups = parameter_groups(network, OptimizerConfig(lr=1.0, layer_decay=0.5))
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    for name, p in network.named_parameters():
        want = {"body.backbone.blocks.0": 0.25, "body.backbone.blocks.1": 0.5, "body.backbone.norm": 1, "head": 1}
        assert rate[p] == next((r for part, r in want.items() if name.startswith(part)), 0.125), name


# --- starting from trained weights


def batches(outputs: int = 3) -> Any:
    tokens, mask = rows()
    label = torch.arange(4) % outputs
    return DataLoader([{"tokens": tokens, "mask": mask, "label": label}] * 2, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("body", ["bert", "gpt"])
@pytest.mark.parametrize(
    ("blocks", "learning"), [(1, ("body.backbone.blocks.1", "body.backbone.norm", "head")), (2, ("head",))]
)
def test_exactly_what_is_not_frozen_learns(body: str, blocks: int, learning: Any, tmp_path: Path) -> None:
    model = TextClassifier(config(body, "mean"), optimizer=QUICK, freeze_blocks=blocks)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    trainer(tmp_path, max_epochs=1).fit(model, batches())
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(learning)}
    assert model.network.dropout.training
    assert not model.network.body.dropout.training


@pytest.fixture(
    params=["bert checkpoint", "bert folder", "gpt checkpoint", "gpt folder", "head checkpoint", "head folder"]
)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, dict[str, Tensor]]:
    """Kind of body, where it is saved, and its weights."""
    kind, place = request.param.split()
    targets = torch.randint(0, V, (4, T))
    batch = {"tokens": targets, "targets": targets[:, :2], "positions": torch.tensor([[1, 2]] * 4)}
    if kind == "head":
        model: Any = TextClassifier(config("bert", "cls"), optimizer=QUICK)
    else:
        own: Any = (
            MaskedLM(bert(next_sentence=False), optimizer=QUICK) if kind == "bert" else CausalLM(gpt(), optimizer=QUICK)
        )
        model, batch["targets"] = own, targets[:, :2] if kind == "bert" else targets
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(model, batches() if kind == "head" else DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    path = tmp_path / "saved"
    if place == "folder":
        model.network.save_pretrained(path)
    else:
        fitted.save_checkpoint(path := tmp_path / "a.ckpt")
    body = model.network.body if kind == "head" else model.network
    return "gpt" if kind == "gpt" else "bert", str(path), body.state_dict()


def test_init_from(source: tuple[str, str, dict[str, Tensor]]) -> None:
    kind, path, weights = source
    model = TextClassifier(config(kind, "mean", num_outputs=5), init_from=path)
    body = model.network.body.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in body.items())
    assert "backbone.blocks.1.mlp.fc2.weight" in body
    assert not any(name.startswith(("masked_head", "head", "pooler")) for name in body)
    assert model.network.head.weight.shape == (5, 16)
    place = f"network.{kind}"
    for own, end, message in (
        (
            {"backbone": trunk(dim=32)},
            "backbone.dim",
            rf"{path} was trained with dim=16, but the network has 32; set {place}\.backbone\.dim to 16",
        ),
        (
            {"backbone": trunk(num_heads=4)},
            "backbone.num_heads",
            rf"num_heads=2, but the network has 4; set {place}\.backbone\.num_heads to 2",
        ),
        ({"backbone": trunk(depth=3)}, "backbone.depth", rf"{place}\.backbone\.depth to 2"),
    ):
        wrong = bert(**own) if kind == "bert" else gpt(**own)
        with pytest.raises(TrunklineError, match=message) as caught:
            TextClassifier(config(kind, "mean", **{kind: wrong}), init_from=path)
        assert caught.value.field == f"model.{place}.{end}"
    other = "gpt" if kind == "bert" else "bert"
    with pytest.raises(
        TrunklineError, match=rf"holds a {kind.upper()}; set network\.{kind} instead of network\.{other}"
    ) as caught:
        TextClassifier(config(other, "mean"), init_from=path)
    assert caught.value.field == "model.init_from"
    free = trunk(dropout=0.3)
    TextClassifier(
        config(kind, "mean", **{kind: bert(backbone=free) if kind == "bert" else gpt(backbone=free)}), init_from=path
    )


def test_a_task_starts_from_the_same_task(tmp_path: Path) -> None:
    first = TextClassifier(config("bert", "cls"), optimizer=QUICK)
    first.network.save_pretrained(tmp_path)
    second = TextClassifier(config("bert", "mean"), init_from=str(tmp_path))
    assert torch.equal(second.network.head.weight, first.network.head.weight)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"network": {"image_size": 3}}, "state_dict": {}}, tmp_path / "a.ckpt")
    torch.save({}, tmp_path / "b.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(
            TrunklineError, match=rf"init_from .*{name} holds weights of something else; give .* BERT or CLIP or GPT"
        ):
            TextClassifier(config("bert", "cls"), init_from=str(tmp_path / name))
