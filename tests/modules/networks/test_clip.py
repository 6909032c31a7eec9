import math

import pytest
import torch
import torch.nn.functional as F

from trunkline import TrunklineError
from trunkline.modules.backbone import TransformerConfig
from trunkline.modules.networks import CLIP, BERTConfig, CLIPConfig, GPTConfig, ViTConfig

END = 98


def trunk(dim: int = 16, **options: object) -> TransformerConfig:
    return TransformerConfig(**{"dim": dim, "depth": 2, "num_heads": 2, **options})  # type: ignore[arg-type]


def two_towers(**options: object) -> CLIPConfig:
    image = ViTConfig(16, 8, pool="mean", backbone=trunk())
    return CLIPConfig(**{"image": image, "gpt": GPTConfig(99, 8, backbone=trunk(24)), "dim": 12, **options})  # type: ignore[arg-type]


def shared_trunk(**options: object) -> CLIPConfig:
    image = ViTConfig(16, 8, pool="mean", backbone=trunk())
    text = BERTConfig(99, 8, num_segments=0, backbone=trunk())
    return CLIPConfig(**{"image": image, "bert": text, "dim": 12, "share_trunk": True, **options})  # type: ignore[arg-type]


def texts(lengths: list[int], width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens that end with the end-of-text token, and their mask."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, 90, mask.shape)
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return tokens.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("config", [two_towers(), two_towers(text_pool="mean"), shared_trunk(text_pool="cls")])
def test_embeddings(config: CLIPConfig) -> None:
    torch.manual_seed(0)
    network = CLIP(config)
    tokens, mask = texts([4, 8])
    found = network(torch.randn(2, 3, 16, 16), tokens, mask)
    assert found.image.shape == found.text.shape == (2, 12)
    torch.testing.assert_close(torch.stack([x.norm(dim=1) for x in found]), torch.ones(2, 2))
    # Padding changes nothing, and neither does what else is in the batch.
    short = network.encode_text(tokens[:1, :4], mask[:1, :4])
    torch.testing.assert_close(found.text[:1], short, rtol=0, atol=1e-5)
    (found.image[0] @ found.text[0]).backward()
    assert {n for n, p in network.named_parameters() if p.grad is None} == {"scale.logit_scale"}


def test_text_is_read_at_its_end() -> None:
    torch.manual_seed(0)
    network = CLIP(two_towers()).eval()
    tokens, mask = texts([5])
    states = network.text.body.forward_features(tokens).x
    want = F.normalize(network.text.head(states[:, 4]), dim=-1)
    torch.testing.assert_close(network.encode_text(tokens, mask), want, rtol=0, atol=1e-6)


def test_shared_trunk_is_there_once(tmp_path: object) -> None:
    torch.manual_seed(0)
    network = CLIP(shared_trunk())
    assert network.text.body.backbone is network.image.backbone
    apart = CLIP(shared_trunk(share_trunk=False))
    once = sum(p.numel() for p in network.image.backbone.parameters())
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in network.parameters()) == once
    network.save_pretrained(str(tmp_path))
    again = CLIP.from_pretrained(str(tmp_path))
    assert again.text.body.backbone is again.image.backbone
    pixels, (tokens, mask) = torch.randn(2, 3, 16, 16), texts([4, 8])
    torch.testing.assert_close(again.eval()(pixels, tokens, mask), network.eval()(pixels, tokens, mask))


def test_scale() -> None:
    network = CLIP(two_towers(init_logit_scale=4.0, init_logit_bias=-10.0))
    torch.testing.assert_close(network.scale(torch.tensor([0.5])), torch.tensor([math.exp(4.0) * 0.5 - 10]))
    for start, end in ((9.0, 100.0), (-3.0, 1.0)):
        network.scale.logit_scale.data.fill_(start)
        network.scale.clamp()
        assert network.scale.factor.item() == pytest.approx(end)


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"gpt": None}, "needs one body, not none; set either bert or gpt", "bert"),
        (
            {"text_pool": "cls"},
            "reads a GPT's first token, which sees no other token; set text_pool to last",
            "text_pool",
        ),
        ({"dim": 0}, "dim=0 is below 1", "dim"),
        ({"end_token": 99}, "end_token=99 is no token of the text tower, whose vocab_size is 99", "end_token"),
        ({"text_padding": -1}, "text_padding=-1 is no token of the text tower", "text_padding"),
        ({"image_projection": False}, "as wide as the image tower, but dim=12; set dim to 16", "dim"),
        ({"init_logit_scale": 10.0}, r"init_logit_scale=10\.0 is out of range; .* at most 4\.605", "init_logit_scale"),
        ({"share_trunk": True}, r"they differ in dim; make image\.backbone and gpt\.backbone equal", "share_trunk"),
    ],
)
def test_impossible_towers(options: dict[str, object], message: str, field: str) -> None:
    with pytest.raises(TrunklineError, match=message) as caught:
        two_towers(**options)
    assert caught.value.field == f"model.network.{field}"


def test_texts_that_are_too_long() -> None:
    with pytest.raises(TrunklineError, match=r"9 tokens are more than the 8"):
        CLIP(two_towers()).encode_text(torch.zeros(1, 9, dtype=torch.long))
