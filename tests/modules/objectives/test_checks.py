"""Sizes that a recipe states once, in its data: which a network takes, which it may keep, and which do not fit."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import trainer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader

from trunkline import TrunklineError
from trunkline.contract import DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    BERTConfig,
    CLIPConfig,
    EncoderDecoderConfig,
    GPTConfig,
    TextHeadConfig,
    ViTConfig,
)
from trunkline.modules.networks.companions import Companions
from trunkline.modules.objectives.arguments import as_plain
from trunkline.modules.objectives.base import TrunklineModule
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.checks import check_sizes, shared_words, with_sizes_of_data
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.text_classifier import TextClassifier

TRUNK = TransformerConfig(dim=16, depth=1, num_heads=2)
TEXT = DataFacts(vocab_size=12, max_length=9)
CLASSES, GREY = DataFacts(class_names=["a", "b", "c"]), DataFacts(channels=1)
PAIRS = DataFacts(vocab_size=12, max_length=9, target_vocab_size=14, max_target_length=7)
SHARED = dataclasses.replace(PAIRS, target_vocab_size=None)
IMAGES = DataFacts(image_size=32, channels=1, class_names=["a", "b", "c"])


def pairs(*sizes: Any) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(*sizes, encoder=TRUNK, decoder=TRUNK)


def vit(**sizes: Any) -> ViTConfig:
    return ViTConfig(patch_size=4, pool="mean", backbone=TRUNK, **sizes)


# --- what is left out


def test_a_network_takes_what_its_recipe_leaves_out() -> None:
    left_out = vit()
    assert with_sizes_of_data(left_out, IMAGES) == vit(image_size=32, in_chans=1, num_classes=3)
    assert left_out == vit()  # not changed in place
    for kind in (GPTConfig, BERTConfig):
        got = with_sizes_of_data(kind(backbone=TRUNK), TEXT)
        assert got == kind(12, 9, backbone=TRUNK)
    assert with_sizes_of_data(pairs(), PAIRS) == pairs(12, 14, 9, 7)
    assert with_sizes_of_data(pairs(), SHARED) == pairs(12, None, 9, 7)


def test_what_the_data_does_not_know_stays() -> None:
    for config in (vit(), vit(num_classes=7), GPTConfig(), CLIPConfig(bert=BERTConfig()), TextHeadConfig(GPTConfig())):  # type: ignore[arg-type]
        assert with_sizes_of_data(config, DataFacts()) == config
    assert with_sizes_of_data(vit(), DataFacts(channels=1)) == vit(in_chans=1)


# --- what is stated


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (vit(image_size=32, in_chans=1, num_classes=3), IMAGES),  # equal
        (vit(image_size=(32, 32), in_chans=1, num_classes=3), IMAGES),
        (vit(image_size=32), DataFacts(image_size=(32, 32))),
        (vit(image_size=(32, 16)), DataFacts(image_size=(32, 16))),
        (GPTConfig(12, 9), TEXT),
        (GPTConfig(64, 100), TEXT),  # larger
        (BERTConfig(13, 9), TEXT),
        (pairs(12, 14, 9, 7), PAIRS),
        (pairs(13, 15, 10, 8), PAIRS),
        (pairs(13, 15, 10, 8), SHARED),
        (TextHeadConfig(bert=BERTConfig(64, 9), num_outputs=3), dataclasses.replace(TEXT, class_names=["a", "b", "c"])),
    ],
)
def test_what_is_stated_and_fits_is_kept(config: Any, facts: DataFacts) -> None:
    assert with_sizes_of_data(config, facts) == config
    check_sizes(config, facts)


@pytest.mark.parametrize(
    ("config", "facts", "place", "needed"),
    [
        (GPTConfig(11, 9), TEXT, "vocab_size", "at least 12"),
        (BERTConfig(12, 8), TEXT, "max_length", "at least 9"),
        (pairs(12, 13, 9, 7), PAIRS, "target_vocab_size", "at least 14"),
        (pairs(12, 14, 9, 6), PAIRS, "max_target_length", "at least 7"),
        (vit(num_classes=2), CLASSES, "num_classes", "3"),
        (vit(num_classes=4), CLASSES, "num_classes", "3"),  # no class may be left over
        (vit(in_chans=4), GREY, "in_chans", "1"),
        (vit(image_size=64), DataFacts(image_size=32), "image_size", "32"),
        (vit(image_size=(32, 16)), DataFacts(image_size=32), "image_size", "32"),
        (vit(image_size=32), DataFacts(image_size=(16, 32)), "image_size", "(16, 32)"),
        (TextHeadConfig(gpt=GPTConfig(11), pool="last"), TEXT, "gpt.vocab_size", "at least 12"),
        (TextHeadConfig(bert=BERTConfig(), num_outputs=4), DataFacts(class_names=["a", "b"]), "num_outputs", "2"),
        (CLIPConfig(vit(in_chans=2), bert=BERTConfig()), GREY, "image.in_chans", "1"),
        (CLIPConfig(vit(), gpt=GPTConfig(12, 8)), TEXT, "gpt.max_length", "at least 9"),
    ],
)
def test_what_is_stated_and_does_not_fit(config: Any, facts: DataFacts, place: str, needed: str) -> None:
    name, own = place.rpartition(".")[2], config
    for part in place.split("."):
        own = getattr(own, part)
    number = needed.removeprefix("at least ")
    message = (
        f"the network has {name}={own}, but the data needs {needed}; leave {name} out of the network, which then takes "
        f"the data's, or set it to {number}"
    )
    for compare in (with_sizes_of_data, check_sizes):
        with pytest.raises(TrunklineError, match=f"^{re.escape(message)}$") as caught:
            compare(config, facts)
        assert caught.value.field == f"model.network.{place}"


def test_a_network_without_a_table_of_its_own_for_targets() -> None:
    with pytest.raises(TrunklineError, match="the network has target_vocab_size=None, but the data needs at least 14"):
        check_sizes(pairs(12, None, 9, 7), PAIRS)


# --- networks in networks


def test_towers_of_a_clip_take_what_is_theirs() -> None:
    facts = DataFacts(vocab_size=12, max_length=9, image_size=(32, 16), channels=1)
    got = with_sizes_of_data(CLIPConfig(vit(), gpt=GPTConfig(backbone=TRUNK), dim=8), facts)
    assert got == CLIPConfig(vit(image_size=(32, 16), in_chans=1), gpt=GPTConfig(12, 9, backbone=TRUNK), dim=8)
    got = with_sizes_of_data(CLIPConfig(vit(in_chans=1), bert=BERTConfig(20, backbone=TRUNK), dim=8), facts)
    assert got.bert == BERTConfig(20, 9, backbone=TRUNK)
    assert got.gpt is None
    assert got.dim == 8


def test_a_body_and_the_outputs_on_it_take_what_is_theirs() -> None:
    facts = dataclasses.replace(TEXT, class_names=["a", "b", "c"])
    got = with_sizes_of_data(TextHeadConfig(bert=BERTConfig(backbone=TRUNK), dropout=0.2), facts)
    assert got == TextHeadConfig(bert=BERTConfig(12, 9, backbone=TRUNK), num_outputs=3, dropout=0.2)


def test_a_trunk_knows_no_data() -> None:
    """Even where a field of it has the name of a size."""

    @dataclasses.dataclass
    class Trunk(TransformerConfig):
        max_length: int = 100

    config = GPTConfig(backbone=Trunk(dim=16, depth=1, num_heads=2, causal=True))
    assert with_sizes_of_data(config, TEXT) == dataclasses.replace(config, vocab_size=12, max_length=9)
    check_sizes(dataclasses.replace(config, vocab_size=12, max_length=9), DataFacts(max_length=9))


# --- weights to start from


def test_left_out_sizes_are_those_of_the_weights_to_start_from() -> None:
    source = GPTConfig(16, 20)
    assert with_sizes_of_data(GPTConfig(backbone=TRUNK), TEXT, source) == GPTConfig(16, 20, backbone=TRUNK)
    assert with_sizes_of_data(GPTConfig(backbone=TRUNK), DataFacts(), source) == GPTConfig(16, 20, backbone=TRUNK)
    assert with_sizes_of_data(GPTConfig(14, 10), TEXT, source) == GPTConfig(14, 10)  # stated
    # Other sizes are the data's: such weights are adapted.
    got = with_sizes_of_data(vit(), IMAGES, vit(image_size=64, in_chans=3, num_classes=10))
    assert got == vit(image_size=32, in_chans=1, num_classes=3)


@pytest.mark.parametrize(
    ("name", "source", "message", "field"),
    [
        ("vocab_size", GPTConfig(11, 9), "=11, but the data needs at least 12; take their tokenizer", "data.tokenizer"),
        (
            "max_length",
            GPTConfig(12, 8),
            "=8, but the data needs at least 9; set the data's max_length to at most 8, or state max_length in the "
            "network, whose positions are then resized",
            "data.max_length",
        ),
    ],
)
def test_weights_that_are_too_small_for_the_data(name: str, source: GPTConfig, message: str, field: str) -> None:
    with pytest.raises(TrunklineError, match=f"^the weights to start from have {name}{message}$") as caught:
        with_sizes_of_data(GPTConfig(backbone=TRUNK), TEXT, source)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("source", "message", "field"),
    [
        (
            pairs(12, 13, 9, 7),
            "target_vocab_size=13, but the data needs at least 14; take their tokenizer of the targets",
            "data.target_tokenizer",
        ),
        (
            pairs(12, 14, 9, 6),
            "max_target_length=6, but the data needs at least 7; set the data's max_target_length to at most 6",
            "data.max_target_length",
        ),
    ],
)
def test_weights_that_are_too_small_for_the_targets(source: EncoderDecoderConfig, message: str, field: str) -> None:
    with pytest.raises(TrunklineError, match=message) as caught:
        with_sizes_of_data(pairs(), PAIRS, source)
    assert caught.value.field == field
    assert with_sizes_of_data(pairs(), PAIRS, pairs(20, 21, 22, 23)) == pairs(20, 21, 22, 23)


def saved(objective: TrunklineModule, folder: Path, kind: str) -> str:
    """As a checkpoint of a run, or by `save_pretrained`."""
    if kind == "folder":
        objective.network.save_pretrained(folder / "network")
        return str(folder / "network")
    run = trainer(folder, max_steps=0)
    run.fit(objective, DataLoader([{}]))  # type: ignore[arg-type]
    run.save_checkpoint(folder / "a.ckpt")
    return str(folder / "a.ckpt")


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
@pytest.mark.parametrize("source", ["MaskedLM", "CausalLM", "TextClassifier"])
def test_a_task_has_the_vocabulary_and_the_row_length_of_its_body(source: str, kind: str, tmp_path: Path) -> None:
    body: Any = BERTConfig(16, 20, backbone=TRUNK) if source != "CausalLM" else GPTConfig(16, 20, backbone=TRUNK)
    kinds: dict[str, Any] = {"MaskedLM": MaskedLM, "CausalLM": CausalLM}
    trained = TextClassifier(TextHeadConfig(bert=body)) if source == "TextClassifier" else kinds[source](body)
    name = saved(trained, tmp_path, kind)
    left_out = {"gpt": GPTConfig(backbone=TRUNK)} if source == "CausalLM" else {"bert": BERTConfig(backbone=TRUNK)}
    network = TextHeadConfig(**left_out, pool="mean")  # type: ignore[arg-type]
    facts = dataclasses.replace(TEXT, class_names=["a", "b", "c"])
    made = TextClassifier(network, init_from=name, facts=facts).network
    assert (made.config.body.vocab_size, made.config.body.max_length, made.config.num_outputs) == (16, 20, 3)
    origin = trained.network.body if source == "TextClassifier" else trained.network  # type: ignore[union-attr]
    torch.testing.assert_close(made.body.token_embed.weight, origin.token_embed.weight, rtol=0, atol=0)
    with pytest.raises(TrunklineError, match="have vocab_size=16, but the data needs at least 17"):
        TextClassifier(network, init_from=name, facts=DataFacts(vocab_size=17))


def test_a_text_tower_has_the_sizes_of_what_it_starts_from(tmp_path: Path) -> None:
    name = saved(MaskedLM(BERTConfig(16, 20, backbone=TRUNK)), tmp_path, "folder")
    network = CLIPConfig(image=vit(), bert=BERTConfig(backbone=TRUNK), dim=4)
    made = ContrastiveImageText(
        network, init_text_from=name, facts=dataclasses.replace(TEXT, image_size=32, channels=1)
    )
    assert made.network.config.bert == BERTConfig(16, 20, backbone=TRUNK)
    assert (made.network.config.image.image_size, made.network.config.image.in_chans) == (32, 1)


def test_sizes_of_the_data_are_in_the_checkpoint() -> None:
    """Who loads it has no data to ask."""
    made = ImageClassifier(vit(), facts=dataclasses.replace(IMAGES, image_size=(32, 16)))
    plain = json.loads(json.dumps(as_plain(made.hparams)))
    again = ImageClassifier(**plain)
    assert again.network.config == made.network.config == vit(image_size=(32, 16), in_chans=1, num_classes=3)
    assert "facts" not in plain


# --- tokenizers


def test_tokenizers_of_both_sides_are_those_of_the_weights_to_start_from() -> None:
    first, second, third = (Tokenizer(models.WordLevel({word: 0}, unk_token=word)) for word in "abc")

    def check(facts: DataFacts, *, own: Tokenizer = first, target: Tokenizer | None = second) -> None:
        state = {"tokenizer": own.to_str(), "target_tokenizer": None if target is None else target.to_str()}
        shared_words(
            Companions.of_checkpoint({"state_dict": {}, "SomeData": state}, "a.ckpt"), "init_from", "a.ckpt", facts
        )

    two = DataFacts(tokenizer=first, target_tokenizer=second, max_target_length=5)
    one = DataFacts(tokenizer=first, max_target_length=5)
    check(two)
    check(one, target=None)
    check(DataFacts(tokenizer=first))  # reads sources alone
    check(one, target=first)
    for facts, trained, field in (
        (two, {"target": third}, "target_tokenizer"),
        (two, {"target": None}, "target_tokenizer"),
        (one, {}, "target_tokenizer"),
        (two, {"own": third}, "tokenizer"),
        (DataFacts(tokenizer=second), {}, "tokenizer"),
    ):
        with pytest.raises(TrunklineError, match=f"with another {field} than the data's") as caught:
            check(facts, **trained)
        assert caught.value.field == f"data.{field}"
