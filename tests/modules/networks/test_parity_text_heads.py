"""Classifiers, taggers and question answering of transformers become a TextHead and go back, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_near, padded_texts, random_peer, randomise
from safetensors.torch import load_file, save_file
from test_parity_encoders import OF_DISTILBERT, OF_ROBERTA, SIZES
from torch import Tensor
from travels import arrive, go_back, gradients

import trunkline
from trunkline import TrunklineError
from trunkline.modules.networks import BERT, BERTConfig, GPTConfig, TextHead, TextHeadConfig
from trunkline.modules.networks.bert import bert_trunk
from trunkline.modules.networks.convert.families import foreign_family, save_foreign

NAMES = {0: "bad", 1: "so so", 2: "good"}
TASKS: dict[str, dict[str, Any]] = {
    "SequenceClassification": {"id2label": NAMES},
    "TokenClassification": {"id2label": NAMES},
    "QuestionAnswering": {"num_labels": 2},
}
BODIES = {"Bert": SIZES, "Roberta": OF_ROBERTA, "DistilBert": OF_DISTILBERT}
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    f"{kind.lower()}-{task}": (getattr(hf, f"{kind}For{task}"), sizes | labels)
    for kind, sizes in BODIES.items()
    for task, labels in TASKS.items()
}


def make_peer(name: str) -> Any:
    return random_peer(*PEERS[name])


def texts(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two texts of 13 tokens, the second padded: inputs of theirs and of ours."""
    tokens, mask = padded_texts(1 if name.startswith("roberta") else 0)
    theirs, ours = {"input_ids": tokens, "attention_mask": mask.long()}, {"tokens": tokens, "mask": mask}
    if name.startswith("bert"):
        segment = (torch.arange(13) > 6).long().expand(2, 13)
        return theirs | {"token_type_ids": segment}, ours | {"segment": segment}
    return theirs, ours


