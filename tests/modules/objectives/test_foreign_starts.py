"""`init_from` of folders of other libraries, and of networks of which only a part fits."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from parity import assert_near, randomise
from timm.models import save_for_hf
from tokenizers import Tokenizer, models

from trunkline import TrunklineError, load
from trunkline.contract import DataFacts
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import (
    AST,
    CLIP,
    GPT,
    ASTConfig,
    BERTConfig,
    CLIPConfig,
    EncoderDecoderConfig,
    GPTConfig,
    SpeechEncoderConfig,
    TextHeadConfig,
    ViTConfig,
    WhisperConfig,
)
from trunkline.modules.networks.encoder_decoder import transformer_base
from trunkline.modules.networks.whisper import whisper_tiny
from trunkline.modules.objectives.causal_lm import CausalLM
from trunkline.modules.objectives.contrastive_image_text import ContrastiveImageText
from trunkline.modules.objectives.image_classifier import ImageClassifier
from trunkline.modules.objectives.masked_lm import MaskedLM
from trunkline.modules.objectives.question_answering import QuestionAnswering
from trunkline.modules.objectives.seq2seq import Seq2Seq
from trunkline.modules.objectives.speech_recognizer import SpeechRecognizer
from trunkline.modules.objectives.speech_to_text import SpeechToText
from trunkline.modules.objectives.text_classifier import TextClassifier
from trunkline.modules.objectives.token_classifier import TokenClassifier

WORDS = ["[CLS]", "a", "b", "c", "d", "e"]
ROOM = 8
"""Rows of the foreign embeddings, of which two are no token's."""
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {**VISION, "image_size": 16, "patch_size": 8}
TEXT = {**VISION, "vocab_size": ROOM, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 5}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": ROOM, "n_positions": 6}
T5 = {"vocab_size": ROOM, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
TRUNK = TransformerConfig(dim=16, depth=2, num_heads=2, mlp_dim=24)
IMAGES = DataFacts(image_size=16, channels=3, class_names=["x", "y", "z"])


def tokenizer(words: list[str] = WORDS) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))


def texts(words: list[str] = WORDS, **others: Any) -> DataFacts:
    return DataFacts(**{"tokenizer": tokenizer(words), "vocab_size": len(words), "max_length": 6, **others})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models; those of texts have their tokenizer beside them."""
    place = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    clip = hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8)
    bert = {**VISION, "vocab_size": ROOM, "max_position_embeddings": 6}
    peers = {
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        "bert": hf.BertForMaskedLM(hf.BertConfig(**bert)),
        "vit": hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, num_labels=5)),
        "clip": hf.CLIPModel(clip),
        "t5": hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    }
    for name, peer in peers.items():
        randomise(peer, 0.1).save_pretrained(place / name)
        if name in ("gpt2", "bert", "t5"):
            tokenizer().save(str(place / name / "tokenizer.json"))
    options = {"depth": 2, "embed_dim": 16, "img_size": 16, "patch_size": 8, "num_classes": 5, "num_heads": 2}
    peer = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)
    save_for_hf(randomise(peer, 0.1), str(place / "timm"), model_args=options, safe_serialization=True)
    return place


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The line about the last start."""
    return [record.getMessage() for record in caplog.records if "init_" in record.getMessage()][-1]


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def same(network: Any, source: Any, changed: tuple[str, ...] = ()) -> None:
    """All weights but those whose names begin like this are equal."""
    trained = source.state_dict()
    for name, value in network.state_dict().items():
        if not name.startswith(changed):
            torch.testing.assert_close(value, trained[name], rtol=0, atol=0)


# --- whole networks


