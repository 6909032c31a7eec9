"""Embeddings for another vocabulary, and learned positions of another length; values worked out by hand."""

import pytest
import torch
from torch import nn

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import BERT, GPT, BERTConfig, GPTConfig, SpeechEncoder, SpeechEncoderConfig
from trunkline.modules.networks.resizing import SharedWords, resize_positions_of_text
from trunkline.modules.training.warm_start import load_matching

TRUNK = TransformerConfig(dim=4, depth=1, num_heads=1)
OLD = {"a": 0, "b": 1, "c": 2}


def test_tokens_are_matched_by_their_text() -> None:
    words = SharedWords.of(OLD, {"c": 0, "new": 1, "a": 2, "z": 3})
    weight = torch.tensor([[1.0, 10], [2, 20], [6, 60], [500, 500]])  # the last row is no token's
    mean = [3.0, 30.0]
    assert not words.same_ids
    assert (len(words.here), words.new, words.old) == (2, 4, 3)
    assert words.rows(weight, 5).tolist() == [[6, 60], mean, [1, 10], mean, mean]
    blank = torch.cat((weight[:3], torch.tensor([[7.0, 7]])))
    assert words.rows(blank, 5, extra=1).tolist() == [[6, 60], mean, [1, 10], mean, [7, 7]]


@pytest.mark.parametrize(
    ("new", "same"),
    [
        (OLD, True),
        (OLD | {"d": 3}, True),  # a token was added at the end
        ({"a": 0, "c": 2}, True),  # one was left out
        ({"b": 0, "a": 1, "c": 2}, False),
        ({"a": 0, "b": 1, "d": 2}, False),  # of equal size, and another word for one id
        ({"d": 0}, False),
    ],
)
def test_which_vocabularies_have_the_same_ids(new: dict[str, int], same: bool) -> None:
    assert SharedWords.of(OLD, new).same_ids is same


def test_rows_that_fill_up_are_kept_or_cut() -> None:
    words, weight = SharedWords.of(OLD, OLD), torch.arange(10.0).reshape(5, 2)
    assert words.rows(weight, 5) is weight
    assert torch.equal(words.rows(weight, 3), weight[:3])
    assert torch.equal(words.rows(weight, 7), torch.cat((weight, weight[:3].mean(0).expand(2, 2))))


@pytest.mark.parametrize(
    ("length", "first", "want"),
    [(3, 0, [0, 1, 2]), (9, 0, [0, 1, 2, 3, 0, 1, 2, 3, 0]), (3, 1, [0, 1, 2]), (8, 1, [0, 1, 2, 3, 1, 2, 3, 1])],
)
def test_positions_follow_again_and_again(length: int, first: int, want: list[int]) -> None:
    table = nn.Embedding.from_pretrained(torch.arange(4.0)[:, None], freeze=False)
    resize_positions_of_text(table, length, first)
    assert table.weight.flatten().tolist() == want
    assert table.num_embeddings == length
    assert table.weight.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt_for_other_words_and_longer_rows(tied: bool) -> None:
    source = GPT(GPTConfig(3, 4, tie_embeddings=tied, backbone=TRUNK))
    own = GPT(GPTConfig(6, 6, tie_embeddings=tied, backbone=TRUNK))
    embedding, output = source.token_embed.weight.detach().clone(), source.head.weight.detach().clone()
    words = {"tokenizer": SharedWords.of(OLD, {"c": 4, "a": 1, "x": 0})}
    taken = load_matching(own, source, "file", words=words)
    assert taken.resized == ["positions 4 to 6", "vocabulary 3 to 6 (2 of 3 tokens known)"]
    for before, after in ((embedding, own.token_embed.weight), (output, own.head.weight)):
        want = before.mean(0).repeat(6, 1)
        want[4], want[1] = before[2], before[0]
        torch.testing.assert_close(after, want)
    assert (own.head.weight is own.token_embed.weight) is tied
    assert own(torch.arange(6)[None]).shape == (1, 6, 6)


def test_a_bert_has_rows_and_biases_of_its_words() -> None:
    """Its output layer is tied to the embedding: a mismatch must not leave both untrained without a word."""
    source, own = BERT(BERTConfig(3, 4, backbone=TRUNK)), BERT(BERTConfig(4, 4, backbone=TRUNK))
    nn.init.normal_(source.head.bias)
    message = r"token_embed\.weight is \(3, 4\) there and \(4, 4\) here.*set network\.vocab_size to 3; tokens can be"
    with pytest.raises(TrunklineError, match=message):
        load_matching(own, source, "file")
    words = {"tokenizer": SharedWords.of(OLD, {"b": 0, "a": 1, "x": 2, "c": 3})}
    load_matching(own, source, "file", words=words)
    bias = source.head.bias
    torch.testing.assert_close(own.head.bias, torch.stack((bias[1], bias[0], bias.mean(), bias[2])))
    assert torch.equal(own.token_embed.weight[[1, 0, 3]], source.token_embed.weight)


def test_the_blank_of_ctc_stays_the_last() -> None:
    sizes = {"num_mels": 4, "max_frames": 16, "backbone": TRUNK}
    source, own = (SpeechEncoder(SpeechEncoderConfig(size, **sizes)) for size in (3, 4))  # type: ignore[arg-type]
    words = {"tokenizer": SharedWords.of(OLD, {"b": 0, "x": 1, "a": 2, "c": 3})}
    load_matching(own, source, "file", words=words)
    assert torch.equal(own.head.weight[[2, 0, 3, 4]], source.head.weight)


def test_positions_before_the_first_token_stay() -> None:
    source, own = (BERT(BERTConfig(3, length, first_position=2, backbone=TRUNK)) for length in (3, 5))
    assert own.adapt(source) == ["positions 3 to 5"]
    load_matching(own, source, "file")
    assert own.pos_embed is not None
    assert torch.equal(own.pos_embed.weight[[2, 3, 4]], own.pos_embed.weight[[5, 6, 4]])


def test_an_output_that_is_tied_here_alone_is_refused() -> None:
    source, own = (GPT(GPTConfig(3, 4, tie_embeddings=tied, backbone=TRUNK)) for tied in (False, True))
    with pytest.raises(TrunklineError, match=r"differ there and are one here.*set network\.tie_embeddings to False"):
        load_matching(own, source, "file")


def test_a_vocabulary_with_more_tokens_than_rows_is_refused() -> None:
    source, own = (GPT(GPTConfig(2, 4, backbone=TRUNK)) for _ in range(2))
    with pytest.raises(
        TrunklineError, match=r"of init_from file has 3 tokens, but its token_embed\.weight only 2 rows"
    ):
        load_matching(own, source, "file", words={"tokenizer": SharedWords.of(OLD, OLD)})