def outputs(peer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(2, K), or (2, 13, K)."""
    found = peer(**inputs)
    return torch.stack([found.start_logits, found.end_logits], -1) if "start_logits" in found else found.logits


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    network = arrive(peer, TextHead, tmp_path)
    again = go_back(network, peer, tmp_path)
    theirs, ours = texts(name)
    with torch.no_grad():
        want = outputs(peer, theirs)
        assert 0.1 < want.std() < 20
        read = slice(None) if "Sequence" in name else ours["mask"]
        assert_near(network(**ours)[read], want[read])
        assert torch.equal(outputs(again, theirs), want)
    names = None if "Question" in name else list(NAMES.values())
    assert trunkline.load(tmp_path / "theirs").companions.class_names == names
    assert again.config.id2label == peer.config.id2label
    assert again.config.architectures == [type(peer).__name__]


@pytest.mark.parametrize("name", [name for name in PEERS if "Sequence" in name])
def test_gradients(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    network = arrive(peer, TextHead, tmp_path)
    theirs, ours = texts(name)
    labels = torch.tensor([2, 0])
    found = gradients(peer, F.cross_entropy(outputs(peer, theirs), labels))
    content = json.loads((tmp_path / "theirs/config.json").read_text())
    want = foreign_family(content, "").weights_from(found, network.config)
    got = gradients(network, F.cross_entropy(network(**ours), labels))
    assert len(got) == len(list(network.parameters()))
    padding = 1 if name.startswith("roberta") else 0  # theirs gives the embedding of padding no gradient there
    for key, value in got.items():
        rows = torch.arange(len(value)) != padding if key.endswith(("token_embed.weight", "pos_embed.weight")) else ...
        assert_near(value[rows], want[key][rows], 1e-4)


def test_a_pooler_that_nothing_reads(tmp_path: Path) -> None:
    """Older files of taggers have one; transformers leaves it out too."""
    peer = make_peer("bert-TokenClassification")
    peer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {"bert.pooler.dense.weight": torch.ones(32, 32)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    theirs, ours = texts("bert-TokenClassification")
    with torch.no_grad():
        want = outputs(peer, theirs)
        assert_near(TextHead.from_pretrained(tmp_path).eval()(**ours)[ours["mask"]], want[ours["mask"]])


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write_sentences(folder: Path, modules: Any = MODULES, **pooling: Any) -> Any:
    """A BERT of transformers, and beside it the files of sentence-transformers as their library writes them."""
    torch.manual_seed(0)
    peer = randomise(hf.BertModel(hf.BertConfig(**SIZES)).eval(), 0.1)
    peer.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "lasttoken"), False) | {"include_prompt": True}
    content = {f"pooling_mode_{mode}" if mode != "include_prompt" else mode: value for mode, value in modes.items()}
    content |= {"word_embedding_dimension": 32, **pooling}
    (folder / "1_Pooling/config.json").write_text(json.dumps(content))
    return peer


@pytest.mark.parametrize("pool", ["cls_token", "mean_tokens", "lasttoken"])
def test_sentence_transformers(pool: str, tmp_path: Path) -> None:
    normalise = pool != "cls_token"
    peer = write_sentences(tmp_path, MODULES[: 2 + normalise], **{f"pooling_mode_{pool}": True})
    network = trunkline.load(tmp_path)
    assert isinstance(network, TextHead)
    theirs, ours = texts("bert")
    with torch.no_grad():
        states = peer(**theirs).last_hidden_state
        rows = [state[kept] for state, kept in zip(states, ours["mask"], strict=True)]  # without padding
        kinds = {
            "cls_token": lambda row: row[0],
            "mean_tokens": lambda row: row.mean(0),
            "lasttoken": lambda row: row[-1],
        }
        want = torch.stack([kinds[pool](row) for row in rows])
        assert_near(network(**ours), want / want.norm(dim=1, keepdim=True) if normalise else want)
        assert_near(BERT.from_pretrained(tmp_path).eval()(**ours)[ours["mask"]], states[ours["mask"]])
    network.save_pretrained(tmp_path / "ours")
    assert torch.equal(trunkline.load(tmp_path / "ours")(**ours), network(**ours))


DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([*MODULES[:2], DENSE], {"pooling_mode_mean_tokens": True}, "Transformer, Pooling, Dense, but a TextHead has"),
        (MODULES, {"pooling_mode_max_tokens": True}, "asks for max_tokens, but"),
        (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls_token and mean_tokens, but"),
        (MODULES, {}, "asks for no pooling, but"),
        ({"0": "Transformer"}, {}, "does not list the parts of a model"),
        ([], {}, "names as parts nothing, but a TextHead has"),
        (MODULES, {"pooling_mode": ["mean"]}, r"asks for \['mean'\], but"),
        ([MODULES[0], {**MODULES[1], "path": "../elsewhere"}], {}, "names a part outside its folder"),
        ([MODULES[0], {**MODULES[1], "path": "2_Pooling"}], {}, "cannot read .*2_Pooling"),
    ],
)
def test_sentence_transformers_that_we_have_not(modules: Any, pooling: Any, message: str, tmp_path: Path) -> None:
    write_sentences(tmp_path, modules, **pooling)
    with pytest.raises(TrunklineError, match=message):
        trunkline.load(tmp_path)


def test_a_pooling_that_is_no_object(tmp_path: Path) -> None:
    write_sentences(tmp_path)
    (tmp_path / "1_Pooling/config.json").write_text("[]")
    with pytest.raises(TrunklineError, match=r"1_Pooling/config\.json does not say how tokens are pooled"):
        trunkline.load(tmp_path)


@pytest.mark.parametrize("labels", [["cat", "dog", "cow"], {"cat": 0, "dog": 1, "cow": 2}])
def test_names_that_are_no_names(labels: Any, tmp_path: Path) -> None:
    make_peer("bert-SequenceClassification").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": labels}))
    with pytest.raises(TrunklineError, match=r"id2label that does not map numbers to names, as \{"):
        trunkline.load(tmp_path)


def test_a_body_of_a_classifier(tmp_path: Path) -> None:
    make_peer("bert-SequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(TrunklineError, match="describes a TextHead, not a BERT; load it with TextHead"):
        BERT.from_pretrained(tmp_path)


def head(**options: Any) -> TextHead:
    body = BERTConfig(50, 16, backbone=replace(bert_trunk(), dim=32, depth=2, num_heads=4))
    return TextHead(TextHeadConfig(**{"bert": body, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a TextHead with hidden=none cannot become a BertForSequenceClassification, which has hidden=tanh"),
        ({"hidden": "relu"}, "hidden=relu cannot become a BertForSequenceClassification, which has hidden=tanh"),
        ({"hidden": "tanh", "pool": "mean"}, "pool=mean cannot become a BertForSequenceClassification"),
        ({"bert": None, "gpt": GPTConfig(50, 16), "pool": "last"}, "on a GPT cannot become a BertForSequence"),
    ],
)
def test_a_network_that_no_other_can_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=message):
        save_foreign(head(**options), tmp_path, "transformers")


def test_ours_for_transformers(tmp_path: Path) -> None:
    """A network of a recipe, whose configuration still names the output layers of the language model."""
    network = randomise(head(hidden="tanh", num_outputs=4).eval(), 0.1)
    save_foreign(network, tmp_path, "transformers")
    peer = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    theirs, ours = texts("bert")
    with torch.no_grad():
        assert_near(peer(**theirs).logits, network(**ours))