@pytest.mark.parametrize("library", ["vit", "timm", "timm/model.safetensors"])
def test_images(library: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, source = str(folder / library), load(folder / library)
    made = ImageClassifier(ViTConfig(), init_from=name, facts=IMAGES).network
    same(made, source, ("head",))
    assert made.head.weight.shape == (3, 16)
    count = sum(p.numel() for n, p in source.named_parameters() if not n.startswith("head"))
    assert said(caplog) == (
        f"init_from {name}: {len(list(source.parameters())) - 2} weights ({count:,} parameters) of ViT; new: head"
    )
    facts = DataFacts(image_size=(16, 12), channels=1, class_names=list("vwxyz"))
    made = ImageClassifier(ViTConfig(patch_size=4), init_from=name, facts=facts).network
    assert said(caplog).endswith("of ViT; resized: positions 2x2 to 4x3, patches 8 to 4, channels 3 to 1")
    source.resize((16, 12), 4, 1)
    image = torch.randn(2, 1, 16, 12)
    assert_near(made.eval()(image), source(image))


@pytest.mark.parametrize("objective", [CausalLM, MaskedLM])
def test_language_models(objective: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = str(folder / ("gpt2" if objective is CausalLM else "bert"))
    config: Any = GPTConfig if objective is CausalLM else BERTConfig
    made, source = objective(config(), init_from=name, facts=texts()).network, load(name)
    assert made.config.vocab_size == ROOM  # the rows that no token has stay
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert_near(made.eval()(tokens), source(tokens))
    assert "resized" not in said(caplog)
    assert "new" not in said(caplog)
    facts = texts(max_length=9)
    with pytest.raises(TrunklineError, match="or state max_length in the network, whose positions"):
        objective(config(), init_from=name, facts=facts)
    made = objective(config(max_length=9), init_from=name, facts=facts).network
    assert said(caplog).endswith("; resized: positions 6 to 9")
    assert_near(made.eval()(tokens), source(tokens))
    assert torch.equal(made.pos_embed.weight[6:], source.pos_embed.weight[:3])


def test_longer_texts_with_rotary_positions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They need no new weights, but the network has not learned them."""
    trunk = TransformerConfig(dim=16, depth=1, num_heads=2, causal=True, rope_theta=1e4)
    source = GPT(GPTConfig(ROOM, 6, positions="none", backbone=trunk))
    source.save_pretrained(tmp_path)
    config = GPTConfig(max_length=9, positions="none")
    made = CausalLM(config, init_from=str(tmp_path), facts=texts(max_length=9)).network
    same(made, source)
    assert said(caplog).endswith("; resized: rotary positions 6 to 9, the new ones untrained")
    CausalLM(GPTConfig(positions="none"), init_from=str(tmp_path), facts=texts())
    assert "resized" not in said(caplog)


def test_a_classifier_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It goes on as a classifier, with the layer before its output; as something else, its body starts that."""
    sizes = {"vocab_size": ROOM, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=6, num_labels=4)
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path)
    source, name = load(tmp_path), str(tmp_path)
    made = TextClassifier(TextHeadConfig(bert=BERTConfig()), init_from=name, facts=texts()).network
    same(made, source, ("head",))
    assert made.config.hidden == "tanh"
    assert said(caplog).endswith("new: head")  # of another number of classes
    made = TokenClassifier(TextHeadConfig(bert=BERTConfig(), pool="none"), init_from=name, facts=texts()).network
    same(made.body, source.body)


@pytest.mark.parametrize("objective", [TextClassifier, TokenClassifier, QuestionAnswering])
@pytest.mark.parametrize("body", ["bert", "gpt2", "clip"])
def test_tasks_on_texts(objective: Any, body: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind: Any = {"bert": BERTConfig()} if body == "bert" else {"gpt": GPTConfig()}
    pool = "mean" if objective is TextClassifier else "none"
    made = objective(TextHeadConfig(**kind, pool=pool), init_from=str(folder / body), facts=texts()).network
    source = load(folder / body)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5]])
    read = source.text.body if body == "clip" else source
    assert_near(made.eval().body.forward_features(tokens).x, read.forward_features(tokens).x)
    part = {"clip": "text.body of CLIP", "bert": "BERT", "gpt2": "GPT"}[body]
    assert said(caplog).endswith(f"of {part} for the body; new: head")


def test_pairs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = DataFacts(image_size=24, channels=3, vocab_size=ROOM, max_length=4)
    network = CLIPConfig(gpt=GPTConfig(max_length=4), dim=8)
    facts.stated = ["model.network.gpt.max_length"]
    made = ContrastiveImageText(network, init_from=str(folder / "clip"), facts=facts).network
    source = load(folder / "clip")
    assert said(caplog).endswith("of CLIP; resized: positions 2x2 to 3x3, positions 6 to 4 of texts")
    tokens = torch.tensor([[0, 1, 2, 5]])
    assert_near(made.eval().encode_text(tokens), source.encode_text(tokens))
    facts.stated = []
    towers: Any = {"init_image_from": str(folder / "vit"), "init_text_from": str(folder / "clip")}
    made = ContrastiveImageText(CLIPConfig(gpt=GPTConfig(), dim=4), **towers, facts=facts).network
    assert said(caplog).startswith("init_text_from")
    same(made.text.body, source.text.body)
    same(made.image.backbone, load(folder / "vit").backbone)
    made = ContrastiveImageText(
        CLIPConfig(gpt=GPTConfig(), dim=4), init_image_from=str(folder / "clip"), facts=facts
    ).network
    same(made.image, source.image, ("head", "pos_embed"))


