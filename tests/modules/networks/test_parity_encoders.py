"""BERT, RoBERTa and DistilBERT of transformers become a BERT and go back, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from parity import assert_near, padded_texts, random_peer
from test_pretrained import edit, edit_weights, to_pickles
from torch import Tensor
from travels import arrive, go_back, gradients

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERT, BERTConfig
from trunkline.modules.networks.bert import bert_trunk
from trunkline.modules.networks.convert.families import foreign_family, save_foreign

SIZES = {
    **{"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 40, "pad_token_id": 0},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
# The positions of a RoBERTa begin after that of its padding, and the numbers of its special tokens are other ones.
OF_ROBERTA = {**SIZES, "max_position_embeddings": 18, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
OF_DISTILBERT = {
    **{"vocab_size": 50, "max_position_embeddings": 16, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    **{"dropout": 0.0, "attention_dropout": 0.0},
}
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pairs": (hf.BertForPreTraining, SIZES),
    "masked": (hf.BertForMaskedLM, SIZES),
    "body": (hf.BertModel, {**SIZES, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "roberta": (hf.RobertaForMaskedLM, OF_ROBERTA),
    "roberta-body": (hf.RobertaModel, OF_ROBERTA),
    "roberta-padding": (hf.RobertaForMaskedLM, {**OF_ROBERTA, "pad_token_id": 3, "max_position_embeddings": 20}),
    "distilbert": (hf.DistilBertForMaskedLM, OF_DISTILBERT),
    "distilbert-body": (hf.DistilBertModel, {**OF_DISTILBERT, "activation": "relu"}),
}


def make_peer(name: str) -> Any:
    return random_peer(*PEERS[name])


def texts(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two texts of 13 tokens, the second padded: inputs of theirs and of ours."""
    tokens, mask = padded_texts(PEERS[name][1].get("pad_token_id", 0))
    theirs = {"input_ids": tokens, "attention_mask": mask.long()}
    if name in ("pairs", "masked", "body"):
        segment = (torch.arange(13) > 6).long().expand(2, 13)
        return theirs | {"token_type_ids": segment}, {"tokens": tokens, "segment": segment, "mask": mask}
    return theirs, {"tokens": tokens, "mask": mask}


