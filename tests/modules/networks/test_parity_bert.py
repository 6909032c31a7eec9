"""Parity of the BERT with transformers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_near, randomise
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERT, BERTConfig
from trunkline.modules.networks.convert import bert_from_transformers


def bert_pair(next_sentence: bool) -> tuple[Any, BERT, dict[str, Tensor]]:
    """A small BERT of transformers with random weights, ours after conversion, and two padded pairs of texts.

    Without token 0, whose embedding gets no gradient there.
    """
    sizes = {"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 32, "num_hidden_layers": 3}
    more = {"num_attention_heads": 4, "intermediate_size": 40, "hidden_dropout_prob": 0.0}
    kind = BertForPreTraining if next_sentence else BertForMaskedLM
    peer: Any = kind(BertConfig(**sizes, **more, attention_probs_dropout_prob=0.0))
    randomise(peer.eval(), 0.1)
    trunk = {"dim": 32, "depth": 3, "num_heads": 4, "mlp_dim": 40, "norm_eps": 1e-12}
    backbone = TransformerConfig(**trunk, norm_first=False, final_norm=False)
    bert = BERT(BERTConfig(50, 16, next_sentence=next_sentence, backbone=backbone)).eval()
    bert.load_state_dict(bert_from_transformers(peer.state_dict()))
    tokens, segment = torch.randint(1, 50, (2, 14)), (torch.arange(14) > 6).long().expand(2, 14)
    mask = torch.arange(14) < torch.tensor([[14], [9]])
    return peer, bert, {"tokens": tokens, "segment": segment, "mask": mask}


@pytest.mark.parametrize("next_sentence", [False, True])
@torch.no_grad()
def test_bert_against_transformers(next_sentence: bool) -> None:
    peer, bert, batch = bert_pair(next_sentence)
    mask = batch["mask"]
    theirs = peer(batch["tokens"], attention_mask=mask.long(), token_type_ids=batch["segment"])
    want = theirs.prediction_logits if next_sentence else theirs.logits
    assert 0.2 < want.std() < 20
    assert_near(bert(**batch)[mask], want[mask])
    keep = torch.tensor([[3, 7], [0, 8]])
    assert_near(bert(**batch, keep=keep), torch.stack([want[0, [3, 7]], want[1, [0, 8]]]))
    if next_sentence:
        logits, follows = bert(**batch, keep=keep, return_next=True)
        assert_near(follows.flip(1), theirs.seq_relationship_logits)
        assert_near(logits, bert(**batch, keep=keep))


def test_bert_gradients_against_transformers() -> None:
    peer, bert, batch = bert_pair(next_sentence=False)
    labels = torch.randint(0, 50, (2, 14)).masked_fill(~batch["mask"], -100)
    theirs = {"attention_mask": batch["mask"].long(), "token_type_ids": batch["segment"], "labels": labels}
    peer(batch["tokens"], **theirs).loss.backward()
    F.cross_entropy(bert(**batch).flatten(0, 1), labels.flatten()).backward()
    grads = {name: p.grad for name, p in peer.named_parameters()}
    want = bert_from_transformers(grads)
    for name, p in bert.named_parameters():
        assert p.grad is not None
        assert_near(p.grad, want[name])