def test_an_encoder_decoder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = texts(max_target_length=6)
    made = Seq2Seq(EncoderDecoderConfig(positions="relative"), init_from=str(folder / "t5"), facts=facts, scores=[])
    source, tokens = load(folder / "t5"), torch.tensor([[1, 2, 3, 4]])
    assert_near(made.network.eval()(tokens, tokens), source(tokens, tokens))
    assert said(caplog).rpartition("; ")[2].endswith("of EncoderDecoder")


# --- a part of a network


def test_an_image_tower_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its projection is no classifier, although there are as many classes as outputs."""
    source = load(folder / "clip")
    facts = DataFacts(image_size=16, channels=3, class_names=list("abcdefgh"))
    made = ImageClassifier(ViTConfig(), init_from=str(folder / "clip"), facts=facts).network
    same(made, source.image, ("head",))
    assert made.head.weight.shape == source.image.head.weight.shape
    assert not made.head.weight.any()
    assert said(caplog).endswith("of image of CLIP; new: head")


def test_a_text_tower_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = CausalLM(GPTConfig(), init_from=str(folder / "clip"), facts=DataFacts(vocab_size=ROOM, max_length=6)).network
    same(made, load(folder / "clip").text.body, ("head",))
    assert made.head.weight is made.token_embed.weight
    assert said(caplog).endswith("of text.body of CLIP")  # the output is the embedding, so nothing is new
    with pytest.raises(TrunklineError, match=r"holds a CLIP with another text\.body than a BERT; give weights"):
        MaskedLM(BERTConfig(), init_from=str(folder / "clip"))


@pytest.mark.parametrize(("source", "part"), [("bert", "encoder"), ("gpt2", "decoder")])
def test_one_trunk_of_an_encoder_decoder(
    source: str, part: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Words and positions are the data's own: another tokenizer than that of the weights is no fault."""
    own = TransformerConfig(dim=16, depth=1, num_heads=2)
    other = "decoder" if part == "encoder" else "encoder"
    config = EncoderDecoderConfig(**{part: replace(transformer_base(), dim=16), other: own})
    facts = texts(["x", "y", "z"], max_target_length=6)
    model = Seq2Seq(config, init_from=str(folder / source), facts=facts, scores=[])
    trunk, trained = getattr(model.network, part), load(folder / source).backbone
    same(trunk, trained, tuple(f"blocks.{n}.{name}" for n in range(2) for name in ("cross_attn", "norm_cross")))
    assert model.network.token_embed.weight.shape == (3, 16)
    kind = "BERT" if source == "bert" else "GPT"
    assert f"of backbone of {kind} for the {part}; new: token_embed" in said(caplog)
    if part == "decoder":
        assert said(caplog).endswith("encoder, decoder.blocks.*.norm_cross, decoder.blocks.*.cross_attn, head")
    wrong = TransformerConfig(**{**vars(trained.config), "num_heads": 4})
    with pytest.raises(TrunklineError, match=rf"num_heads=2, but the network has 4; set network.{part}.num_heads to 2"):
        Seq2Seq(EncoderDecoderConfig(**{part: wrong, other: own}), init_from=str(folder / source), scores=[])