def main_output(peer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (2, 13, V) of a model of transformers, or states (2, 13, D) of a body."""
    return peer(**inputs)["prediction_logits" if isinstance(peer, hf.BertForPreTraining) else 0]


@pytest.mark.parametrize("name", PEERS)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    bert = arrive(peer, BERT, tmp_path)
    again = go_back(bert, peer, tmp_path)
    theirs, ours = texts(name)
    with torch.no_grad():
        want, mask = main_output(peer, theirs), ours["mask"]
        assert 0.1 < want.std() < 20
        assert_near(bert(**ours)[mask], want[mask])
        assert torch.equal(main_output(again, theirs), want)
        if name == "pairs":
            logits, follows = bert(**ours, return_next=True, keep=torch.tensor([[3, 7], [0, 8]]))
            assert_near(logits, torch.stack([want[0, [3, 7]], want[1, [0, 8]]]))
            assert_near(follows.flip(1), peer(**theirs).seq_relationship_logits)
        if name in ("body", "roberta-body"):
            assert_near(bert.pool(bert(**ours)), peer(**theirs).pooler_output)


@pytest.mark.parametrize("name", ["masked", "roberta", "roberta-padding", "distilbert"])
def test_padding_on_the_left(name: str, tmp_path: Path) -> None:
    """A RoBERTa counts positions from the first token that is not padding; the others count padding too.

    Without a mask padding is attended to, but still not counted.
    """
    peer = make_peer(name)
    bert = arrive(peer, BERT, tmp_path)
    theirs, ours = ({key: value.flip(1) for key, value in inputs.items()} for inputs in texts(name))
    mask = ours["mask"]
    assert not mask[1, 0]
    with torch.no_grad():
        assert_near(bert(**ours)[mask], main_output(peer, theirs)[mask])
        del ours["mask"], theirs["attention_mask"]
        assert_near(bert(**ours), main_output(peer, theirs))


def test_an_epsilon_that_nothing_reads(tmp_path: Path) -> None:
    peer = make_peer("distilbert")
    peer.save_pretrained(tmp_path)
    edit(layer_norm_eps=0.1)(tmp_path)
    assert BERT.from_pretrained(tmp_path).config.backbone.norm_eps == 1e-12


@pytest.mark.parametrize("name", ["masked", "roberta", "distilbert"])
def test_gradients(name: str, tmp_path: Path) -> None:
    peer = make_peer(name)
    bert = arrive(peer, BERT, tmp_path)
    theirs, ours = texts(name)
    labels = torch.randint(0, 50, (2, 13)).masked_fill(~ours["mask"], -100)
    found = gradients(peer, F.cross_entropy(main_output(peer, theirs).flatten(0, 1), labels.flatten()))
    family = foreign_family(peer.config.to_dict(), "")
    want = family.weights_from(found, bert.config)
    got = gradients(bert, F.cross_entropy(bert(**ours).flatten(0, 1), labels.flatten()))
    assert len(got) == len(list(bert.parameters()))
    padding = 1 if name == "roberta" else 0  # theirs gives the embedding of padding no gradient from its place there
    for key, value in got.items():
        rows = torch.arange(len(value)) != padding if key in ("token_embed.weight", "pos_embed.weight") else slice(None)
        assert_near(value[rows], want[key][rows], 1e-4)


def test_files_of_old(tmp_path: Path) -> None:
    """The first files of BERT call the weights of a norm gamma and beta, repeat the tied output layer, and are such as
    torch wrote before version 1.6.
    """
    peer = make_peer("pairs")
    theirs, ours = texts("pairs")
    peer.save_pretrained(tmp_path)

    def age(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            other = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[other] = weights.pop(name)
        weights["bert.embeddings.position_ids"] = torch.arange(16)
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()

    edit_weights(age)(tmp_path)
    to_pickles(tmp_path, archive=False)
    assert_near(BERT.from_pretrained(tmp_path).eval()(**ours)[ours["mask"]], main_output(peer, theirs)[ours["mask"]])


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("masked", {"hidden_act": "relu"}, "a BERT of transformers with hidden_act=relu cannot be converted"),
        ("body", {"hidden_act": "mish"}, "with hidden_act=mish cannot"),
        ("masked", {"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key cannot"),
        ("masked", {"is_decoder": True}, "is_decoder=True cannot"),
        ("roberta", {"tie_word_embeddings": False}, "a RoBERTa with tie_word_embeddings=False cannot"),
        ("roberta", {"pad_token_id": None}, "a RoBERTa with pad_token_id=None cannot"),
        ("distilbert", {"activation": "relu"}, "a DistilBERT with activation=relu cannot"),
    ],
)
def test_options_that_we_have_not(name: str, option: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_peer(name).save_pretrained(tmp_path)
    edit(**option)(tmp_path)
    with pytest.raises(TrunklineError, match=message):
        BERT.from_pretrained(tmp_path)


def test_a_task_that_we_have_not(tmp_path: Path) -> None:
    hf.BertForMultipleChoice(hf.BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(TrunklineError, match=r"no place in a BERT: 'classifier\.bias'; 'classifier\.weight'"):
        BERT.from_pretrained(tmp_path)


def test_networks_that_no_encoder_can_be(tmp_path: Path) -> None:
    trunk = TransformerConfig(dim=32, depth=1, num_heads=4)
    with pytest.raises(TrunklineError, match=r"become a DistilBERT.*=True cannot become a BERT.*become a RoBERTa"):
        save_foreign(BERT(BERTConfig(50, 16, backbone=trunk)), tmp_path, "transformers")
    pairs = BERTConfig(50, 16, num_segments=0, next_sentence=True, backbone=bert_trunk())
    with torch.device("meta"), pytest.raises(TrunklineError, match="num_segments=0 cannot become a BERT"):
        save_foreign(BERT(pairs), tmp_path, "transformers")


def test_a_body_has_no_pooler_unless_it_says_so() -> None:
    bert = BERT(BERTConfig(50, 16, predicts_tokens=False, backbone=TransformerConfig(dim=32, depth=1, num_heads=4)))
    states = bert(torch.zeros(1, 3, dtype=torch.long))
    assert states.shape == (1, 3, 32)
    with pytest.raises(TrunklineError, match="this BERT has no pooler"):
        bert.pool(states)
    assert bert_trunk().norm_eps == 1e-12