def test_trunks_that_hear(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard = AST(ASTConfig(16, 32, 8, 8, backbone=TRUNK))
    randomise(heard).save_pretrained(tmp_path / "ast")
    config = SpeechEncoderConfig(5, 16, 32)
    made = SpeechRecognizer(config, init_from=str(tmp_path / "ast"))
    same(made.network.backbone, heard.backbone)
    assert said(caplog).endswith("of backbone of AST for the backbone; new: front, head")
    made.network.save_pretrained(tmp_path / "ctc")
    decoder, encoder = TransformerConfig(dim=16, depth=1, num_heads=2), replace(whisper_tiny(), dim=16, num_heads=2)
    whisper = WhisperConfig(5, 16, 32, 6, encoder=encoder, decoder=decoder)
    written = SpeechToText(whisper, init_from=str(tmp_path / "ctc"), scores=[]).network
    same(written.encoder, heard.backbone)
    written.save_pretrained(tmp_path / "whisper")
    same(SpeechRecognizer(config, init_from=str(tmp_path / "whisper")).network.backbone, heard.backbone)


# --- words


def test_another_tokenizer_beside_the_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of equal size, which no shape tells."""
    name, shuffled = str(folder / "gpt2"), ["[CLS]", "e", "d", "c", "b", "new"]
    message = (
        rf"^init_from {name} was trained with another tokenizer .*init_vocabulary to matched.* the 5 of .* 6 tokens"
    )
    with pytest.raises(TrunklineError, match=message) as caught:
        CausalLM(GPTConfig(), init_from=name, facts=texts(shuffled))
    assert caught.value.field == "data.tokenizer"
    model = CausalLM(GPTConfig(), init_from=name, init_vocabulary="matched", facts=texts(shuffled))
    assert said(caplog).endswith("; resized: vocabulary 8 to 6 (5 of 6 tokens known)")
    trained, own = load(folder / "gpt2").token_embed.weight, model.network.token_embed.weight
    torch.testing.assert_close(own, torch.stack([*trained[[0, 5, 4, 3, 2]], trained[:6].mean(0)]))
    assert model.hparams["init_vocabulary"] == "matched"
    with pytest.warns(UserWarning, match="knows only 1 of the data's 4 tokens"):
        CausalLM(GPTConfig(), init_from=name, init_vocabulary="matched", facts=texts(["a", "x", "y", "z"]))


def test_added_tokens_need_no_other_flag(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    added = [*WORDS, "f", "g", "h", "i"]
    model = MaskedLM(BERTConfig(), init_from=str(folder / "bert"), facts=texts(added))
    assert said(caplog).endswith("; resized: vocabulary 8 to 10")
    assert torch.equal(model.network.token_embed.weight[:8], load(folder / "bert").token_embed.weight)


def test_data_that_comes_later_is_compared_before_the_first_step(folder: Path) -> None:
    model = CausalLM(GPTConfig(), init_from=str(folder / "gpt2"))
    for words, fits in ((WORDS, True), (WORDS[::-1], False)):
        data = SimpleNamespace(facts=texts(words))
        model.trainer = SimpleNamespace(datamodule=data, strategy=None)  # type: ignore[assignment]
        if fits:
            model.setup("fit")
            continue
        with pytest.raises(TrunklineError, match="another tokenizer than the data's"):
            model.setup("fit")


def test_a_tokenizer_that_is_too_large_for_its_weights(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer([*WORDS, "f", "g", "h"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        TrunklineError, match=r"has 9 tokens, but the network's embedding only 8 rows \(.*tokenizer.json"
    ):
        assert load(tmp_path).tokenizer
    with pytest.raises(TrunklineError, match=r"has 9 tokens, but its token_embed\.weight only 8 rows"):
        CausalLM(GPTConfig(), init_from=str(tmp_path), facts=texts())


# --- what does not fit


@pytest.mark.parametrize(
    ("objective", "config", "source", "message"),
    [
        (ImageClassifier, ViTConfig(), "gpt2", "holds a GPT; give a checkpoint or a folder of ViT or CLIP"),
        (CausalLM, GPTConfig(), "bert", "holds a BERT; give a checkpoint or a folder of GPT or CLIP or TextHead"),
        (MaskedLM, BERTConfig(), "t5", "holds an EncoderDecoder; give .* BERT or CLIP or TextHead"),
        (TextClassifier, TextHeadConfig(bert=BERTConfig()), "gpt2", r"holds a GPT; set network\.gpt instead of"),
        (Seq2Seq, EncoderDecoderConfig(), "vit", "holds a ViT; give a checkpoint or a folder of EncoderDecoder"),
    ],
)
def test_another_family(objective: Any, config: Any, source: str, message: str, folder: Path) -> None:
    with pytest.raises(TrunklineError, match=rf"^init_from .*{source} {message}") as caught:
        objective(config, init_from=str(folder / source))
    assert caught.value.field == "model.init_from"


def test_shapes_are_strict(folder: Path, tmp_path: Path) -> None:
    wide = GPTConfig(backbone=TransformerConfig(dim=32, depth=2, num_heads=2))
    facts = texts(stated=["model.network.backbone.dim"])
    with pytest.raises(TrunklineError, match=r"token_embed\.weight is \(8, 16\) there and \(8, 32\) here.*dim to 16"):
        CausalLM(wide, init_from=str(folder / "gpt2"), facts=facts)
    for file in (folder / "vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "intermediate_size": 28}))
    with pytest.raises(TrunklineError, match=r"is \(24, 16\) there and \(28, 16\) here"):
        ImageClassifier(ViTConfig(), init_from=str(tmp_path), facts=IMAGES)


def test_a_clip_of_ours_has_a_bert_too(tmp_path: Path) -> None:
    image = ViTConfig(16, 8, backbone=TRUNK)
    source = CLIP(CLIPConfig(image, bert=BERTConfig(ROOM, 6, backbone=TRUNK), dim=4))
    source.save_pretrained(tmp_path)
    same(MaskedLM(BERTConfig(), init_from=str(tmp_path)).network, source.text.body, ("masked_head", "head"))
